"""Where the figures of a run are shown besides metrics.jsonl: TensorBoard and Weights & Biases, by --log.

check_trackers needs neither torch nor a network, so that a run that could not be logged ends before anything slow.
"""

import importlib.util
import json
import netrc
import os
import secrets
import sys
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from drdpo.cli import as_dict
from drdpo.config import TrainConfig
from drdpo.display import one_line
from drdpo.errors import DataError, ProcessError, UsageError
from drdpo.folder import atomic_file, read_json_object

WANDB_ID = "wandb.json"
"""{id, project}: the run of this folder. Never a key."""

WANDB_PIN = "wandb==0.31.0"
"""What the tracker was written for; outside the locks, as it is optional."""

Metrics = dict[str, float]

_OFFLINE = ("offline", "dryrun")
_PROJECT = "drdpo"
_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")
"""wandb's public server: the name under which WANDB_PIN looks for a key, and the older one, which it tries next."""


class Tracker(Protocol):
    """A place that figures go to, on rank 0."""

    def write(self, metrics: Metrics) -> None:
        """Add one step."""

    def close(self) -> None:
        """Hand over what is left."""


def grouped(metrics: Metrics) -> Metrics:
    """{train/loss: .., eval/loss: ..} of a line of metrics.jsonl, without its step."""
    return {
        f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in metrics.items()
        if name != "step"
    }


def check_trackers(config: TrainConfig) -> None:
    """Refuse --log=wandb where it could not work: wandb itself would ask for a key, and wait.

    Raises:
        UsageError: the package is missing, it is told to record nothing, or it is online and has no key.
    """
    if "wandb" not in config.trackers:
        return
    if importlib.util.find_spec("wandb") is None:
        raise UsageError(
            "--log=wandb needs the package wandb, which is not installed; run: python -m pip install "
            f"{WANDB_PIN}, or leave wandb out of --log"
        )
    mode = _wandb_mode()
    if mode == "disabled":
        raise UsageError("--log=wandb with WANDB_MODE=disabled would record nothing; unset it, or leave wandb out of --log")
    if mode not in _OFFLINE and not _has_wandb_key():
        raise UsageError(
            "--log=wandb has no key: run `wandb login` or set WANDB_API_KEY; or set WANDB_MODE=offline, which logs into "
            "--save_path for a later `wandb sync`"
        )


def start_trackers(config: TrainConfig, folder: Path, kept: list[Metrics], logged: int) -> list[Tracker]:
    """Open what --log names, so that it goes on after the steps that the run has behind it; rank 0 only.

    Args:
        config: of the run.
        folder: save_path.
        kept: the lines of metrics.jsonl of the steps behind it.
        logged: steps that an earlier start has logged; those beyond `kept` will be done again.

    Raises:
        ProcessError: Weights & Biases cannot be reached, or refuses the key.
    """
    trackers: list[Tracker] = []
    for name in config.trackers:
        trackers.append(TensorBoard(folder, len(kept)) if name == "tensorboard" else Wandb(config, folder, kept, logged))
    return trackers


class TensorBoard:
    """Event files in save_path/tensorboard."""

    def __init__(self, folder: Path, done: int) -> None:
        """Go on after `done` steps: what an earlier start wrote of later ones is purged, as it is written again."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, metrics: Metrics) -> None:
        for name, value in grouped(metrics).items():
            self._writer.add_scalar(name, value, int(metrics["step"]))
        # At once, or a kill would lose steps that the saved state counts as done.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """One run of Weights & Biases per folder; WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_MODE are heeded.

    Its own files are in save_path/wandb. The key stays where wandb keeps it.
    """

    def __init__(self, config: TrainConfig, folder: Path, kept: list[Metrics], logged: int) -> None:
        import wandb

        self._folder = folder
        self._lost = False
        run = _wandb_identity(folder)
        try:
            self._run: Any = wandb.init(
                project=run["project"], id=run["id"], resume="allow", dir=str(folder), config=as_dict(config),
                name=os.environ.get("WANDB_NAME") or folder.resolve().name,
                # Neither source nor output of the program leaves this machine; no prompt, no endless wait.
                settings=wandb.Settings(console="off", disable_git=True, save_code=False, login_timeout=1, init_timeout=120,
                                        finish_timeout=300, silent=True),
            )  # fmt: skip
        except Exception as error:  # Of wandb's own kinds, which differ from version to version.
            raise ProcessError(
                f"--log=wandb could not start: {one_line(str(error), 300)}; set WANDB_MODE=offline, or leave wandb out of "
                "--log"
            ) from error
        # A server knows what it has of the run. Offline nobody tells, and what was written once will be sent once.
        offline = _wandb_mode() in _OFFLINE
        self._next = logged + 1 if offline and run["resumed"] else int(self._run.step)
        for metrics in kept:
            self.write(metrics)

    def write(self, metrics: Metrics) -> None:
        step = int(metrics["step"])
        if step < self._next or self._lost:
            return
        try:
            self._run.log(grouped(metrics), step=step)
        except Exception as error:
            # Such as wandb's own process having been killed. Training goes on; metrics.jsonl has the figures.
            self._lost = True
            print(f"warning: wandb takes no more figures ({one_line(str(error), 200)}); metrics.jsonl goes on",
                  file=sys.stderr, flush=True)  # fmt: skip

    def close(self) -> None:
        # A run that ends by an exception is shown as failed.
        try:
            self._run.finish(exit_code=int(sys.exc_info()[0] is not None))
        except Exception as error:
            # The model is trained and metrics.jsonl is whole: that wandb has gone must not end the run.
            print(f"warning: wandb did not take the last figures ({one_line(str(error), 200)}); they are in "
                  f"{self._folder / 'wandb'}: wandb sync", file=sys.stderr, flush=True)  # fmt: skip


def _wandb_identity(folder: Path) -> dict[str, Any]:
    """{id, project, resumed} of the folder's run; a new one is written down before anything is sent."""
    path = folder / WANDB_ID
    if path.is_file():
        known = read_json_object(path)
        if not isinstance(known.get("id"), str) or not isinstance(known.get("project"), str):
            raise DataError(f'{path}: fields "id" and "project" must be texts; delete it to begin a new wandb run')
        return {"id": known["id"], "project": known["project"], "resumed": True}
    made = {
        "id": os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4),
        "project": os.environ.get("WANDB_PROJECT") or _PROJECT,
    }
    with atomic_file(path) as stream:
        json.dump(made, stream)
    return {**made, "resumed": False}


def _wandb_mode() -> str:
    return os.environ.get("WANDB_MODE", "online").strip().lower()


def _has_wandb_key() -> bool:
    """Would wandb find a key without asking? In its variables, or where `wandb login` puts it: the netrc file."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    # With its port, as wandb names a machine.
    given = urlsplit(os.environ.get("WANDB_BASE_URL") or "").netloc
    hosts = _HOSTS if given in ("", _HOSTS[0]) else (given,)
    named = os.environ.get("NETRC")
    for path in [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            known = netrc.netrc(path)
        except (OSError, netrc.NetrcParseError):
            continue
        # As wandb reads it: an entry `default` serves every host.
        if any(found[2] for host in hosts if (found := known.authenticators(host))):
            return True
    return False

"""TensorBoard, Weights & Biases and Trackio, which get what metrics.jsonl gets; one that fails never ends a run."""

import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drdpo import distributed
from drdpo.errors import UsageError, one_line
from drdpo.folder import atomic_file, read_json_object

DASHBOARD = "dashboard.json"
"""{id, project} of the folder's run on wandb and Trackio. Never a key."""
PINS = {"wandb": "wandb==0.31.0", "trackio": "trackio==0.43.0"}
"""Oldest versions that work. They are optional, so they are not in the locks."""
_OFFLINE = ("offline", "dryrun")


class Tracker:
    """One tracker of a run, which has every step once: a resumed run continues there."""

    def __init__(self, name: str, folder: Path, flags: dict[str, Any], kept: list[dict[str, float]], logged: int) -> None:
        """`kept`: metrics.jsonl's lines of the finished steps; `logged`: steps that an earlier start has sent."""
        self._name, self._lost, self._next = name, False, len(kept) + 1
        self._log: Callable[[dict[str, float], int], Any]
        self._finish: Callable[[], Any]
        self._keep_running(lambda: getattr(self, f"_{name}")(folder, flags, logged))
        for metrics in kept:
            self.write(metrics)

    def write(self, metrics: dict[str, float]) -> None:
        """Log a line of metrics.jsonl, as train/loss and eval/loss, unless an earlier start has."""
        step = int(metrics["step"])
        named = {f"train/{name}".replace("train/eval_", "eval/"): value for name, value in metrics.items() if name != "step"}
        if step >= self._next:
            self._keep_running(lambda: self._log(named, step))

    def close(self) -> None:
        """End it."""
        self._keep_running(lambda: self._finish())

    def _tensorboard(self, folder: Path, flags: dict[str, Any], logged: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=self._next)

        def log(named: dict[str, float], step: int) -> None:
            for name, value in named.items():
                writer.add_scalar(name, value, step)
            writer.flush()  # or a kill would lose steps that the saved state counts as finished

        self._log, self._finish = log, writer.close

    def _wandb(self, folder: Path, flags: dict[str, Any], logged: int) -> None:
        import wandb

        known, resumed = _identity(folder)
        # Neither source nor output of the program leaves this machine; no prompt, no endless wait.
        limits = {"login_timeout": 1, "init_timeout": 120, "finish_timeout": 300}
        settings = wandb.Settings(console="off", disable_git=True, save_code=False, silent=True, **limits)
        name = os.environ.get("WANDB_NAME") or folder.resolve().name
        run = wandb.init(**known, name=name, resume="allow", dir=str(folder), config=flags, settings=settings)
        # The server knows its last step. Offline there is none.
        self._next = logged + 1 if _mode() in _OFFLINE and resumed else int(run.step)
        # A run that ends by an exception is shown as failed.
        self._finish = lambda: run.finish(exit_code=int(sys.exc_info()[0] is not None))
        self._log = lambda named, step: run.log(named, step=step)

    def _trackio(self, folder: Path, flags: dict[str, Any], logged: int) -> None:
        import trackio

        known, resumed = _identity(folder)
        name, quiet = f"{folder.resolve().name}-{known['id']}", {"auto_log_gpu": False, "auto_log_cpu": False}
        run = trackio.init(known["project"], name, resume="allow", config=flags, **quiet)
        self._next = logged + 1 if resumed else 1
        self._log, self._finish = lambda named, step: run.log(named, step=step), trackio.finish

    def _keep_running(self, send: Callable[[], Any]) -> None:
        try:
            if not self._lost:
                send()
        except Exception as error:  # Of the trackers' own kinds, which differ from version to version.
            self._lost = True
            print(f"warning: {self._name} failed ({one_line(str(error), 200)}); continuing without it", file=sys.stderr)


def check_trackers(trackers: list[str]) -> None:
    """Raise UsageError for a tracker of --log that could not work: not installed, or wandb without a key or disabled."""
    asked = [name for name in PINS if name in trackers] if distributed.is_main() else []
    for name in asked:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--log={name}: not installed; run: python -m pip install {PINS[name]}, or omit it")
    if "wandb" in asked and _mode() == "disabled":
        raise UsageError("--log=wandb with WANDB_MODE=disabled would record nothing; unset it, or remove wandb from --log")
    if "wandb" in asked and _mode() not in _OFFLINE:
        import wandb

        if not wandb.login(prompt=False, verify=False):  # it would ask and wait
            raise UsageError("--log=wandb has no key: run `wandb login` or set WANDB_API_KEY; or set WANDB_MODE=offline")


def _mode() -> str:
    return os.environ.get("WANDB_MODE", "").strip().lower()


def _identity(folder: Path) -> tuple[dict[str, str], bool]:
    """{id, project} of the folder's run, and whether an earlier start made them; new ones are written at once."""
    path = folder / DASHBOARD
    if path.is_file():
        return {name: str(read_json_object(path)[name]) for name in ("id", "project")}, True
    made = {"id": os.getenv("WANDB_RUN_ID") or secrets.token_hex(4), "project": os.getenv("WANDB_PROJECT") or "drdpo"}
    with atomic_file(path) as stream:
        json.dump(made, stream)
    return made, False

"""The state of a training folder, read from manifest.json, metrics.jsonl, .lock and resume/ while the run may write them."""

import fcntl
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from drdpo.files import whole_lines
from drdpo.manifest import read_manifest

LOCK = ".lock"
RECENT = 20
"""Steps that the speed is the median of."""


@dataclass(frozen=True)
class Owner:
    """Who holds a folder's lock."""

    pid: int | None
    host: str | None
    started: str | None


@dataclass(frozen=True)
class TrainingState:
    """What is known of a training run; a part is None where its files do not say."""

    method: str | None
    made_by: dict[str, Any]
    """Flags and fingerprints of the manifest."""
    rows: list[dict[str, float]]
    """The whole lines of metrics.jsonl in the order of the steps, finite figures only."""
    torn: bool
    """Does metrics.jsonl go on after the last whole line?"""
    steps: int | None
    """Of the whole run."""
    complete: bool
    owner: Owner | None
    """Of the lock, while a process holds it."""
    saved: int | None
    """Steps behind the newest state in resume/."""
    checkpoints: list[str]
    idle_seconds: float | None
    """Since the last line of metrics.jsonl."""

    @property
    def done(self) -> int:
        """Optimizer steps in metrics.jsonl."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def step_seconds(self) -> float | None:
        """Median time of the last steps, without evaluation and saving."""
        batch = self.made_by.get("train_batch_size")
        speeds = [row["pairs_per_second"] for row in self.rows[-RECENT:] if row.get("pairs_per_second", 0) > 0]
        return batch / median(speeds) if isinstance(batch, int) and speeds else None


def is_training(folder: Path, manifest: dict[str, Any]) -> bool:
    """Does the folder hold a training run?"""
    return "train" in manifest or (folder / "metrics.jsonl").is_file()


def read_training(folder: Path) -> TrainingState:
    """Read a training folder; nothing in it is touched.

    Raises:
        DataError: manifest.json is not a JSON object.
    """
    record = _object(read_manifest(folder).get("train"))
    made_by = _object(record.get("made_by"))
    path = folder / "metrics.jsonl"
    rows, torn = _read_rows(path) if path.is_file() else ([], False)
    steps = record.get("steps")
    return TrainingState(
        method=_method(made_by),
        made_by=made_by,
        rows=rows,
        torn=torn,
        steps=steps if isinstance(steps, int) else None,
        complete=record.get("complete") is True,
        owner=lock_owner(folder),
        saved=max(_numbers(folder / "resume", "step_*", "state.json"), default=None),
        checkpoints=[f"global_step_{n}" for n in _numbers(folder, "global_step_*", "*config.json")],
        idle_seconds=max(0.0, time.time() - path.stat().st_mtime) if rows else None,
    )


def lock_owner(folder: Path) -> Owner | None:
    """Who holds a folder's lock (flock(2), see drdpo.lock), or None. The kernel drops a dead process's lock."""
    try:
        with (folder / LOCK).open("rb") as stream:
            try:
                # Shared, and for an instant: it asks, it does not take.
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                text = stream.read(4096)
    except OSError:
        return None
    try:
        told = json.loads(text)
    except ValueError:
        told = {}
    told = told if isinstance(told, dict) else {}
    pid, host, started = (told.get(name) for name in ("pid", "host", "started"))
    return Owner(pid if isinstance(pid, int) else None, *(str(v) if v else None for v in (host, started)))


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_rows(path: Path) -> tuple[list[dict[str, float]], bool]:
    by_step: dict[int, dict[str, float]] = {}
    end = 0
    for place, line in whole_lines(path):
        end = place
        row = {name: float(value) for name, value in line.items() if _is_figure(value)}
        if "step" in row:
            by_step[int(row["step"])] = row
    with path.open("rb") as stream:
        if by_step:
            stream.seek(end)
            stream.readline()
        torn = bool(stream.read(1))
    return [by_step[step] for step in sorted(by_step)], torn


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)


def _method(made_by: dict[str, Any]) -> str | None:
    if not made_by:
        return None
    for flag, name in (("kldpo_tau", "KLDPO"), ("wdpo_rho", "WDPO"), ("drdpo_beta", "Dr. DPO")):
        if made_by.get(flag) is not None:
            return f"{name} --{flag}={made_by[flag]}"
    return str(made_by.get("method", "DPO"))


def _numbers(folder: Path, pattern: str, inside: str) -> list[int]:
    """n of every whole <name>_<n>, in order."""
    names = [path.name.rpartition("_")[2] for path in folder.glob(pattern) if any(path.glob(inside))]
    return sorted(int(name) for name in names if name.isdigit())

"""Which DeepSpeed state in save_path/resume is the newest complete one. Needs no torch, so that a check is quick."""

import json
import shutil
from pathlib import Path
from typing import Any

from drdpo import distributed
from drdpo.errors import DataError, UsageError
from drdpo.files import atomic_file, read_json_object


def write_newest(folder: Path, newest: dict[str, Any]) -> None:
    """Name the newest state {step, world_size, tag}: it counts from now on; one that was cut short never does."""
    with atomic_file(folder / "newest.json") as stream:
        json.dump(newest, stream)


def read_newest(folder: Path) -> dict[str, Any] | None:
    """{step, world_size, tag} of the newest complete state in save_path/resume, or None where there is none.

    Raises:
        DataError: the state that it names is not there.
    """
    path = folder / "newest.json"
    if not path.is_file():
        return None
    newest = read_json_object(path)
    if not (folder / newest["tag"]).is_dir():
        raise DataError(f"{path} names {newest['tag']}, which is not there; start anew with --resume=never")
    return newest


def check_world(folder: Path) -> None:
    """Raise UsageError when another number of processes wrote the state in save_path/resume."""
    newest = read_newest(folder)
    if newest and newest["world_size"] != distributed.world_size():
        raise UsageError(
            f"{folder} was written by {newest['world_size']} processes and cannot be resumed by "
            f"{distributed.world_size()}; use as many, or start anew with --resume=never"
        )


def keep_only(folder: Path, tag: str) -> None:
    """Remove every state in save_path/resume but one: those before it, and what a save that was cut short left."""
    for other in folder.glob("step_*"):
        if other.name != tag:
            shutil.rmtree(other)

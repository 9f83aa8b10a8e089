"""Which DeepSpeed states in save_path/resume are complete, newest first. Needs no torch, so that a check is quick.

A state is a folder step_<n> with an index of its own files, state.json: {step, world_size, files: {name: {size, sha256}}}.
It is written under another name, with the index last, flushed to disk and only then renamed; so a save that was cut short is
never taken for a state, and one whose files were cut or changed later is recognised.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drdpo import distributed
from drdpo.errors import DataError, UsageError
from drdpo.folder import LOCK, atomic_file, read_json_object, remove_tree

INDEX = "state.json"


@dataclass(frozen=True)
class State:
    """A state as its index describes it."""

    folder: Path
    step: int
    """Optimizer steps done."""
    world_size: int
    files: dict[str, dict[str, Any]]
    """Size in bytes and sha256 of every file by name."""


def write_index(folder: Path, step: int, world_size: int, files: dict[str, dict[str, Any]]) -> None:
    """Describe a state whose files are all written."""
    with atomic_file(folder / INDEX) as stream:
        json.dump({"step": step, "world_size": world_size, "files": files}, stream, indent=1)


def describe(path: Path) -> dict[str, Any]:
    """{size, sha256} of a file."""
    with path.open("rb") as stream:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def states(folder: Path) -> tuple[list[State], list[str]]:
    """The states in save_path/resume whose files have their sizes, newest first; and what is wrong with others.

    Contents are compared by `damage`, as reading them takes long.
    """
    found, torn = [], []
    places = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    for place in sorted(places, key=lambda path: int(path.name.removeprefix("step_")), reverse=True):
        try:
            index = read_json_object(place / INDEX)
            state = State(place, int(index["step"]), int(index["world_size"]), dict(index["files"]))
            wrong = next((text for name in state.files if (text := _wrong_size(state, name))), None)
        except (OSError, DataError, KeyError, TypeError, ValueError):
            state, wrong = None, f"{place / INDEX} is missing or not readable"
        if state is None or wrong:
            torn.append(str(wrong))
        else:
            found.append(state)
    return found, torn


def damage(state: State, names: list[str]) -> str | None:
    """What is wrong with the contents of some of a state's files, or None."""
    for name in names:
        try:
            same = describe(state.folder / name)["sha256"] == state.files[name]["sha256"]
        except (OSError, KeyError, TypeError):
            same = False
        if not same:
            return f"{state.folder / name} does not hold what was written"
    return None


def _wrong_size(state: State, name: str) -> str | None:
    path, size = state.folder / name, state.files[name]["size"]
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != size:
        return f"{path} has {path.stat().st_size} bytes, not {size}"
    return None


def check_world(folder: Path) -> None:
    """Raise UsageError when another number of processes wrote the state in save_path/resume that would be continued."""
    newest = next(iter(states(folder)[0]), None)
    if newest and newest.world_size != distributed.world_size():
        raise UsageError(
            f"{folder} was written by {newest.world_size} processes and cannot be resumed by "
            f"{distributed.world_size()}; use as many, or start anew with --resume=never"
        )


def check_owner(place: Path) -> None:
    """Refuse a state that somebody else put there: DeepSpeed unpickles it, and a pickle can run any code as who reads it.

    Its owner must be this user, the superuser, or whoever a file that this process makes belongs to, as the run's lock: NFS
    may hand the superuser's files to nobody.

    Args:
        place: save_path/resume/step_<n>.

    Raises:
        UsageError: somebody else owns it, or a file in it.
    """
    lock = place.parent.parent / LOCK
    trusted = {os.getuid(), 0, *([lock.stat().st_uid] if lock.is_file() else [])}
    for path in [place, *place.iterdir()]:
        owner = path.stat().st_uid
        if owner not in trusted:
            raise UsageError(
                f"{path} belongs to user {owner}, and loading it could run that user's code as yours; take it over with "
                "chown if you trust it, or start anew with --resume=never"
            )


def keep_only(folder: Path, kept: list[State]) -> None:
    """Remove every state in save_path/resume but these, and what saves that were cut short left."""
    for other in [*folder.glob("step_*"), *folder.glob(".step_*")]:
        if other not in [state.folder for state in kept]:
            remove_tree(other)

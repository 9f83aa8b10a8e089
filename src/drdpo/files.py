"""Files and folders that appear whole or not at all."""

import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from drdpo.errors import DataError

_ASIDE = re.compile(r"\..+\.[a-z0-9_]{8}\.(tmp|old)")
"""The names that this module gives what is not whole yet, or no longer wanted."""


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        DataError: the file is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value


def whole_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(Place, content) of every line of JSON objects that were appended, up to the first that a killed process cut."""
    with path.open("rb") as stream:
        offset = 0
        for line in stream:
            try:
                content = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                content = None
            if not isinstance(content, dict):
                return
            yield offset, content
            offset += len(line)


@contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file beside `path`; on success flush it to disk and move it into place, on any error remove it.

    Raises:
        OSError: with `filename` set to `path`, when the disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    aside = Path(name)
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
        flush(path.parent)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def atomic_files(*paths: Path) -> Iterator[list[Path]]:
    """Yield one path beside each of `paths`, to be written; on success all move into place, on any error none does."""
    asides: list[Path] = []
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
            os.close(handle)
            asides.append(Path(name))
        yield asides
        for aside, path in zip(asides, paths, strict=True):
            os.chmod(aside, 0o666 & ~_umask())
            os.replace(aside, path)
    except BaseException as error:
        for aside in asides:
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(error.filename2 or paths[0].parent)) from error
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success flush it to disk and let it take the place of `path`, on any error
    remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield aside
        os.chmod(aside, 0o777 & ~_umask())
        for place in [*aside.rglob("*"), aside]:
            flush(place)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
            os.replace(path, old / path.name)
            os.replace(aside, path)
            shutil.rmtree(old)
        else:
            os.replace(aside, path)
        flush(path.parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def remove_tree(folder: Path) -> None:
    """Remove a folder that nobody needs. What cannot be removed is told of, and left: NFS keeps files that are open."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        print(f"warning: {folder} could not be removed ({error.strerror}); remove it by hand", file=sys.stderr)


def sweep(folder: Path) -> None:
    """Remove what writers of this module that were killed left in a folder; only for the holder of its lock."""
    for left in [path for path in folder.iterdir() if _ASIDE.fullmatch(path.name)]:
        remove_tree(left) if left.is_dir() else left.unlink()


def flush(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk before going on: a power cut loses neither."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot flush a folder; they write names at once.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

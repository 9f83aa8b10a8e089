"""One writer a folder: a lock that the kernel drops when its owner dies, however it dies.

flock(2) on <folder>/.lock. On NFS it holds between hosts since Linux 2.6.12 with NFSv4, unless mounted with local_lock.
The owner removes the file when it ends; one that was killed leaves it, and it then locks nothing.
"""

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from drdpo import distributed
from drdpo.errors import UsageError

NAME = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks answers."""
_PATIENCE = 1.0
"""Seconds to wait for a lock: owner_of holds it for an instant."""


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
    path = folder / NAME
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
        handle = os.open(folder / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        # No lock yet, or a folder that cannot be read: the run itself will say so.
        return None
    try:
        # Shared, and for an instant: it asks, it does not take.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(folder / NAME)
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
    try:
        # NFS keeps a removed file under another name, which filelock cannot see.
        if not os.path.samestat(os.fstat(handle), path.stat()):
            raise UsageError(f"{path.parent} was released by another run at this moment; run the command again")
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode(), 0)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_bytes())
        return f"process {owner['pid']} on {owner['host']} ({owner['command']}), since {owner['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _refusal(owner: str, folder: Path) -> str:
    return f"{folder} is locked by {owner}; wait, stop that process, or choose another folder"

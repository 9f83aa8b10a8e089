"""A folder that one run at a time may write into: a lock that the kernel drops when its owner dies, however it dies.

flock(2) on <folder>/.lock. On NFS it holds between hosts since Linux 2.6.12 with NFSv4, unless mounted with local_lock.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from drdpo.errors import UsageError

NAME = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks answers."""
_PATIENCE = 1.0
"""Seconds that a lock is asked for: refuse_if_locked holds it for an instant."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; the file stays behind, empty.

    Args:
        folder: is made where it is not there.

    Raises:
        UsageError: another process holds it; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Without O_TRUNC: it may be another's.
    handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _take(handle, folder)
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode(), 0)
        yield
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def refuse_if_locked(folder: Path) -> None:
    """Raise UsageError, which names the owner, where another process holds a folder's lock. Writes nothing."""
    try:
        handle = os.open(folder / NAME, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        # No lock yet, or a folder that cannot be written: the run itself will say so.
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(_refusal(handle, folder)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(handle)


def _take(handle: int, folder: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UsageError(_refusal(handle, folder)) from None
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(f"warning: {folder}: its file system has no locks, so nothing stops a second run there", file=sys.stderr)
            return


def _refusal(handle: int, folder: Path) -> str:
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        who = f"process {owner['pid']} on {owner['host']}, since {owner['started']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return f"{folder} is being written by {who}; wait for it, end it, or give another folder"

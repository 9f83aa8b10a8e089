"""One writer a folder: the second is refused and told by whom, until the first is gone, however it went."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading

import pytest

from drdpo.errors import UsageError
from drdpo.lock import lock_folder, refuse_if_locked

HOLD = (
    "import sys; from drdpo.lock import *\nwith lock_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def owner(root, tmp_path):
    """Another process that holds the lock."""
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
    )  # fmt: skip
    assert owner.stdout.readline() == "held\n"
    yield owner
    owner.kill()
    owner.wait()


def test_the_second_is_refused_and_told_by_whom(owner, tmp_path):
    words = rf"out is locked by process {owner.pid} on .+ \(-c .+\), since 20\d\d-"
    with pytest.raises(UsageError, match=words), lock_folder(tmp_path / "out"):
        pytest.fail("two writers")
    with pytest.raises(UsageError, match=words):
        refuse_if_locked(tmp_path / "out")
    owner.stdin.close()
    owner.wait()
    refuse_if_locked(tmp_path / "out")


def test_the_lock_dies_with_its_owner(owner, tmp_path):
    owner.kill()
    owner.wait()
    assert json.loads((tmp_path / "out" / ".lock").read_text())["pid"] == owner.pid
    refuse_if_locked(tmp_path / "out")
    with lock_folder(tmp_path / "out"):
        assert json.loads((tmp_path / "out" / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(UsageError, match=f"process {os.getpid()}"):
            refuse_if_locked(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_who_waits_gets_the_lock_that_others_see(owner, tmp_path):
    """The owner removes the file at its end; a lock on the removed file would lock nothing."""
    threading.Timer(0.3, owner.stdin.close).start()
    with lock_folder(tmp_path / "out"):
        owner.wait()
        with pytest.raises(UsageError, match=f"process {os.getpid()}"):
            refuse_if_locked(tmp_path / "out")


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_of_and_used(answer, tmp_path, monkeypatch, capsys):
    def flock(handle, kind):
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_folder(tmp_path / "out"):
        refuse_if_locked(tmp_path / "out")
    assert "file system has no locks, so nothing stops a second run there" in capsys.readouterr().err


def test_a_fork_that_ends_takes_no_lock_with_it(tmp_path):
    with lock_folder(tmp_path / "out"):
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(UsageError, match=f"process {os.getpid()}"):
            refuse_if_locked(tmp_path / "out")

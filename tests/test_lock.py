"""One writer a folder: the second is refused and told by whom, until the first is gone, however it went."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
    words = rf"out is being written by process {owner.pid} on .+, since 20\d\d-"
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
    assert Path(tmp_path / "out" / ".lock").read_text() == ""

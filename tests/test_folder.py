"""Files and folders appear whole or not at all; a full disk is one line and status 1; a folder has one writer at a time."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from drdpo.errors import UsageError
from drdpo.folder import already_made, atomic_file, atomic_folder, lock_folder, owner_of, refuse_if_locked, sweep


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    def failing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, failing)


def write_and_fail(path: Path, error: BaseException) -> None:
    with atomic_file(path) as stream:
        stream.write("half")
        raise error


def fill_and_fail(path: Path, error: BaseException) -> None:
    with atomic_folder(path) as aside:
        (aside / "half").write_text("half")
        raise error


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a file"
    for text in ("old", "new — é"):
        with atomic_file(path) as stream:
            stream.write(text)
            assert not path.exists() or path.read_text(encoding="utf-8") == "old"
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(path.parent) == ["a file"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), FULL], ids=repr)
@pytest.mark.parametrize("write", [write_and_fail, fill_and_fail])
def test_an_error_or_a_full_disk_keeps_the_old_result_and_names_it(
    tmp_path: Path, write: Callable[[Path, BaseException], None], error: BaseException
) -> None:
    old = tmp_path / "old" if write is write_and_fail else tmp_path / "old" / "file"
    old.parent.mkdir(exist_ok=True)
    old.write_text("old")
    with pytest.raises(type(error)) as caught:
        write(tmp_path / "old", error)
    assert error is not FULL or (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "old"))
    assert old.read_text() == "old"
    assert os.listdir(tmp_path) == ["old"] and os.listdir(old.parent) == [old.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_the_end_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    refuse(monkeypatch, call, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left") as caught, atomic_file(path) as stream:
        stream.write("new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_folder_is_swapped_whole(tmp_path: Path) -> None:
    path = tmp_path / "a folder"
    for content in ("old", "new"):
        with atomic_folder(path) as aside:
            (aside / content).write_text(content)
            assert not (path / "new").exists()
        assert os.listdir(path) == [content]
    assert os.listdir(tmp_path) == ["a folder"]


def test_sweep_takes_what_a_killed_writer_left_and_nothing_else(tmp_path: Path) -> None:
    names = {"c.tmp", ".notes.tmp", ".a.jsonl", "a.abcdefgh.tmp"}
    for name in names:
        (tmp_path / name).write_text("the user's")
    writers = atomic_file(tmp_path / "a.jsonl"), atomic_folder(tmp_path / "b")
    for writer in writers:
        writer.__enter__()  # and never ends, as under SIGKILL
    assert len(list(tmp_path.iterdir())) == len(names) + 2
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names


KILLED_BETWEEN = """
import os, signal, sys
from drdpo.folder import *

rename = os.replace
def replace(source, target):
    if Path(target) == Path(sys.argv[1]):  # the old folder has been moved away, the new one has not come yet
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace
with atomic_folder(Path(sys.argv[1])) as aside:
    (aside / "new").write_text("new")
"""


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    """Twice, with the first kill's leavings unswept and the folder written again between them: the newer one goes back."""
    path = tmp_path / "global_step_8"
    for text in ("older", "newer"):
        with atomic_folder(path) as aside:
            (aside / "old").write_text(text)
        killed = subprocess.run([sys.executable, "-c", KILLED_BETWEEN, str(path)])
        assert killed.returncode == -signal.SIGKILL and not path.exists()
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["global_step_8"]
    assert (path / "old").read_text() == "newer"


@pytest.mark.parametrize(
    ("manifest", "made_by", "says"),
    [
        ({"step": {"made_by": {"seed": 1}}}, {"seed": 1}, None),
        ({"step": {"made_by": {"seed": 1}}}, {"seed": 2}, r"different configuration: seed \(1 -> 2\)"),
        ({"step": {}}, {"seed": 1}, "does not say what made it"),
        ({"step": {"made_by": [1]}}, {"seed": 1}, "does not say what made it"),
        ({"step": "odd"}, {"seed": 1}, "does not say what made it"),
        ({}, {"seed": 1}, "does not say what made it"),
    ],
)
@pytest.mark.parametrize("files", [1, 2])
def test_results_of_another_configuration_are_never_replaced(tmp_path, manifest, made_by, says, files):
    """Not even where one of two files is missing: only the same configuration continues an interrupted run."""
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    results = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    for path in results[:files]:
        path.write_text("")
    if says is None:
        assert already_made(tmp_path, "step", made_by, results, False) == (files == 2)
        assert already_made(tmp_path, "step", made_by, results, True) == (files == 2)
    else:
        with pytest.raises(UsageError, match=says):
            already_made(tmp_path, "step", made_by, results, False)
        assert not already_made(tmp_path, "step", made_by, results, True)


HOLD = """
import sys
from drdpo.folder import *

with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


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


def test_machines_share_a_folder_that_nobody_else_may_write(owner, tmp_path):
    """`owner` holds the whole of tmp_path / "out"; then shares of it are held here."""
    with pytest.raises(UsageError, match=f"is locked by process {owner.pid}"), lock_folder(tmp_path / "out", 1):
        pytest.fail("the whole folder is held")
    assert not (tmp_path / "out" / ".lock.1").exists()
    owner.kill()
    owner.wait()
    folder = tmp_path / "out"
    with lock_folder(folder, 0), lock_folder(folder, 1):
        refuse_if_locked(folder, 2)
        assert owner_of(folder) is not None
        for share in (1, None):
            with pytest.raises(UsageError, match=f"is locked by process {os.getpid()}"):
                refuse_if_locked(folder, share)
            with pytest.raises(UsageError, match=f"is locked by process {os.getpid()}"), lock_folder(folder, share):
                pytest.fail("it is held")
    (folder / ".lock.1").write_text("of a killed machine")
    with lock_folder(folder):
        sweep(folder)
    assert list(folder.iterdir()) == [] and owner_of(folder) is None


def test_the_lock_dies_with_its_owner(owner, tmp_path):
    owner.kill()
    owner.wait()
    assert f"process {owner.pid} on" in (tmp_path / "out" / ".lock").read_text()
    refuse_if_locked(tmp_path / "out")
    with lock_folder(tmp_path / "out"):
        assert f"process {os.getpid()} on" in (tmp_path / "out" / ".lock").read_text()
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


KILLED_WHILE_STARTING = """
import os, signal, sys, time
from pathlib import Path
from drdpo.folder import lock_folder
with lock_folder(Path(sys.argv[1])):
    if os.fork() == 0:
        time.sleep(0.4)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_lock_that_a_killed_owners_child_still_holds_is_waited_for(root, tmp_path):
    """As between fork and exec of a program that the owner was starting: a child has its file open."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_STARTING, str(tmp_path)], env=environment)
    assert done.returncode == -9
    assert owner_of(tmp_path) is None
    with lock_folder(tmp_path):
        pass

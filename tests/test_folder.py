"""Files and folders appear whole or not at all; a full disk is one line and status 1; a folder has one writer at a time."""

import errno
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from drdpo.errors import UsageError
from drdpo.folder import Parts, already_made, atomic_file, atomic_folder, lock_folder, owner_of, refuse_if_locked, sweep


def write(path: Path, text: str, error: BaseException | None = None) -> None:
    with atomic_file(path) as stream:
        stream.write(text)
        if error:
            raise error


def fill(path: Path, text: str, error: BaseException | None = None) -> None:
    with atomic_folder(path) as aside:
        (aside / text).write_text(text)
        if error:
            raise error


def test_a_file_or_folder_is_replaced_whole(tmp_path):
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
    for text in ("older", "newer"):
        fill(path.parent, text)
        assert os.listdir(path.parent) == [text] and os.listdir(tmp_path) == ["new folder"]


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("make", "error"),
    [*itertools.product((write, fill), (ValueError("bug"), KeyboardInterrupt(), FULL, "fsync")), (write, "replace")],
)
def test_an_error_or_a_full_disk_keeps_the_old_result_and_names_it(tmp_path, monkeypatch, make, error):
    """While it is written, or as it is flushed or renamed."""
    make(tmp_path / "old", "text")

    def full(*_: object) -> None:
        raise FULL

    if isinstance(error, str):
        monkeypatch.setattr(os, error, full)
        error = None
    with pytest.raises(type(error or FULL)) as caught:
        make(tmp_path / "old", "new", error)
    if isinstance(caught.value, OSError):
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "old"))
    old = tmp_path / "old" if make is write else tmp_path / "old" / "text"
    assert old.read_text() == "text"
    assert os.listdir(tmp_path) == ["old"] and os.listdir(old.parent) == [old.name]


def test_sweep_takes_what_a_killed_writer_left_and_nothing_else(tmp_path):
    names = {"c.tmp", ".notes.tmp", ".a.jsonl", "a.abcdefgh.tmp"}
    for name in names:
        (tmp_path / name).write_text("the user's")
    for writer in (writers := [atomic_file(tmp_path / "a.jsonl"), atomic_folder(tmp_path / "b")]):
        writer.__enter__()  # and never ends, as under SIGKILL
    assert len(list(tmp_path.iterdir())) == len(names) + len(writers)
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


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
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
    ("entry", "seed", "says"),
    [({"made_by": {"seed": 1}}, 1, None), ({"made_by": {"seed": 1}}, 2, r"different configuration: seed \(1 -> 2\)"),
     *((odd, 1, "does not say what made it") for odd in ({}, {"made_by": [1]}, "odd", None))],
)  # fmt: skip
@pytest.mark.parametrize("files", [1, 2])
def test_results_of_another_configuration_are_never_replaced(tmp_path, entry, seed, says, files):
    """Not even where one of two files is missing: only the same configuration continues an interrupted run."""
    (tmp_path / "manifest.json").write_text(json.dumps({"step": entry} if entry is not None else {}))
    results = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    for path in results[:files]:
        path.write_text("")
    if says is None:
        assert already_made(tmp_path, "step", {"seed": seed}, results, False) == (files == 2)
    else:
        with pytest.raises(UsageError, match=says):
            already_made(tmp_path, "step", {"seed": seed}, results, False)
    assert already_made(tmp_path, "step", {"seed": seed}, results, True) == (says is None and files == 2)


HOLD = """
import sys
from drdpo.folder import *
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that holds the lock."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "held\n"
        yield owner
        owner.kill()


def test_machines_share_a_folder_that_nobody_else_may_write(owner, tmp_path):
    """`owner` holds the whole of tmp_path / "out"; then shares of it are held here."""
    folder = tmp_path / "out"
    with pytest.raises(UsageError, match=f"is locked by process {owner.pid}"), lock_folder(folder, 1):
        pytest.fail("the whole folder is held")
    assert not (folder / ".lock.1").exists()
    owner.kill()
    owner.wait()
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


@pytest.mark.parametrize("killed", [False, True])
def test_the_second_is_refused_and_told_by_whom_until_the_owner_ends(killed, owner, tmp_path):
    folder, words = tmp_path / "out", rf"out is locked by process {owner.pid} on .+ \(-c .+\), since 20\d\d-"
    with pytest.raises(UsageError, match=words), lock_folder(folder):
        pytest.fail("two writers")
    with pytest.raises(UsageError, match=words):
        refuse_if_locked(folder)
    owner.kill() if killed else owner.stdin.close()
    owner.wait()
    assert not killed or f"process {owner.pid} on" in (folder / ".lock").read_text()
    refuse_if_locked(folder)
    with lock_folder(folder):
        if (child := os.fork()) == 0:  # a fork that ends takes no lock with it
            os._exit(0)
        os.waitpid(child, 0)
        assert f"process {os.getpid()} on" in (folder / ".lock").read_text()
        with pytest.raises(UsageError, match=f"process {os.getpid()}"):
            refuse_if_locked(folder)
    assert list(folder.iterdir()) == []


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
    assert "file system has no locks" in capsys.readouterr().err


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


def test_a_lock_that_a_killed_owners_child_still_holds_is_waited_for(tmp_path):
    """As between fork and exec of a program that the owner was starting: a child has its file open."""
    assert subprocess.run([sys.executable, "-c", KILLED_WHILE_STARTING, str(tmp_path)]).returncode == -9
    assert owner_of(tmp_path) is None
    with lock_folder(tmp_path):
        pass


# Resumable parts

MADE_BY = {"model": "abc", "temperature": 0.7}
CONTENT = {"7": [[[1, 2], "stop"], [[3], "length"]], "9": "é\n"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out put" / ".test.parts"


def opened(folder: Path, plan: object = 2, rank: int = 0) -> Parts:
    parts = Parts(folder, MADE_BY, False, rank)
    parts.open(plan)
    return parts


def test_finished_parts_of_all_ranks_come_back_with_their_plan(folder):
    parts, other = opened(folder), opened(folder, rank=1)
    assert parts.plan is None and parts.done == set()
    parts.add(1, CONTENT)
    other.add(0, "zero")
    parts.find()
    assert (parts.done, parts.read(0)) == ({0, 1}, "zero")
    again = Parts(folder, MADE_BY, overwrite=False)
    assert again.plan == 2
    again.open(2)
    assert (again.done, again.read(1), again.read(0)) == ({0, 1}, CONTENT, "zero")
    assert opened(folder, plan=3).done == set(), "another plan starts again"
    assert json.loads((folder / "plan.json").read_text()) == {"made_by": MADE_BY, "plan": 3}
    again.remove()
    assert not folder.exists()


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_cut_line_is_dropped(folder, cut):
    parts = opened(folder)
    parts.add(0, CONTENT)
    parts.add(1, CONTENT)
    (file,) = folder.glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-cut])
    again = opened(folder)
    assert again.done == {0}
    again.add(1, "new")
    last = opened(folder)
    assert (last.read(0), last.read(1)) == (CONTENT, "new")


def test_another_configuration_is_refused_and_named(folder):
    opened(folder).add(0, CONTENT)
    with pytest.raises(UsageError, match=r"temperature \(0.7 -> 1.0\)"):
        Parts(folder, {**MADE_BY, "temperature": 1.0}, overwrite=False)
    assert opened(folder).done == {0}, "a refusal loses nothing"
    other = Parts(folder, {**MADE_BY, "temperature": 1.0}, overwrite=True)
    assert other.plan is None
    other.open(2)
    assert other.done == set()

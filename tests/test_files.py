"""Files and folders appear whole or not at all; a full disk is one line and status 1."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from drdpo.files import atomic_file, atomic_folder, sweep

FULL_DISK = """
import os, sys
from pathlib import Path
from drdpo.errors import one_line_errors
from drdpo.files import atomic_file

def full(_):
    raise OSError({number}, os.strerror({number}))

os.fsync = full
with one_line_errors(), atomic_file(Path(sys.argv[1])) as stream:
    stream.write("new")
"""


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


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt()])
def test_an_error_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)):
        write_and_fail(path, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    refuse(monkeypatch, call, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left") as caught, atomic_file(path) as stream:
        stream.write("new")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "the disk is full while writing"), (errno.EACCES, "no permission to write")]
)
def test_a_full_disk_is_one_line_and_status_1(root: Path, tmp_path: Path, number: int, words: str) -> None:
    path = tmp_path / "out put.jsonl"
    ended = subprocess.run(
        [sys.executable, "-c", FULL_DISK.format(number=number), str(path)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(root / "src")},
    )  # fmt: skip
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {words} {path}")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_the_kernels_own_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes go to /dev/full, where writing really fails, at the flush."""
    monkeypatch.setattr(
        "tempfile.mkstemp", lambda dir, prefix, suffix: (os.open("/dev/full", os.O_WRONLY), str(tmp_path / "aside"))
    )
    with pytest.raises(OSError, match="No space left") as caught, atomic_file(tmp_path / "file") as stream:
        stream.write("x" * 100)
    assert caught.value.filename == str(tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_a_folder_is_swapped_whole(tmp_path: Path) -> None:
    path = tmp_path / "a folder"
    for content in ("old", "new"):
        with atomic_folder(path) as aside:
            (aside / content).write_text(content)
            assert not (path / "new").exists()
        assert os.listdir(path) == [content]
    assert os.listdir(tmp_path) == ["a folder"]


def test_an_error_keeps_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(ValueError, match="bug"):
        fill_and_fail(path, ValueError("bug"))
    assert os.listdir(path) == ["old"]
    assert os.listdir(tmp_path) == ["folder"]


def test_a_full_disk_keeps_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(OSError, match="No space left") as caught:
        fill_and_fail(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert caught.value.filename == str(path)
    assert os.listdir(path) == ["old"]
    assert os.listdir(tmp_path) == ["folder"]


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

"""A file where a folder must be, and the reverse: one clear line and status 1."""

from collections.abc import Callable
from pathlib import Path

import pytest

from drdpo.errors import one_line_errors
from drdpo.folder import atomic_file, atomic_files, atomic_folder


def write_file(path: Path) -> None:
    with atomic_file(path) as stream:
        stream.write("x")


def write_files(path: Path) -> None:
    with atomic_files(path.parent / "other", path) as asides:
        for aside in asides:
            aside.write_text("x")


def write_folder(path: Path) -> None:
    with atomic_folder(path) as aside:
        (aside / "x").write_text("x")


def said(capsys: pytest.CaptureFixture[str], write: Callable[[Path], None], path: Path) -> str:
    with pytest.raises(SystemExit) as stop, one_line_errors():
        write(path)
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("write", [write_file, write_files, write_folder])
@pytest.mark.parametrize("below", ["out.jsonl", "deep/out.jsonl", "deep/er/out.jsonl"])
def test_a_file_where_a_folder_must_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Callable[[Path], None], below: str
) -> None:
    file = tmp_path / "my results"
    file.write_text("precious")
    assert said(capsys, write, file / below).startswith(f"error: {file} is a file, where a folder must be")
    assert file.read_text() == "precious"


@pytest.mark.parametrize("write", [write_file, write_files])
def test_a_folder_where_a_file_must_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Callable[[Path], None]
) -> None:
    folder = tmp_path / "out.jsonl"
    folder.mkdir()
    assert said(capsys, write, folder).startswith(f"error: {folder} is a folder, where a file must be")
    assert not list(tmp_path.glob(".*"))


def test_other_errors_of_the_system_keep_their_traceback() -> None:
    with pytest.raises(FileNotFoundError), one_line_errors():
        Path("/nowhere/at all").read_text()

"""A user's errors are one clear line and a status; untrusted text on a terminal steers nothing and stays readable."""

import errno
from pathlib import Path

import pytest

from drdpo.errors import DataError, duration, harmless, one_line, one_line_errors, shortened
from drdpo.folder import atomic_file, atomic_files, atomic_folder


def said(capsys, make, what):
    with pytest.raises(SystemExit) as stop, one_line_errors(), make(what):
        pass
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("make", [atomic_file, lambda path: atomic_files(path.parent / "other", path), atomic_folder])
@pytest.mark.parametrize("below", ["out.jsonl", "deep/er/out.jsonl"])
def test_a_file_where_a_folder_must_be_or_a_folder_where_a_file(tmp_path, capsys, make, below):
    file, folder = tmp_path / "my results", tmp_path / "out.jsonl"
    file.write_text("precious")
    assert said(capsys, make, file / below).startswith(f"error: {file} is a file, where a folder must be")
    assert file.read_text() == "precious"
    if make is not atomic_folder:
        folder.mkdir()
        assert said(capsys, make, folder).startswith(f"error: {folder} is a folder, where a file must be")
        assert not list(tmp_path.glob(".*"))


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "", "out put.jsonl"), "error: the disk is full while writing out put.jsonl"),
        (OSError(errno.EACCES, "", "out put.jsonl"), "error: no permission to read or write out put.jsonl"),
        (DataError("x.jsonl, row 1: has \x1b[2Jevil\nfields"), "error: x.jsonl, row 1: has \\x1b[2Jevil fields"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_that_does_not_steer_the_terminal(capsys, error, line):
    assert said(capsys, fail, error).startswith(line)
    with pytest.raises(FileNotFoundError), one_line_errors():  # others keep their traceback
        Path("/nowhere/at all").read_text()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"), ("a\rb\x08\x7f\x9b", r"a\rb\x08\x7f\x9b"),
        ("right \u202eto left\u2066", r"right \u202eto left\u2066"), ("half \ud800 a pair", r"half \ud800 a pair"),
        ("invisible \u200b\ufeff\U000e0041", r"invisible \u200b\ufeff\U000e0041"),
        ("line\r\nline\n\tindented", "line\nline\n    indented"),
        ("Grüße, 日本語, می‌خواهم, 👩‍🔬, ∂∂t(∇×𝐂)", "Grüße, 日本語, می‌خواهم, 👩‍🔬, ∂∂t(∇×𝐂)"),
    ],
)  # fmt: skip
def test_what_is_shown(text, shown):
    assert harmless(text) == shown
    harmless(text).encode("utf-8")


def test_one_line_is_one_line_and_cut():
    assert one_line("a \n\n b\tc") == "a b c"
    assert one_line("abcdef", 4) == "abc…"
    assert one_line("abcd", 4) == "abcd"


def test_shortened_keeps_beginning_and_end():
    assert shortened("one two three", 7, 5) == ["one two", "three"]
    assert shortened("a\n\nb", 7, 5) == ["a", "", "b"]
    text = "\n".join(str(number) for number in range(100))
    # 7 lines: 4 of the beginning, the note, 2 of the end. 0..9 and 10..99 with 99 line feeds: 10 + 180 + 99 characters.
    assert shortened(text, 20, 7) == ["0", "1", "2", "3", "[... of 289 characters ...]", "98", "99"]
    lines = shortened("x" * 10_000_000 + "END", 50, 6)
    assert len(lines) <= 6 and max(map(len, lines)) <= 50 and lines[-1].endswith("END")


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.23, "4.2 s"), (200, "3 min 20 s"), (3599.9, "59 min 59 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text

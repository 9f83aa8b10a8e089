"""Untrusted text on a terminal: nothing in it steers, nothing readable is lost."""

import pytest

from drdpo.errors import DataError, duration, harmless, one_line, one_line_errors, shortened


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("a\rb\x08\x7f\x9b", r"a\rb\x08\x7f\x9b"),
        ("right \u202eto left\u2066", r"right \u202eto left\u2066"),
        ("half \ud800 a pair", r"half \ud800 a pair"),
        ("invisible \u200b\ufeff\U000e0041", r"invisible \u200b\ufeff\U000e0041"),
        ("line\r\nline\n\tindented", "line\nline\n    indented"),
        ("Grüße, 日本語, می‌خواهم, 👩‍🔬, ∂∂t(∇×𝐂)", "Grüße, 日本語, می‌خواهم, 👩‍🔬, ∂∂t(∇×𝐂)"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert harmless(text) == shown
    harmless(text).encode("utf-8")


def test_one_line_is_one_line_and_cut() -> None:
    assert one_line("a \n\n b\tc") == "a b c"
    assert one_line("abcdef", 4) == "abc…"
    assert one_line("abcd", 4) == "abcd"


def test_shortened_keeps_beginning_and_end() -> None:
    assert shortened("one two three", 7, 5) == ["one two", "three"]
    assert shortened("a\n\nb", 7, 5) == ["a", "", "b"]
    text = "\n".join(str(number) for number in range(100))
    # 7 lines: 4 of the beginning, the note, 2 of the end. 0..9 and 10..99 with 99 line feeds: 10 + 180 + 99 characters.
    assert shortened(text, 20, 7) == ["0", "1", "2", "3", "[... of 289 characters ...]", "98", "99"]


def test_shortened_of_a_very_long_line() -> None:
    lines = shortened("x" * 10_000_000 + "END", 50, 6)
    assert len(lines) <= 6
    assert max(map(len, lines)) <= 50
    assert lines[-1].endswith("END")


def test_an_error_that_quotes_data_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), one_line_errors():
        raise DataError("file.jsonl, row 1: the row has \x1b[2Jevil\nfields")
    assert capsys.readouterr().err == "error: file.jsonl, row 1: the row has \\x1b[2Jevil fields\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.23, "4.2 s"), (200, "3 min 20 s"), (3599.9, "59 min 59 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text

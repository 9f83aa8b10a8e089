"""A bar on a terminal; in a file a line every ten percent, none for what takes no time."""

import sys
import time

import pytest
from tqdm import tqdm

from drdpo.progress import Lines, progress


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock with one hand, which tests move."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    text = capsys.readouterr().err
    assert "\r" not in text
    return text.splitlines()


def test_a_line_every_ten_percent_or_every_minute(seconds, capsys):
    for _ in progress(range(1000), desc="score", unit="completion"):
        seconds[0] += 0.5
    lines = lines_of(capsys)
    assert lines[0] == "score: 10% (completion 100 of 1000, 50 s)"
    assert [line.split()[1] for line in lines] == [f"{tenth}0%" for tenth in range(1, 11)]
    for _ in progress(range(632), desc="KLDPO", unit="step"):
        seconds[0] += 60.0
    lines = lines_of(capsys)
    assert len(lines) == 632 and lines[0] == "KLDPO: 0% (step 1 of 632, 60 s)"


def test_finished_units_are_not_counted_again(seconds, capsys):
    with progress(desc="sample", unit="completion", total=10, initial=4) as bar:
        for count in (2, 4):
            seconds[0] += 60.0
            bar.set_postfix_str("70 tokens/s", refresh=False)
            bar.update(count)
    assert lines_of(capsys) == [
        "sample: 60% (completion 6 of 10, 60 s, 70 tokens/s)", "sample: 100% (completion 10 of 10, 120 s, 70 tokens/s)",
    ]  # fmt: skip


def test_quick_work_is_silent_and_quick_tenths_share_a_line(seconds, capsys):
    bar = progress(range(10), desc="tokenise", unit="pair")
    assert list(bar) == list(range(10)) and lines_of(capsys) == []
    for _ in progress(range(10), desc="dpo", unit="step"):
        seconds[0] += 0.5
    assert [line.split("(")[0] for line in lines_of(capsys)] == ["dpo: 40% ", "dpo: 80% "]


def test_a_terminal_has_a_bar_and_other_ranks_have_nothing(seconds, monkeypatch, capsys):
    hidden = progress(range(3), desc="dpo", unit="step", disable=True)
    assert list(hidden) == [0, 1, 2] and lines_of(capsys) == []
    assert isinstance(progress(range(3), desc="dpo", unit="step"), Lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(progress(range(3), desc="dpo", unit="step"), tqdm)

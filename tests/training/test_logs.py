"""logs/rank_<r>.log: what a rank says, in its file as on the terminal."""

import io
import logging
import sys

import pytest

from drdpo.errors import UsageError
from drdpo.training.logs import rank_log


def lines_of(folder, rank=0):
    """Without the times of day, headers as they are."""
    lines = (folder / "logs" / f"rank_{rank}.log").read_text().splitlines()
    return [line if line.startswith("===") else line.split(" ", 1)[1] for line in lines]


def fail(folder, error):
    with rank_log() as log:
        print("checking")
        if folder is not None:
            log.keep(folder)
        raise error


def test_output_and_older_handlers_go_to_file_and_terminal(tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler()  # as a library makes it, at its import
    logger = logging.getLogger("drdpo_test_logs")
    logger.addHandler(handler)
    try:
        with rank_log() as log:
            print("before the folder is ours")
            log.keep(tmp_path / "a run")
            logger.warning("a library warns")
            sys.stderr.write("half a ")
            sys.stderr.write("line\n")
        assert handler.stream is terminal
    finally:
        logger.removeHandler(handler)
    assert terminal.getvalue() == "a library warns\nhalf a line\n"
    header, *lines = lines_of(tmp_path / "a run")
    assert header.startswith("=== 20") and "rank 0 of 1" in header
    assert lines == ["before the folder is ours", "a library warns", "half a line"]


def test_a_bar_is_one_line_and_colours_are_dropped(tmp_path):
    with rank_log() as log:
        log.keep(tmp_path)
        for percent in range(101):
            sys.stderr.write(f"\r{percent}%|")
        sys.stderr.write("\r\n\x1b[31mred\x1b[0m\n")
        sys.stderr.write("\r40%|cut")
    assert lines_of(tmp_path)[1:] == ["100%|", "red", "40%|cut"]


def test_exceptions_leave_their_traceback_and_go_on(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path, ZeroDivisionError("division by zero"))
    assert lines_of(tmp_path)[-1] == "ZeroDivisionError: division by zero"
    assert "Traceback (most recent call last):" in lines_of(tmp_path)
    with pytest.raises(UsageError):
        fail(tmp_path, UsageError("not so"))
    lines = lines_of(tmp_path)
    assert lines[-1] == "error: not so"
    assert sum(line.startswith("===") for line in lines) == 2, "appended, a header each start"


def test_a_run_that_is_refused_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        fail(None, UsageError("no"))
    assert not list(tmp_path.iterdir())


def test_every_rank_has_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with rank_log() as log:
        log.keep(tmp_path)
    assert "rank 3 of 4" in lines_of(tmp_path, 3)[0]

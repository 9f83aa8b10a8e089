"""The server of forks keeps what subprocess promises, and faults strike where they are planted."""

import signal
import sys
from pathlib import Path

import pytest
from harness.forks import Forks, statuses

SCRIPT = """
import os, sys, time
print("in", os.getcwd(), "rank", os.environ.get("RANK"))
if sys.argv[1] == "sleep":
    time.sleep(60)
os.makedirs(sys.argv[1])
sys.exit("a message")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "a script.py"
    path.write_text(SCRIPT)
    return path


def test_a_fork_has_the_status_and_streams_of_a_process(forks: Forks, script: Path, tmp_path: Path) -> None:
    done = forks.run([sys.executable, script, "made"], cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, f"in {tmp_path} rank None\n", "a message\n")
    done = forks.run([sys.executable, script, "made"], cwd=tmp_path)
    assert done.returncode == 1 and "FileExistsError" in done.stderr
    sleeper = forks.start([sys.executable, script, "sleep"])
    assert sleeper.poll() is None
    sleeper.send_signal(signal.SIGTERM)
    assert sleeper.wait() == -signal.SIGTERM


def test_faults_strike_where_they_are_planted(forks: Forks, script: Path, tmp_path: Path) -> None:
    stop = {"rank": 1, "at": "os:makedirs", "call": 1, "when": "before", "signal": "SIGSTOP"}
    ranks = forks.start_ranks([sys.executable, script, tmp_path / "made"], 2, log=tmp_path / "log", faults=[stop])
    assert statuses(ranks) == [1, -signal.SIGKILL], "a rank that hangs is ended once the other has"
    assert [(tmp_path / f"log.{rank}").read_text().count("a message") for rank in (0, 1)] == [1, 0]
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "inner"
    kill = {"folder": str(outer), "count": str(tmp_path / "count"), "call": 2}
    killed = forks.start([sys.executable, script, inner], faults=[kill])
    assert killed.wait() == -signal.SIGKILL
    assert outer.is_dir() and not inner.exists(), "just before the second change"

"""drdpo/launch.py with real torchrun and two processes that do nothing but end, each in its way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WORKER = """
import os, signal, sys, time
rank, how = int(os.environ["RANK"]), sys.argv[1]
stop = lambda number, frame: sys.exit(75)
if how == "waits":
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
print(f"rank {rank} of {os.environ['WORLD_SIZE']} is ready", flush=True)
if how == "waits":
    time.sleep(60)
if how == "loses rank 1" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if how == "loses rank 1":
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    from drdpo.distributed import lost_rank_in_one_line
    with lost_rank_in_one_line(60):
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
if how == "refuses" and rank == 0:
    time.sleep(60)
if how == "is silent":
    sys.exit(1)
if how == "does not listen":
    time.sleep(60)
if how in ("refuses", "refuse"):
    sys.exit(print("error: train.jsonl, row 3: no prompt", file=sys.stderr) or 2)
"""


class Launched:
    """torchrun with two processes."""

    def __init__(self, root: Path, folder: Path, how: str) -> None:
        self.folder = folder
        (folder / "worker.py").write_text(WORKER)
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(root / "src/drdpo/launch.py"), "--standalone", "--local-addr=127.0.0.1",
             "--nproc-per-node=2", f"--log-dir={folder / 'logs'}", str(folder / "worker.py"), how, "--log=none"],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # A shell's & makes its commands ignore SIGINT, and the tests with them.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def log(self, rank: int, name: str = "stdout.log") -> Path:
        return next(self.folder.glob(f"logs/*/attempt_0/{rank}/{name}"), self.folder / "none")

    def send_to_both(self, sent: signal.Signals) -> None:
        deadline = time.monotonic() + 120
        while not all(self.log(rank).is_file() and "ready" in self.log(rank).read_text() for rank in (0, 1)):
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        self.process.send_signal(sent)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


@pytest.mark.parametrize(
    ("how", "sent", "status"),
    [("waits", "SIGTERM", 75), ("waits", "SIGUSR1", 75), ("waits", "SIGINT", 130), ("does not listen", "SIGTERM", 75)],
)
def test_a_signal_reaches_the_processes_and_their_status_is_the_launchers(how, sent, status, root, tmp_path):
    """Also of processes that do not handle it yet."""
    launched = Launched(root, tmp_path, how)
    launched.send_to_both(signal.Signals[sent])
    found, out, err = launched.end()
    assert (found, out) == (status, "rank 0 of 2 is ready\n"), err
    assert how == "does not listen" or ("torch" not in err and (sent == "SIGINT" or not err))


def test_a_killed_process_is_named_in_one_line_and_the_lost_connection_kept(root, tmp_path):
    launched = Launched(root, tmp_path, "loses rank 1")
    status, _, err = launched.end()
    assert status == 1
    assert err.startswith("error: rank 1 was ended by SIGKILL") and err.count("\n") == 1, err
    assert str(launched.log(1).parent) in err
    assert "pair.cc" in launched.log(0, "error.json").read_text()
    assert "Signal 9 (SIGKILL)" in (tmp_path / "logs" / "torchrun.log").read_text()


@pytest.mark.parametrize(
    ("how", "status", "line"),
    [
        ("refuse", 2, "error: train.jsonl, row 3"), ("refuses", 2, "error: rank 1 ended with status 2: train.jsonl, row 3"),
        # As on a full disk, where the logs are.
        ("is silent", 1, "ended with status 1: it wrote nothing"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_whichever_process_finds_it(how, status, line, root, tmp_path):
    launched = Launched(root, tmp_path, how)
    found, out, err = launched.end()
    assert found == status
    assert line in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert out == "rank 0 of 2 is ready\n"
    assert launched.log(1).read_text() == "rank 1 of 2 is ready\n"
    assert how != "is silent" or "GiB are free" in err

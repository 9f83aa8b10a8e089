"""Two hosts, each a network namespace with an address of its own: one dies, hangs or loses its network during a run.

The other ends with one clear line in bounded time, and the resumed run equals the undisturbed one.
"""

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.forks import Fork, Forks, statuses
from harness.hosts import FIRST, ip
from harness.runs import check_equal, fault, flags_of, said, start_run, words_of

pytestmark = pytest.mark.slow

STEP = "loop:train_step"
PORTS = itertools.count(12345)


def start_on(hosts: list[Forks], flags: dict, log: Path, **options: Any) -> list[Fork]:
    """Start a run of one rank a host."""
    common = {"address": FIRST, "port": next(PORTS), **options}
    return [fork for rank, host in enumerate(hosts) for fork in start_run(host, flags, log, ranks=[rank], **common)]


def run_on(hosts: list[Forks], flags: dict, log: Path) -> list[int]:
    """Exit statuses of a run of one rank a host."""
    return statuses(start_on(hosts, flags, log))


def lost_line(log: Path, rank: int) -> str:
    """The last line of an error of a rank that lost another one."""
    assert "Traceback" not in said(log, rank)
    last = [line for line in said(log, rank).splitlines() if line.startswith("error: ")][-1]
    assert last.startswith(f"error: rank {rank} lost another rank")
    return last


def wait_for(there: Callable[[], bool], log: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, said(log)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(hosts, tiny_policy, data, tmp_path_factory) -> Path:
    save = tmp_path_factory.mktemp("undisturbed") / "a run"
    assert run_on(hosts, flags_of(tiny_policy, data, save), save.parent / "log") == [0, 0], said(save.parent / "log")
    return save


@pytest.mark.parametrize(("how", "dead"), [("dies", 0), ("dies", 1), ("hangs", 1)])
def test_a_run_that_lost_a_host_resumes(how, dead, hosts, undisturbed, tiny_policy, data, tmp_path, monkeypatch):
    save, log = tmp_path / "a run", tmp_path / "log"
    monkeypatch.setenv("DRDPO_TIMEOUT", "15")
    flags = flags_of(tiny_policy, data, save)
    lost = fault(STEP, 3, rank=dead, signal="SIGKILL" if how == "dies" else "SIGSTOP")
    ranks, other = start_on(hosts, flags, log, faults=[lost]), 1 - dead
    assert ranks[other].wait() == 1, said(log, other)
    assert "DRDPO_TIMEOUT=15" in lost_line(log, other)
    assert statuses([ranks[dead]]) == [-9]
    assert run_on(hosts, flags, log) == [0, 0], said(log)
    assert "after step 2 of 4" in said(log)
    check_equal(save, undisturbed)


def test_a_cut_cable_ends_both(network, hosts, undisturbed, tiny_policy, data, tmp_path, monkeypatch):
    """No connection is closed: the receiver learns it from the timeout, the sender from the kernel."""
    save, log = tmp_path / "a run", tmp_path / "log"
    monkeypatch.setenv("DRDPO_TIMEOUT", "10")
    flags = flags_of(tiny_policy, data, save)
    ranks = start_on(hosts, flags, log)
    (name, interface), _ = network
    wait_for((save / "resume" / "step_1" / "state.json").is_file, log)
    ip("-n", name, "link", "set", interface, "down")
    try:
        ended = statuses(ranks)
    finally:
        ip("-n", name, "link", "set", interface, "up")
    assert ended == [1, 1], said(log) + said(log, 1)
    assert lost_line(log, 0) and lost_line(log, 1)
    assert run_on(hosts, flags, log) == [0, 0], said(log)
    check_equal(save, undisturbed)


def test_the_wrapper_on_both_hosts_stops_and_its_run_resumes(network, hosts, root, undisturbed, tiny_policy, data, tmp_path):
    """train_alignment.sh with torchrun on either host, its checks in forks; SIGUSR1 reaches one of them.

    The ranks that resume run in forks, as in the other tests.
    """
    save = tmp_path / "a run"
    given = flags_of(tiny_policy, data, save, save_steps=0)
    port, started = str(next(PORTS)), []
    for rank, (name, interface) in enumerate(network):
        environment = {
            **os.environ, "DRDPO_ENV": str(hosts[rank].environment(tmp_path / f"host {rank}")), "DRDPO_NODES": "2",
            "DRDPO_NODE_RANK": str(rank), "MASTER_ADDR": FIRST, "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": interface, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "DRDPO_PROCESSES": "1",
        }  # fmt: skip
        command = ["ip", "netns", "exec", name, "bash", str(root / "train_alignment.sh"), *words_of(given)]
        output = (tmp_path / f"wrapper.{rank}").open("w")
        started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
    metrics = save / "metrics.jsonl"
    wait_for(lambda: started[0].poll() is not None or (metrics.is_file() and metrics.read_text()), tmp_path / "wrapper")
    started[1].send_signal(signal.SIGUSR1)
    assert [process.wait(timeout=200) for process in started] == [75, 75], said(tmp_path / "wrapper")
    assert "stopped by SIGUSR1 after step" in said(tmp_path / "wrapper")
    assert run_on(hosts, given, tmp_path / "log") == [0, 0], said(tmp_path / "log")
    assert "after step" in said(tmp_path / "log")
    check_equal(save, undisturbed)

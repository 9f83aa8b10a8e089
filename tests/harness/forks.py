"""`python SCRIPT ARGUMENTS` as with subprocess, but in a fork of a process with the heavy libraries imported (server.py).
That a script starts from nothing, by the command that a user types, is for tests/test_readme_run.py."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import ROOT
from harness.client import POLL_SECONDS, ask
from harness.stand_ins import make_environment

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DRDPO_ENGINES")


class Fork:
    """A running script: what the tests need of subprocess.Popen."""

    def __init__(self, place: str, pid: int, command: Sequence[str], out: Path, err: Path) -> None:
        self._place, self.pid, self.command, self._out, self._err = place, pid, list(command), out, err
        self.returncode: int | None = None

    def poll(self) -> int | str | None:
        """Exit status, minus the number of a signal that ended it; "stopped", once after each stop; None while it runs."""
        if self.returncode is not None:
            return self.returncode
        state = ask(self._place, {"poll": self.pid})
        if isinstance(state, int):
            self.returncode = state
        return state

    def wait(self, timeout: float = 300) -> int | str:
        """Its exit status, or "stopped"."""
        deadline = time.monotonic() + timeout
        while (state := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise AssertionError(f"it still runs after {timeout} seconds: {self.command}")
            time.sleep(POLL_SECONDS)
        return state

    def send_signal(self, sent: int) -> None:
        os.kill(self.pid, sent)

    def said(self) -> tuple[str, str]:
        """What it has written to stdout and stderr so far, both in the first where they are one file."""
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in (self._out, self._err))
        return (out, "") if self._out == self._err else (out, err)


class Forks:
    """One server, started when it is first asked for something; in a network namespace where one is named."""

    started: list[Fork] = []  # noqa: RUF012
    """The scripts of the test at work, of all servers: conftest.py shows their output where it fails."""

    def __init__(self, folder: Path, namespace: str | None = None, interface: str = "lo") -> None:
        self._folder, self._namespace, self._interface = folder, namespace, interface
        self._numbers, self._server = itertools.count(), None

    def start(
        self, command: Sequence[Any], env: Mapping[str, str] | None = None, cwd: Path | None = None,
        log: Path | None = None, faults: Iterable[dict[str, Any]] = (),
    ) -> Fork:  # fmt: skip
        """Start [sys.executable, SCRIPT, ARGUMENTS...] in `env`, by default this process's; `log` takes all its output."""
        program, script, *arguments = map(str, command)
        assert program == sys.executable, command
        number = next(self._numbers)
        out, err = (log, log) if log else (self._folder / f"out.{number}", self._folder / f"err.{number}")
        task = {
            "script": script, "arguments": arguments, "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()), "faults": list(faults),
        }  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("wb") as out_stream, err.open("ab") as err_stream:
            pid = self._ask(task, [out_stream.fileno(), (out_stream if log else err_stream).fileno()])
        fork = Fork(str(self.place), pid, [program, script, *arguments], out, err)
        Forks.started.append(fork)
        return fork

    def run(
        self, command: Sequence[Any], env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 300
    ) -> "subprocess.CompletedProcess[str]":
        """As subprocess.run with captured text."""
        fork = self.start(command, env, cwd)
        fork.wait(timeout)
        return subprocess.CompletedProcess(fork.command, fork.returncode, *fork.said())

    def start_ranks(
        self, command: Sequence[Any], world: int, ranks: Iterable[int] | None = None, address: str = "127.0.0.1",
        port: int | None = None, log: Path | None = None, faults: Iterable[dict[str, Any]] = (), **variables: str,
    ) -> list[Fork]:  # fmt: skip
        """Start `command` on these ranks, by default all, as a launcher does; a rank's output goes to `log`.RANK, a fault
        with a "rank" into that rank only."""
        here = list(range(world) if ranks is None else ranks)
        common = without_ranks() | variables | {
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self._interface, "MASTER_ADDR": address,
            "MASTER_PORT": str(port or free_port()), "WORLD_SIZE": str(world),
        }  # fmt: skip
        return [
            self.start(command, common | {"RANK": str(rank), "LOCAL_RANK": str(local)}, log=log and Path(f"{log}.{rank}"),
                       faults=[fault for fault in faults if fault.get("rank", rank) == rank])
            for local, rank in enumerate(here)
        ]  # fmt: skip

    def ranks(self, command: Sequence[Any], world: int, timeout: float = 300) -> "list[subprocess.CompletedProcess[str]]":
        """Run `command` on all ranks of one machine."""
        ranks = self.start_ranks(command, world)
        return [subprocess.CompletedProcess(command, status, *rank.said())
                for status, rank in zip(statuses(ranks, timeout), ranks, strict=True)]  # fmt: skip

    def environment(self, folder: Path) -> Path:
        """An environment for src/env.sh, made in `folder`: its python runs our scripts here, and all else really. For chains
        of commands, which would spend most of their time on imports."""
        return make_environment(folder, {"python": "forks/python"}, FORKS_SOCKET=str(self.place))

    @property
    def place(self) -> Path:
        """Where the server listens; asking for it starts the server."""
        self.start_server()
        return self._folder / "socket"

    def start_server(self) -> None:
        """Start the server, if it is not there, without waiting for its imports: requests queue at its socket."""
        if self._server is not None:
            return
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
        inside = ["ip", "netns", "exec", self._namespace] if self._namespace else []
        with socket.socket(socket.AF_UNIX) as listener, (self._folder / "server.log").open("wb") as log:
            listener.bind(str(self._folder / "socket"))
            listener.listen(64)
            self._server = subprocess.Popen(
                [*inside, sys.executable, "-m", "harness.server", str(listener.fileno())],
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[listener.fileno()],
                env=without_ranks() | paths | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def close(self) -> None:
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait(timeout=60)

    def _ask(self, task: dict[str, Any], streams: Sequence[int]) -> Any:
        try:
            return ask(str(self.place), task, streams)
        except ConnectionError as error:
            raise AssertionError(f"{error}: {(self._folder / 'server.log').read_text()}") from error


def without_ranks() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def statuses(forks: Sequence[Fork], timeout: float = 300) -> list[int]:
    """Exit statuses once all have ended; one that hangs, stopped, is ended once its peers have noticed."""
    hanging = [fork for fork in forks if fork.wait(timeout) == "stopped"]
    for fork in hanging:
        fork.send_signal(signal.SIGKILL)
        fork.wait(timeout)
    return [fork.returncode for fork in forks]

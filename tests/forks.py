"""`python SCRIPT ARGUMENTS`, as by subprocess, but in a fork of a process that has the heavy libraries: see fork_server.py.

For tests of what a script of the pipeline does, many times over. That it starts from nothing, by the command that a user
gives, is for tests/test_readme_run.py.
"""

import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Fork:
    """A script that runs; what of subprocess.Popen the tests need."""

    def __init__(self, forks: "Forks", pid: int, out: Path, err: Path) -> None:
        self._forks, self.pid, self._out, self._err = forks, pid, out, err
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._forks.ask({"wait": self.pid, "seconds": 0})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        if self.returncode is None:
            self.returncode = self._forks.ask({"wait": self.pid, "seconds": timeout})
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"it still runs after {timeout} seconds: {self.said()}")
        return self.returncode

    def send_signal(self, sent: int) -> None:
        os.kill(self.pid, sent)

    def said(self) -> tuple[str, str]:
        """What it has written to stdout and stderr so far."""
        return self._out.read_text(encoding="utf-8"), self._err.read_text(encoding="utf-8")

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        self.wait(timeout)
        return self.said()


class Forks:
    """The server, started when it is first asked for something."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._root, self._folder, self._numbers = root, folder, itertools.count()
        self._server: subprocess.Popen[str] | None = None

    def start(self, command: Sequence[Any], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Fork:
        """Start [sys.executable, SCRIPT, ARGUMENTS...] in `env`, by default this process's."""
        program, script, *arguments = map(str, command)
        assert program == sys.executable, command
        number = next(self._numbers)
        out, err = self._folder / f"out.{number}", self._folder / f"err.{number}"
        task = {
            "script": script, "arguments": arguments, "environment": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()), "out": str(out), "err": str(err),
        }  # fmt: skip
        return Fork(self, int(self.ask(task)), out, err)

    def run(
        self, command: Sequence[Any], env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """As subprocess.run with captured text."""
        fork = self.start(command, env, cwd)
        out, err = fork.communicate(timeout)
        assert fork.returncode is not None
        return subprocess.CompletedProcess(list(command), fork.returncode, out, err)

    def ranks(self, command: Sequence[Any], world: int, timeout: float = 300) -> list[subprocess.CompletedProcess[str]]:
        """Run `command` on so many ranks of one machine, with the variables that DeepSpeed's launcher sets."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [
            self.start(command, os.environ | common | {"RANK": str(k), "LOCAL_RANK": str(k), "WORLD_SIZE": str(world)})
            for k in range(world)
        ]
        said = [rank.communicate(timeout) for rank in ranks]
        return [
            subprocess.CompletedProcess(list(command), rank.wait(), *texts) for rank, texts in zip(ranks, said, strict=True)
        ]

    def environment(self, folder: Path) -> Path:
        """An environment for src/env.sh, made in `folder`: its python runs our scripts here, its launcher starts one rank.

        For whole chains of commands, which would spend most of their time on imports. All other words go to the real python.
        """
        client = Path(__file__).parent / "fork_client.py"
        scripts = {
            "python": f"""case "${{1:-}}" in */src/*.py | */experiments/*.py)
    exec {shlex.join([sys.executable, "-IS", str(client), str(self.socket)])} "$@" ;;
esac
exec {shlex.quote(sys.executable)} "$@\"""",
            "deepspeed": """while (($#)) && [[ "$1" != *.py ]]; do shift; done
exec "$(dirname "$0")/python" "$@\"""",
        }
        (folder / "bin").mkdir(parents=True)
        for name, script in scripts.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
            (folder / "bin" / name).chmod(0o755)
        return folder

    @property
    def socket(self) -> Path:
        """Where the server listens; asking for it starts the server."""
        self._server = self._server or self._started()
        return self._folder / "socket"

    def ask(self, task: dict[str, Any]) -> Any:
        server = self._server = self._server or self._started()
        assert server.stdin is not None
        server.stdin.write(json.dumps(task) + "\n")
        server.stdin.flush()
        return self._answer(server)

    def close(self) -> None:
        if self._server is not None and self._server.stdin is not None:
            self._server.stdin.close()
            self._server.wait(timeout=60)

    def _started(self) -> "subprocess.Popen[str]":
        kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        environment = {**kept, "PYTHONPATH": str(self._root / "src"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).parent / "fork_server.py"), str(self._folder / "socket")]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        while self._answer(server) != "ready":
            pass
        return server

    def _answer(self, server: "subprocess.Popen[str]") -> Any:
        assert server.stdout is not None
        while line := server.stdout.readline():
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue  # a library's own word
        raise AssertionError("the server of scripts died")

"""The steps of the pipeline on tiny random models, as the tests of faults run them and compare what they leave."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from training.machines import FIGURES

STEPS = ("sample", "score", "pair", "train", "evaluate")
_UNEQUAL = ("seconds", "commit")
"""Fields of manifests that two runs need not share; the commit may move while the tests run."""


@dataclass(frozen=True)
class Step:
    """One step, which always writes to the same folder, so that no path differs between runs."""

    name: str
    script: Path
    flags: tuple[str, ...]
    out: Path
    given: Path | None = None
    """What lies in `out` before the step."""
    settings: dict[str, Any] = field(default_factory=dict)

    def prepare(self, keep: bool = False) -> None:
        """Empty `out` but for what the step is given; with `keep` the folder itself stays, a mount point."""
        self.out.mkdir(exist_ok=True)
        for path in self.out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.given is not None:
            shutil.copytree(self.given, self.out, dirs_exist_ok=True)
        elif not keep:
            self.out.rmdir()


class Server:
    """A step_server.py and what its steps say."""

    def __init__(self, root: Path, room: Path) -> None:
        environment = {
            **os.environ, "PYTHONPATH": str(root / "src"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo", "TQDM_DISABLE": "1",
        }  # fmt: skip
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DRDPO_STOP_FILE", "DRDPO_ENGINES"):
            environment.pop(name, None)
        self.room, self.started = room, 0
        command = [sys.executable, str(Path(__file__).parent / "step_server.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._answer() == "ready"

    def start(self, step: Step, fault: dict[str, Any] | None = None) -> int:
        """Start a step; returns its process id. Its output goes to `room`/log.<process id>."""
        self.started += 1
        log, count = self.room / f"log {self.started}", self.room / "count"
        task = {
            "script": str(step.script), "arguments": [*step.flags], "log": str(log), "count": str(count),
            "settings": step.settings, "fault": {"folder": str(step.out), **(fault or {})},
        }  # fmt: skip
        if step.name == "train":
            task["environment"] = {
                "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(_free_port()),
            }  # fmt: skip
        child = int(self._ask(task))
        (self.room / f"log.{child}").unlink(missing_ok=True)
        (self.room / f"log.{child}").symlink_to(log)
        return child

    def wait(self, child: int, seconds: float = 300) -> int | str:
        """Exit status, "stopped" or "running"; see step_server.py."""
        return self._ask({"wait": child, "seconds": seconds})

    def run(self, step: Step, fault: dict[str, Any] | None = None) -> tuple[int | str, str]:
        """(Exit status, output) of a step."""
        child = self.start(step, fault)
        return self.wait(child), self.said(child)

    def said(self, child: int) -> str:
        return (self.room / f"log.{child}").read_text()

    def changes(self) -> int:
        """How often the step that ended last changed its folder."""
        return int((self.room / "count").read_text())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _ask(self, task: dict[str, Any]) -> Any:
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        assert line, "the server of steps died"
        return json.loads(line)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def contents(folder: Path) -> dict[str, Any]:
    """{name: content} of every file of a result, hidden ones included, without what no two runs share."""
    return {
        str(path.relative_to(folder)): content_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _is_log(path.relative_to(folder))
    }


def _is_log(name: Path) -> bool:
    """Does a file tell of one process, or hold DeepSpeed's pickles, whose equality tests/training/test_resume.py shows?

    A killed owner's lock file too, which locks nothing, and which a run that finds all done has no cause to remove.
    """
    return name.name == ".lock" or name.parts[0] in ("tensorboard", "resume", "logs") or name.suffix == ".log"


def content_of(path: Path) -> Any:
    if path.name == "metrics.jsonl":
        lines = map(json.loads, path.read_text().splitlines())
        return [{name: line[name] for name in FIGURES if name in line} for line in lines]
    if path.suffix == ".json":
        return _equal_part(json.loads(path.read_text()))
    if path.suffix == ".md":
        return re.sub(r"commit [0-9a-f]{40}(-dirty)?", "commit", path.read_text())
    return path.read_bytes()


def _equal_part(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _equal_part(content) for name, content in value.items() if name not in _UNEQUAL}
    return value


def check_nothing_partial(folder: Path, expected: dict[str, Any]) -> None:
    """Is every file that has its final name whole?

    Files that grow by whole lines (metrics.jsonl, hidden parts) and logs are none of it; manifests name what is done so far.
    """
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts) or _is_log(name):
            continue
        if path.name == "metrics.jsonl":
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as stored:
                assert stored.keys(), path
        found = content_of(path)
        if str(name) in expected and path.name not in ("manifest.json", "rejects.jsonl"):
            assert found == expected[str(name)], f"{name} is not what it will be"


def errors_of(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]

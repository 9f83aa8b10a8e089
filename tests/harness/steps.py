"""The steps of the pipeline on tiny random models, as the tests of faults run them and compare what they leave."""

import json
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from harness.forks import Fork, Forks, without_ranks
from harness.runs import FIGURES

STEPS = ("sample", "score", "pair", "train", "evaluate")
QUIET = {"TQDM_DISABLE": "1"}
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

    def start(self, forks: Forks, fault: dict[str, Any] | None = None) -> Fork:
        """Start the step, with a fault of its output folder (see faults.py)."""
        command = [sys.executable, self.script, *self.flags]
        faults = [{"folder": str(self.out), "count": str(self._count), **(fault or {})}]
        faults += [{"at": place, "value": value} for place, value in self.settings.items()]
        if self.name == "train":
            return forks.start_ranks(command, 1, faults=faults, **QUIET)[0]
        environment = without_ranks() | QUIET | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        return forks.start(command, environment, faults=faults)

    def run(self, forks: Forks, fault: dict[str, Any] | None = None) -> tuple[int | str, str]:
        """(Exit status, output)."""
        fork = self.start(forks, fault)
        return fork.wait(), "".join(fork.said())

    def changes(self) -> int:
        """How often the run that ended last changed its folder."""
        return int(self._count.read_text())

    @property
    def _count(self) -> Path:
        return self.out.with_name(f"changes of {self.name}")


def contents(folder: Path) -> dict[str, Any]:
    """{name: content} of every file of a result, hidden ones included, without what no two runs share."""
    return {
        str(path.relative_to(folder)): _content_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _is_log(path.relative_to(folder))
    }


def _is_log(name: Path) -> bool:
    """Is a file about one process, as a killed owner's lock, or a state, which tests/training/test_resume.py checks?"""
    return name.name == ".lock" or name.parts[0] in ("tensorboard", "resume", "logs") or name.suffix == ".log"


def _content_of(path: Path) -> Any:
    if path.name == "metrics.jsonl":
        lines = map(json.loads, path.read_text().splitlines())
        return [{name: line[name] for name in FIGURES if name in line} for line in lines]
    if path.suffix == ".json":
        return json.loads(path.read_text(), object_pairs_hook=lambda pairs: {k: v for k, v in pairs if k not in _UNEQUAL})
    if path.suffix == ".md":
        return re.sub(r"commit [0-9a-f]{40}(-dirty)?", "commit", path.read_text())
    return path.read_bytes()


def check_nothing_partial(folder: Path, expected: dict[str, Any]) -> None:
    """Is every file with its final name whole? Files that grow by lines and logs are exempt; manifests, rejects.jsonl and
    eval_pairs.json tell of what is done so far."""
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts) or _is_log(name):
            continue
        if path.name == "metrics.jsonl":
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as stored:
                assert stored.keys(), path
        found = _content_of(path)
        if str(name) in expected and path.name not in ("manifest.json", "rejects.jsonl", "eval_pairs.json"):
            assert found == expected[str(name)], f"{name} is not what it will be"


def errors_of(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


def finish(step: Step, forks: Forks, undisturbed: Any) -> None:
    """The same command ends the work, and its result is the undisturbed one."""
    status, said = step.run(forks)
    assert status == 0, said
    assert contents(step.out) == undisturbed.contents

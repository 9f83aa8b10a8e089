"""The pairs of most tests of the objective, the data of most runs, and steps of the real engine."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.forks import Forks
from harness.policies import four_pairs
from harness.runs import write_pairs

from drdpo.training.data import Pair


@pytest.fixture(scope="session")
def pairs() -> list[Pair]:
    return four_pairs()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preference data set of ten training and three test pairs."""
    return write_pairs(tmp_path_factory.mktemp("preference data"))


@pytest.fixture(scope="session")
def engine_work(tiny_policy: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs cases of engine_worker.py in one start of some ranks; returns the folder of their results."""

    def run(cases: dict[str, Any], pairs: list[list[list[int]]], ranks: int = 2) -> Path:
        folder = tmp_path_factory.mktemp("deep speed")
        (folder / "cases.json").write_text(json.dumps(cases))
        (folder / "pairs.json").write_text(json.dumps(pairs))
        worker = Path(__file__).parent / "engine_worker.py"
        command = [sys.executable, worker, folder / "cases.json", folder / "pairs.json", tiny_policy, folder]
        for done in forks.ranks(command, ranks, timeout=600):
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return folder

    return run

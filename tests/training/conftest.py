"""The pairs of most tests of the objective, and the data of most runs."""

from pathlib import Path

import pytest
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

"""The pairs of most tests of the objective."""

import pytest
from harness.policies import four_pairs

from drdpo.training.data import Pair


@pytest.fixture(scope="session")
def pairs() -> list[Pair]:
    return four_pairs()

"""A stand-in machine for ranks, which several files of tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Machine


@pytest.fixture(scope="session")
def machine(root: Path) -> Iterator[Machine]:
    machine = Machine(root)
    yield machine
    machine.close()

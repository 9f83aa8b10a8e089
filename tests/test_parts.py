"""Resumable parts: what a killed run leaves, and what the next one takes from it."""

import json
from pathlib import Path

import pytest

from drdpo.errors import UsageError
from drdpo.folder import Parts

MADE_BY = {"model": "abc", "temperature": 0.7}
CONTENT = {"7": [[[1, 2], "stop"], [[3], "length"]], "9": "é\n"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out put" / ".test.parts"


def opened(folder: Path, made_by: dict = MADE_BY, plan: object = 2, overwrite: bool = False, rank: int = 0) -> Parts:
    parts = Parts(folder, made_by, overwrite, rank)
    parts.open(plan)
    return parts


def test_finished_parts_of_all_ranks_come_back_with_their_plan(folder):
    parts, other = opened(folder), opened(folder, rank=1)
    assert parts.plan is None and parts.done == set()
    parts.add(1, CONTENT)
    other.add(0, "zero")
    parts.find()
    assert (parts.done, parts.read(0)) == ({0, 1}, "zero")
    again = Parts(folder, MADE_BY, overwrite=False)
    assert again.plan == 2
    again.open(2)
    assert (again.done, again.read(1), again.read(0)) == ({0, 1}, CONTENT, "zero")
    assert opened(folder, plan=3).done == set(), "another plan starts again"
    assert json.loads((folder / "plan.json").read_text()) == {"made_by": MADE_BY, "plan": 3}
    again.remove()
    assert not folder.exists()


def test_a_part_whose_write_was_killed_is_not_there(folder):
    opened(folder).add(0, CONTENT)
    (folder / ".part_1.json.abcdefgh.tmp").write_text("[1, ")
    again = opened(folder)
    assert again.done == {0}
    again.add(1, "new")
    last = opened(folder)
    assert (last.read(0), last.read(1)) == (CONTENT, "new")


def test_another_configuration_is_refused_and_named(folder):
    opened(folder).add(0, CONTENT)
    with pytest.raises(UsageError, match=r"temperature \(0.7 -> 1.0\)"):
        Parts(folder, {**MADE_BY, "temperature": 1.0}, overwrite=False)
    assert opened(folder).done == {0}, "a refusal loses nothing"
    other = Parts(folder, {**MADE_BY, "temperature": 1.0}, overwrite=True)
    assert other.plan is None
    other.open(2)
    assert other.done == set()

"""The part file: what a killed run leaves, and what the next one takes from it."""

from pathlib import Path

import pytest

from drdpo.errors import UsageError
from drdpo.sampling.engines import Sample
from drdpo.sampling.sample import PartFile

MADE_BY = {"model": "abc", "temperature": 0.7}
BLOCK = {7: [Sample([1, 2], "stop"), Sample([3], "length")], 9: [Sample([], "abort"), Sample([4], "length")]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sampled" / ".test.part.jsonl"


def test_finished_blocks_come_back(path: Path) -> None:
    part = PartFile(path, MADE_BY, 2, overwrite=False)
    part.add(1, BLOCK)
    part.add(0, {5: [Sample([8], "stop")]})
    again = PartFile(path, MADE_BY, 64, overwrite=False)
    assert again.done == {0, 1}
    assert again.read(1) == BLOCK
    assert again.prompts_per_block == 2, "blocks keep their size, or their numbers would mean other prompts"
    again.remove()
    assert not path.exists()


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_cut_line_is_dropped_and_overwritten(path: Path, cut: int) -> None:
    part = PartFile(path, MADE_BY, 2, overwrite=False)
    part.add(0, BLOCK)
    part.add(1, BLOCK)
    path.write_bytes(path.read_bytes()[:-cut])
    again = PartFile(path, MADE_BY, 2, overwrite=False)
    assert again.done == {0}
    again.add(1, {5: [Sample([8], "stop")]})
    last = PartFile(path, MADE_BY, 2, overwrite=False)
    assert last.read(0) == BLOCK
    assert last.read(1) == {5: [Sample([8], "stop")]}


def test_a_cut_header_starts_anew(path: Path) -> None:
    PartFile(path, MADE_BY, 2, overwrite=False)
    path.write_bytes(path.read_bytes()[:10])
    assert PartFile(path, MADE_BY, 3, overwrite=False).done == set()


def test_other_flags_are_refused_and_named(path: Path) -> None:
    PartFile(path, MADE_BY, 2, overwrite=False).add(0, BLOCK)
    with pytest.raises(UsageError, match=r"temperature \(0.7 -> 1.0\)"):
        PartFile(path, {**MADE_BY, "temperature": 1.0}, 2, overwrite=False)
    assert PartFile(path, MADE_BY, 2, overwrite=False).done == {0}, "a refusal costs nothing"
    assert PartFile(path, {**MADE_BY, "temperature": 1.0}, 2, overwrite=True).done == set()

"""The embedded prompts: counts, roles, ids, lengths, no near duplicates, and the folder that setup writes."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from drdpo.assets.embedded import make_prompts, prompts_are_made
from drdpo.errors import DataError
from drdpo.folder import read_manifest
from drdpo.records import SPLITS, Prompt, read_records, read_rows

CATEGORIES = ("facts", "writing", "code", "reasoning", "advice", "safety", "summarise_rewrite", "two_turn")
IDS = {"train": range(0, 192), "test": range(1000, 1048)}
SYSTEM_MESSAGES = {"train": 8, "test": 2}
MAX_JACCARD = 0.6
"""Largest Jaccard index |A & B| / |A | B| of the words of two different prompts."""
WORDS = (5, 100)
"""Fewest and most words of a whole prompt, all its turns together."""


def _path(root: Path, split: str) -> Path:
    return root / "src" / "drdpo" / "assets" / "prompts" / f"{split}.jsonl"


def _prompts(root: Path, split: str) -> list[Prompt]:
    return read_records(_path(root, split), Prompt.from_row)


def _rows(root: Path, split: str) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(_path(root, split))]


def _text(prompt: Prompt) -> str:
    return "\n".join(message["content"] for message in prompt.prompt)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def _jaccard(left: set[str], right: set[str]) -> float:
    return len(left & right) / len(left | right)


@pytest.mark.parametrize("split", SPLITS)
def test_ids_count_up_from_the_first_of_the_split(root: Path, split: str) -> None:
    assert [prompt.prompt_id for prompt in _prompts(root, split)] == list(IDS[split])


@pytest.mark.parametrize("split", SPLITS)
def test_rows_have_only_the_documented_fields(root: Path, split: str) -> None:
    for row in _rows(root, split):
        assert set(row) == {"prompt_id", "category", "prompt"}, row
        assert all(set(message) == {"role", "content"} for message in row["prompt"]), row


@pytest.mark.parametrize("split", SPLITS)
def test_categories_take_turns(root: Path, split: str) -> None:
    found = [row["category"] for row in _rows(root, split)]
    assert found == list(CATEGORIES) * (len(IDS[split]) // len(CATEGORIES))


@pytest.mark.parametrize("split", SPLITS)
def test_roles_alternate_and_end_in_a_user_turn(root: Path, split: str) -> None:
    openings: Counter[bool] = Counter()
    for row in _rows(root, split):
        roles = [message["role"] for message in Prompt.from_row(row).prompt]
        openings[roles[0] == "system"] += 1
        turns = roles[1:] if roles[0] == "system" else roles
        expected = ["user", "assistant", "user"] if row["category"] == "two_turn" else ["user"]
        assert turns == expected, row
    assert openings[True] == SYSTEM_MESSAGES[split]


@pytest.mark.parametrize("split", SPLITS)
def test_contents_are_stripped_and_not_empty(root: Path, split: str) -> None:
    for prompt in _prompts(root, split):
        for message in prompt.prompt:
            assert message["content"], prompt
            assert message["content"] == message["content"].strip(), prompt


@pytest.mark.parametrize("split", SPLITS)
def test_lengths_are_in_range_and_varied(root: Path, split: str) -> None:
    lengths = [len(_words(_text(prompt))) for prompt in _prompts(root, split)]
    assert min(lengths) >= WORDS[0]
    assert max(lengths) <= WORDS[1]
    assert sum(length <= 15 for length in lengths) >= len(lengths) // 5
    assert sum(length >= 35 for length in lengths) >= len(lengths) // 8


def test_no_near_duplicates(root: Path) -> None:
    """Over both splits at once."""
    prompts = [prompt for split in SPLITS for prompt in _prompts(root, split)]
    asked = [(prompt.prompt_id, set(_words(_text(prompt)))) for prompt in prompts]
    assert len({_text(prompt).casefold() for prompt in prompts}) == len(prompts)
    near = [
        (left_id, right_id)
        for (left_id, left), (right_id, right) in itertools.combinations(asked, 2)
        if _jaccard(left, right) > MAX_JACCARD
    ]
    assert near == []


def test_jaccard_by_hand() -> None:
    assert _jaccard({"a", "b", "c"}, {"b", "c", "d"}) == 0.5


def _line(number: int, text: str = "Why?") -> str:
    return json.dumps({"prompt_id": number, "category": "facts", "prompt": [{"role": "user", "content": text}]}) + "\n"


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    folder = tmp_path / "committed"
    folder.mkdir()
    (folder / "train.jsonl").write_text(_line(0) + _line(1, "How?"))
    (folder / "test.jsonl").write_text(_line(1000, "Where?"))
    return folder


def test_plain_records_and_a_manifest(committed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    assert not prompts_are_made(folder, committed)
    make_prompts(folder, committed)
    assert prompts_are_made(folder, committed)
    assert json.loads((folder / "test.jsonl").read_text()) == {
        "prompt_id": 1000,
        "prompt": [{"role": "user", "content": "Where?"}],
    }
    facts = read_manifest(folder)["assets"]
    assert facts["count"] == {"train": 2, "test": 1}
    assert facts["categories"] == {"train": {"facts": 2}, "test": {"facts": 1}}
    (committed / "train.jsonl").write_text(_line(0))
    assert not prompts_are_made(folder, committed), "changed prompts are noticed"


@pytest.mark.parametrize(
    ("line", "message"),
    [(_line(0), r'train\.jsonl, row 3: field "prompt_id" repeats'), ('{"prompt_id": 2}\n', 'row 3: .*"prompt"')],
)
def test_a_bad_row_leaves_nothing(committed: Path, tmp_path: Path, line: str, message: str) -> None:
    with (committed / "train.jsonl").open("a") as stream:
        stream.write(line)
    with pytest.raises(DataError, match=message):
        make_prompts(tmp_path / "datasets" / "prompts", committed)
    assert not list((tmp_path / "datasets").iterdir())


def test_the_committed_prompts_are_written(tmp_path: Path) -> None:
    make_prompts(tmp_path / "prompts")
    train = read_records(tmp_path / "prompts" / "train.jsonl", Prompt.from_row)
    test = read_records(tmp_path / "prompts" / "test.jsonl", Prompt.from_row)
    assert len(train) >= 128
    assert len(test) >= 32
    assert not {prompt.prompt_id for prompt in train} & {prompt.prompt_id for prompt in test}

"""The embedded prompt set: counts, roles, ids, lengths, and no two prompts that are nearly the same."""

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from drdpo.records import SPLITS, Prompt, read_records, read_rows

CATEGORIES = ("facts", "writing", "code", "reasoning", "advice", "safety", "summarise_rewrite", "two_turn")
IDS = {"train": range(0, 192), "test": range(1000, 1048)}
SYSTEM_MESSAGES = {"train": 8, "test": 2}
MAX_JACCARD = 0.6
"""Largest share of common words, |A & B| / |A | B|, of two prompts that count as different."""
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
def test_rows_hold_only_the_documented_fields(root: Path, split: str) -> None:
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


def test_no_two_prompts_are_nearly_the_same(root: Path) -> None:
    """Over both files at once, so a test prompt is not in train either."""
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

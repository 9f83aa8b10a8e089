"""HelpSteer2's flattened conversations as messages."""

import json
from pathlib import Path

import pytest

from drdpo.assets.helpsteer2 import split_helpsteer_turns


def test_one_turn_is_kept_whole() -> None:
    assert split_helpsteer_turns(" Hi\n\nUser\nthere ") == [{"role": "user", "content": "Hi\n\nUser\nthere"}]


def test_turns_alternate() -> None:
    text = "Hi\n<extra_id_1>Assistant\nHello,\n\nyou\n<extra_id_1>User\nBye"
    assert split_helpsteer_turns(text) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello,\n\nyou"},
        {"role": "user", "content": "Bye"},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hi\n<extra_id_1>Assistant\nHello", "does not end in a user turn"),
        ("Hi\n<extra_id_1>User\nagain", "turn 2 is the user's"),
        ("Hi\n<extra_id_1>Assistant\n \n<extra_id_1>User\nBye", "turn 2 is empty"),
        ("  ", "turn 1 is empty"),
        ("<extra_id_1>Assistant\nHello", "turn 1 is the assistant's"),
    ],
)
def test_broken_conversations_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_helpsteer_turns(text)


def test_every_real_prompt_splits(root: Path) -> None:
    data = root.parent / "shared" / "data" / "helpsteer2"
    if not data.is_dir():
        pytest.skip("the HelpSteer2 rows are not here")
    turns = []
    for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines():
        messages = split_helpsteer_turns(json.loads(line)["prompt"])
        assert all("<extra_id_1>" not in message["content"] for message in messages)
        turns.append(len(messages))
    assert (len(turns), sum(n > 1 for n in turns)) == (1000, 104)
    assert all(n % 2 == 1 for n in turns)

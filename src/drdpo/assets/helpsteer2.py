"""HelpSteer2's prompts (nvidia/HelpSteer2, CC-BY-4.0, arXiv 2406.08673): each once, conversations split into messages.

The data set holds two rated responses a prompt, in consecutive rows; only the prompts are used here.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drdpo.errors import DataError
from drdpo.folder import atomic_folder, write_manifest
from drdpo.records import SPLITS, Message, Prompt, write_records

LICENCE = (
    "CC-BY-4.0; HelpSteer2, NVIDIA (Wang et al. 2024, arXiv 2406.08673); the prompts, without repeats, split into turns"
)
UPSTREAM = {"train": "train", "test": "validation"}
"""Our split -> the data set's."""

FIRST_TEST_ID = 1_000_000
"""No prompt_id stands for two prompts, not even over both splits."""

_FIELD = "prompt"
_BROKEN = "<extra_id_"
_MARKER = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


@dataclass
class Conversion:
    """What became of the rows of one split."""

    prompts: list[Prompt] = field(default_factory=list)
    rows: int = 0
    repeated: int = 0
    broken_turns: int = 0
    also_in_test: int = 0

    def counts(self) -> dict[str, int]:
        multi_turn = sum(len(prompt.prompt) > 1 for prompt in self.prompts)
        return {
            "rows": self.rows, "prompts": len(self.prompts), "multi_turn": multi_turn, "dropped_repeated": self.repeated,
            "dropped_broken_turns": self.broken_turns, "dropped_also_in_test": self.also_in_test,
        }  # fmt: skip


def convert_rows(rows: Iterable[dict[str, Any]], first_id: int = 0, held_out: Iterable[Prompt] = ()) -> Conversion:
    """Turn rows of the data set into prompts.

    Args:
        rows: JSON objects with the text field `prompt`; other fields are not read.
        first_id: prompt_id of the first prompt; the others count on.
        held_out: prompts to leave out (the test split's, for the train split).

    Returns:
        The prompts in the order in which they first appear, and counts of the rows left out: a repeated prompt, turns
        that do not alternate or do not end in the user's, a held-out prompt.

    Raises:
        DataError: a row without the text field; the message names the row.
    """
    result = Conversion()
    held = {_key(prompt.prompt) for prompt in held_out}
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        result.rows += 1
        text = row.get(_FIELD)
        if not isinstance(text, str):
            raise DataError(f'HelpSteer2, row {number}: field "{_FIELD}" is missing or is not text')
        try:
            messages = _messages(text)
        except ValueError:
            result.broken_turns += 1
            continue
        key = _key(messages)
        if key in seen:
            result.repeated += 1
            continue
        seen.add(key)
        if key in held:
            result.also_in_test += 1
            continue
        result.prompts.append(Prompt(first_id + len(result.prompts), messages))
    return result


def write_prompts(
    folder: Path, rows: Mapping[str, Iterable[dict[str, Any]]], source: dict[str, Any]
) -> dict[str, dict[str, int]]:
    """Convert both splits and write `folder/{train,test}.jsonl` and its manifest, whole or not at all.

    Args:
        folder: datasets/helpsteer2_prompts.
        rows: the data set's rows by our split name.
        source: hub id and revision, for the manifest.

    Returns:
        {split: counts}.

    Raises:
        DataError: a split without a usable prompt, or from convert_rows.
    """
    test = convert_rows(rows["test"], first_id=FIRST_TEST_ID)
    splits = {"train": convert_rows(rows["train"], held_out=test.prompts), "test": test}
    for split, converted in splits.items():
        if not converted.prompts:
            raise DataError(f"HelpSteer2: the {UPSTREAM[split]} split holds no usable prompt")
    counts = {split: splits[split].counts() for split in SPLITS}
    with atomic_folder(folder) as aside:
        for split in SPLITS:
            write_records(aside / f"{split}.jsonl", splits[split].prompts)
        write_manifest(aside, "assets", source, licence=LICENCE, count=counts)
    return counts


def split_helpsteer_turns(text: str) -> list[Message]:
    """Split a HelpSteer2 prompt into messages.

    About 29% of HelpSteer2's prompts are conversations, written as one string: the first user turn, then turns opened by
    "\\n<extra_id_1>Assistant\\n" and "\\n<extra_id_1>User\\n".

    Args:
        text: the data set's `prompt` field.

    Returns:
        Messages that alternate user, assistant, ..., user, with outer white space stripped.

    Raises:
        ValueError: the turns do not alternate, one is empty, or the last is not the user's.
    """
    first, *rest = _MARKER.split(text)
    if not first.strip() and rest:  # The text opens with a marker of its own.
        turns = list(zip(rest[0::2], rest[1::2], strict=True))
    else:
        turns = [("User", first), *zip(rest[0::2], rest[1::2], strict=True)]
    messages = [{"role": role.lower(), "content": content.strip()} for role, content in turns]
    for number, message in enumerate(messages):
        expected = "assistant" if number % 2 else "user"
        if message["role"] != expected:
            raise ValueError(f"turn {number + 1} is the {message['role']}'s where the {expected}'s is due")
        if not message["content"]:
            raise ValueError(f"turn {number + 1} is empty")
    if messages[-1]["role"] != "user":
        raise ValueError("the prompt does not end in a user turn")
    return messages


def parse_lines(lines: Iterable[str], name: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a downloaded file's lines; raises DataError for a line that is none."""
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{name}, row {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{name}, row {number}: not a JSON object")
        yield row


def _messages(text: str) -> list[Message]:
    messages = split_helpsteer_turns(text)
    if any(_BROKEN in message["content"] for message in messages):
        raise ValueError("a turn marker in an unknown form")
    return messages


def _key(messages: list[Message]) -> str:
    return json.dumps([(message["role"], message["content"]) for message in messages])

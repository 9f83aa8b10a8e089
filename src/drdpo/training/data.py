"""Preferences from a folder, a saved data set or the hub, as token ids of prompt, chosen and rejected answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from drdpo import chat, distributed
from drdpo.config import TrainConfig
from drdpo.errors import DataError
from drdpo.progress import progress
from drdpo.records import Message, Preference, read_rows


@dataclass(frozen=True)
class Pair:
    """Token ids of one preference; an answer that was not cut ends in the template's end-of-turn token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    prompt_id: int | None = field(default=None, compare=False)
    """Of the record; says which pair is meant."""

    def __len__(self) -> int:
        """Tokens of the longer sequence."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def load_preferences(dataset_path: str, split: str) -> list[Preference]:
    """Read one split of a preference data set.

    Args:
        dataset_path: a folder with <split>.jsonl, a folder of datasets.save_to_disk, or a hub id. Rows are our own
            records or TRL's form: prompt, chosen and rejected as message lists or texts, or chosen and rejected with
            the shared prompt inside.
        split: "train" or "test".

    Raises:
        DataError: no such data set or split, no rows, or a row without the fields; names file, row and field.
    """
    folder = Path(dataset_path)
    if folder.is_dir() and not (folder / "dataset_dict.json").is_file():
        source = str(folder / f"{split}.jsonl")
        rows = read_rows(Path(source))
    else:
        source = f"{dataset_path} [{split}]"
        rows = enumerate(_hub_rows(dataset_path, split), start=1)
    preferences = []
    for number, row in rows:
        try:
            preferences.append(Preference.from_trl(row, number))
        except ValueError as error:
            raise DataError(f"{source}, row {number}: {error}") from error
    if not preferences:
        raise DataError(f"{source}: the data set has no rows")
    return preferences


REASONS = ("prompt too long", "template refuses", "empty answer", "equal answers", "answer cut", "text encoded")


def tokenise(preferences: list[Preference], tokenizer: chat.Tokenizer, max_len: int) -> tuple[list[Pair], dict[str, int]]:
    """Turn preferences into token ids.

    Sampled ids are used where they are there and spell the stored text in this tokenizer; otherwise the text is encoded.
    An answer is cut at max_len tokens in all and then has no end-of-turn token.

    Args:
        preferences: of one split.
        tokenizer: of the policy.
        max_len: longest prompt + answer in tokens.

    Returns:
        The pairs that can be trained on, and counts of what was done: "prompt too long", "template
        refuses", "empty answer" and "equal answers" were left out, "answer cut" and "text encoded" were not.
    """
    pairs, counts = [], dict.fromkeys(REASONS, 0)
    for preference in progress(preferences, desc="tokenise", unit="pair", disable=not distributed.is_main()):
        try:
            prompt = chat.prompt_token_ids(tokenizer, preference.prompt)
        except (TemplateError, ValueError):
            counts["template refuses"] += 1
            continue
        room = max_len - len(prompt)
        if room < 1:
            counts["prompt too long"] += 1
            continue
        answers = []
        for message, sampled in (
            (preference.chosen, preference.chosen_token_ids),
            (preference.rejected, preference.rejected_token_ids),
        ):
            ids, encoded = _answer(tokenizer, message, sampled)
            counts["text encoded"] += encoded
            counts["answer cut"] += len(ids) > room
            answers.append(ids[:room])
        if not all(answers):
            counts["empty answer"] += 1
        elif answers[0] == answers[1]:
            counts["equal answers"] += 1
        else:
            pairs.append(Pair(prompt, answers[0], answers[1], preference.prompt_id))
    return pairs, counts


def _answer(tokenizer: chat.Tokenizer, answer: list[Message], sampled: list[int] | None) -> tuple[list[int], bool]:
    """Ids of an answer, and whether they had to be made from its text."""
    if sampled is None:
        return chat.answer_token_ids(tokenizer, answer), True
    known = all(token < len(tokenizer) for token in sampled)
    if known and chat.decode(tokenizer, sampled) == answer[0]["content"].strip():
        return list(sampled), False
    return chat.answer_token_ids(tokenizer, answer), True


def _hub_rows(dataset_path: str, split: str) -> Any:
    import datasets

    folder = Path(dataset_path)
    try:
        found = datasets.load_from_disk(dataset_path) if folder.is_dir() else datasets.load_dataset(dataset_path)
    except Exception as error:
        # The hub client raises errors of a dozen libraries; all of them mean that there is no data.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{dataset_path}: neither a folder of preferences nor a data set of the hub ({reason})") from error
    names = [split] if split == "train" else ["test", "validation", "eval"]
    for name in names:
        if name in found:
            return found[name]
    raise DataError(f"{dataset_path}: no split {' or '.join(names)} (it has {', '.join(found)})")


def row_tokens(pair: Pair, config: TrainConfig) -> int:
    """Tokens that a pair takes in a packed row."""
    prompts = 2 if config.method == "wdpo" and config.wdpo_prompt == "per_sequence" else 1
    return prompts * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def dealt_lengths(pairs: Sequence[Pair], config: TrainConfig) -> list[int]:
    """The length of every pair that dealing goes by: tokens in a row, or of the longer sequence."""
    return [len(pair) if config.micro_batch_tokens is None else row_tokens(pair, config) for pair in pairs]

"""Rated answers: human ratings in HelpSteer2's row form, {prompt, response, <column>: rating, ...}, and what joins files."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drdpo.errors import DataError
from drdpo.helpsteer import split_helpsteer_turns
from drdpo.records import Message, is_text, read_rows
from drdpo.rewards.labels import LabelColumn, Scale


@dataclass(frozen=True)
class Rated:
    """N rated answers of one file, K objectives, P pairs."""

    conversations: list[list[Message]]
    """[N] messages, each ending in the rated answer."""
    labels_NK: np.ndarray
    """[N, K] on ArmoRM's scale, see labels.Scale; NaN where there is no rating."""
    quality_N: np.ndarray
    """[N] what people think of the answer: higher is better; NaN where it is not known."""
    pairs_P2: np.ndarray
    """[P, 2] rows of answers to one prompt, the better one first."""
    notes: tuple[str, ...]
    """What was masked or left out, and why; for the reader of the figures."""

    def __len__(self) -> int:
        return len(self.conversations)

    def prompts(self) -> list[str]:
        """[N] the prompts, so that equal ones are equal strings, white space at their ends aside."""
        return [prompt_key(messages) for messages in self.conversations]

    def keep(self, rows: Sequence[int]) -> "Rated":
        """The rows of these indices, and the pairs of which both answers are kept."""
        place = {row: index for index, row in enumerate(rows)}
        pairs = [(place[a], place[b]) for a, b in self.pairs_P2.tolist() if a in place and b in place]
        return Rated(
            [self.conversations[row] for row in rows], self.labels_NK[list(rows)], self.quality_N[list(rows)],
            np.array(pairs, dtype=np.int64).reshape(-1, 2), self.notes,
        )  # fmt: skip


def prompt_key(conversation: list[Message]) -> str:
    """A conversation without its last turn as a string."""
    return json.dumps([[message["role"], message["content"].strip()] for message in conversation[:-1]])


def prompt_numbers(keys: Sequence[str]) -> np.ndarray:
    """[N] the number of each row's prompt, in order of first appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def read_ratings(path: Path, columns: list[str], quality: Sequence[str], scale: Scale) -> Rated:
    """Read a ratings file. Answers to one prompt are paired.

    Args:
        path: JSON lines; rows of one prompt have the same prompt text.
        columns: the rating fields, in the order of K. A value that is missing, no number or out of range is masked there.
        quality: columns whose sum says which of two answers is better; without one of them an answer is in no pair.
        scale: of the ratings.

    Raises:
        DataError: naming file, row and field: a prompt or response that is no text, a column without ratings, more wrong
            values than slips would explain, or a file without rows.
    """
    conversations = []
    readers = [LabelColumn(column, scale) for column in columns]
    for number, row in read_rows(path):
        try:
            conversations.append(
                [*split_helpsteer_turns(_text(row, "prompt")), {"role": "assistant", "content": _text(row, "response")}]
            )
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        for reader in readers:
            reader.read(number, row.get(reader.field))
    if not conversations:
        raise DataError(f"{path}: the file has no rows")
    for reader in readers:
        reader.check(path)
    labels_NK = np.array([reader.labels for reader in readers], dtype=np.float64).T
    quality_N = labels_NK[:, [columns.index(name) for name in quality]].sum(axis=1)
    pairs_P2 = rating_pairs(prompt_numbers([prompt_key(messages) for messages in conversations]), quality_N)
    masked = [text for reader in readers if (text := reader.masked())]
    return Rated(conversations, labels_NK, quality_N, pairs_P2, tuple(f"{path.name}: masked {text}" for text in masked))


def rating_pairs(prompt_N: np.ndarray, quality_N: np.ndarray) -> np.ndarray:
    """Pairs (better, worse) of answers to one prompt; ties and answers without a rating make none.

    Returns:
        [pairs, 2] row indices.
    """
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompt_N):
        rows_of[int(prompt)].append(row)
    pairs = [
        (a, b) if quality_N[a] > quality_N[b] else (b, a)
        for rows in rows_of.values()
        for position, a in enumerate(rows)
        for b in rows[position + 1 :]
        if abs(quality_N[a] - quality_N[b]) > 1e-9
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def unseen(held_out: Rated, seen: set[str], path: Path) -> Rated:
    """The held-out rows whose prompt is in no training file; `path` is named where none is left.

    Raises:
        DataError: every prompt is also in a training file.
    """
    kept = [row for row, key in enumerate(held_out.prompts()) if key not in seen]
    if not kept:
        raise DataError(f"{path}: every held-out prompt is also among those of training")
    if seen_too := len(held_out) - len(kept):
        note = f"{path.name}: {seen_too} answers left out, whose prompt is also among those of training"
        return Rated(**{**vars(held_out.keep(kept)), "notes": (*held_out.notes, note)})
    return held_out


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'field "{name}" is {value!r}, not a text')
    if not is_text(value):
        raise ValueError(f'field "{name}" holds half of a surrogate pair (\\ud800 to \\udfff), no text')
    return value

"""Human ratings in HelpSteer2's row form: {prompt, response, <column>: rating from 0 to 4, ...}."""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drdpo.errors import DataError
from drdpo.helpsteer import split_helpsteer_turns
from drdpo.records import Message, read_rows

HIGHEST = 4
"""Ratings run from 0 to this."""


@dataclass(frozen=True)
class Ratings:
    """N rated answers to P prompts, K objectives."""

    conversations: list[list[Message]]
    """[N] messages, each ending in the rated answer."""
    prompt_N: np.ndarray
    """[N] index of the prompt, 0 to P - 1, in order of first appearance."""
    labels_NK: np.ndarray
    """[N, K] (rating + 0.5) / 5, ArmoRM's scale, so that 5 x - 0.5 gives the rating back; NaN where there is none."""

    def keep(self, rows: list[int]) -> "Ratings":
        """The rows of these indices."""
        return Ratings([self.conversations[row] for row in rows], self.prompt_N[rows], self.labels_NK[rows])


def read_ratings(path: Path, columns: list[str]) -> Ratings:
    """Read a ratings file.

    Args:
        path: JSON lines; rows of one prompt have the same prompt text.
        columns: the rating fields, in the order of K. A field that is null or absent in some row is masked there.

    Raises:
        DataError: naming file, row and field: a prompt or response that is no text, a rating that is no number from 0 to
            4, a column that no row has, or a file without rows.
    """
    conversations, prompts, labels = [], [], []
    numbers: dict[str, int] = {}
    for number, row in read_rows(path):
        try:
            conversations.append(
                [*split_helpsteer_turns(_text(row, "prompt")), {"role": "assistant", "content": _text(row, "response")}]
            )
            labels.append([_label(row, column) for column in columns])
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        prompts.append(numbers.setdefault(row["prompt"], len(numbers)))
    if not conversations:
        raise DataError(f"{path}: the file has no rows")
    labels_NK = np.array(labels, dtype=np.float64)
    for index, column in enumerate(columns):
        if np.isnan(labels_NK[:, index]).all():
            raise DataError(f'{path}: no row has a rating in the field "{column}"')
    return Ratings(conversations, np.array(prompts), labels_NK)


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


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'field "{name}" is {value!r}, not a text')
    return value


def _label(row: dict[str, Any], column: str) -> float:
    value = row.get(column)
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= HIGHEST:
        raise ValueError(f'field "{column}" is {value!r}, not a rating from 0 to {HIGHEST}')
    return (float(value) + 0.5) / (HIGHEST + 1)

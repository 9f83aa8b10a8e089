"""Preference files: pairs of answers to one prompt, usually with a score each, in TRL's forms or our own."""

from pathlib import Path
from typing import Any

import numpy as np

from drdpo.errors import DataError
from drdpo.records import Message, Preference, read_rows
from drdpo.rewards.labels import LabelColumn, Scale
from drdpo.rewards.ratings import Rated
from drdpo.trl import own_form

SIDES = ("chosen", "rejected")


def read_rated_pairs(path: Path, scale: Scale, columns: int, labelled: bool) -> Rated:
    """Read a preference file: two rated answers a row.

    A pair is (chosen, rejected), as the file says. It is none where the two scores are equal or contradict it, or the two
    texts are equal; a score that is missing, no number or out of range is masked, and the pair stays.

    Args:
        path: JSON lines {prompt, chosen, rejected}, texts or message lists, with `score_chosen` and `score_rejected` in
            the row or in its `metadata`.
        scale: of the scores.
        columns: K, of which the last one takes the scores where `labelled`; the others are NaN.
        labelled: are the scores labels of an objective?

    Raises:
        DataError: naming file, row and field: a row that is no preference, scores that are wrong or missing all over
            where they are labels, or a file without rows.
    """
    conversations: list[list[Message]] = []
    pairs: list[tuple[int, int]] = []
    readers = [LabelColumn(f"score_{side}", scale) for side in SIDES]
    left_out = {"an empty answer": 0, "equal scores": 0, "the rejected answer scored higher": 0, "equal texts": 0}
    for number, row in read_rows(path):
        preference = _preference(path, number, row)
        answers = [preference.chosen[0]["content"].strip(), preference.rejected[0]["content"].strip()]
        if not all(answers):
            left_out["an empty answer"] += 1
            continue
        for reader, side in zip(readers, SIDES, strict=True):
            reader.read(number, _score(row, side))
        reason = _no_pair(answers, readers[0].labels[-1], readers[1].labels[-1])
        if reason is None:
            pairs.append((len(conversations), len(conversations) + 1))
        else:
            left_out[reason] += 1
        conversations += [[*preference.prompt, answer] for answer in (preference.chosen[0], preference.rejected[0])]
    if not conversations:
        raise DataError(f"{path}: the file has no rows with two answers")
    if labelled:
        for reader in readers:
            reader.check(path, "; without scores, give --preferences_objective=")
    quality_N = np.array([reader.labels for reader in readers], dtype=np.float64).T.reshape(-1)
    labels_NK = np.full((len(conversations), columns), np.nan)
    if labelled:
        labels_NK[:, -1] = quality_N
    notes = [f"{path.name}: masked {text}" for reader in readers if (text := reader.masked())]
    notes += [f"{path.name}: rows that make no pair, {reason}: {count}" for reason, count in left_out.items() if count]
    return Rated(conversations, labels_NK, quality_N, np.array(pairs, dtype=np.int64).reshape(-1, 2), tuple(notes))


def _preference(path: Path, number: int, row: dict[str, Any]) -> Preference:
    try:
        # Scores are read apart: a wrong one masks itself, not the row.
        return Preference.from_row(own_form(row, number) | {"chosen_score": None, "rejected_score": None})
    except ValueError as error:
        raise DataError(f"{path}, row {number}: {error}") from error


def _score(row: dict[str, Any], side: str) -> Any:
    """`score_chosen`, of the row or of its metadata."""
    name = f"score_{side}"
    metadata = row.get("metadata")
    return row[name] if name in row else metadata.get(name) if isinstance(metadata, dict) else None


def _no_pair(answers: list[str], chosen: float, rejected: float) -> str | None:
    """Why a row makes no pair; None where it makes one. A comparison with a masked score, NaN, is False."""
    if answers[0] == answers[1]:
        return "equal texts"
    if chosen == rejected:
        return "equal scores"
    return "the rejected answer scored higher" if chosen < rejected else None

"""Scored completions, prompt by prompt, and their scores as matrices."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from drdpo.errors import DataError
from drdpo.records import Completion, check_unique, read_records, row_number
from drdpo.rewards.scores import Floats

LARGEST = 1e100
"""Squares and sums of larger scores would overflow, and every z-score be 0."""


def read_completions(path: Path, objectives: Iterable[str]) -> list[Completion]:
    """Read scored completions.

    Args:
        path: a JSON-lines file.
        objectives: that every completion must have a score of.

    Raises:
        DataError: as read_records; also for a (prompt_id, sample_id) that repeats, for a completion without one of the
            objectives (the message lists what it has), and for a text that no file can hold.
    """
    completions = read_records(path, Completion.from_row)
    check_unique(path, ((c.prompt_id, c.sample_id) for c in completions), '"prompt_id", "sample_id"')
    needed = set(objectives)
    for index, completion in enumerate(completions):
        if not needed <= completion.scores.keys():
            lacking = ", ".join(sorted(needed - completion.scores.keys()))
            there = ", ".join(completion.scores) or "no scores at all; score them with step 1"
            raise DataError(
                f"{path}, row {row_number(path, index)} "
                f"(prompt_id {completion.prompt_id}, sample_id {completion.sample_id}): "
                f'field "scores" lacks {lacking}; it has {there}'
            )
        for name in needed:
            if abs(completion.scores[name]) > LARGEST:
                raise DataError(
                    f'{path}, row {row_number(path, index)}: field "scores": {name} is {completion.scores[name]:g}, beyond '
                    f"{LARGEST:g} and no score"
                )
    return completions


def group_by_prompt(path: Path, completions: list[Completion]) -> list[list[Completion]]:
    """Completions by prompt_id, each group sorted by sample_id, groups in order of first appearance.

    Raises:
        DataError: one prompt_id has two different prompts, or no prompt has two completions.
    """
    groups: dict[int, list[Completion]] = {}
    for index, completion in enumerate(completions):
        group = groups.setdefault(completion.prompt_id, [])
        if group and group[0].prompt != completion.prompt:
            raise DataError(
                f"{path}, row {row_number(path, index)}: "
                f'field "prompt" differs from that of another row with prompt_id {completion.prompt_id}'
            )
        group.append(completion)
    if max(map(len, groups.values())) < 2:
        raise DataError(f"{path}: every prompt has one completion only; a pair needs best_of_n >= 2 when sampling")
    return [sorted(group, key=lambda completion: completion.sample_id) for group in groups.values()]


def score_matrices(groups: list[list[Completion]], objectives: Iterable[str]) -> dict[str, Floats]:
    """{objective: scores [M, n]}; a prompt with fewer completions than n ends in NaN."""
    widest = max(map(len, groups))
    matrices = {}
    for objective in objectives:
        scores_Mn = np.full((len(groups), widest), np.nan)
        for row, group in enumerate(groups):
            scores_Mn[row, : len(group)] = [completion.scores[objective] for completion in group]
        matrices[objective] = scores_Mn
    return matrices

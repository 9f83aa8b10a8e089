"""Means, gains over the base run and their confidence intervals.

Shapes: P prompts that every run has (paired), K compared figures, B bootstrap samples.

The gain of a run in one objective is

    mean over P of (run's score of the prompt - base's score of the prompt)  /  sd of the base's completion scores,

a prompt's score being the mean over its completions, and the sd taken over every completion of the base (population
form, as the z-scores of step 2). The interval is the percentile interval of the paired bootstrap (Efron and Tibshirani
1993, chapter 13): prompts are drawn with replacement, the same draws for every run and objective. The sd is a unit
of measure here and stays fixed, so a run that is the base plus a constant has an interval of width zero.
"""

from dataclasses import dataclass

import numpy as np

from drdpo.evaluation.runs import Array, Run
from drdpo.objectives import GATED_SCORE

CONFIDENCE = 0.95
_DRAWS = 64
"""Bootstrap samples per block, so that memory stays at 64 x P integers."""


@dataclass(frozen=True)
class Figure:
    """An estimate with its 95% interval; no interval (None) from a single prompt."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """The figures of a report. Objectives whose base scores are all equal have no gain."""

    objectives: list[str]
    common: list[int]
    """Ids of the paired prompts."""
    gains: dict[str, dict[str, Figure]]
    """{run: {objective: gain over the first run in its sd}}, without the first run."""
    win_rates: dict[str, Figure]
    """{run: share of the paired prompts on which it beats the first run on the gated score, a tie counting half}."""


def mean(run: Run, objective: str) -> float:
    """Mean over all prompts of the run."""
    return float(run.scores_P[objective].mean())


def spread(run: Run, objective: str) -> float:
    """Standard deviation over all completions of the run (population form); 0 when all scores are equal."""
    scores_C = run.scores_C[objective]
    return 0.0 if np.ptp(scores_C) == 0 else float(scores_C.std())


def compare(runs: list[Run], objectives: list[str], common: list[int], draws: int, seed: int) -> Comparison:
    """Compare every run with the first one on the prompts they share.

    Args:
        runs: the base first.
        objectives: names that every run has.
        common: ids of the prompts that every run has.
        draws: bootstrap samples.
        seed: of the bootstrap.
    """
    base, *others = runs
    base_rows = base.rows(common)
    columns: list[Array] = []
    keys: list[tuple[str, str]] = []
    for run in others:
        rows = run.rows(common)
        for objective in objectives:
            if (unit := spread(base, objective)) > 0:
                keys.append((run.name, objective))
                columns.append((run.scores_P[objective][rows] - base.scores_P[objective][base_rows]) / unit)
        if GATED_SCORE in run.scores_P and GATED_SCORE in base.scores_P:
            difference_P = run.scores_P[GATED_SCORE][rows] - base.scores_P[GATED_SCORE][base_rows]
            keys.append((run.name, ""))
            columns.append((np.sign(difference_P) + 1) / 2)
    figures = dict(zip(keys, bootstrap_means(np.stack(columns, axis=1), draws, seed), strict=True)) if columns else {}
    return Comparison(
        objectives,
        common,
        {run.name: {name: figures[run.name, name] for name in objectives if (run.name, name) in figures} for run in others},
        {run.name: figures[run.name, ""] for run in others if (run.name, "") in figures},
    )


def bootstrap_means(values_PK: Array, draws: int, seed: int) -> list[Figure]:
    """Means over P with the 95% percentile interval of the bootstrap over P.

    Args:
        values_PK: [P, K]; a row is one prompt and is drawn as a whole.
        draws: bootstrap samples.
        seed: the same seed gives the same intervals.

    Returns:
        K figures.
    """
    prompts = len(values_PK)
    means_K = values_PK.mean(axis=0)
    if prompts < 2:
        return [Figure(float(value), None, None) for value in means_K]
    generator = np.random.default_rng(seed)
    shares = np.full(prompts, 1 / prompts)
    blocks = []
    for start in range(0, draws, _DRAWS):
        # How often each prompt is drawn, in place of the draws themselves: one matrix product gives the means.
        counts_BP = generator.multinomial(prompts, shares, size=min(_DRAWS, draws - start))
        # Centred, so that a column without spread has an interval of exactly zero width.
        blocks.append(counts_BP @ (values_PK - means_K) / prompts)
    tail = (1 - CONFIDENCE) / 2
    low_K, high_K = np.quantile(np.concatenate(blocks), [tail, 1 - tail], axis=0)
    return [
        Figure(float(value), float(value + low), float(value + high))
        for value, low, high in zip(means_K, low_K, high_K, strict=True)
    ]

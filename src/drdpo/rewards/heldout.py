"""How good fitted heads are on held-out ratings and pairs, with 95% intervals over prompts."""

from dataclasses import dataclass

import numpy as np

from drdpo.rewards.baselines import Comparison
from drdpo.rewards.scores import Floats
from drdpo.rewards.statistics import bootstrap_interval, pair_accuracy, pearson, spearman

Interval = tuple[float, float]

GATED, LONGER = "ArmoRM (gated)", "longer answer"


@dataclass(frozen=True)
class ObjectiveFigures:
    """One objective on the held-out answers that have a rating."""

    against: Comparison
    alpha: float
    pearson: float
    pearson_interval: Interval
    spearman_interval: Interval


@dataclass(frozen=True)
class PairFigures:
    """How often a score prefers the answer that people rated higher. A constant gets 0.5."""

    name: str
    spearman: float
    """With the quality of the answers, over all prompts; NaN where it is not known."""
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class FileFigures:
    """The pairs of one held-out file."""

    source: str
    pairs: int
    scores: list[PairFigures]
    """Of the gated score, every objective, and the answer's length."""
    loss: float
    """Bradley-Terry loss of the gated score; ln 2 = 0.693 is guessing."""
    lead: float
    """Pair accuracy of the gated score less that of the longer answer."""
    lead_interval: Interval
    length_bias: tuple[float, float]
    """Rank correlation with the answer's length over the answers in pairs: of the gated score, and of their quality."""


def objective_figures(
    against: Comparison, alpha: float, predicted_N: Floats, label_N: Floats, prompt_N: np.ndarray, seed: int
) -> ObjectiveFigures:
    """Figures of one objective.

    Args:
        against: the comparison with the baselines on these answers.
        alpha: penalty of its ridge.
        predicted_N, label_N: on ArmoRM's scale; NaN labels do not count.
        prompt_N: prompt of each answer, for the bootstrap.
        seed: of the bootstrap.
    """
    there = ~np.isnan(label_N)
    predicted_N, label_N, prompt_N = (array[there] for array in (predicted_N, label_N, prompt_N))
    return ObjectiveFigures(
        against, alpha, pearson(predicted_N, label_N),
        bootstrap_interval(lambda rows: pearson(predicted_N[rows], label_N[rows]), prompt_N, seed),
        bootstrap_interval(lambda rows: spearman(predicted_N[rows], label_N[rows]), prompt_N, seed),
    )  # fmt: skip


def file_figures(
    source: str, scores: dict[str, Floats], quality_N: Floats, pairs_P2: np.ndarray, prompt_N: np.ndarray, seed: int
) -> FileFigures:
    """Figures of the pairs of one file.

    Args:
        source: name of the file.
        scores: {name: [N]} of its answers, among them GATED and LONGER.
        quality_N: what people think of the answers, NaN where they were not asked.
        pairs_P2: (better, worse) row indices.
        prompt_N: prompt of each answer, for the bootstrap.
        seed: of the bootstrap.
    """
    prompt_P, paired = prompt_N[pairs_P2[:, 0]], np.unique(pairs_P2)

    def figures(name: str, score_N: Floats) -> PairFigures:
        interval = bootstrap_interval(lambda rows: pair_accuracy(score_N, pairs_P2[rows]), prompt_P, seed)
        return PairFigures(name, _correlation(score_N, quality_N), pair_accuracy(score_N, pairs_P2), interval)

    def lead(rows: np.ndarray) -> float:
        return pair_accuracy(scores[GATED], pairs_P2[rows]) - pair_accuracy(scores[LONGER], pairs_P2[rows])

    margin_P = scores[GATED][pairs_P2[:, 0]] - scores[GATED][pairs_P2[:, 1]]
    return FileFigures(
        source, len(pairs_P2), [figures(name, score_N) for name, score_N in scores.items()],
        float(np.logaddexp(0.0, -margin_P).mean()), lead(np.arange(len(pairs_P2))), bootstrap_interval(lead, prompt_P, seed),
        (spearman(scores[GATED][paired], scores[LONGER][paired]), _correlation(scores[LONGER][paired], quality_N[paired])),
    )  # fmt: skip


def _correlation(score_N: Floats, quality_N: Floats) -> float:
    """Rank correlation of a score with quality, where that is known."""
    there = ~np.isnan(quality_N)
    return spearman(score_N[there], quality_N[there]) if there.sum() > 1 else float("nan")

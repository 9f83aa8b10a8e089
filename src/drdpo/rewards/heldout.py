"""How good fitted heads are on held-out ratings, against what needs no model: a constant, and the answer's length."""

from dataclasses import dataclass

import numpy as np

from drdpo.rewards.scores import Floats
from drdpo.rewards.statistics import bootstrap_interval, pair_accuracy, pearson, spearman


@dataclass(frozen=True)
class ObjectiveFigures:
    """One objective on the held-out answers that have a rating. Errors are mean squares in rating points (0-4)."""

    objective: str
    rows: int
    alpha: float
    pearson: float
    spearman: float
    spearman_interval: tuple[float, float]
    length_spearman: float
    error: float
    constant_error: float
    length_error: float

    @property
    def beats_baselines(self) -> bool:
        """Better than length in rank correlation, and a smaller error than both baselines."""
        return self.spearman > self.length_spearman and self.error < min(self.constant_error, self.length_error)


@dataclass(frozen=True)
class PairFigures:
    """How often a score prefers the answer that people rated higher. A constant gets 0.5."""

    name: str
    spearman: float
    """With the quality of the answers, over all prompts."""
    accuracy: float
    interval: tuple[float, float]


def objective_figures(
    objective: str, alpha: float, predicted_N: Floats, label_N: Floats, length_N: Floats, train: tuple[Floats, Floats],
    prompt_N: np.ndarray, seed: int,
) -> ObjectiveFigures:  # fmt: skip
    """Figures of one objective.

    Args:
        predicted_N, label_N: on ArmoRM's scale; NaN labels do not count.
        length_N: log of the answers' lengths in characters.
        train: lengths and labels of the training answers, on which the two baselines are fitted.
        prompt_N: prompt of each answer, for the bootstrap.
    """
    there = ~np.isnan(label_N)
    predicted_N, label_N, length_N, prompt_N = (array[there] for array in (predicted_N, label_N, length_N, prompt_N))
    train_length, train_label = (array[~np.isnan(train[1])] for array in train)
    slope, intercept = np.polyfit(train_length, train_label, 1)
    by_length_N = slope * length_N + intercept
    return ObjectiveFigures(
        objective=objective, rows=len(label_N), alpha=alpha,
        pearson=pearson(predicted_N, label_N),
        spearman=spearman(predicted_N, label_N),
        spearman_interval=bootstrap_interval(lambda rows: spearman(predicted_N[rows], label_N[rows]), prompt_N, seed),
        length_spearman=spearman(by_length_N, label_N),
        error=_rating_error(predicted_N, label_N),
        constant_error=_rating_error(np.full_like(label_N, train_label.mean()), label_N),
        length_error=_rating_error(by_length_N, label_N),
    )  # fmt: skip


def pair_figures(
    name: str, score_N: Floats, quality_N: Floats, pairs_P2: np.ndarray, prompt_N: np.ndarray, seed: int
) -> PairFigures:
    """Pair accuracy of a score, with an interval over prompts, and its rank correlation with quality.

    Args:
        score_N: of every held-out answer.
        quality_N: what people think of it, NaN where they were not asked.
        pairs_P2: (better, worse) row indices.
        prompt_N: prompt of every answer.
    """
    interval = bootstrap_interval(lambda rows: pair_accuracy(score_N, pairs_P2[rows]), prompt_N[pairs_P2[:, 0]], seed)
    there = ~np.isnan(quality_N)
    return PairFigures(name, spearman(score_N[there], quality_N[there]), pair_accuracy(score_N, pairs_P2), interval)


def objective_table(figures: list[ObjectiveFigures]) -> str:
    """A markdown table, aligned so that it reads well in a terminal too."""
    width = max(len(figure.objective) for figure in figures)
    lines = [
        f"| {'objective':<{width}} | rows | ridge alpha | Pearson | Spearman (95% interval)  | length's Spearman "
        "| error | constant's error | length's error | beats both |",
        f"| {'-' * width} | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for f in figures:
        low, high = f.spearman_interval
        lines.append(
            f"| {f.objective:<{width}} | {f.rows:>4} | {f.alpha:>11.4g} | {f.pearson:>7.3f} "
            f"| {f.spearman:>7.3f} ({low:.3f} to {high:.3f}) | {f.length_spearman:>17.3f} | {f.error:>5.3f} "
            f"| {f.constant_error:>16.3f} | {f.length_error:>14.3f} | {'yes' if f.beats_baselines else 'no':<10} |"
        )
    return "\n".join(lines)


def pair_table(figures: list[PairFigures]) -> str:
    """A markdown table of pair accuracies and correlations with quality."""
    width = max(len(figure.name) for figure in figures)
    lines = [
        f"| {'score':<{width}} | pair accuracy (95% interval) | Spearman over all answers |",
        f"| {'-' * width} | ---: | ---: |",
    ]
    for f in figures:
        low, high = f.interval
        lines.append(f"| {f.name:<{width}} |       {f.accuracy:.3f} ({low:.3f} to {high:.3f}) | {f.spearman:>25.3f} |")
    return "\n".join(lines)


def _rating_error(predicted_N: Floats, label_N: Floats) -> float:
    return float(((5 * (predicted_N - label_N)) ** 2).mean())

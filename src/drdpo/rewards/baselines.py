"""Predictions against what needs no model: a constant, and a line through the log of the answer's length."""

from dataclasses import dataclass

import numpy as np

from drdpo.rewards.scores import Floats
from drdpo.rewards.statistics import bootstrap, spearman

SAMPLES = 200
"""Bootstrap samples for a standard error."""


@dataclass(frozen=True)
class Comparison:
    """One objective on the answers that have a rating. Errors are mean squares in rating points."""

    objective: str
    rows: int
    spearman: float
    length_spearman: float
    error: float
    constant_error: float
    length_error: float

    @property
    def beats_baselines(self) -> bool:
        """Better than length in rank correlation, and a smaller error than both baselines."""
        return self.spearman > self.length_spearman and self.error < min(self.constant_error, self.length_error)


@dataclass(frozen=True)
class Claim:
    """Whether an objective earns a head, by predictions for training prompts that were not fitted on."""

    against: Comparison
    standard_error: float
    """Of the lead in rank correlation over length, by resampling prompts."""

    @property
    def lead(self) -> float:
        """Rank correlation less length's."""
        return self.against.spearman - self.against.length_spearman

    @property
    def holds(self) -> bool:
        """Both baselines are beaten, and length by more than two standard errors: less may be chance."""
        return self.against.beats_baselines and self.lead > 2 * self.standard_error


def claim(
    objective: str,
    points: float,
    predicted_N: Floats,
    label_N: Floats,
    baselines_N2: Floats,
    prompt_N: np.ndarray,
    seed: int,
) -> Claim:
    """What an objective can claim; arguments as for `compare`, and the prompt of each answer for the bootstrap."""
    there = ~np.isnan(label_N)
    predicted, label, length = predicted_N[there], label_N[there], baselines_N2[there, 1]

    def lead(rows: np.ndarray) -> float:
        return spearman(predicted[rows], label[rows]) - spearman(length[rows], label[rows])

    against = compare(objective, points, predicted_N, label_N, baselines_N2)
    return Claim(against, float(np.std(bootstrap(lead, prompt_N[there], seed, SAMPLES))))


def compare(objective: str, points: float, predicted_N: Floats, label_N: Floats, baselines_N2: Floats) -> Comparison:
    """Compare predictions with those of the baselines.

    Args:
        objective: its name.
        points: rating points in a difference of 1 in labels.
        predicted_N, label_N: on ArmoRM's scale; NaN labels do not count.
        baselines_N2: predictions by a constant and by length, from `baselines`.
    """
    there = ~np.isnan(label_N)
    label_N, constant_N, length_N = label_N[there], baselines_N2[there, 0], baselines_N2[there, 1]
    errors = [float(((points * (guess_N - label_N)) ** 2).mean()) for guess_N in (predicted_N[there], constant_N, length_N)]
    return Comparison(objective, len(label_N), spearman(predicted_N[there], label_N), spearman(length_N, label_N), *errors)


def baselines(length_N: Floats, train_length_N: Floats, train_label_N: Floats) -> Floats:
    """[N, 2] predictions by the training answers' mean, and by a least-squares line through the log of the length.

    Args:
        length_N: log lengths of the answers to predict.
        train_length_N, train_label_N: of the training answers; NaN labels do not count.
    """
    there = ~np.isnan(train_label_N)
    slope, intercept = np.polyfit(train_length_N[there], train_label_N[there], 1)
    return np.stack([np.full(len(length_N), train_label_N[there].mean()), slope * length_N + intercept], axis=1)


def folded_baselines(length_N: Floats, label_N: Floats, fold_N: np.ndarray) -> Floats:
    """[N, 2] the same for every training answer, by baselines that were fitted without its fold."""
    made_N2 = np.empty((len(length_N), 2))
    for fold in np.unique(fold_N):
        rest = fold_N != fold
        made_N2[~rest] = baselines(length_N[~rest], length_N[rest], label_N[rest])
    return made_N2

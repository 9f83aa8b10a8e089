"""The arithmetic of scores, in numpy. M prompts, n completions of each; NaN where a prompt has fewer than n."""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from drdpo.errors import DataError

Floats: TypeAlias = npt.NDArray[np.float64]

DECIMALS = 12
"""Mixed scores are compared to so many decimals, so that rounding in the mix cannot break a tie."""


def mean_and_sd(scores_Mn: npt.ArrayLike) -> tuple[float, float]:
    """Mean and population standard deviation over all entries of a split; the sd of equal entries is exactly 0."""
    values = np.asarray(scores_Mn, dtype=np.float64)
    values = values[~np.isnan(values)]
    if values.size == 0:
        return float("nan"), float("nan")
    return float(values.mean()), 0.0 if values.min() == values.max() else float(values.std())


def standardise(scores_Mn: npt.ArrayLike, statistics: tuple[float, float] | None = None) -> Floats:
    """Z-scores of one objective over ALL entries of a split, as the authors' code has it, or by statistics of another split.

    Args:
        scores_Mn: [M, n] scores; NaN is kept and does not count.
        statistics: mean and population sd to standardise by; those of scores_Mn itself by default.

    Returns:
        [M, n] (x - mean) / population sd; all 0 where the sd is 0.
    """
    values_Mn = np.asarray(scores_Mn, dtype=np.float64)
    mean, sd = mean_and_sd(values_Mn) if statistics is None else statistics
    return np.where(np.isnan(values_Mn), np.nan, 0.0) if sd == 0 else (values_Mn - mean) / sd


def mix(scores: Mapping[str, npt.ArrayLike], weights: Mapping[str, float]) -> Floats:
    """The weighted sum of objectives.

    Args:
        scores: {objective: [M, n]}.
        weights: {objective: weight}, not empty.

    Returns:
        [M, n]

    Raises:
        DataError: a weighted objective has no scores; the message lists those that are there.
    """
    for objective in weights:
        if objective not in scores:
            raise DataError(f"there are no scores of {objective}; there are scores of {', '.join(scores) or 'nothing'}")
    terms = [weight * np.asarray(scores[objective], dtype=np.float64) for objective, weight in weights.items()]
    return np.sum(terms, axis=0)


def best_and_worst(mixed_Mn: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The completions to choose and to reject.

    Args:
        mixed_Mn: [M, n] scores; NaN is no completion.

    Returns:
        best [M] and worst [M], on ties the first index; usable [M], False where the margin is zero or where a prompt has
        fewer than two completions.
    """
    mixed_Mn = np.round(np.asarray(mixed_Mn, dtype=np.float64), DECIMALS)
    absent_Mn = np.isnan(mixed_Mn)
    best_M = np.where(absent_Mn, -np.inf, mixed_Mn).argmax(axis=1)
    worst_M = np.where(absent_Mn, np.inf, mixed_Mn).argmin(axis=1)
    row_M = np.arange(len(mixed_Mn))
    usable_M = mixed_Mn[row_M, best_M] > mixed_Mn[row_M, worst_M]  # False where either is NaN
    return best_M, worst_M, usable_M

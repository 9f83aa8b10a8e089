"""Rank and product-moment correlation, in numpy, with a bootstrap over prompts."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from drdpo.rewards.scores import Floats


def pearson(x_N: npt.ArrayLike, y_N: npt.ArrayLike) -> float:
    """Product-moment correlation; 0 where one side is constant, which predicts nothing."""
    xs_N: Floats = np.asarray(x_N, dtype=np.float64)
    ys_N: Floats = np.asarray(y_N, dtype=np.float64)
    xs_N, ys_N = xs_N - xs_N.mean(), ys_N - ys_N.mean()
    scale = float(np.sqrt(np.square(xs_N).sum() * np.square(ys_N).sum()))
    return float((xs_N * ys_N).sum()) / scale if scale > 0 else 0.0


def ranks(x_N: npt.ArrayLike) -> Floats:
    """Ranks from 1; ties share the mean of their ranks."""
    _, inverse_N, count = np.unique(np.asarray(x_N, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return ((2 * last - count + 1) / 2)[inverse_N]


def spearman(x_N: npt.ArrayLike, y_N: npt.ArrayLike) -> float:
    """Rank correlation with averaged ties; 0 where one side is constant."""
    return pearson(ranks(x_N), ranks(y_N))


def pair_accuracy(score_N: npt.ArrayLike, pairs_P2: npt.NDArray[np.int64]) -> float:
    """Share of pairs (better, worse) that a score orders rightly; a tie counts half."""
    score_N = np.asarray(score_N, dtype=np.float64)
    margin_P = score_N[pairs_P2[:, 0]] - score_N[pairs_P2[:, 1]]
    return float(((margin_P > 0) + 0.5 * (margin_P == 0)).mean())


def bootstrap(
    statistic: Callable[[npt.NDArray[np.int64]], float], group_N: npt.NDArray[np.int64], seed: int, samples: int
) -> Floats:
    """[samples] values of a statistic, each on whole groups (prompts) drawn anew: the rows of one are not independent.

    Args:
        statistic: of row indices [rows].
        group_N: [N] the group of each row.
        seed: of the resampling.
        samples: bootstrap samples.
    """
    generator = np.random.default_rng(seed)
    groups = [np.flatnonzero(group_N == group) for group in np.unique(group_N)]
    return np.array(
        [
            statistic(np.concatenate([groups[index] for index in generator.integers(len(groups), size=len(groups))]))
            for _ in range(samples)
        ]
    )


def bootstrap_interval(
    statistic: Callable[[npt.NDArray[np.int64]], float], group_N: npt.NDArray[np.int64], seed: int, samples: int = 1000
) -> tuple[float, float]:
    """95% interval of a statistic by `bootstrap`."""
    low, high = np.quantile(bootstrap(statistic, group_N, seed, samples), [0.025, 0.975])
    return float(low), float(high)

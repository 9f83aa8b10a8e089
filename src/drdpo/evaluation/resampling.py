"""The paired bootstrap over prompts and, where a run has several, over its training seeds.

Shapes: P prompts, S seeds of a run, K columns, B bootstrap samples.

Prompts are drawn with replacement, the same draws for every run and figure; so what two runs share cancels in their
difference. A run with S > 1 seeds also has its seeds drawn with replacement, independently of the prompts and of the other
runs (the pigeonhole bootstrap of two crossed factors, Owen 2007). With few seeds this understates their spread, by a factor
sqrt((S - 1) / S) of the seeds' part; the report prints every seed's own figure beside it.

The interval is the percentile interval (Efron and Tibshirani 1993, chapter 13).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from drdpo.evaluation.runs import Array

CONFIDENCE = 0.95
_DRAWS = 64
"""Bootstrap samples per block, so that memory stays at 64 x P integers."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Figure:
    """An estimate with its 95% interval; no interval (None) from a single prompt."""

    value: float
    low: float | None
    high: float | None

    @property
    def sure(self) -> bool:
        """Does the interval leave zero out?"""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Table:
    """What is averaged: one row a prompt, one column a combination of the seeds of `runs`, the last run's fastest."""

    values_PK: Array
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Resampled:
    """A mean and what it is in every bootstrap sample. Linear in both, so that figures add and scale as numbers do."""

    value: float
    draws_B: Array
    """Empty from a single prompt."""

    def __sub__(self, other: "Resampled") -> "Resampled":
        return Resampled(self.value - other.value, self.draws_B - other.draws_B)

    def __add__(self, other: "Resampled") -> "Resampled":
        return Resampled(self.value + other.value, self.draws_B + other.draws_B)

    def __mul__(self, factor: float) -> "Resampled":
        return Resampled(self.value * factor, self.draws_B * factor)

    @property
    def figure(self) -> Figure:
        """With the 95% percentile interval."""
        if not len(self.draws_B):
            return Figure(self.value, None, None)
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(self.draws_B, [tail, 1 - tail])
        return Figure(self.value, float(low), float(high))


def worst(parts: list[Resampled]) -> Resampled:
    """The smallest of several means, in the estimate and in every bootstrap sample."""
    return Resampled(min(part.value for part in parts), np.stack([part.draws_B for part in parts]).min(axis=0))


def resample(tables: Mapping[Key, Table], seeds: Mapping[str, int], draws: int, seed: int) -> dict[Key, Resampled]:
    """Bootstrap the mean of every table.

    Args:
        tables: all with the same P; a row is one prompt and is drawn as a whole, over all tables.
        seeds: {run: its number of seeds S}.
        draws: bootstrap samples B.
        seed: the same seed gives the same draws.
    """
    if not tables:
        return {}
    values_PK = np.concatenate([table.values_PK for table in tables.values()], axis=1)
    means_K = values_PK.mean(axis=0)
    centred_BK = _prompt_draws(values_PK - means_K, draws, seed)
    weights = {
        # One stream a run, by its place: adding a run leaves the draws of those before it as they were.
        run: np.random.default_rng([seed, place]).multinomial(count, np.full(count, 1 / count), size=draws) / count
        for place, (run, count) in enumerate(seeds.items(), start=1)
    }
    found: dict[Key, Resampled] = {}
    start = 0
    for key, table in tables.items():
        columns = slice(start, start + table.values_PK.shape[1])
        start = columns.stop
        estimate = float(means_K[columns].mean())
        if not len(centred_BK):
            found[key] = Resampled(estimate, np.empty(0))
            continue
        weights_BK = np.ones((draws, 1))
        for run in table.runs:
            weights_BK = (weights_BK[:, :, None] * weights[run][:, None, :]).reshape(draws, -1)
        around_K = means_K[columns] - estimate
        found[key] = Resampled(estimate, estimate + ((centred_BK[:, columns] + around_K) * weights_BK).sum(axis=1))
    return found


def _prompt_draws(centred_PK: Array, draws: int, seed: int) -> Array:
    """[B, K]: means of the centred columns over prompts drawn with replacement; no row from a single prompt."""
    prompts = len(centred_PK)
    if prompts < 2:
        return np.empty((0, centred_PK.shape[1]))
    generator = np.random.default_rng(seed)
    shares = np.full(prompts, 1 / prompts)
    blocks = []
    for start in range(0, draws, _DRAWS):
        # How often each prompt is drawn, in place of the draws themselves: one matrix product gives the means.
        counts_BP = generator.multinomial(prompts, shares, size=min(_DRAWS, draws - start))
        blocks.append(counts_BP @ centred_PK / prompts)
    return np.concatenate(blocks)

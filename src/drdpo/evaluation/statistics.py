"""Gains over the base run, comparisons of every two runs, and their confidence intervals.

Shapes: P prompts that every run has (paired), S seeds of a run, K columns, B bootstrap samples, A values of alpha.

The gain of a run in one objective is

    mean over P of (run's score of the prompt - base's score of the prompt)  /  sd of the base's completion scores,

where a prompt's score is the mean over its completions (and seeds) and the sd is taken over every completion of the base
(population form, as for the z-scores of step 2). Differences between other runs have the same unit. The sd is held fixed:
a run that equals the base plus a constant has an interval of width zero.

Intervals are percentile intervals (Efron and Tibshirani 1993, chapter 13) of a paired bootstrap: prompts are drawn with
replacement, the same draws for every run and estimate, so what two runs share cancels in their difference. A run of S > 1
seeds also has its seeds drawn with replacement, independently of the prompts and of the other runs (the pigeonhole bootstrap
of two crossed factors, Owen 2007). With few seeds this understates the seeds' part of the spread by a factor
sqrt((S - 1) / S); the report prints every seed's own means beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from drdpo.evaluation.runs import ANSWERS, ScoredRun
from drdpo.objectives import GATED_SCORE

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Key = TypeVar("Key")

CONFIDENCE = 0.95
ALPHAS = tuple(step / 10 for step in range(11))
"""Where the sweep of a mixture is evaluated."""
MIXTURE = "trained mixture"
"""Name of the summary that weighs the gains as the training pairs weighed the objectives."""
_DRAWS = 64
"""Bootstrap samples per block, to bound memory at 64 x P integers."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval; no interval (None) from a single prompt."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Observations:
    """What is averaged: one row per prompt, one column per combination of the seeds of `runs`, the last run's fastest."""

    values_PK: Array
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Resampled:
    """A mean, and the same mean in every bootstrap sample. Linear in both, so it adds and scales as numbers do."""

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
    def estimate(self) -> Estimate:
        """With the 95% percentile interval."""
        if not len(self.draws_B):
            return Estimate(self.value, None, None)
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(self.draws_B, [tail, 1 - tail])
        return Estimate(self.value, float(low), float(high))


def weighted(gains: dict[str, Resampled], weights: dict[str, float]) -> Resampled:
    """The weighted sum of gains, at least one."""
    first, *others = (gain * weights[name] for name, gain in gains.items())
    return sum(others, start=first)


def worst(parts: list[Resampled]) -> Resampled:
    """The smallest of several means, in the value and in every bootstrap sample."""
    return Resampled(min(part.value for part in parts), np.stack([part.draws_B for part in parts]).min(axis=0))


def resample(tables: Mapping[Key, Observations], seeds: Mapping[str, int], draws: int, seed: int) -> dict[Key, Resampled]:
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
        # One stream per run, by its place: adding a run does not change the draws of those before it.
        run: np.random.default_rng([seed, place]).multinomial(count, np.full(count, 1 / count), size=draws) / count
        for place, (run, count) in enumerate(seeds.items(), start=1)
    }
    found: dict[Key, Resampled] = {}
    start = 0
    for key, table in tables.items():
        columns = slice(start, start + table.values_PK.shape[1])
        start = columns.stop
        value = float(means_K[columns].mean())
        if not len(centred_BK):
            found[key] = Resampled(value, np.empty(0))
            continue
        weights_BK = np.ones((draws, 1))
        for run in table.runs:
            weights_BK = (weights_BK[:, :, None] * weights[run][:, None, :]).reshape(draws, -1)
        around_K = means_K[columns] - value
        found[key] = Resampled(value, value + ((centred_BK[:, columns] + around_K) * weights_BK).sum(axis=1))
    return found


def _prompt_draws(centred_PK: Array, draws: int, seed: int) -> Array:
    """[B, K]: means of the centred columns over prompts drawn with replacement; no rows from a single prompt."""
    prompts = len(centred_PK)
    if prompts < 2:
        return np.empty((0, centred_PK.shape[1]))
    generator = np.random.default_rng(seed)
    shares = np.full(prompts, 1 / prompts)
    blocks = []
    for start in range(0, draws, _DRAWS):
        # How often each prompt is drawn, not the draws themselves: one matrix product gives the means.
        counts_BP = generator.multinomial(prompts, shares, size=min(_DRAWS, draws - start))
        blocks.append(counts_BP @ centred_PK / prompts)
    return np.concatenate(blocks)


@dataclass(frozen=True)
class Difference:
    """One run against another in one objective."""

    gain: Estimate | None
    """In the base's sd; None if all of the base's scores are equal."""
    win_rate: Estimate
    """Share of the paired prompts on which the run scores higher, ties counting half; over every two seeds."""


@dataclass(frozen=True)
class Comparison:
    """The estimates of a report. Objectives whose base scores are all equal have no gain."""

    objectives: list[str]
    common: list[int]
    """Ids of the paired prompts."""
    trained_on: list[str]
    """The objectives that training saw; empty if unknown."""
    mixture: dict[str, float]
    """{objective: weight} of the training pairs; empty if unknown."""
    gains: dict[str, dict[str, Estimate]]
    """{run: {objective: gain over the first run in its sd}}, without the first run."""
    win_rates: dict[str, Estimate]
    """{run: its win rate against the first run on the gated score}."""
    pairs: dict[tuple[str, str], dict[str, Difference]] = field(default_factory=dict)
    """{(run, against): {objective: }}, every two runs once, the later of them first."""
    summaries: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    """{run: {"mean of ...": mean gain over those objectives, "worst of ...": the smallest}}, without the gated score; and
    MIXTURE: the gain in the mixture that training saw, of z-scores (mean and sd of the first run)."""
    answers: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    """{run: {name in ANSWERS: difference from the first run, in its own unit}}."""
    sweep: dict[str, list[Estimate]] = field(default_factory=dict)
    """{run: [A] gain in the mixture alpha r1 + (1 - alpha) r2 of z-scores, for every one of ALPHAS}."""


def compare(
    runs: list[ScoredRun],
    objectives: list[str],
    common: list[int],
    draws: int,
    seed: int,
    trained_on: list[str] | None = None,
    sweep: list[str] | None = None,
    mixture: dict[str, float] | None = None,
) -> Comparison:
    """Compare every run with the first one, and every two runs, on the prompts they share.

    Args:
        runs: the base first.
        objectives: names that every run has.
        common: ids of the prompts that every run has.
        draws: bootstrap samples.
        seed: of the bootstrap.
        trained_on: the objectives that training saw, if known.
        sweep: two of `objectives`, r1 and r2, whose base scores are not all equal; None for no sweep.
        mixture: {objective: weight} that training saw, if known.
    """
    base, *others = runs
    pairs = [(run, against) for place, run in enumerate(runs) for against in runs[:place]]
    judge = GATED_SCORE in set.intersection(*(set(run.scores) for run in runs))
    tables = _observations(runs, pairs, objectives, [GATED_SCORE] if judge else [], common)
    found = resample(tables, {run.name: len(run.members) for run in runs}, draws, seed)
    units = {name: unit for name in objectives if (unit := base.sd(name)) > 0}

    def difference(run: ScoredRun, against: ScoredRun, objective: str) -> Resampled:
        return (found[run.name, objective] - found[against.name, objective]) * (1 / units[objective])

    gains = {run.name: {name: difference(run, base, name) for name in units} for run in others}
    return Comparison(
        objectives,
        common,
        trained_on or [],
        mixture or {},
        {run: {name: gain.estimate for name, gain in by_name.items()} for run, by_name in gains.items()},
        {run.name: found[run.name, base.name, GATED_SCORE, "wins"].estimate for run in others if judge},
        {
            (run.name, against.name): {
                name: Difference(
                    difference(run, against, name).estimate if name in units else None,
                    found[run.name, against.name, name, "wins"].estimate,
                )
                for name in objectives
            }
            for run, against in pairs
        },
        {run: _summaries(by_name, trained_on or [], mixture or {}) for run, by_name in gains.items()},
        {
            run.name: {name: (found[run.name, "", name] - found[base.name, "", name]).estimate for name in ANSWERS}
            for run in others
        },
        {run: _mixtures(by_name[sweep[0]], by_name[sweep[1]]) for run, by_name in gains.items()} if sweep else {},
    )


def _observations(
    runs: list[ScoredRun],
    pairs: list[tuple[ScoredRun, ScoredRun]],
    objectives: list[str],
    judges: list[str],
    common: list[int],
) -> dict[tuple[str, ...], Observations]:
    """What is bootstrapped: (run, objective), (run, "", one of ANSWERS) and (run, against, objective, "wins")."""
    scores_PS = {
        (run.name, name): np.stack([member.scores.loc[common, name] for member in run.members], axis=1)
        for run in runs
        for name in dict.fromkeys([*objectives, *judges])
    }
    tables: dict[tuple[str, ...], Observations] = {}
    for run in runs:
        for name in objectives:
            tables[run.name, name] = Observations(scores_PS[run.name, name], (run.name,))
        for name in ANSWERS:
            values_PS = np.stack([member.answers.loc[common, name] for member in run.members], axis=1)
            tables[run.name, "", name] = Observations(values_PS, (run.name,))
    for run, against in pairs:
        for name in dict.fromkeys([*objectives, *judges]):
            # [P, S of the run, S of the other]: 1, 1/2 or 0 for every two seeds.
            signs = np.sign(scores_PS[run.name, name][:, :, None] - scores_PS[against.name, name][:, None, :])
            wins_PK = ((signs + 1) / 2).reshape(len(common), -1)
            tables[run.name, against.name, name, "wins"] = Observations(wins_PK, (run.name, against.name))
    return tables


def _summaries(gains: dict[str, Resampled], trained_on: list[str], mixture: dict[str, float]) -> dict[str, Estimate]:
    """The gain in the trained mixture, if all of it has gains; mean and worst gain over all objectives but the gated score,
    which is a mixture itself, and over the trained and the unseen ones."""
    single = [name for name in gains if name != GATED_SCORE]
    groups = {"all": single}
    if trained_on:
        groups |= {
            "trained": [name for name in single if name in trained_on],
            "unseen": [name for name in single if name not in trained_on],
        }
    found: dict[str, Estimate] = {}
    if mixture and all(name in gains for name in mixture):
        found[MIXTURE] = weighted({name: gains[name] for name in mixture}, mixture).estimate
    for label, names in groups.items():
        if len(names) < 2:
            continue
        equal = dict.fromkeys(names, 1 / len(names))
        found[f"mean of {label} ({len(names)})"] = weighted({name: gains[name] for name in names}, equal).estimate
        found[f"worst of {label} ({len(names)})"] = worst([gains[name] for name in names]).estimate
    return found


def _mixtures(first: Resampled, second: Resampled) -> list[Estimate]:
    """[A]: alpha r1 + (1 - alpha) r2 for every one of ALPHAS; gains in sd units are means of z-scores and mix linearly."""
    return [weighted({"1": first, "2": second}, {"1": alpha, "2": 1 - alpha}).estimate for alpha in ALPHAS]

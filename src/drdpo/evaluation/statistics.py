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
"""Name of the summary that weights the gains like the training pairs weighted the objectives."""
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


def estimate(means: Array) -> Estimate:
    """The value and its 95% percentile interval.

    Args:
        means: [1 + B], from `resample`; [1] has no interval.
    """
    value = float(means[0])
    if len(means) == 1:
        return Estimate(value, None, None)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means[1:], [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def weighted(gains: Mapping[str, Array], weights: Mapping[str, float]) -> Array:
    """[1 + B] weighted sum of gains."""
    return sum((gains[name] * weight for name, weight in weights.items()), start=np.zeros(1))


def resample(tables: Mapping[Key, Observations], seeds: Mapping[str, int], draws: int, seed: int) -> dict[Key, Array]:
    """Bootstrap the mean of every table.

    Args:
        tables: all with the same P; a row is one prompt and is drawn as a whole, over all tables.
        seeds: {run: its number of seeds S}.
        draws: bootstrap samples B.
        seed: the same seed gives the same draws.

    Returns:
        {key: [1 + B]}: the mean, then the mean in every bootstrap sample; [1], the mean only, if P is 1. Linear in the
        table's values, so that sums and differences of these arrays are those of the estimates.
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
    found: dict[Key, Array] = {}
    start = 0
    for key, table in tables.items():
        columns = slice(start, start + table.values_PK.shape[1])
        start = columns.stop
        value = means_K[columns].mean()
        found[key] = np.array([value])
        if not len(centred_BK):
            continue
        weights_BK = np.ones((draws, 1))
        for run in table.runs:
            weights_BK = (weights_BK[:, :, None] * weights[run][:, None, :]).reshape(draws, -1)
        draws_B = value + ((centred_BK[:, columns] + (means_K[columns] - value)) * weights_BK).sum(axis=1)
        found[key] = np.concatenate([found[key], draws_B])
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
    """The estimates of a report. Objectives in which all base scores are equal have no gain."""

    objectives: list[str]
    common: list[int]
    """Ids of the paired prompts."""
    trained_on: list[str]
    """The objectives that training used; empty if unknown."""
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
    MIXTURE: the gain in the mixture that was trained on, of z-scores (mean and sd of the first run)."""
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
        trained_on: the objectives that training used, if known.
        sweep: two of `objectives`, r1 and r2, whose base scores are not all equal; None for no sweep.
        mixture: {objective: weight} of the training pairs, if known.
    """
    base, *others = runs
    pairs = [(run, against) for place, run in enumerate(runs) for against in runs[:place]]
    judge = GATED_SCORE in set.intersection(*(set(run.scores) for run in runs))
    tables = _observations(runs, pairs, objectives, [GATED_SCORE] if judge else [], common)
    found = resample(tables, {run.name: len(run.members) for run in runs}, draws, seed)
    units = {name: unit for name in objectives if (unit := base.sd(name)) > 0}

    def difference(run: ScoredRun, against: ScoredRun, objective: str) -> Array:
        return (found[run.name, objective] - found[against.name, objective]) * (1 / units[objective])

    def pair(run: ScoredRun, against: ScoredRun, objective: str) -> Difference:
        gain = estimate(difference(run, against, objective)) if objective in units else None
        return Difference(gain, estimate(found[run.name, against.name, objective, "wins"]))

    gains = {run.name: {name: difference(run, base, name) for name in units} for run in others}
    mixtures = [{sweep[0]: alpha, sweep[1]: 1 - alpha} for alpha in ALPHAS] if sweep else []
    return Comparison(
        objectives,
        common,
        trained_on or [],
        mixture or {},
        {run: {name: estimate(gain) for name, gain in by_name.items()} for run, by_name in gains.items()},
        {run.name: estimate(found[run.name, base.name, GATED_SCORE, "wins"]) for run in others if judge},
        {(run.name, against.name): {name: pair(run, against, name) for name in objectives} for run, against in pairs},
        {run: _summaries(by_name, trained_on or [], mixture or {}) for run, by_name in gains.items()},
        {
            run.name: {name: estimate(found[run.name, "", name] - found[base.name, "", name]) for name in ANSWERS}
            for run in others
        },
        # Gains in sd units are means of z-scores, which mix linearly.
        {run: [estimate(weighted(by_name, alphas)) for alphas in mixtures] for run, by_name in gains.items()}
        if sweep
        else {},
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


def _summaries(gains: dict[str, Array], trained_on: list[str], mixture: dict[str, float]) -> dict[str, Estimate]:
    """The gain in the trained mixture, if every objective of it has one; mean and worst gain over all objectives without the
    gated score, which is a mixture itself, and over the trained and the unseen ones."""
    single = [name for name in gains if name != GATED_SCORE]
    groups = {"all": single}
    if trained_on:
        groups["trained"] = [name for name in single if name in trained_on]
        groups["unseen"] = [name for name in single if name not in trained_on]
    found: dict[str, Estimate] = {}
    if mixture and all(name in gains for name in mixture):
        found[MIXTURE] = estimate(weighted(gains, mixture))
    for label, names in groups.items():
        if len(names) >= 2:
            found[f"mean of {label} ({len(names)})"] = estimate(weighted(gains, dict.fromkeys(names, 1 / len(names))))
            # The smallest in every bootstrap sample, whichever objective it is.
            found[f"worst of {label} ({len(names)})"] = estimate(np.min([gains[name] for name in names], axis=0))
    return found

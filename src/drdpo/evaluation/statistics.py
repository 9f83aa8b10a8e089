"""Gains over the base run, comparisons of every two runs, and their confidence intervals.

Shapes: P prompts that every run has (paired), S seeds of a run, K columns, B bootstrap samples.

The gain of a run in one objective is

    mean over P of (run's score of the prompt - base's score of the prompt)  /  sd of the base's completion scores,

where a prompt's score is the mean over its completions (and seeds) and the sd is taken over every completion of the base
(population form, as for the z-scores of step 2). Differences between other runs have the same unit. The sd is held fixed:
a run that equals the base plus a constant has an interval of width zero.

Intervals are percentile intervals (Efron and Tibshirani 1993, chapter 13) of a paired bootstrap: prompts are drawn with
replacement, the same draws for every run and estimate, so what two runs share cancels in their difference. Where a run of
S > 1 seeds takes part, the interval is symmetric, with the half width

    sqrt(t(P - 1)^2 V + sum over these runs of t(S - 1)^2 v / S),

t the 97.5% quantile of Student's distribution, V the variance over the draws of prompts, v that over the seeds (dividing by
S - 1). Such a sum covers at least 95% (Banerjee, Sankhya 1961); Satterthwaite's degrees of freedom gave 88% for two seeds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.special import stdtrit

from drdpo.evaluation.runs import ANSWERS, ScoredRun
from drdpo.objectives import GATED_SCORE

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Key = TypeVar("Key")

CONFIDENCE = 0.95
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
    """What is averaged: [P, S, ...], an axis for the seeds of each of `runs`."""

    values: Array
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """What the entries of a resampled mean are: the mean, its B draws over prompts, the mean of each seed of each run."""

    prompts: int
    draws: int
    seeds: tuple[int, ...]
    """Numbers of seeds of the runs that have several."""


def estimate(means: Array, layout: Layout, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Estimate:
    """The value and its 95% interval; see the module's docstring.

    Args:
        means: [1 + B + seeds], from `resample`, or a combination of such arrays.
        layout: of `means`.
        bounds: what the value cannot exceed.
    """
    value = float(means[0])
    if layout.prompts < 2:
        return Estimate(value, None, None)
    tail = (1 - CONFIDENCE) / 2
    draws_B, *seeds = np.split(means[1:], np.cumsum([layout.draws, *layout.seeds])[:-1])
    # Where a run takes no part, the entries of its seeds are equal.
    spread = [stdtrit(len(one) - 1, 1 - tail) ** 2 * one.var(ddof=1) / len(one) for one in seeds if np.ptp(one) > 0]
    if spread:
        half = np.sqrt(stdtrit(layout.prompts - 1, 1 - tail) ** 2 * draws_B.var() + sum(spread))
        low, high = value - half, value + half
    else:
        low, high = np.quantile(draws_B, [tail, 1 - tail])
    return Estimate(value, max(float(low), bounds[0]), min(float(high), bounds[1]))


def weighted(gains: Mapping[str, Array], weights: Mapping[str, float]) -> Array:
    """Weighted sum of resampled gains."""
    return sum((gains[name] * weight for name, weight in weights.items()), start=np.zeros(1))


def resample(
    tables: Mapping[Key, Observations], seeds: Mapping[str, int], draws: int, seed: int
) -> tuple[dict[Key, Array], Layout]:
    """Bootstrap the mean of every table over prompts, and average it for every seed of every run.

    Args:
        tables: at least one, all with the same P; a row is one prompt and is drawn as a whole, over all tables.
        seeds: {run: its number of seeds S}.
        draws: bootstrap samples B; none from a single prompt.
        seed: the same seed gives the same draws.

    Returns:
        {key: entries}, and what they are. Linear in the table's values, so that sums and differences of these arrays are
        those of the estimates.
    """
    means_PK = np.stack([table.values.reshape(len(table.values), -1).mean(axis=1) for table in tables.values()], axis=1)
    means_K = means_PK.mean(axis=0)
    draws_BK = means_K + _prompt_draws(means_PK - means_K, draws, seed)
    several = {run: count for run, count in seeds.items() if count > 1}
    found: dict[Key, Array] = {}
    for column, (key, table) in enumerate(tables.items()):
        alone = [np.full(count, means_K[column]) for count in several.values()]
        for place, run in enumerate(several):
            if run in table.runs:
                axis = 1 + table.runs.index(run)
                alone[place] = table.values.mean(axis=tuple({*range(table.values.ndim)} - {axis}))
        found[key] = np.concatenate([means_K[column : column + 1], draws_BK[:, column], *alone])
    return found, Layout(len(means_PK), len(draws_BK), tuple(several.values()))


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
    """{objective: weight} of the training pairs; empty if unknown, or if one of them has no gain."""
    gains: dict[str, dict[str, Estimate]]
    """{run: {objective: gain over the first run in its sd}}, without the first run."""
    pairs: dict[tuple[str, str], dict[str, Difference]]
    """{(run, against): {objective: }}, every two runs once, the later of them first."""
    summaries: dict[str, dict[str, Estimate]]
    """{run: {"mean of ...": mean gain over those objectives, "worst of ...": the smallest}}, without the gated score; and
    MIXTURE: the gain in the mixture that was trained on, of z-scores (mean and sd of the first run)."""
    answers: dict[str, dict[str, Estimate]]
    """{run: {name in ANSWERS: difference from the first run, in its own unit}}."""


def compare(
    runs: list[ScoredRun],
    objectives: list[str],
    common: list[int],
    draws: int,
    seed: int,
    trained_on: list[str],
    mixture: dict[str, float],
) -> Comparison:
    """Compare every run with the first one, and every two runs, on the prompts they share.

    Args:
        runs: the base first.
        objectives: names that every run has.
        common: ids of the prompts that every run has.
        draws: bootstrap samples.
        seed: of the bootstrap.
        trained_on: the objectives that training used; empty if unknown.
        mixture: {objective: weight} of the training pairs; empty if unknown.
    """
    base, *others = runs
    pairs = [(run, against) for place, run in enumerate(runs) for against in runs[:place]]
    found, layout = resample(
        _observations(runs, pairs, objectives, common), {run.name: len(run.members) for run in runs}, draws, seed
    )
    units = {name: unit for name in objectives if (unit := base.sd(name)) > 0}
    mixture = mixture if mixture.keys() <= units.keys() else {}

    def difference(run: ScoredRun, against: ScoredRun, objective: str) -> Array:
        return (found[run.name, objective] - found[against.name, objective]) * (1 / units[objective])

    def pair(run: ScoredRun, against: ScoredRun, objective: str) -> Difference:
        gain = estimate(difference(run, against, objective), layout) if objective in units else None
        return Difference(gain, estimate(found[run.name, against.name, objective, "wins"], layout, (0.0, 1.0)))

    gains = {run.name: {name: difference(run, base, name) for name in units} for run in others}
    return Comparison(
        objectives,
        common,
        trained_on,
        mixture,
        {run: {name: estimate(gain, layout) for name, gain in by_name.items()} for run, by_name in gains.items()},
        {(run.name, against.name): {name: pair(run, against, name) for name in objectives} for run, against in pairs},
        {run: _summaries(by_name, layout, trained_on, mixture) for run, by_name in gains.items()},
        {
            run.name: {name: estimate(found[run.name, "", name] - found[base.name, "", name], layout) for name in ANSWERS}
            for run in others
        },
    )


def _observations(
    runs: list[ScoredRun],
    pairs: list[tuple[ScoredRun, ScoredRun]],
    objectives: list[str],
    common: list[int],
) -> dict[tuple[str, ...], Observations]:
    """What is bootstrapped: (run, objective), (run, "", one of ANSWERS) and (run, against, objective, "wins")."""
    scores_PS = {
        (run.name, name): np.stack([member.scores.loc[common, name] for member in run.members], axis=1)
        for run in runs
        for name in objectives
    }
    tables: dict[tuple[str, ...], Observations] = {}
    for run in runs:
        for name in objectives:
            tables[run.name, name] = Observations(scores_PS[run.name, name], (run.name,))
        for name in ANSWERS:
            values_PS = np.stack([member.answers.loc[common, name] for member in run.members], axis=1)
            tables[run.name, "", name] = Observations(values_PS, (run.name,))
    for run, against in pairs:
        for name in objectives:
            # [P, S of the run, S of the other]: 1, 1/2 or 0 for every two seeds.
            signs = np.sign(scores_PS[run.name, name][:, :, None] - scores_PS[against.name, name][:, None, :])
            tables[run.name, against.name, name, "wins"] = Observations((signs + 1) / 2, (run.name, against.name))
    return tables


def _summaries(
    gains: dict[str, Array], layout: Layout, trained_on: list[str], mixture: dict[str, float]
) -> dict[str, Estimate]:
    """The gain in the trained mixture, if there is one (gains in sd are of z-scores, which mix linearly); mean and worst
    gain over all objectives without the gated score, which is a mixture itself, and over the trained and unseen ones."""
    single = [name for name in gains if name != GATED_SCORE]
    groups = {"all": single}
    if trained_on:
        groups["trained"] = [name for name in single if name in trained_on]
        groups["unseen"] = [name for name in single if name not in trained_on]
    found: dict[str, Estimate] = {}
    if mixture:
        found[MIXTURE] = estimate(weighted(gains, mixture), layout)
    for label, names in groups.items():
        if len(names) >= 2:
            mean = weighted(gains, dict.fromkeys(names, 1 / len(names)))
            found[f"mean of {label} ({len(names)})"] = estimate(mean, layout)
            # The smallest in every bootstrap sample and for every seed, whichever objective it is.
            found[f"worst of {label} ({len(names)})"] = estimate(np.min([gains[name] for name in names], axis=0), layout)
    return found

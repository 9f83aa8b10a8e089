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

from drdpo.evaluation.runs import ANSWERS, ScoredRun, common_prompts
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
    means_K, prompts, generator = means_PK.mean(axis=0), len(means_PK), np.random.default_rng(seed)
    blocks = [np.empty((0, len(tables)))]
    for start in range(0, draws if prompts > 1 else 0, _DRAWS):
        # How often each prompt is drawn, not the draws themselves: one matrix product gives the means.
        counts_BP = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=min(_DRAWS, draws - start))
        blocks.append(counts_BP @ (means_PK - means_K) / prompts)
    draws_BK = means_K + np.concatenate(blocks)
    several = {run: count for run, count in seeds.items() if count > 1}
    found: dict[Key, Array] = {}
    for column, (key, table) in enumerate(tables.items()):
        alone = [np.full(count, means_K[column]) for count in several.values()]
        for place, run in enumerate(several):
            if run in table.runs:
                axis = 1 + table.runs.index(run)
                alone[place] = table.values.mean(axis=tuple({*range(table.values.ndim)} - {axis}))
        found[key] = np.concatenate([means_K[column : column + 1], draws_BK[:, column], *alone])
    return found, Layout(prompts, len(draws_BK), tuple(several.values()))


@dataclass(frozen=True)
class Comparison:
    """The estimates of a report. Objectives in which all base scores are equal have no gain."""

    runs: list[ScoredRun]
    """The base first."""
    objectives: list[str]
    common: list[int]
    """Ids of the paired prompts: those that all runs have."""
    trained_on: list[str]
    """The objectives that training used; empty if unknown."""
    mixture: dict[str, float]
    """{objective: weight} of the training pairs; empty if unknown, if runs differ, or if one objective has no gain."""
    gains: dict[tuple[str, str], dict[str, Estimate]]
    """{(run, against): {objective: gain in the base's sd}}, every two runs once, the later of them first. Against the base
    also {"mean of ...": mean gain over those objectives, "worst of ...": the smallest}, without the gated score, and
    MIXTURE: the gain in the mixture that was trained on, of z-scores (mean and sd of the base)."""
    win_rates: dict[tuple[str, str], dict[str, Estimate]]
    """Share of the paired prompts on which the run scores higher, ties counting half; over every two seeds."""
    answers: dict[str, dict[str, Estimate]]
    """{run but the base: {name in ANSWERS: difference from the base, in its own unit}}."""

    @property
    def base(self) -> str:
        return self.runs[0].name

    @property
    def others(self) -> list[str]:
        return [run.name for run in self.runs[1:]]

    def is_unseen(self, objective: str) -> bool:
        """Is it known that training did not use this objective? The gated score mixes all of them."""
        return bool(self.trained_on) and objective not in (*self.trained_on, GATED_SCORE)


def compare(
    runs: list[ScoredRun], objectives: list[str], draws: int, seed: int, mixtures: list[dict[str, float]]
) -> Comparison:
    """Compare every run with the first one, the base, and every two runs, on the prompts they share.

    Args:
        runs, objectives: as in Comparison.
        draws, seed: of the bootstrap.
        mixtures: {objective: weight} of the training pairs, of the runs for which it is known.
    """
    base = runs[0].name
    common = common_prompts({f"{run.name} ({run.folders[0]})": run.prompts for run in runs})
    tables: dict[tuple[str, ...], Observations] = {
        (run.name, kind, name): Observations(run.means[kind, name].loc[common].to_numpy(), (run.name,))
        for run in runs
        for kind, names in (("scores", objectives), ("answers", ANSWERS))
        for name in names
    }
    pairs = [(run.name, against.name) for place, run in enumerate(runs) for against in runs[:place]]
    for run, against in pairs:
        for name in objectives:
            ours_PS, theirs_PS = (tables[one, "scores", name].values for one in (run, against))
            # [P, S of the run, S of the other]: 1, 1/2 or 0 for every two seeds.
            signs = np.sign(ours_PS[:, :, None] - theirs_PS[:, None, :])
            tables[run, against, name, "wins"] = Observations((signs + 1) / 2, (run, against))
    found, layout = resample(tables, {run.name: len(run.folders) for run in runs}, draws, seed)
    units = {name: unit for name in objectives if (unit := runs[0].sd(name)) > 0}
    trained_on = list(dict.fromkeys(name for mixture in mixtures for name in mixture))
    one = len(trained_on) > 0 and all(mixture == mixtures[0] for mixture in mixtures) and set(trained_on) <= units.keys()
    mixture = mixtures[0] if one else {}

    def differences(run: str, against: str, kind: str, units: dict[str, float]) -> dict[str, Array]:
        return {name: (found[run, kind, name] - found[against, kind, name]) * (1 / unit) for name, unit in units.items()}

    def estimates(arrays: dict[str, Array], *bounds: tuple[float, float]) -> dict[str, Estimate]:
        return {name: estimate(array, layout, *bounds) for name, array in arrays.items()}

    gains = {pair: differences(*pair, "scores", units) for pair in pairs}
    for run, against in pairs:
        if against == base:
            gains[run, base] |= _summaries(gains[run, base], trained_on, mixture)
    return Comparison(
        runs,
        objectives,
        common,
        trained_on,
        mixture,
        {pair: estimates(by_name) for pair, by_name in gains.items()},
        {pair: estimates({name: found[*pair, name, "wins"] for name in objectives}, (0.0, 1.0)) for pair in pairs},
        {run.name: estimates(differences(run.name, base, "answers", dict.fromkeys(ANSWERS, 1.0))) for run in runs[1:]},
    )


def _summaries(gains: dict[str, Array], trained_on: list[str], mixture: dict[str, float]) -> dict[str, Array]:
    """The gain in the trained mixture, if there is one (gains in sd are of z-scores, which mix linearly); mean and worst
    gain over all objectives without the gated score, which is a mixture itself, and over the trained and unseen ones."""
    single = [name for name in gains if name != GATED_SCORE]
    groups = {"all": single}
    if trained_on:
        groups["trained"] = [name for name in single if name in trained_on]
        groups["unseen"] = [name for name in single if name not in trained_on]
    found = {MIXTURE: np.sum([gains[name] * weight for name, weight in mixture.items()], axis=0)} if mixture else {}
    for label, names in groups.items():
        if len(names) >= 2:
            found[f"mean of {label} ({len(names)})"] = np.sum([gains[name] * (1 / len(names)) for name in names], axis=0)
            # The smallest in every bootstrap sample and for every seed, whichever objective it is.
            found[f"worst of {label} ({len(names)})"] = np.min([gains[name] for name in names], axis=0)
    return found

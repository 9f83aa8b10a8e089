"""Means, gains over the base run, comparisons of every two runs, and their confidence intervals.

Shapes: P prompts that every run has (paired), S seeds of a run, A values of alpha.

The gain of a run in one objective is

    mean over P of (run's score of the prompt - base's score of the prompt)  /  sd of the base's completion scores,

a prompt's score being the mean over its completions (and seeds), and the sd taken over every completion of the base
(population form, as the z-scores of step 2). The difference of any two runs is in the same unit. Intervals are those of
resampling.py. The sd is a unit of measure here and stays fixed, so a run that is the base plus a constant has an interval of
width zero.
"""

from dataclasses import dataclass, field

import numpy as np

from drdpo.evaluation.resampling import Figure, Resampled, Table, resample, worst
from drdpo.evaluation.runs import Array, Run
from drdpo.objectives import GATED_SCORE

ALPHAS = tuple(step / 10 for step in range(11))
"""Where the sweep of a mixture is evaluated."""

MIXTURE = "trained mixture"
"""Name of the summary that weighs the gains as the training pairs weighed the objectives."""

ANSWERS = ("tokens", "repeated", "cut")
"""Figures of the answers themselves: see Run.tokens_P, repeated_P, cut_P."""


@dataclass(frozen=True)
class Pair:
    """One run against another in one objective."""

    difference: Figure | None
    """In the base's sd; None where all of the base's scores are equal."""
    win_rate: Figure
    """Share of the paired prompts on which the run scores higher, a tie counting half; over every two seeds."""


@dataclass(frozen=True)
class Comparison:
    """The figures of a report. Objectives whose base scores are all equal have no gain."""

    objectives: list[str]
    common: list[int]
    """Ids of the paired prompts."""
    gains: dict[str, dict[str, Figure]]
    """{run: {objective: gain over the first run in its sd}}, without the first run."""
    win_rates: dict[str, Figure]
    """{run: its win rate against the first run on the gated score}."""
    pairs: dict[tuple[str, str], dict[str, Pair]] = field(default_factory=dict)
    """{(run, against): {objective: }}, every two runs once, the later of them first."""
    summaries: dict[str, dict[str, Figure]] = field(default_factory=dict)
    """{run: {"mean of ...": mean gain over those objectives, "worst of ...": the least}}, without the gated score; and
    MIXTURE: the gain in the mixture that training saw, of z-scores (mean and sd of the first run)."""
    answers: dict[str, dict[str, Figure]] = field(default_factory=dict)
    """{run: {name in ANSWERS: difference from the first run, in its own unit}}."""
    sweep: dict[str, list[Figure]] = field(default_factory=dict)
    """{run: [A] gain in the mixture alpha r1 + (1 - alpha) r2 of z-scores, for every one of ALPHAS}."""


def mean(run: Run, objective: str) -> float:
    """Mean over all prompts of the run."""
    return float(run.scores_P[objective].mean())


def spread(run: Run, objective: str) -> float:
    """Standard deviation over all completions of the run (population form); 0 when all scores are equal."""
    scores_C = run.scores_C[objective]
    return 0.0 if np.ptp(scores_C) == 0 else float(scores_C.std())


def compare(
    runs: list[Run],
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
        trained_on: the objectives that training saw, where that is known.
        sweep: two of `objectives`, r1 and r2, whose base scores differ among themselves; None for no sweep.
        mixture: {objective: weight} that training saw, where that is known.
    """
    base, *others = runs
    pairs = [(run, against) for place, run in enumerate(runs) for against in runs[:place]]
    judge = GATED_SCORE in set.intersection(*(set(run.scores_P) for run in runs))
    tables = _tables(runs, pairs, objectives, [GATED_SCORE] if judge else [], common)
    found = resample(tables, {run.name: len(run.members) for run in runs}, draws, seed)
    units = {name: unit for name in objectives if (unit := spread(base, name)) > 0}

    def difference(run: Run, against: Run, objective: str) -> Resampled:
        return (found[run.name, objective] - found[against.name, objective]) * (1 / units[objective])

    gains = {run.name: {name: difference(run, base, name) for name in units} for run in others}
    return Comparison(
        objectives,
        common,
        {run: {name: gain.figure for name, gain in by_name.items()} for run, by_name in gains.items()},
        {run.name: found[run.name, base.name, GATED_SCORE, "wins"].figure for run in others if judge},
        {
            (run.name, against.name): {
                name: Pair(
                    difference(run, against, name).figure if name in units else None,
                    found[run.name, against.name, name, "wins"].figure,
                )
                for name in objectives
            }
            for run, against in pairs
        },
        {run: _summaries(by_name, trained_on or [], mixture or {}) for run, by_name in gains.items()},
        {
            run.name: {name: (found[run.name, "", name] - found[base.name, "", name]).figure for name in ANSWERS}
            for run in others
        },
        {run: mixtures(by_name[sweep[0]], by_name[sweep[1]]) for run, by_name in gains.items()} if sweep else {},
    )


def _tables(
    runs: list[Run], pairs: list[tuple[Run, Run]], objectives: list[str], judges: list[str], common: list[int]
) -> dict[tuple[str, ...], Table]:
    """What is bootstrapped: (run, objective) scores, (run, "", answers' figure), (run, against, objective, "wins")."""
    tables: dict[tuple[str, ...], Table] = {}
    for run in runs:
        for objective in objectives:
            tables[run.name, objective] = Table(scores(run, objective, common), (run.name,))
        for name in ANSWERS:
            values_PS = np.stack([getattr(member, f"{name}_P")[member.rows(common)] for member in run.members], axis=1)
            tables[run.name, "", name] = Table(values_PS, (run.name,))
    for run, against in pairs:
        for objective in dict.fromkeys([*objectives, *judges]):
            wins_PK = _wins(scores(run, objective, common), scores(against, objective, common))
            tables[run.name, against.name, objective, "wins"] = Table(wins_PK, (run.name, against.name))
    return tables


def scores(run: Run, objective: str, common: list[int]) -> Array:
    """[P, S]: every seed's score of every paired prompt."""
    return np.stack([member.scores_P[objective][member.rows(common)] for member in run.members], axis=1)


def _wins(run_PS: Array, against_PS: Array) -> Array:
    """[P, S of the run x S of the other]: 1, 1/2 or 0 for every two seeds."""
    signs = np.sign(run_PS[:, :, None] - against_PS[:, None, :])
    wins_PK: Array = ((signs + 1) / 2).reshape(len(run_PS), -1)
    return wins_PK


def _summaries(gains: dict[str, Resampled], trained_on: list[str], mixture: dict[str, float]) -> dict[str, Figure]:
    """The gain in the mixture that training saw, where all of it has gains; mean and worst gain over all objectives but the
    gated score, which is itself a mixture, and over the unseen ones."""
    single = [name for name in gains if name != GATED_SCORE]
    groups = {"all": single}
    if trained_on:
        groups |= {
            "trained": [name for name in single if name in trained_on],
            "unseen": [name for name in single if name not in trained_on],
        }
    found: dict[str, Figure] = {}
    if mixture and all(name in gains for name in mixture):
        found[MIXTURE] = weighted({name: gains[name] for name in mixture}, mixture).figure
    for label, names in groups.items():
        if len(names) < 2:
            continue
        equal = dict.fromkeys(names, 1 / len(names))
        found[f"mean of {label} ({len(names)})"] = weighted({name: gains[name] for name in names}, equal).figure
        found[f"worst of {label} ({len(names)})"] = worst([gains[name] for name in names]).figure
    return found


def mixtures(first: Resampled, second: Resampled) -> list[Figure]:
    """[A]: alpha r1 + (1 - alpha) r2 for every one of ALPHAS; gains in sd units are means of z-scores and mix linearly."""
    return [weighted({"1": first, "2": second}, {"1": alpha, "2": 1 - alpha}).figure for alpha in ALPHAS]


def weighted(gains: dict[str, Resampled], weights: dict[str, float]) -> Resampled:
    """The weighted sum of gains, at least one."""
    first, *others = (gain * weights[name] for name, gain in gains.items())
    return sum(others, start=first)

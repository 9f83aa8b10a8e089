"""The sections of a report that compare runs."""

from itertools import combinations

from drdpo.config.evaluation import EvaluateConfig
from drdpo.evaluation.resampling import Figure
from drdpo.evaluation.runs import Run
from drdpo.evaluation.statistics import ALPHAS, ANSWERS, MIXTURE, Comparison, mean
from drdpo.evaluation.tables import markdown_table
from drdpo.objectives import GATED_SCORE, flag_name

_PAIR_COLUMNS = 6
"""So many pairs of runs fit a table; more are left to pairs.csv."""


def gain_sections(
    base: Run, others: list[Run], comparison: Comparison, trained_on: list[str], mixture: dict[str, float]
) -> list[str]:
    """Gains over the base, their means over the objectives, and win rates against it.

    Args:
        base: the first run.
        others: at least one.
        comparison: of them all.
        trained_on: the objectives that training saw; empty where that is not known.
        mixture: {objective: weight} of the training pairs; empty where that is not known.
    """
    header = ["objective", *(run.name for run in others)]
    rows = [
        [f"`{flag_name(name)}`{mark(name, trained_on)}", *(gain(comparison, run.name, name) for run in others)]
        for name in comparison.objectives
    ]
    summaries = {
        label: [interval(comparison.summaries[run.name][label], "{:+.3f}") for run in others]
        for label in comparison.summaries[others[0].name]
    }
    # What training optimised comes first.
    rows[:0] = [[f"**{MIXTURE}**", *summaries.pop(MIXTURE)]] if MIXTURE in summaries else []
    rows += [[label, *figures] for label, figures in summaries.items()]
    text = (
        f"Mean over the paired prompts of (run - {base.name}), divided by the standard deviation of {base.name}'s "
        "completion scores; in brackets the 95% percentile interval of the paired bootstrap over prompts"
        + (", and over seeds" if any(run.seeds for run in [base, *others]) else "")
        + ". The standard deviation is held fixed, as the unit. Each interval stands for itself: of twenty, one leaves out "
        "its true value."
    )
    if summaries:
        text += f" The means and the worst are over single objectives, without the gated score ({GATED_SCORE})."
    if MIXTURE in comparison.summaries[others[0].name]:
        terms = " + ".join(f"{weight:g} `{flag_name(name)}`" for name, weight in mixture.items())
        text += f" The {MIXTURE} is {terms}, of the gains below it."
    if trained_on:
        names = ", ".join(f"`{flag_name(name)}`" for name in trained_on)
        text += f" Training saw {names}; the objectives marked *unseen* took no part in its pairs."
        if GATED_SCORE not in trained_on:
            text += f" {GATED_SCORE} mixes all of them."
    parts = [f"## Gain over {base.name}, in standard deviations", text, markdown_table(header, rows)]
    if not comparison.win_rates:
        return [*parts, f"No win rate: the runs have no gated score ({GATED_SCORE})."]
    wins = [[run.name, interval(comparison.win_rates[run.name], "{:.1%}")] for run in others]
    return [
        *parts,
        f"## Win rate against {base.name}",
        f"Share of the paired prompts on which the run's gated score ({GATED_SCORE}) is higher; a tie counts half.",
        markdown_table(["run", "win rate"], wins),
    ]


def mark(objective: str, trained_on: list[str]) -> str:
    """What stands behind the name of an objective that training did not see."""
    return " *unseen*" if trained_on and objective not in trained_on and objective != GATED_SCORE else ""


def pair_sections(runs: list[Run], comparison: Comparison) -> list[str]:
    """Every two runs but those with the base, which have sections of their own."""
    names = [(b.name, a.name) for a, b in combinations(runs[1:], 2)]
    if not names:
        return []
    parts = ["## Every two runs"]
    if len(names) > _PAIR_COLUMNS:
        parts.append(f"The {len(names)} pairs of runs are in pairs.csv.")
        if GATED_SCORE not in comparison.objectives:
            return parts
        parts.append(f"Here: the gated score ({GATED_SCORE}), row minus column, in standard deviations of {runs[0].name}.")
        header = ["", *(run.name for run in runs[1:-1])]
        rows = [
            [run.name, *(_difference(comparison, run.name, against.name) for against in runs[1:place])]
            + [""] * (len(runs) - 1 - place)
            for place, run in enumerate(runs[2:], start=2)
        ]
        return [*parts, markdown_table(header, rows)]
    header = ["objective", *(f"{run} - {against}" for run, against in names)]
    shown = {name: [comparison.pairs[pair][name] for pair in names] for name in comparison.objectives}
    rows = [
        [f"`{flag_name(name)}`", *(interval(p.difference, "{:+.3f}") if p.difference else "n/a" for p in pairs)]
        for name, pairs in shown.items()
    ]
    wins = [[f"`{flag_name(name)}`", *(interval(p.win_rate, "{:.1%}") for p in pairs)] for name, pairs in shown.items()]
    return [
        *parts,
        f"Differences, in standard deviations of {runs[0].name}'s scores; an interval without 0 tells the two runs apart.",
        markdown_table(header, rows),
        "Win rates: the share of the paired prompts on which the first scores higher, a tie counting half.",
        markdown_table(header, wins),
    ]


def _difference(comparison: Comparison, run: str, against: str) -> str:
    difference = comparison.pairs[run, against][GATED_SCORE].difference
    return interval(difference, "{:+.3f}") if difference else "n/a"


def sweep_sections(config: EvaluateConfig, comparison: Comparison, base: str) -> list[str]:
    """The mixtures from alpha 0 to 1."""
    r1, r2 = (f"`{flag_name(name)}`" for name in config.sweep)
    text = (
        f"r*(alpha) = alpha r1 + (1 - alpha) r2 of z-scores (mean and standard deviation of {base}), r1 = {r1}, r2 = {r2}. "
        f"{base} is at 0 for every alpha. Training used alpha = {config.sweep_trained_at:g}."
    )
    rows = [
        [f"{alpha:.1f}", *(interval(figures[place], "{:+.3f}") for figures in comparison.sweep.values())]
        for place, alpha in enumerate(ALPHAS)
    ]
    table = markdown_table(["alpha", *comparison.sweep], rows)
    return ["## Other mixtures of the two objectives", text, "![Gain by alpha](alpha.png)", table]


def seed_sections(runs: list[Run], objectives: list[str]) -> list[str]:
    """Mean scores of every seed, and their standard deviation."""
    parts = ["## Mean scores by seed", "On the prompts that all seeds of a run have; sd over seeds with n - 1."]
    for run in runs:
        if not run.seeds:
            continue
        header = [run.name, *(f"seed {number}" for number in range(1, len(run.seeds) + 1)), "sd over seeds"]
        rows = []
        for name in objectives:
            means = [mean(member, name) for member in run.seeds]
            centre = sum(means) / len(means)
            sd = (sum((value - centre) ** 2 for value in means) / (len(means) - 1)) ** 0.5
            rows.append([f"`{flag_name(name)}`", *(f"{value:.4f}" for value in means), f"{sd:.4f}"])
        parts.append(markdown_table(header, rows))
    return parts


def answer_sections(runs: list[Run], comparison: Comparison) -> list[str]:
    """Length, repetition and cut answers, and how they differ from the base's."""
    base, *others = runs
    parts = [
        "## Answers",
        "Repeated: the share of an answer's token 4-grams that stood in it before (seq-rep-4, Welleck et al. 2020).",
        markdown_table(
            ["run", "answer length, mean tokens", "cut by the length limit", "repeated 4-grams"],
            [
                [run.name, f"{run.tokens_P.mean():.1f}", f"{run.cut_P.mean():.1%}", f"{run.repeated_P.mean():.1%}"]
                for run in runs
            ],
        ),
    ]
    if others:
        forms = {"tokens": "{:+.1f}", "cut": "{:+.1%}", "repeated": "{:+.1%}"}
        order = sorted(ANSWERS, key=list(forms).index)
        rows = [[run.name, *(interval(comparison.answers[run.name][name], forms[name]) for name in order)] for run in others]
        parts += [
            f"Differences from {base.name} on the paired prompts:",
            markdown_table(["run", "tokens", "cut by the length limit", "repeated 4-grams"], rows),
        ]
    return parts


def gain(comparison: Comparison, run: str, objective: str) -> str:
    """A gain with its interval; n/a where the base's scores are all equal."""
    figure = comparison.gains.get(run, {}).get(objective)
    return interval(figure, "{:+.3f}") if figure else "n/a"


def interval(figure: Figure, form: str) -> str:
    """`+0.894 [+0.721, +1.060]`"""
    value = form.format(figure.value)
    if figure.low is None or figure.high is None:
        return f"{value} (one prompt: no interval)"
    return f"{value} [{form.format(figure.low)}, {form.format(figure.high)}]"

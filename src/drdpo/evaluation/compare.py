"""Step 4a: report.md and its tables for one or more scored runs, with gains over the first."""

from dataclasses import asdict, astuple
from itertools import combinations
from pathlib import Path

import pandas as pd

from drdpo.config.evaluation import EvaluateConfig
from drdpo.evaluation.report import Change, csv_text, differences, interval, markdown_table, text_table, write_report
from drdpo.evaluation.runs import (
    Provenance,
    ScoredRun,
    choose_objectives,
    common_prompts,
    load_run,
    parse_runs,
    pool_seeds,
    read_provenance,
)
from drdpo.evaluation.spider import draw_spider
from drdpo.evaluation.statistics import MIXTURE, Comparison, compare
from drdpo.models import fingerprint
from drdpo.objectives import GATED_SCORE, flag_name
from drdpo.records import Completion, read_records

SCORES = ("run", "objective", "prompts", "mean", "sd", "paired_prompts", "gain_sd", "ci_low", "ci_high")
PAIRS = (
    "run", "against", "objective", "paired_prompts", "difference_sd", "ci_low", "ci_high", "win_rate", "win_low", "win_high",
)  # fmt: skip
_PAIR_COLUMNS = 6
"""More pairs of runs than these are in pairs.csv only."""
_CHANGES = 12
"""Prompts that report.html shows with their answers."""
_ENOUGH_SEEDS = 5
"""With fewer the spread over seeds is hardly known."""
_OPTIONAL = ("spider.png", "spider.svg", "pairs.csv")


def evaluate_armorm(config: EvaluateConfig) -> None:
    """Write report.md and scores.csv to the output folder and print the table; for three objectives also spider.png and
    .svg, for several runs pairs.csv.

    Runs are joined by prompt_id. Means are over all prompts of a run, gains and win rates over the prompts that all share.

    Args:
        config: the flags; the first run is the base.

    Raises:
        UsageError: a --runs argument that is not NAME=FOLDER, a repeated folder, an unknown objective, or a locked output
            folder.
        DataError: a missing folder or split, unscored or broken rows, no common objective or prompt.
    """
    folders = parse_runs(config.runs)
    runs = [pool_seeds(name, [load_run(name, place, config.split) for place in places]) for name, places in folders.items()]
    objectives = choose_objectives(runs, config.objectives)
    provenances = {
        name if len(places) == 1 else f"{name}, seed {number}": read_provenance(place, config.split)
        for name, places in folders.items()
        for number, place in enumerate(places, start=1)
    }
    comparison = compare(
        runs,
        objectives,
        common_prompts(runs),
        config.bootstrap,
        config.seed,
        list(dict.fromkeys(name for provenance in provenances.values() for name in provenance.mixture)),
        _mixture(provenances),
    )
    files = _tables(runs, comparison) | draw_spider(runs, comparison)
    files["report.md"] = armorm_report(config, runs, comparison, provenances, "spider.png" in files)
    inputs = {name: [fingerprint(place / f"{config.split}.jsonl") for place in places] for name, places in folders.items()}
    facts: dict[str, object] = {
        "counts": {run.name: {"completions": len(run.completions), "prompts": len(run.prompts)} for run in runs},
        "paired_prompts": len(comparison.common),
    }
    if gains := {run: asdict(found[MIXTURE]) for run, found in comparison.summaries.items() if MIXTURE in found}:
        facts["trained_mixture"] = {"weights": comparison.mixture, "gains_sd": gains}
    output = Path(config.output_path)
    changes = _changes(runs, comparison, config.split)
    write_report(output, "evaluate_armorm", config, inputs, files, _OPTIONAL, changes, **facts)
    print(_terminal_table(runs, comparison))
    for line in [*_unlike(provenances), *_notes(provenances)]:
        print(f"note: {line}")
    print(f"report: {output / 'report.md'}")


def _mixture(provenances: dict[str, Provenance]) -> dict[str, float]:
    """The {objective: weight} that the runs were trained on; empty if none is recorded or they differ."""
    found = [p.mixture for p in provenances.values() if p.mixture]
    return found[0] if found and all(mixture == found[0] for mixture in found) else {}


def _unlike(provenances: dict[str, Provenance]) -> list[str]:
    """Differences in how the runs were sampled and scored, other than the policy."""
    return [
        line
        for step in ("sampling", "scoring")
        for line in differences(step, {run: p.made_by[step] for run, p in provenances.items() if step in p.made_by})
    ]


def _notes(provenances: dict[str, Provenance]) -> list[str]:
    return [note for provenance in provenances.values() for note in provenance.notes]


def _changes(runs: list[ScoredRun], comparison: Comparison, split: str) -> list[Change]:
    """The shared prompts with the largest change of the trained mixture, or else of the gated or the first objective."""
    if len(runs) == 1:
        return []
    first = GATED_SCORE if GATED_SCORE in comparison.objectives else comparison.objectives[0]
    weights = pd.Series(comparison.mixture or {first: 1.0})
    score = MIXTURE if comparison.mixture else flag_name(first)
    means = pd.DataFrame({run.name: run.scores[weights.index] @ weights for run in runs}).loc[list(comparison.common)]
    moved = means.sub(means[runs[0].name], axis=0).abs().max(axis=1)
    shown = moved.sort_values(ascending=False, kind="stable").index[:_CHANGES]
    answers: dict[str, dict[int, str]] = {}
    for run in runs:
        rows = read_records(run.members[0].folder / f"{split}.jsonl", Completion.from_row)
        answers[run.name] = {row.prompt_id: row.completion[0]["content"] for row in reversed(rows)}
    return [
        Change(
            runs[0].prompts[number][-1]["content"], score,
            [(run.name, float(means.at[number, run.name]), answers[run.name][number]) for run in runs],
        )
        for number in shown
    ]  # fmt: skip


# CSV files and the terminal ------------------------------------------------------------------------------------------------


def _tables(runs: list[ScoredRun], comparison: Comparison) -> dict[str, str | bytes]:
    """{name: content} of the CSV files, at full precision. The first run has no gain; differences are in its sd."""
    paired = len(comparison.common)
    scores = []
    for run in runs:
        for name in comparison.objectives:
            gain = comparison.gains.get(run.name, {}).get(name)
            numbers = [paired, *astuple(gain)] if gain else [""] * 4
            scores.append([run.name, name, len(run.prompts), run.mean(name), run.sd(name), *numbers])
    files: dict[str, str | bytes] = {"scores.csv": csv_text(SCORES, scores)}
    if len(runs) > 1:
        pairs = [
            [run, against, name, paired, *(astuple(d.gain) if d.gain else [""] * 3), *astuple(d.win_rate)]
            for (run, against), by_name in comparison.pairs.items()
            for name, d in by_name.items()
        ]
        files["pairs.csv"] = csv_text(PAIRS, pairs)
    return files


def _terminal_table(runs: list[ScoredRun], comparison: Comparison) -> str:
    """Means, and gains in standard deviations of the first run with their intervals."""
    base, *others = runs
    header = ["objective", *(run.name for run in runs), *(f"{run.name} - {base.name} [sd]" for run in others)]
    rows = [
        [flag_name(name), *(f"{run.mean(name):.4f}" for run in runs), *(_gain(comparison, run, name) for run in others)]
        for name in comparison.objectives
    ]
    if others and comparison.mixture:
        gains = [interval(comparison.summaries[run.name][MIXTURE], "{:+.3f}") for run in others]
        rows.append([MIXTURE, *[""] * len(runs), *gains])
    return text_table(header, rows)


# report.md -----------------------------------------------------------------------------------------------------------------


def armorm_report(
    config: EvaluateConfig,
    runs: list[ScoredRun],
    comparison: Comparison,
    provenances: dict[str, Provenance],
    pictured: bool,
) -> str:
    """The Markdown report.

    Args:
        config: the flags.
        runs: the base first.
        comparison: of these runs.
        provenances: {run, or run and seed: what made it}, in the order of the runs.
        pictured: whether to show spider.png.
    """
    base, *others = runs
    title = f"# {', '.join(run.name for run in others)} against {base.name}" if others else f"# {base.name}"
    parts = [title, _summary(config, runs, comparison)]
    parts += [f"> **Not a like-for-like comparison:** {line}" for line in _unlike(provenances)]
    parts += ["![Mean scores and gains](spider.png)"] if pictured else []
    parts += ["## Runs", _runs_table(runs, comparison, provenances)]
    parts += ["\n".join(f"* {note}" for note in notes)] if (notes := _notes(provenances)) else []
    if others:
        parts += _gain_sections(base, others, comparison) + _win_sections(base, others, comparison)
        parts += _pair_sections(runs, comparison)
    parts += [
        "## Mean scores",
        "Mean over prompts of each prompt's mean score, on the reward model's own scales.",
        markdown_table(
            ["objective", *(run.name for run in runs)],
            [[f"`{flag_name(name)}`", *(f"{run.mean(name):.4f}" for run in runs)] for name in comparison.objectives],
        ),
    ]
    parts += _answer_sections(runs, comparison)
    return "\n\n".join(parts) + "\n"


def _gain(comparison: Comparison, run: ScoredRun, objective: str) -> str:
    return interval(comparison.gains[run.name].get(objective), "{:+.3f}")


def _summary(config: EvaluateConfig, runs: list[ScoredRun], comparison: Comparison) -> str:
    lines = [f"Split `{config.split}`. Every prompt counts once; its score is the mean over its completions."]
    if len(runs) > 1:
        lines.append(
            f"Gains and win rates use the {len(comparison.common)} prompts that all runs share; their intervals come from "
            f"{config.bootstrap} bootstrap samples over prompts (seed {config.seed})."
        )
        flat = [name for name in comparison.objectives if runs[0].sd(name) == 0]
        if flat:
            lines.append(
                f"All scores of {runs[0].name} are equal in {', '.join(flat)}, so there is no gain in units of its sd."
            )
    return " ".join(lines)


def _runs_table(runs: list[ScoredRun], comparison: Comparison, provenances: dict[str, Provenance]) -> str:
    members = [member for run in runs for member in run.members]
    rows = [
        [
            label, f"`{member.folder}`", f"`{provenance.policy}`", provenance.method, str(len(member.completions)),
            str(len(member.prompts)), str(len(member.prompts) - len(comparison.common)),
        ]
        for (label, provenance), member in zip(provenances.items(), members, strict=True)
    ]  # fmt: skip
    header = ["run", "folder", "policy", "method", "completions", "prompts", "unpaired prompts"]
    return markdown_table(header, rows, left=4)


def _gain_sections(base: ScoredRun, others: list[ScoredRun], comparison: Comparison) -> list[str]:
    """Gains over the base and their means over the objectives."""
    trained_on, mixture = comparison.trained_on, comparison.mixture

    def unseen(name: str) -> str:
        return " *unseen*" if trained_on and name not in (*trained_on, GATED_SCORE) else ""

    rows = [
        [f"`{flag_name(name)}`{unseen(name)}", *(_gain(comparison, run, name) for run in others)]
        for name in comparison.objectives
    ]
    summaries = {
        label: [interval(comparison.summaries[run.name][label], "{:+.3f}") for run in others]
        for label in comparison.summaries[others[0].name]
    }
    pooled = any(run.seeds for run in (base, *others))
    seeds = ", for runs of several seeds a t interval over prompts and seeds" if pooled else ""
    text = (
        f"Mean difference from {base.name} over the paired prompts, in standard deviations of {base.name}'s completion "
        "scores. The unit is held fixed, so a mixture of such scores gains the weighted sum of their gains; "
        "`src/evaluate_policy.py --mixtures` has its interval. "
        f"Brackets: 95% percentile interval of a paired bootstrap over prompts{seeds}, without correction for multiple "
        "comparisons: about one in twenty misses the true value."
    )
    if summaries.keys() - {MIXTURE}:
        text += f" The mean and worst gains omit the gated score ({GATED_SCORE})."
    if mixture:
        # What training optimised comes first.
        rows.insert(0, [f"**{MIXTURE}**", *summaries.pop(MIXTURE)])
        terms = " + ".join(f"{weight:g} `{flag_name(name)}`" for name, weight in mixture.items())
        text += f" The {MIXTURE} is {terms}, applied to the gains below."
    if trained_on:
        names = ", ".join(f"`{flag_name(name)}`" for name in trained_on)
        text += f" Training used {names}; objectives marked *unseen* were not used."
        if GATED_SCORE not in trained_on:
            text += f" {GATED_SCORE} mixes all objectives."
    rows += [[label, *gains] for label, gains in summaries.items()]
    header = ["objective", *(run.name for run in others)]
    return [f"## Gain over {base.name}, in standard deviations", text, markdown_table(header, rows)]


def _win_sections(base: ScoredRun, others: list[ScoredRun], comparison: Comparison) -> list[str]:
    if GATED_SCORE not in comparison.objectives:
        return [f"No win rate: the gated score ({GATED_SCORE}) is not among the objectives."]
    rates = {run.name: comparison.pairs[run.name, base.name][GATED_SCORE].win_rate for run in others}
    return [
        f"## Win rate against {base.name}",
        f"Share of the paired prompts on which the run's gated score ({GATED_SCORE}) is higher; ties count half.",
        markdown_table(["run", "win rate"], [[run, interval(rate, "{:.1%}")] for run, rate in rates.items()]),
    ]


def _pair_sections(runs: list[ScoredRun], comparison: Comparison) -> list[str]:
    """Every two runs other than the base, which has sections of its own."""
    names = [(b.name, a.name) for a, b in combinations(runs[1:], 2)]
    if not names:
        return []
    if len(names) > _PAIR_COLUMNS:
        return ["## Every two runs", f"The {len(names)} pairs of runs are in pairs.csv."]
    header = ["objective", *(f"{run} - {against}" for run, against in names)]
    rows = [
        [f"`{flag_name(name)}`", *(interval(comparison.pairs[pair][name].gain, "{:+.3f}") for pair in names)]
        for name in comparison.objectives
    ]
    text = f"Differences, in standard deviations of {runs[0].name}'s scores. "
    if any(1 < len(run.members) < _ENOUGH_SEEDS for run in runs):
        text += f"With fewer than {_ENOUGH_SEEDS} seeds they tell no two methods apart, whatever the intervals. "
    elif not any(run.seeds for run in runs):
        text += "Two runs differ if the interval excludes 0; that says nothing about other training seeds. "
    else:
        text += "Two runs differ if the interval excludes 0. "
    text += "Win rates are in pairs.csv."
    return ["## Every two runs", text, markdown_table(header, rows)]


def _answer_sections(runs: list[ScoredRun], comparison: Comparison) -> list[str]:
    """Lengths, cut and repeated answers, and differences from the base."""
    base, *others = runs
    forms = {"tokens": "{:.1f}", "cut": "{:.1%}", "repeated": "{:.1%}"}
    means = [[run.name, *(form.format(run.answers[name].mean()) for name, form in forms.items())] for run in runs]
    parts = [
        "## Answers",
        "Repeated 4-grams: share of an answer's token 4-grams that occur earlier in it (seq-rep-4, Welleck et al. 2020).",
        markdown_table(["run", "answer length, mean tokens", "cut by the length limit", "repeated 4-grams"], means),
    ]
    if others:
        rows = [
            [run, *(interval(found[name], form.replace(":", ":+")) for name, form in forms.items())]
            for run, found in comparison.answers.items()
        ]
        parts += [
            f"Differences from {base.name} on the paired prompts:",
            markdown_table(["run", "tokens", "cut by the length limit", "repeated 4-grams"], rows),
        ]
    return parts

"""scores.csv, report.md and the table in the terminal."""

import csv
from pathlib import Path
from typing import IO

from drdpo.config.evaluation import EvaluateConfig
from drdpo.evaluation.provenance import Provenance, differences, shown
from drdpo.evaluation.runs import Run
from drdpo.evaluation.statistics import Comparison, Figure, mean, spread
from drdpo.evaluation.tables import markdown_table, text_table
from drdpo.manifest import git_commit, versions
from drdpo.objectives import GATED_SCORE, flag_name

CSV_COLUMNS = ("run", "objective", "prompts", "mean", "sd", "paired_prompts", "gain_sd", "ci_low", "ci_high")


def write_csv(stream: IO[str], runs: list[Run], comparison: Comparison) -> None:
    """One line a run and objective; the gain's columns are empty for the first run and where there is no gain."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for run in runs:
        for objective in comparison.objectives:
            gain = comparison.gains.get(run.name, {}).get(objective)
            paired = [len(comparison.common), gain.value, gain.low, gain.high] if gain else ["", "", "", ""]
            writer.writerow([run.name, objective, len(run.prompts), mean(run, objective), spread(run, objective), *paired])


def terminal_table(runs: list[Run], comparison: Comparison) -> str:
    """Means, and gains in standard deviations of the first run with their interval."""
    base, *others = runs
    header = ["objective", *(run.name for run in runs), *(f"{run.name} - {base.name} [sd]" for run in others)]
    rows = [
        [flag_name(name), *_means(runs, name), *(_gain(comparison, run.name, name) for run in others)]
        for name in comparison.objectives
    ]
    return text_table(header, rows)


def report(config: EvaluateConfig, runs: list[Run], comparison: Comparison, provenances: dict[str, Provenance]) -> str:
    """The Markdown report, with spider.png beside it.

    Args:
        config: the flags.
        runs: the base first.
        comparison: from statistics.compare.
        provenances: {run: what made it}.
    """
    base, *others = runs
    title = f"# {', '.join(run.name for run in others)} against {base.name}" if others else f"# {base.name}"
    parts = [title, _summary(config, runs, comparison)]
    parts += [f"> **Not a like-for-like comparison:** {line}" for line in differences(provenances)]
    parts += ["![Mean scores and gains](spider.png)", "## Runs", _runs_table(runs, comparison, provenances)]
    if others:
        parts += _gain_sections(base, others, comparison)
    parts += ["## Mean scores", "The mean over prompts of each prompt's mean score, on the reward model's own scales.",
              markdown_table(["objective", *(run.name for run in runs)],
                             [[f"`{flag_name(name)}`", *_means(runs, name)] for name in comparison.objectives])]  # fmt: skip
    parts += ["## Answers", markdown_table(
        ["run", "answer length, mean tokens", "cut by the length limit"],
        [[run.name, f"{run.tokens_P.mean():.1f}", f"{run.cut_P.mean():.1%}"] for run in runs],
    )]  # fmt: skip
    parts += ["## How the runs were made", *_provenance_sections(provenances)]
    return "\n\n".join(parts) + "\n"


def _summary(config: EvaluateConfig, runs: list[Run], comparison: Comparison) -> str:
    lines = [f"Split `{config.split}`; every prompt counts once, its score being the mean over its completions."]
    if len(runs) > 1:
        lines.append(
            f"Runs are joined by prompt_id; gains and win rates use the {len(comparison.common)} prompts that every run "
            f"has, with {config.bootstrap} bootstrap samples over prompts, seed {config.seed}."
        )
    flat = [name for name in comparison.objectives if len(runs) > 1 and spread(runs[0], name) == 0]
    if flat:
        lines.append(f"All scores of {runs[0].name} are equal in {', '.join(flat)}, so there is no gain in its sd units.")
    return " ".join(lines)


def _runs_table(runs: list[Run], comparison: Comparison, provenances: dict[str, Provenance]) -> str:
    rows = [
        [
            run.name, f"`{run.folder}`", f"`{provenances[run.name].policy}`", provenances[run.name].method,
            str(run.completions), str(len(run.prompts)), str(len(run.prompts) - len(comparison.common)),
        ]
        for run in runs
    ]  # fmt: skip
    header = ["run", "folder", "policy", "method", "completions", "prompts", "prompts left out of pairs"]
    return markdown_table(header, rows, left=4)


def _gain_sections(base: Run, others: list[Run], comparison: Comparison) -> list[str]:
    header = ["objective", *(run.name for run in others)]
    rows = [
        [f"`{flag_name(name)}`", *(_gain(comparison, run.name, name) for run in others)] for name in comparison.objectives
    ]
    text = (
        f"Mean over the paired prompts of (run - {base.name}), divided by the standard deviation of {base.name}'s "
        "completion scores; in brackets the 95% percentile interval of the paired bootstrap over prompts. The standard "
        "deviation is held fixed, as the unit."
    )
    parts = [f"## Gain over {base.name}, in standard deviations", text, markdown_table(header, rows)]
    if comparison.win_rates:
        wins = [[run.name, _interval(comparison.win_rates[run.name], "{:.1%}")] for run in others]
        parts += [
            f"## Win rate against {base.name}",
            f"Share of the paired prompts on which the run's gated score ({GATED_SCORE}) is higher; a tie counts half.",
            markdown_table(["run", "win rate"], wins),
        ]
    else:
        parts.append(f"No win rate: the runs have no gated score ({GATED_SCORE}).")
    return parts


def _provenance_sections(provenances: dict[str, Provenance]) -> list[str]:
    parts = []
    sections: dict[str, dict[str, dict[str, str]]] = {
        "Training": {run: p.training or {} for run, p in provenances.items()},
        "Sampling": {run: shown(p.sampling) for run, p in provenances.items()},
        "Scoring": {run: shown(p.scoring) for run, p in provenances.items()},
        "Versions": {run: p.versions for run, p in provenances.items()},
    }
    for heading, records in sections.items():
        names = list(dict.fromkeys(name for record in records.values() for name in record))
        if names:
            rows = [[f"`{name}`", *(record.get(name, "") for record in records.values())] for name in names]
            parts += [f"### {heading}", markdown_table(["", *records], rows, left=1 + len(records))]
    notes = [note for provenance in provenances.values() for note in provenance.notes]
    if notes:
        parts += ["### Not recorded", "\n".join(f"- {note}" for note in notes)]
    used = ", ".join(f"{name} {versions()[name]}" for name in ("numpy",) if name in versions())
    return [*parts, f"This report: commit {git_commit()}, {used}."]


def _means(runs: list[Run], objective: str) -> list[str]:
    return [f"{mean(run, objective):.4f}" for run in runs]


def _gain(comparison: Comparison, run: str, objective: str) -> str:
    gain = comparison.gains.get(run, {}).get(objective)
    return _interval(gain, "{:+.3f}") if gain else "n/a"


def _interval(figure: Figure, form: str) -> str:
    value = form.format(figure.value)
    if figure.low is None or figure.high is None:
        return f"{value} (one prompt: no interval)"
    return f"{value} [{form.format(figure.low)}, {form.format(figure.high)}]"


def report_paths(folder: Path) -> list[Path]:
    """The files of a report."""
    return [folder / name for name in ("scores.csv", "report.md", "spider.png", "spider.svg")]

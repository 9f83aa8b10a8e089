"""report.md and the table in the terminal."""

from drdpo.config.evaluation import EvaluateConfig
from drdpo.evaluation.provenance import Provenance, differences, shown
from drdpo.evaluation.report_sections import (
    answer_sections,
    gain,
    gain_sections,
    interval,
    pair_sections,
    seed_sections,
    sweep_sections,
)
from drdpo.evaluation.runs import Run
from drdpo.evaluation.statistics import MIXTURE, Comparison, mean, spread
from drdpo.evaluation.tables import markdown_table, text_table
from drdpo.folder import git_commit, versions
from drdpo.objectives import flag_name


def terminal_table(runs: list[Run], comparison: Comparison) -> str:
    """Means, and gains in standard deviations of the first run with their interval."""
    base, *others = runs
    header = ["objective", *(run.name for run in runs), *(f"{run.name} - {base.name} [sd]" for run in others)]
    rows = [
        [flag_name(name), *_means(runs, name), *(gain(comparison, run.name, name) for run in others)]
        for name in comparison.objectives
    ]
    if others and MIXTURE in comparison.summaries[others[0].name]:
        gains = [interval(comparison.summaries[run.name][MIXTURE], "{:+.3f}") for run in others]
        rows.append([MIXTURE, *[""] * len(runs), *gains])
    return text_table(header, rows)


def report(
    config: EvaluateConfig,
    runs: list[Run],
    comparison: Comparison,
    provenances: dict[str, Provenance],
    trained_on: list[str],
    mixture: dict[str, float],
) -> str:
    """The Markdown report, with spider.png beside it.

    Args:
        config: the flags.
        runs: the base first.
        comparison: from statistics.compare.
        provenances: {run, or run and seed: what made it}, in the order of the runs.
        trained_on: the objectives that training saw; empty where that is not known.
        mixture: {objective: weight} of the training pairs; empty where that is not known.
    """
    base, *others = runs
    title = f"# {', '.join(run.name for run in others)} against {base.name}" if others else f"# {base.name}"
    parts = [title, _summary(config, runs, comparison)]
    parts += [f"> **Not a like-for-like comparison:** {line}" for line in differences(provenances)]
    parts += ["![Mean scores and gains](spider.png)", "## Runs", _runs_table(runs, comparison, provenances)]
    if others:
        parts += gain_sections(base, others, comparison, trained_on, mixture)
        parts += pair_sections(runs, comparison)
    if comparison.sweep:
        parts += sweep_sections(config, comparison, base.name)
    parts += ["## Mean scores", "The mean over prompts of each prompt's mean score, on the reward model's own scales.",
              markdown_table(["objective", *(run.name for run in runs)],
                             [[f"`{flag_name(name)}`", *_means(runs, name)] for name in comparison.objectives])]  # fmt: skip
    if any(run.seeds for run in runs):
        parts += seed_sections(runs, comparison.objectives)
    parts += answer_sections(runs, comparison)
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
    rows = []
    members = [(run, member) for run in runs for member in run.members]
    for (label, provenance), (_, member) in zip(provenances.items(), members, strict=True):
        left_out = len(member.prompts) - len(comparison.common)
        rows.append([
            label, f"`{member.folder}`", f"`{provenance.policy}`", provenance.method, str(member.completions),
            str(len(member.prompts)), str(left_out),
        ])  # fmt: skip
    header = ["run", "folder", "policy", "method", "completions", "prompts", "prompts left out of pairs"]
    return markdown_table(header, rows, left=4)


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

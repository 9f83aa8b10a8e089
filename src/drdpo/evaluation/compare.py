"""Step 4a: report.md and its tables for one or more scored runs, with gains over the first."""

import re
from dataclasses import asdict, astuple

import pandas as pd

from drdpo.config.evaluation import EvaluateConfig
from drdpo.evaluation.report import Change, csv_text, differences, interval, markdown_table, text_table, write_report
from drdpo.evaluation.runs import Provenance, choose_objectives, load_run, parse_runs, read_provenance
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

    Runs are joined by prompt_id, and the first is the base. Means are over all prompts of a run, gains and win rates over
    the prompts that all share.

    Raises:
        UsageError: a --runs argument that is not NAME=FOLDER, a repeated folder, an unknown objective, or a locked output
            folder.
        DataError: a missing folder or split, unscored or broken rows, no common objective or prompt.
    """
    folders = parse_runs(config.runs)
    runs = [load_run(name, places, config.split) for name, places in folders.items()]
    objectives = choose_objectives(runs, config.objectives)
    provenances = {
        name if len(places) == 1 else f"{name}, seed {number}": read_provenance(place, config.split)
        for name, places in folders.items()
        for number, place in enumerate(places, start=1)
    }
    mixtures = [provenance.mixture for provenance in provenances.values() if provenance.mixture]
    comparison = compare(runs, objectives, config.bootstrap, config.seed, mixtures)
    notes = [note for provenance in provenances.values() for note in provenance.notes]
    unlike = [
        line
        for step in ("sampling", "scoring")
        for line in differences(step, {run: p.made_by[step] for run, p in provenances.items() if step in p.made_by})
    ]
    table = _score_table(comparison)
    files = _csv_files(comparison) | draw_spider(comparison)
    parts = [
        _summary(config, comparison),
        *(f"> **Not a like-for-like comparison:** {line}" for line in unlike),
        *(["![Mean scores and gains](spider.png)"] if "spider.png" in files else []),
        "## Runs",
        _runs_table(comparison, provenances),
        *(["\n".join(f"* {note}" for note in notes)] if notes else []),
        *_gain_text(comparison),
        "The means are over prompts of each prompt's mean score, on the reward model's own scales.",
        markdown_table(["objective", *table], list(table.itertuples())),
        *_pair_section(comparison),
        *_answer_section(comparison),
    ]
    files["report.md"] = "\n\n".join(parts) + "\n"
    inputs = {name: [fingerprint(place / f"{config.split}.jsonl") for place in places] for name, places in folders.items()}
    facts: dict[str, object] = {
        "counts": {run.name: {"completions": len(run.completions), "prompts": len(run.prompts)} for run in runs},
        "paired_prompts": len(comparison.common),
    }
    if comparison.mixture and comparison.others:
        gains = {run: asdict(comparison.gains[run, comparison.base][MIXTURE]) for run in comparison.others}
        facts["trained_mixture"] = {"weights": comparison.mixture, "gains_sd": gains}
    print(text_table(["objective", *table], [[re.sub("[`*]", "", label), *cells] for label, *cells in table.itertuples()]))
    for line in [*unlike, *notes]:
        print(f"note: {line}")
    write_report("evaluate_armorm", config, inputs, files, _OPTIONAL, _changes(comparison, config.split), **facts)


def _changes(comparison: Comparison, split: str) -> list[Change]:
    """The shared prompts with the largest change of the trained mixture, or else of the gated or the first objective."""
    runs = comparison.runs
    if len(runs) == 1:
        return []
    first = GATED_SCORE if GATED_SCORE in comparison.objectives else comparison.objectives[0]
    weights = comparison.mixture or {first: 1.0}
    score = MIXTURE if comparison.mixture else flag_name(first)
    means = pd.DataFrame({
        run.name: sum(run.by_prompt(name) * weight for name, weight in weights.items()) for run in runs
    }).loc[comparison.common]  # fmt: skip
    moved = means.sub(means[runs[0].name], axis=0).abs().max(axis=1)
    shown = moved.sort_values(ascending=False, kind="stable").index[:_CHANGES]
    answers: dict[str, dict[int, str]] = {}
    for run in runs:
        rows = read_records(run.folders[0] / f"{split}.jsonl", Completion.from_row)
        answers[run.name] = {row.prompt_id: row.completion[0]["content"] for row in reversed(rows)}
    return [
        Change(
            runs[0].prompts[number][-1]["content"], score,
            [(run.name, float(means.at[number, run.name]), answers[run.name][number]) for run in runs],
        )
        for number in shown
    ]  # fmt: skip


def _csv_files(comparison: Comparison) -> dict[str, str | bytes]:
    """{name: content} of the CSV files, at full precision. The first run has no gain; differences are in its sd."""
    paired = len(comparison.common)
    scores = []
    for run in comparison.runs:
        gains = comparison.gains.get((run.name, comparison.base), {})
        for name in comparison.objectives:
            numbers = [paired, *astuple(gains[name])] if name in gains else [""] * 4
            scores.append([run.name, name, len(run.prompts), run.mean(name), run.sd(name), *numbers])
    files: dict[str, str | bytes] = {"scores.csv": csv_text(SCORES, scores)}
    if comparison.others:
        pairs = [
            [*pair, name, paired, *(astuple(gains[name]) if name in gains else [""] * 3), *astuple(rate)]
            for pair, gains in comparison.gains.items()
            for name, rate in comparison.win_rates[pair].items()
        ]
        files["pairs.csv"] = csv_text(PAIRS, pairs)
    return files


def _summary(config: EvaluateConfig, comparison: Comparison) -> str:
    base, others = comparison.base, comparison.others
    text = f"# {', '.join(others)} against {base}\n\n" if others else f"# {base}\n\n"
    text += f"Split `{config.split}`. Every prompt counts once; its score is the mean over its completions."
    if others:
        text += (
            f" Gains and win rates use the {len(comparison.common)} prompts that all runs share; their intervals come from "
            f"{config.bootstrap} bootstrap samples over prompts (seed {config.seed})."
        )
        if flat := [name for name in comparison.objectives if comparison.runs[0].sd(name) == 0]:
            text += f" All scores of {base} are equal in {', '.join(flat)}, so there is no gain in units of its sd."
    return text


def _runs_table(comparison: Comparison, provenances: dict[str, Provenance]) -> str:
    folders = [(run, seed, folder) for run in comparison.runs for seed, folder in enumerate(run.folders)]
    rows = [
        [
            label, f"`{folder}`", f"`{provenance.policy}`", provenance.method, str(len(run.completions.loc[seed])),
            str(len(run.prompts)), str(len(run.prompts) - len(comparison.common)),
        ]
        for (label, provenance), (run, seed, folder) in zip(provenances.items(), folders, strict=True)
    ]  # fmt: skip
    header = ["run", "folder", "policy", "method", "completions", "prompts", "unpaired prompts"]
    return markdown_table(header, rows, left=4)


def _score_table(comparison: Comparison) -> pd.DataFrame:
    """Cells: gains over the base and mean scores; a row an objective, then the summaries and the win rates."""
    columns = {}
    for run in comparison.others:
        gains = comparison.gains[run, comparison.base]
        names = dict.fromkeys([*comparison.objectives, *gains])
        cells = columns[f"{run} - {comparison.base}"] = {name: interval(gains.get(name)) for name in names}
        if GATED_SCORE in comparison.objectives:
            cells["win rate"] = interval(comparison.win_rates[run, comparison.base][GATED_SCORE], "{:.1%}")
    for scored in comparison.runs:
        columns[f"{scored.name}, mean"] = {name: f"{scored.mean(name):.4f}" for name in comparison.objectives}
    # What training optimised comes first.
    order = dict.fromkeys([*([MIXTURE] if comparison.mixture and comparison.others else []), *next(iter(columns.values()))])
    labels = {name: f"`{flag_name(name)}`" + " *unseen*" * comparison.is_unseen(name) for name in comparison.objectives}
    return pd.DataFrame(columns, list(order)).fillna("").rename(labels | {MIXTURE: f"**{MIXTURE}**"})


def _answer_section(comparison: Comparison) -> list[str]:
    forms = {"tokens": "{:.1f}", "cut": "{:.1%}", "repeated": "{:.1%}"}
    rows = [
        [run.name, *(form.format(run.means["answers", name].mean(axis=1).mean()) for name, form in forms.items())]
        for run in comparison.runs
    ]
    rows += [
        [f"{run} - {comparison.base}", *(interval(found[name], form.replace(":", ":+")) for name, form in forms.items())]
        for run, found in comparison.answers.items()
    ]
    return [
        "## Answers",
        "Repeated 4-grams: share of an answer's token 4-grams that occur earlier in it (seq-rep-4, Welleck et al. 2020). "
        "Differences are on the paired prompts.",
        markdown_table(["run", "tokens, mean", "cut by the length limit", "repeated 4-grams"], rows),
    ]


def _gain_text(comparison: Comparison) -> list[str]:
    if not comparison.others:
        return ["## Mean scores"]
    base, mixture, trained_on = comparison.base, comparison.mixture, comparison.trained_on
    gated = GATED_SCORE in comparison.objectives
    pooled = any(len(run.folders) > 1 for run in comparison.runs)
    seeds = ", for runs of several seeds a t interval over prompts and seeds" * pooled
    text = (
        f"Mean difference from {base} over the paired prompts, in standard deviations of {base}'s completion scores. The "
        "unit is held fixed, so a mixture of such scores gains the weighted sum of their gains; `src/evaluate_policy.py "
        f"--mixtures` has its interval. Brackets: 95% percentile interval of a paired bootstrap over prompts{seeds}, "
        "without correction for multiple comparisons: about one in twenty misses the true value."
    )
    if comparison.gains[comparison.others[0], base].keys() - {*comparison.objectives, MIXTURE}:
        text += f" The mean and worst gains omit the gated score ({GATED_SCORE})."
    if gated:
        text += f" The win rate is the share of the paired prompts on which {GATED_SCORE} prefers the run; ties count half."
    else:
        text += f" No win rate: the gated score ({GATED_SCORE}) is not among the objectives."
    if mixture:
        terms = " + ".join(f"{weight:g} `{flag_name(name)}`" for name, weight in mixture.items())
        text += f" The {MIXTURE} is {terms}, applied to the gains below."
    if trained_on:
        names = ", ".join(f"`{flag_name(name)}`" for name in trained_on)
        text += f" Training used {names}; objectives marked *unseen* were not used."
        if gated and GATED_SCORE not in trained_on:
            text += f" {GATED_SCORE} mixes all objectives."
    return [f"## Gain over {base}, in standard deviations", text]


def _pair_section(comparison: Comparison) -> list[str]:
    """Every two runs other than the base."""
    pairs = {pair: gains for pair, gains in comparison.gains.items() if pair[1] != comparison.base}
    seeds = [len(run.folders) for run in comparison.runs]
    if not pairs:
        return []
    if len(pairs) > _PAIR_COLUMNS:
        return ["## Every two runs", f"The {len(pairs)} pairs of runs are in pairs.csv."]
    text = f"Differences, in standard deviations of {comparison.base}'s scores; win rates are in pairs.csv. "
    if any(1 < count < _ENOUGH_SEEDS for count in seeds):
        text += f"With fewer than {_ENOUGH_SEEDS} seeds they tell no two methods apart, whatever the intervals."
    else:
        text += "Two runs differ if the interval excludes 0"
        text += "." if max(seeds) > 1 else "; that says nothing about other training seeds."
    rows = [
        [f"`{flag_name(name)}`", *(interval(gains.get(name)) for gains in pairs.values())] for name in comparison.objectives
    ]
    return ["## Every two runs", text, markdown_table(["objective", *map(" - ".join, pairs)], rows)]

"""Step 4a: report.md and its tables for one or more scored runs, with gains over the first; and the ArmoRM experiment,
several such reports in one: the gains of every training mixture next to the published ones."""

import os
import re
from dataclasses import asdict, astuple
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from drdpo.config.evaluation import CompareMixturesConfig, EvaluateConfig
from drdpo.errors import DataError, UsageError, reason
from drdpo.evaluation import spider
from drdpo.evaluation.report import (
    STYLE,
    Change,
    csv_text,
    differences,
    interval,
    markdown_table,
    save_picture,
    text_table,
    write_report,
)
from drdpo.evaluation.runs import (
    Provenance,
    choose_objectives,
    load_run,
    parse_runs,
    read_provenance,
    section,
    sort_objectives,
)
from drdpo.evaluation.spider import draw_spider
from drdpo.evaluation.statistics import MIXTURE, Comparison, Estimate, compare
from drdpo.folder import read_manifest
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
    output = Path(config.output_path)
    write_report(output, "evaluate_armorm", config, inputs, files, _OPTIONAL, _changes(comparison, config.split), **facts)
    print(text_table(["objective", *table], [[re.sub("[`*]", "", label), *cells] for label, *cells in table.itertuples()]))
    for line in [*unlike, *notes]:
        print(f"note: {line}")
    print(f"report: {output / 'report.md'}")


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


SPOKES = (
    "helpsteer-helpfulness", "helpsteer-correctness", "helpsteer-coherence", "ultrafeedback-honesty", "ArmoRM",
)  # fmt: skip
"""The spokes of the paper's spider plots: Helpfulness, Correctness, Coherence, Honesty and ArmoRM."""

PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "truthfulness_complexity": {
        "DPO": (0.20, 0.20, 0.19, 0.23, 0.07),
        "KLDPO": (0.33, 0.33, 0.31, 0.34, 0.15),
        "WDPO": (0.37, 0.37, 0.37, 0.37, 0.16),
    },
    "helpfulness_coherence": {
        "DPO": (0.31, 0.29, 0.31, 0.29, 0.15),
        "KLDPO": (0.37, 0.36, 0.36, 0.34, 0.17),
        "WDPO": (0.41, 0.40, 0.44, 0.39, 0.20),
    },
    "correctness_helpfulness": {
        "DPO": (0.22, 0.20, 0.17, 0.18, 0.07),
        "KLDPO": (0.36, 0.34, 0.32, 0.34, 0.17),
        "WDPO": (0.42, 0.41, 0.41, 0.38, 0.21),
    },
}
"""{training mixture: {method: values in the order of SPOKES}}, read from the spider plots of arXiv 2502.01930, ± 0.01."""

_SMALLEST_RIM = 0.05
"""Standard deviations: on a smaller scale, negligible gains would look large."""


def compare_mixtures(config: CompareMixturesConfig) -> None:
    """Write report.md, and spiders.png and spiders.svg if there are at least three objectives.

    Raises:
        UsageError: a --reports argument that is not NAME=FOLDER, a repeated name, or a locked output folder.
        DataError: a folder without the scores.csv of evaluate_armorm, or with that of a single run.
    """
    folders: dict[str, Path] = {}
    for name, (folder, *more) in parse_runs(config.reports, "--reports").items():
        if more:
            raise UsageError(f"--reports: the name {name} is given twice; pass one report per mixture")
        folders[name] = folder
    results = {name: read_gains(name, folder) for name, folder in folders.items()}
    output = Path(config.output_path)
    files: dict[str, str | bytes] = {}
    if all(len(_spokes(gains)) >= 3 for gains in results.values()):
        with rc_context(STYLE):
            files |= save_picture(spiders(results), "spiders", dpi=120)
    parts = [
        "# Training on one mixture of objectives, evaluated on others",
        "Gains over the base model in standard deviations of its completion scores, with 95% paired bootstrap intervals. "
        "Published values are read from the spider plots of arXiv 2502.01930 (± 0.01). The paper does not state their unit, "
        "which may differ from ours.",
        *(["![Spider plots, ours above the published ones](spiders.png)"] if files else []),
    ]
    for name, gains in results.items():
        parts += _section(name, folders[name], gains, output)
    files["report.md"] = "\n\n".join(parts) + "\n"
    inputs = {name: fingerprint(folder / "scores.csv") for name, folder in folders.items()}
    write_report(output, "compare_mixtures", config, inputs, files, optional=("spiders.png", "spiders.svg"))
    print(f"report: {output / 'report.md'}")


def read_gains(name: str, folder: Path) -> pd.DataFrame:
    """[objectives, runs but the base]: the gains in a report of evaluate_armorm, None where all base scores are equal.

    Raises:
        DataError: no scores.csv, or not one that evaluate_armorm writes, or of a single run.
    """
    path = folder / "scores.csv"
    if not path.is_file():
        raise DataError(f"mixture {name}: {path}: no such file; src/evaluate_armorm.py writes it")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:
        raise DataError(f"{path}: not a CSV file ({reason(error)})") from error
    if tuple(table) != SCORES:
        raise DataError(f"{path}, row 1: not the columns that src/evaluate_armorm.py writes ({', '.join(SCORES)})")
    numbers = table[["gain_sd", "ci_low", "ci_high"]].apply(pd.to_numeric, errors="coerce")
    odd = (numbers.isna() & (table[numbers.columns] != "")).any(axis=1)
    if odd.any():
        raise DataError(f"{path}, row {odd.idxmax() + 2}: a gain is not a number")
    runs = list(table["run"].unique())[1:]
    if not runs:
        raise DataError(f"mixture {name}: {path} has only one run; gains need a base and a run")
    ends = numbers.astype(object).where(numbers.notna(), None)
    table["gain"] = [None if row[0] is None else Estimate(*row) for row in ends.itertuples(index=False)]
    gains = table.drop_duplicates(["run", "objective"], keep="last").pivot(index="objective", columns="run", values="gain")
    return gains.loc[sort_objectives(set(gains.index)), runs]


def _spokes(gains: pd.DataFrame) -> list[str]:
    """Those of the paper's five that have gains; if fewer than three, all objectives that have gains."""
    have = list(gains.dropna().index)
    paper = [name for name in SPOKES if name in have]
    return paper if len(paper) >= 3 else have


def _section(name: str, folder: Path, gains: pd.DataFrame, output: Path) -> list[str]:
    theirs = {method.upper(): dict(zip(SPOKES, values, strict=True)) for method, values in PUBLISHED.get(name, {}).items()}
    columns = {"objective": [f"`{flag_name(objective)}`" for objective in gains.index]}
    for run in gains:
        columns[run] = [interval(gain) for gain in gains[run]]
        if published := theirs.get(run.upper()):
            columns[f"{run}, published"] = [f"{published[of]:+.2f}" if of in published else "" for of in gains.index]
    link = os.path.relpath(folder / "report.md", output)
    trained_on = section(read_manifest(folder), "evaluate_armorm", "trained_mixture", "weights")
    text = f"Trained on {', '.join(f'`{flag_name(objective)}`' for objective in trained_on)}. " if trained_on else ""
    text += f"Full report, with win rates and answer lengths: [{link}](<{link}>)."
    table = markdown_table(list(columns), list(zip(*columns.values(), strict=True)))
    return [f"## {name.replace('_', ' + ')}", text, table]


def spiders(results: dict[str, pd.DataFrame]) -> Figure:
    """Spider plots as in the paper: a panel per mixture, a polygon per method; ours above, the published ones below.

    Our panels share one scale, the published ones another. A published method has the style of our run of the same name,
    ignoring case.

    Args:
        results: {mixture: gains, see read_gains}.
    """
    ours = {name: gains.loc[_spokes(gains)] for name, gains in results.items()}
    theirs = {
        name: pd.DataFrame(PUBLISHED[name], SPOKES).map(lambda value: Estimate(value, None, None))
        for name in results
        if name in PUBLISHED
    }
    labels = {method.upper(): method for rows in (theirs, ours) for gains in rows.values() for method in gains}
    order = dict.fromkeys(method.upper() for rows in (ours, theirs) for gains in rows.values() for method in gains)
    looks = spider.run_styles(["base (0)", *(labels[method] for method in order)])
    figure, axes_RC = spider.panels(2 if theirs else 1, len(results))
    for axes_C, rows, what in zip(axes_RC, (ours, theirs), ("ours: gain in sd of the base", "published"), strict=False):
        limits = spider.gain_limits((gain for gains in rows.values() for gain in gains.to_numpy().flat), _SMALLEST_RIM)
        for axes, name in zip(axes_C, results, strict=True):
            if name not in rows:
                axes.remove()
                continue
            values = {labels[method.upper()]: list(rows[name][method]) for method in rows[name]}
            spider.draw_gains(axes, [spider.axis_label(spoke) for spoke in rows[name].index], values, looks, limits)
            axes.set_title(f"{name.replace('_', ' + ')}\n{what}", pad=48)
    spider.legend(figure, looks, columns=2 * len(results) + 1)
    return figure

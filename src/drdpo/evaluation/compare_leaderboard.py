"""Leaderboard results of several models in one report: normalised scores, raw scores and the authors' numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from drdpo.cli import as_dict
from drdpo.config.evaluation import CompareOpenllmConfig
from drdpo.errors import DataError, UsageError
from drdpo.evaluation.leaderboard_scores import (
    COLUMNS,
    RAW_HEADER,
    Benchmark,
    average,
    average_stderr,
    benchmarks,
    raw_rows,
)
from drdpo.evaluation.report import STYLE, csv_text, differences, markdown_table, save_picture, write_report
from drdpo.evaluation.runs import parse_runs, section
from drdpo.evaluation.statistics import Array
from drdpo.folder import read_json_object, read_manifest
from drdpo.models import fingerprint

PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "1B": {
        "SFT": (0.56, 0.35, 0.08, 0.24, 0.33, 0.17),
        "DPO epoch 2": (0.48, 0.35, 0.08, 0.26, 0.35, 0.17),
        "DPO epoch 4": (0.48, 0.33, 0.08, 0.25, 0.33, 0.17),
        "DPO epoch 6": (0.48, 0.33, 0.06, 0.26, 0.33, 0.17),
        "KLDPO tau=0.05": (0.56, 0.35, 0.09, 0.25, 0.32, 0.18),
        "WDPO rho=0.01": (0.52, 0.35, 0.10, 0.25, 0.34, 0.19),
    },
    "3B": {
        "DPO": (0.55, 0.45, 0.08, 0.24, 0.36, 0.30),
        "KLDPO tau=0.005": (0.74, 0.46, 0.19, 0.26, 0.35, 0.32),
        "WDPO rho=0.005": (0.62, 0.45, 0.06, 0.25, 0.36, 0.30),
    },
    "8B": {
        "DPO": (0.62, 0.50, 0.03, 0.29, 0.44, 0.33),
        "KLDPO tau=0.005": (0.72, 0.51, 0.24, 0.29, 0.34, 0.37),
        "KLDPO tau=0.01": (0.75, 0.51, 0.22, 0.31, 0.36, 0.37),
    },
}
"""{size: {method: raw values, 0 to 1, in the order of COLUMNS}}: the harness's size-weighted means, from arXiv 2502.01930
and the README of its repository."""

_CSV = ("group", "run", "benchmark", "raw", "raw_stderr", "normalised", "normalised_stderr")
_MAY_DIFFER = ("model_path", "model_fingerprint", "date", "commit")
_ROW, _PANEL = 0.36, 6.3
"""Inches of the heat map."""

Published = dict[str, tuple[float, ...]]
"""{method: raw values in the order of COLUMNS}"""


@dataclass(frozen=True)
class LeaderboardRun:
    """One model's results."""

    group: str
    """The part of the name before "/"; may be empty."""
    name: str
    folder: Path
    results: dict[str, Any]
    """The harness's results.json."""
    manifest: dict[str, Any]
    """Of the evaluation; empty if the harness was called directly."""

    @property
    def label(self) -> str:
        """GROUP/NAME, or NAME."""
        return f"{self.group}/{self.name}".lstrip("/")

    @property
    def benchmarks(self) -> list[Benchmark]:
        """Those of the six benchmarks that are complete."""
        return benchmarks(self.results["results"])

    @property
    def facts(self) -> dict[str, str]:
        """What identifies the evaluation: flags, date, versions, commit."""
        versions = section(self.manifest, "versions")
        facts = {
            **section(self.manifest, "made_by"),
            **{name: self.manifest.get(name) for name in ("date", "chat_template_sha256", "max_length")},
            **{f"{name} version": versions.get(name) for name in ("lm-eval", "transformers", "torch", "vllm")},
            "commit": self.manifest.get("commit"),
        }
        return {name: str(value) for name, value in facts.items() if value is not None}


def compare_openllm(config: CompareOpenllmConfig) -> None:
    """Write report.md, leaderboard.csv, heatmap.png and heatmap.svg.

    Raises:
        UsageError: a --runs argument that is not NAME=FOLDER, a repeated name, or a locked output folder.
        DataError: missing or malformed results.
    """
    runs = read_runs(config.runs)
    groups = {group: [run for run in runs if run.group == group] for group in dict.fromkeys(run.group for run in runs)}
    published = {group: PUBLISHED.get(group if config.published == "auto" else config.published, {}) for group in groups}
    pictures: dict[str, str | bytes] = {}
    if any(run.benchmarks for run in runs):
        with rc_context(STYLE):
            pictures |= save_picture(heatmap(groups, published), "heatmap", dpi=120)
    files = pictures | {
        "leaderboard.csv": csv_text(_CSV, _csv_rows(runs)),
        "report.md": leaderboard_report(config, groups, published, bool(pictures)),
    }
    inputs = {f"{run.group}/{run.name}": fingerprint(run.folder / "results.json") for run in runs}
    made_by = as_dict(config) | {"inputs": inputs}
    output = Path(config.output_path)
    write_report(output, "compare_openllm", made_by, files, optional=("heatmap.png", "heatmap.svg"))
    print(f"report: {output / 'report.md'}")


def read_runs(arguments: list[str]) -> list[LeaderboardRun]:
    """Read GROUP/NAME=FOLDER arguments.

    Raises:
        UsageError: an argument of another form, or a repeated name.
        DataError: a folder has no results.json, or it is not the harness's.
    """
    runs = []
    for name, folders in parse_runs(arguments).items():
        if len(folders) > 1:
            raise UsageError(f"--runs: the name {name} is given twice; pass a different name for every model")
        group, _, short = name.rpartition("/")
        path = folders[0] / "results.json"
        if not path.is_file():
            raise DataError(f"run {short}: {path}: no such file; openllm_eval.slurm writes it")
        results = read_json_object(path)
        scores = results.get("results")
        if not isinstance(scores, dict) or not all(isinstance(values, dict) for values in scores.values()):
            raise DataError(f'{path}: field "results" is missing or not written by lm-eval')
        manifest = section(read_manifest(folders[0]), "evaluate_openllm")
        runs.append(LeaderboardRun(group, short, folders[0], results, manifest))
    return runs


def _csv_rows(runs: list[LeaderboardRun]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for run in runs:
        for b in run.benchmarks:
            numbers = [b.raw, b.raw_stderr, b.normalised, b.normalised_stderr]
            rows.append([run.group, run.name, b.name, *numbers])
        if (mean := average(run.benchmarks)) is not None:
            rows.append([run.group, run.name, "Average", "", "", mean, average_stderr(run.benchmarks)])
    return rows


def leaderboard_report(
    config: CompareOpenllmConfig,
    groups: dict[str, list[LeaderboardRun]],
    published: dict[str, Published],
    pictured: bool,
) -> str:
    """The Markdown report.

    Args:
        config: the flags.
        groups: {group: its runs}, in order.
        published: {group: the authors' numbers}, which may be empty.
        pictured: whether to show heatmap.png.
    """
    parts = ["# Open LLM Leaderboard v2"]
    runs = [run for members in groups.values() for run in members]
    if trials := [run.name for run in runs if section(run.results, "config").get("limit") is not None]:
        parts.append(f"**Trial: {', '.join(trials)} used only part of each task (--limit); not comparable with full runs.**")
    unlike = differences("evaluation", {run.name: run.facts for run in runs}, _MAY_DIFFER)
    parts += [f"> **Not a like-for-like comparison:** {line}" for line in unlike]
    if pictured:
        parts.append("![Raw scores, ours and published, and normalised scores](heatmap.png)")
    for group, members in groups.items():
        if any(run.benchmarks for run in members):
            title = group or config.published
            parts += [f"## {group}"] if group else []
            parts += _group_sections(members, published[group], title)
    parts += _other_sections(runs)
    facts = {run.label: run.facts | {"folder": str(run.folder)} for run in runs}
    names = list(dict.fromkeys(name for record in facts.values() for name in record))
    rows = [[f"`{name}`", *(record.get(name, "") for record in facts.values())] for name in names]
    parts += ["## How the models were evaluated", markdown_table(["", *facts], rows, left=1 + len(facts))]
    return "\n\n".join(parts) + "\n"


def _group_sections(runs: list[LeaderboardRun], published: Published, title: str) -> list[str]:
    header = ["run", *COLUMNS]

    def table(value: str) -> str:
        rows = []
        for run in runs:
            found = {benchmark.name: benchmark for benchmark in run.benchmarks}
            cells = [_cell(found[name], value) if name in found else "-" for name in COLUMNS]
            rows.append([run.name, *cells, *([_average(run)] if value == "normalised" else [])])
        return markdown_table([*header, "Average"] if value == "normalised" else header, rows)

    parts = [
        "### Normalised like the public leaderboard (0-100, guessing scores 0; ± one standard error)",
        table("normalised"),
        "### Raw (0-1, every question has the same weight, as in published tables; ± one standard error)",
        table("raw"),
    ]
    if published:
        rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in published.items()]
        parts += [f"### Published raw scores, {title} (arXiv 2502.01930)", markdown_table(header, rows)]
    return parts


def _cell(benchmark: Benchmark, value: str) -> str:
    if value == "normalised":
        return _with_error(benchmark.normalised, benchmark.normalised_stderr, 2)
    return _with_error(benchmark.raw, benchmark.raw_stderr, 3)


def _average(run: LeaderboardRun) -> str:
    mean = average(run.benchmarks)
    return "-" if mean is None else _with_error(mean, average_stderr(run.benchmarks), 2)


def _with_error(value: float, error: float | None, digits: int) -> str:
    """`0.350 ± 0.006`"""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _other_sections(runs: list[LeaderboardRun]) -> list[str]:
    """Tasks outside the leaderboard."""
    rows = []
    for run in runs:
        others = {name: values for name, values in run.results["results"].items() if not name.startswith("leaderboard_")}
        rows += [[run.label, *row] for row in raw_rows(run.results | {"results": others})]
    if not rows:
        return []
    return ["## Other tasks", markdown_table(["run", *RAW_HEADER], rows, left=2)]


def heatmap(groups: dict[str, list[LeaderboardRun]], published: dict[str, Published]) -> Figure:
    """The leaderboard as in the paper's table, one row per model: for each group our raw scores, the published ones, and our
    normalised scores. Colours compare models within a column of a panel; the best is darkest.
    """
    groups = {name: runs for name, runs in groups.items() if any(run.benchmarks for run in runs)}
    columns = 3 if any(published[name] for name in groups) else 2
    heights = [max(len(runs), len(published[name])) * _ROW + 1.25 for name, runs in groups.items()]
    figure = Figure(figsize=(_PANEL * columns, sum(heights)), layout=ConstrainedLayoutEngine(h_pad=0.14))
    # Proportional to the number of columns.
    widths = [len(COLUMNS)] * (columns - 1) + [len(COLUMNS) + 1]
    grid = figure.subplots(len(groups), columns, squeeze=False, height_ratios=heights, width_ratios=widths)
    for axes, (name, runs) in zip(grid, groups.items(), strict=True):
        title = f"{name}: " if name else ""
        names = [run.name for run in runs]
        _panel(axes[0], f"{title}raw scores, ours", names, COLUMNS, _values(runs, "raw"), "{:.3f}")
        if columns == 3 and published[name]:
            theirs = np.array(list(published[name].values()))
            _panel(axes[1], f"{title}raw scores, published", list(published[name]), COLUMNS, theirs, "{:.2f}")
        elif columns == 3:
            axes[1].set_axis_off()
        averages = np.array([[average(run.benchmarks)] for run in runs], dtype=np.float64)
        scores = np.concatenate([_values(runs, "normalised"), averages], axis=1)
        _panel(axes[-1], f"{title}normalised scores, ours", names, [*COLUMNS, "Average"], scores, "{:.1f}")
    return figure


def _values(runs: list[LeaderboardRun], name: str) -> Array:
    """[runs, benchmarks]; NaN if a benchmark is incomplete."""
    found = [{benchmark.name: float(getattr(benchmark, name)) for benchmark in run.benchmarks} for run in runs]
    return np.array([[values.get(column, np.nan) for column in COLUMNS] for values in found])


def shades(values: Array) -> Array:
    """[rows, columns] from 0 (worst of its column) to 1 (best); 0 in a column of equal values, NaN for NaN."""
    frame = pd.DataFrame(values)
    reach = frame.max() - frame.min()
    return ((frame - frame.min()) / reach.where(reach > 0, 1)).to_numpy()


def _panel(axes: Any, title: str, rows: Sequence[str], columns: Sequence[str], values: Array, form: str) -> None:
    shaded = shades(values)
    axes.imshow(np.ma.masked_invalid(shaded), cmap="YlGnBu", vmin=-0.1, vmax=1.3, aspect="auto")
    axes.set_xticks(range(len(columns)), labels=columns, fontsize=9)
    axes.set_yticks(range(len(rows)), labels=rows)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_title(title, fontsize=11)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    for (row, column), value in np.ndenumerate(values):
        text = "-" if np.isnan(value) else form.format(value)
        color = "white" if shaded[row, column] > 0.6 else "#222222"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=color)

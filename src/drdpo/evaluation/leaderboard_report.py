"""Leaderboard results of several models as one report: normalised, raw, and the authors' numbers beside them."""

import csv
import os
from pathlib import Path
from typing import IO

from drdpo.cli import as_dict
from drdpo.config.comparison import CompareOpenllmConfig
from drdpo.errors import DataError
from drdpo.evaluation.leaderboard_runs import LeaderboardRun, differences, read_runs
from drdpo.evaluation.leaderboard_scores import COLUMNS, Benchmark, average, average_stderr
from drdpo.evaluation.leaderboard_tables import RAW_HEADER, raw_rows
from drdpo.evaluation.published import LEADERBOARD
from drdpo.evaluation.tables import markdown_table
from drdpo.folder import atomic_file, atomic_folder, lock_folder, refuse_if_locked, sweep, write_manifest
from drdpo.models import fingerprint

_CSV = ("group", "run", "benchmark", "raw", "raw_stderr", "raw_unweighted", "normalised", "normalised_stderr")
Groups = dict[str, list[LeaderboardRun]]


def compare_openllm(config: CompareOpenllmConfig) -> None:
    """Write report.md, leaderboard.csv, heatmap.png and heatmap.svg, and print the report's tables.

    Args:
        config: the flags.

    Raises:
        UsageError: a --runs word that is not NAME=FOLDER, a name given twice, or another run that is writing to the
            output folder.
        DataError: a folder without results, or with broken ones.
    """
    runs = read_runs(config.runs)
    groups: Groups = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    output = Path(config.output_path)
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: --output_path is a file, not a folder")
    refuse_if_locked(output)
    with lock_folder(output):
        sweep(output)
        # Drawn aside as a whole first: an error leaves an earlier report as it was.
        with atomic_folder(output / ".report.tmp") as aside:
            from drdpo.evaluation.heatmap import draw_heatmap

            pictured = draw_heatmap(aside, groups, {name: published(config, name) for name in groups})
            with atomic_file(aside / "leaderboard.csv") as stream:
                _write_csv(stream, runs)
            with atomic_file(aside / "report.md") as stream:
                stream.write(report(config, groups, pictured))
        if not pictured:
            for name in ("heatmap.png", "heatmap.svg"):
                (output / name).unlink(missing_ok=True)
        for path in sorted((output / ".report.tmp").iterdir()):
            os.replace(path, output / path.name)
        (output / ".report.tmp").rmdir()
        inputs = {f"{run.group}/{run.name}": fingerprint(run.folder / "results.json") for run in runs}
        write_manifest(output, "compare_openllm", as_dict(config) | {"inputs": inputs})
    print(f"report: {output / 'report.md'}")


def published(config: CompareOpenllmConfig, group: str) -> dict[str, tuple[float, ...]]:
    """{method: raw values in the order of COLUMNS} that the authors published for a group; empty where none."""
    size = group if config.published == "auto" else config.published
    return LEADERBOARD.get(size, {})


def report(config: CompareOpenllmConfig, groups: Groups, pictured: bool) -> str:
    """The Markdown report.

    Args:
        config: the flags.
        groups: {group: its runs}, in order.
        pictured: is there a heat map?
    """
    parts = ["# Open LLM Leaderboard v2"]
    runs = [run for members in groups.values() for run in members]
    if trials := [run.name for run in runs if run.limit is not None]:
        parts.append(f"**A trial: {', '.join(trials)} saw a few samples per task only; not comparable with full runs.**")
    parts += [f"> **Not a like-for-like comparison:** {line}" for line in differences(runs)]
    if pictured:
        parts.append("![Raw values, ours and published, and normalised scores](heatmap.png)")
    for group, members in groups.items():
        parts += _group_sections(config, group, members)
    parts += _other_sections(runs)
    facts = {f"{run.group}/{run.name}".lstrip("/"): run.facts | {"folder": str(run.folder)} for run in runs}
    names = list(dict.fromkeys(name for record in facts.values() for name in record))
    rows = [[f"`{name}`", *(record.get(name, "") for record in facts.values())] for name in names]
    parts += ["## How the models were evaluated", markdown_table(["", *facts], rows, left=1 + len(facts))]
    return "\n\n".join(parts) + "\n"


def _group_sections(config: CompareOpenllmConfig, group: str, runs: list[LeaderboardRun]) -> list[str]:
    theirs = published(config, group)
    found = {run.name: {benchmark.name: benchmark for benchmark in run.benchmarks} for run in runs}
    if not any(found.values()):
        return []
    parts = [f"## {group}"] if group else []
    header = ["run", *COLUMNS]
    normalised = [
        [run.name, *(_cell(found[run.name].get(name), "normalised") for name in COLUMNS), _average(run)] for run in runs
    ]
    raw = [[run.name, *(_cell(found[run.name].get(name), "raw") for name in COLUMNS)] for run in runs]
    unweighted = [[run.name, *(_cell(found[run.name].get(name), "unweighted") for name in COLUMNS)] for run in runs]
    parts += [
        "### Normalised, as the public leaderboard (0-100, guessing is 0; ± one standard error)",
        markdown_table([*header, "Average"], normalised),
        "### Raw, as published tables (0-1, questions weighted alike; ± one standard error)",
        markdown_table(header, raw),
    ]
    if theirs:
        parts += [
            f"### Published raw values, {group or config.published} (arXiv 2502.01930)",
            markdown_table(header, [[name, *(f"{value:.2f}" for value in values)] for name, values in theirs.items()]),
        ]
    return [*parts, "### Raw, subtasks weighted alike (0-1)", markdown_table(header, unweighted)]


def _cell(benchmark: Benchmark | None, value: str) -> str:
    """`0.350 ± 0.006`, `12.41 ± 0.80`, or a dash where the benchmark was not run whole."""
    if benchmark is None:
        return "-"
    if value == "unweighted":
        return f"{benchmark.unweighted:.3f}"
    number, error = getattr(benchmark, value), getattr(benchmark, f"{value}_stderr")
    digits = 3 if value == "raw" else 2
    return f"{number:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _average(run: LeaderboardRun) -> str:
    mean, error = average(run.benchmarks), average_stderr(run.benchmarks)
    if mean is None:
        return "-"
    return f"{mean:.2f}" + ("" if error is None else f" ± {error:.2f}")


def _other_sections(runs: list[LeaderboardRun]) -> list[str]:
    """Tasks that are none of the leaderboard's."""
    tables = {}
    for run in runs:
        others = {name: values for name, values in run.results["results"].items() if not name.startswith("leaderboard_")}
        name = f"{run.group}/{run.name}".lstrip("/")
        tables[name] = raw_rows(run.results | {"results": others})
    rows = [[name, *row] for name, table in tables.items() for row in table]
    if not rows:
        return []
    text = "These are no part of the leaderboard, and nothing is published for them."
    return ["## Other tasks", text, markdown_table(["run", *RAW_HEADER], rows, left=2)]


def _write_csv(stream: IO[str], runs: list[LeaderboardRun]) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_CSV)
    for run in runs:
        for b in run.benchmarks:
            figures = [b.raw, b.raw_stderr, b.unweighted, b.normalised, b.normalised_stderr]
            writer.writerow([run.group, run.name, b.name, *figures])
        if (mean := average(run.benchmarks)) is not None:
            writer.writerow([run.group, run.name, "Average", "", "", "", mean, average_stderr(run.benchmarks)])

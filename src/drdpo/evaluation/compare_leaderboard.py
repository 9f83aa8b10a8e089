"""Leaderboard results of several models in one report: normalised scores, raw scores and the authors' numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drdpo.config.evaluation import CompareOpenllmConfig
from drdpo.errors import DataError, UsageError
from drdpo.evaluation.leaderboard_scores import (
    COLUMNS,
    RAW_HEADER,
    Benchmark,
    average,
    average_stderr,
    benchmarks,
    math_original,
    raw_rows,
)
from drdpo.evaluation.report import csv_text, differences, markdown_table, write_report
from drdpo.evaluation.runs import parse_runs, section
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
    """Write report.md and leaderboard.csv.

    Raises:
        UsageError: a --runs argument that is not NAME=FOLDER, a repeated name, or a locked output folder.
        DataError: missing or malformed results.
    """
    runs = read_runs(config.runs)
    groups = {group: [run for run in runs if run.group == group] for group in dict.fromkeys(run.group for run in runs)}
    files = {
        "leaderboard.csv": csv_text(_CSV, _csv_rows(runs)),
        "report.md": leaderboard_report(groups),
    }
    inputs = {run.label: fingerprint(run.folder / "results.json") for run in runs}
    output = Path(config.output_path)
    write_report(output, "compare_openllm", config, inputs, files)
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


def leaderboard_report(groups: dict[str, list[LeaderboardRun]]) -> str:
    """The Markdown report of {group: its runs}."""
    parts = ["# Open LLM Leaderboard v2"]
    runs = [run for members in groups.values() for run in members]
    if trials := [run.label for run in runs if section(run.results, "config").get("limit") is not None]:
        parts.append(f"**Trial: {', '.join(trials)} used only part of each task (--limit); not comparable with full runs.**")
    for members in groups.values():
        # Groups are models of different sizes, which may need different settings.
        unlike = differences("evaluation", {run.label: run.facts for run in members}, _MAY_DIFFER)
        parts += [f"> **Not a like-for-like comparison:** {line}" for line in unlike]
    for group, members in groups.items():
        if any(run.benchmarks for run in members):
            parts += [f"## {group}"] if group else []
            parts += _group_sections(group, members)
    parts += _other_sections(runs)
    facts = {run.label: run.facts | {"folder": str(run.folder)} for run in runs}
    names = list(dict.fromkeys(name for record in facts.values() for name in record))
    rows = [[f"`{name}`", *(record.get(name, "") for record in facts.values())] for name in names]
    parts += ["## How the models were evaluated", markdown_table(["", *facts], rows, left=1 + len(facts))]
    return "\n\n".join(parts) + "\n"


def _group_sections(group: str, runs: list[LeaderboardRun]) -> list[str]:
    header = ["run", *COLUMNS]
    raw: list[list[str]] = []
    normalised: list[list[str]] = []
    for run in runs:
        found = {benchmark.name: benchmark for benchmark in run.benchmarks}
        raw.append([
            run.name, *(_cell(found[name].raw, found[name].raw_stderr, 3) if name in found else "-" for name in COLUMNS),
            _cell(math_original(run.results["results"]), None, 3),
        ])  # fmt: skip
        normalised.append([
            run.name,
            *(_cell(found[name].normalised, found[name].normalised_stderr, 2) if name in found else "-" for name in COLUMNS),
            _cell(average(run.benchmarks), average_stderr(run.benchmarks), 2),
        ])  # fmt: skip
    parts = [
        "### Normalised like the public leaderboard (0-100, guessing scores 0; ± one standard error)",
        markdown_table([*header, "Average"], normalised),
        "### Raw (0-1, every question has the same weight, as in published tables; ± one standard error)",
        markdown_table([*header, "MATH, exact_match_original"], raw),
    ]
    if published := PUBLISHED.get(group):
        rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in published.items()]
        parts += [
            f"### Published raw scores, {group} (arXiv 2502.01930)",
            "The paper does not name its version of lm-eval. MATH above is exact_match, which is Math-Verify's since "
            "version 3 of the task. It was exact_match_original before; compare that one with published numbers of 2024.",
            markdown_table(header, rows),
        ]
    return parts


def _cell(value: float | None, error: float | None, digits: int) -> str:
    """`0.350 ± 0.006`; "-" without a value."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _other_sections(runs: list[LeaderboardRun]) -> list[str]:
    """Tasks outside the leaderboard."""
    rows = []
    for run in runs:
        others = {
            name: values for name, values in run.results["results"].items()
            if name != "leaderboard" and not name.startswith("leaderboard_")
        }  # fmt: skip
        rows += [[run.label, *row] for row in raw_rows(run.results | {"results": others})]
    if not rows:
        return []
    return ["## Other tasks", markdown_table(["run", *RAW_HEADER], rows, left=2)]

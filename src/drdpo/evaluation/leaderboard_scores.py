"""Normalised scores of the public Open LLM Leaderboard from lm-eval's (the harness's) raw scores; tables of a model, and of
several beside the authors' numbers.

The leaderboard (version 2, 2024) maps the score of guessing to 0 and a perfect score to 100:

    normalised = max(raw - low, 0) / (1 - low) * 100,     low = 1 / choices for multiple choice, 0 for generation.

BBH and MuSR are normalised per subtask, because the numbers of choices differ, and then averaged without weights; GPQA,
MMLU-Pro and MATH are normalised as a whole. IFEval is the mean of the strict accuracies per instruction and per prompt. The
average is the plain mean of the six. The harness's raw means are weighted by size, as in published tables.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd

from drdpo.config.evaluation import CompareOpenllmConfig, LeaderboardConfig
from drdpo.errors import DataError, UsageError
from drdpo.evaluation.report import csv_text, differences, markdown_table, text_table, write_report
from drdpo.evaluation.runs import parse_runs
from drdpo.folder import read_json_object, read_manifest, section
from drdpo.models import fingerprint

BBH_CHOICES: dict[str, int] = {
    "boolean_expressions": 2, "causal_judgement": 2, "date_understanding": 6, "disambiguation_qa": 3, "formal_fallacies": 2,
    "geometric_shapes": 11, "hyperbaton": 2, "logical_deduction_five_objects": 5, "logical_deduction_seven_objects": 7,
    "logical_deduction_three_objects": 3, "movie_recommendation": 6, "navigate": 2, "object_counting": 19,
    "penguins_in_a_table": 5, "reasoning_about_colored_objects": 18, "ruin_names": 6,
    "salient_translation_error_detection": 6, "snarks": 2, "sports_understanding": 2, "temporal_sequences": 4,
    "tracking_shuffled_objects_five_objects": 5, "tracking_shuffled_objects_seven_objects": 7,
    "tracking_shuffled_objects_three_objects": 3, "web_of_lies": 2,
}  # fmt: skip
MUSR_CHOICES: dict[str, int] = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}
_STRICT = "mean of strict accuracies"
_BENCHMARKS: dict[str, tuple[str, str, dict[str, float]]] = {
    "IFEval": ("leaderboard_ifeval", _STRICT, {"leaderboard_ifeval": 0.0}),
    "BBH": ("leaderboard_bbh", "acc_norm", {f"leaderboard_bbh_{task}": 1 / n for task, n in BBH_CHOICES.items()}),
    "MATH": ("leaderboard_math_hard", "exact_match", {"leaderboard_math_hard": 0.0}),
    "GPQA": ("leaderboard_gpqa", "acc_norm", {"leaderboard_gpqa": 1 / 4}),
    "MuSR": ("leaderboard_musr", "acc_norm", {f"leaderboard_musr_{task}": 1 / n for task, n in MUSR_CHOICES.items()}),
    "MMLU-Pro": ("leaderboard_mmlu_pro", "acc", {"leaderboard_mmlu_pro": 1 / 10}),
}
"""{benchmark: (task, metric, {task to normalise, itself or its subtasks: score of guessing})}"""
COLUMNS = tuple(_BENCHMARKS)
"""The benchmarks, in the order of published tables."""

HUB_BENCHMARKS = {
    "leaderboard_gpqa_diamond": ("Idavidrein/gpqa", "diamond", "acc_norm"),
    "leaderboard_mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro", "acc"),
}
"""{task: (data set on the hub, task id in that data set's eval.yaml, metric)} of the leaderboard's tasks whose data sets
are known to be benchmarks of the hub; its validation refuses results that name another data set."""

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

TaskScores = Mapping[str, Mapping[str, Any]]
"""The harness's `results`: {task or group: {"metric,filter": value}}."""


def normalise(raw: float, low: float) -> float:
    """Map `low`, the score of guessing, to 0 and 1 to 100; scores below `low` become 0, NaN stays."""
    return max(raw - low, 0.0) / (1.0 - low) * 100.0


def benchmarks(scores: TaskScores) -> pd.DataFrame:
    """The complete ones of the six benchmarks, in the leaderboard's order, and, if all are complete, their average.

    Columns: metric; raw, 0 to 1, the harness's mean over all questions; normalised, 0 to 100; and their standard errors, the
    second before clamping at 0 and for independent tasks. What is not reported is NaN.
    """
    task = "leaderboard_ifeval"
    strict = sum(metric_value(scores, task, f"{of}_level_strict_acc") for of in ("inst", "prompt")) / 2
    # The harness has no standard error for instructions, several of which share a prompt: that of the prompts is used.
    error = metric_value(scores, task, "prompt_level_strict_acc_stderr")
    scores = {**scores, task: {f"{_STRICT},none": strict, f"{_STRICT}_stderr,none": error}}
    rows = {}
    for name, (task, metric, lows) in _BENCHMARKS.items():
        raw, error = metric_value(scores, task, metric), metric_value(scores, task, f"{metric}_stderr")
        parts = [normalise(metric_value(scores, part, metric), low) for part, low in lows.items()]
        errors = [metric_value(scores, part, f"{metric}_stderr") / (1 - low) * 100 for part, low in lows.items()]
        rows[name] = metric, raw, error, sum(parts) / len(lows), math.hypot(*errors) / len(lows)
    found = pd.DataFrame.from_dict(rows, orient="index", columns=["metric", *_CSV[3:]]).dropna(subset=["raw", "normalised"])
    if len(found) == len(rows):
        error = math.hypot(*found["normalised_stderr"]) / len(rows)
        found.loc["Average"] = "", math.nan, math.nan, sum(found["normalised"]) / len(rows), error
    return found


def metric_value(scores: TaskScores, task: str, metric: str) -> float:
    """A task's value of an unfiltered metric; NaN if it was not run."""
    value = scores.get(task, {}).get(f"{metric},none")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def math_original(scores: TaskScores) -> float:
    """MATH by exact_match_original, the comparison of 2024, over all questions; NaN if it was not run.

    Since version 3 of the task exact_match means Math-Verify, which accepts more answers; lm-eval aggregates only that.
    """
    tasks = [task for task in scores if task.startswith("leaderboard_math_")]
    found = [(metric_value(scores, task, "exact_match_original"), scores[task].get("sample_len", 0)) for task in tasks]
    found = [(value, count) for value, count in found if not math.isnan(value)]
    questions = sum(count for _, count in found)
    return sum(value * count for value, count in found) / questions if questions else math.nan


def hub_results(results: Mapping[str, Any], date: str) -> str:
    """A file of .eval_results/ in a model's repository on the hub, which shows it beside the benchmarks; "" without any.

    Source: https://huggingface.co/docs/hub/eval-results; values in percent, as in the benchmarks' tables.
    """
    import yaml

    entries = []
    for task, (dataset, task_id, metric) in HUB_BENCHMARKS.items():
        if not math.isnan(value := metric_value(results["results"], task, metric)):
            shots = _count(results.get("n-shot", {}).get(task))
            notes = f"lm-eval task {task}: {shots}-shot, by the choices' log-likelihoods, no chain of thought"
            benchmark = {"id": dataset, "task_id": task_id}
            entries.append({"dataset": benchmark, "value": round(100 * value, 2), "date": date, "notes": notes})
    return str(yaml.safe_dump(entries, sort_keys=False)) if entries else ""


def raw_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """One row of RAW_HEADER per task and metric of what lm_eval.simple_evaluate returned."""
    rows = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, separator, chosen_filter = key.partition(",")
            if not separator or metric.endswith("_stderr"):
                continue
            name = metric if chosen_filter == "none" else f"{metric} ({chosen_filter})"
            error = values.get(f"{metric}_stderr,{chosen_filter}", math.nan)
            counts = (results.get("n-shot", {}).get(task), values.get("sample_len"))
            rows.append([task, *map(_count, counts), name, _decimal(value), _decimal(error)])
    return rows


RAW_HEADER = ["task", "shots", "questions", "metric", "value", "stderr"]
LEADERBOARD_HEADER = ["benchmark", "metric", "raw (0-1)", "stderr", "normalised (0-100)", "stderr"]


def leaderboard_rows(found: pd.DataFrame) -> list[list[str]]:
    """Of what `benchmarks` found; the average has neither metric nor raw score."""
    return [
        [
            str(name), row["metric"], *(_decimal(row[column]) if row["metric"] else "" for column in ("raw", "raw_stderr")),
            *(_decimal(row[column], 2) for column in ("normalised", "normalised_stderr")),
        ]
        for name, row in found.iterrows()
    ]  # fmt: skip


def markdown(config: LeaderboardConfig, results: Mapping[str, Any]) -> str:
    """table.md: the leaderboard's columns, then every task."""
    parts = [f"# {config.model_path} on {config.tasks}"]
    if config.limit is not None:
        parts.append(f"**Trial: limited to {config.limit:g} samples per task; not comparable with full runs.**")
    found = benchmarks(results["results"])
    if len(found):
        parts += [
            "## Open LLM Leaderboard v2",
            "Raw: the harness's mean over all questions. Normalised: the scale of the public leaderboard, on which guessing "
            "scores 0. The harness has no standard error for IFEval's instructions; that of its prompts is used for both.",
            markdown_table(LEADERBOARD_HEADER, leaderboard_rows(found), left=2),
        ]
    if not math.isnan(original := math_original(results["results"])):
        parts.append(
            f"MATH's exact_match is Math-Verify's; by the comparison of 2024 (exact_match_original) it is {original:.4f}."
        )
    parts += ["## All tasks", markdown_table(RAW_HEADER, raw_rows(results), left=1), *_notes(results)]
    return "\n\n".join(parts) + "\n"


def terminal(results: Mapping[str, Any]) -> str:
    """The same for a terminal, without the subtasks of groups that have a mean."""
    inner = {
        child for group, children in results.get("group_subtasks", {}).items() if group in results.get("groups", {})
        for child in children if child not in results.get("groups", {})
    }  # fmt: skip
    found = benchmarks(results["results"])
    # MMLU-Pro and IFEval are single tasks and stay.
    inner -= {"leaderboard_mmlu_pro", "leaderboard_ifeval"}
    rows = [row for row in raw_rows(results) if row[0] not in inner]
    tables = [text_table(RAW_HEADER, rows)]
    if len(found):
        tables.append(text_table(LEADERBOARD_HEADER, leaderboard_rows(found), left=2))
    return "\n\n".join([*tables, *_notes(results)])


def _notes(results: Mapping[str, Any]) -> list[str]:
    """What of the tasks the model did not see."""
    if "cut_prompts" not in results:
        return []
    samples = results.get("n-samples", {})
    cut = [f"{task} {count} of {samples[task]['effective']}" for task, count in results["cut_prompts"].items() if count]
    notes = [f"Prompts cut from the left to fit the context: {', '.join(cut) or 'none'}."]
    lost = results.get("lost_descriptions")
    return [*notes, lost_note(lost)] if lost else notes


def lost_note(tasks: Sequence[str]) -> str:
    """One sentence about task descriptions that a template without a system role drops."""
    return (
        "The chat template prints no system message, so lm-eval drops the description of the task from the prompts of "
        f"{', '.join(tasks)}."
    )


def json_safe(value: Any) -> Any:
    """Plain JSON values: sets become lists, NaN and infinity null, other objects their name or text."""
    return msgspec.json.decode(msgspec.json.encode(value, enc_hook=_plain))


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return f"{value.__module__}.{value.__name__}" if callable(value) and hasattr(value, "__name__") else str(value)


def _count(value: Any) -> str:
    return str(value) if isinstance(value, int) else ""


def _decimal(value: Any, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) and math.isfinite(value) else "n/a"


# Several models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeaderboardRun:
    """One model's results."""

    label: str
    """GROUP/NAME, or NAME."""
    group: str
    name: str
    folder: Path
    results: dict[str, Any]
    """The harness's results.json."""
    facts: dict[str, str]
    """What identifies the evaluation: flags, date, versions, commit; empty if the harness was called directly."""
    benchmarks: pd.DataFrame


def compare_openllm(config: CompareOpenllmConfig) -> None:
    """Write report.md and leaderboard.csv.

    Raises:
        UsageError: a --runs argument that is not NAME=FOLDER, a repeated name, or a locked output folder.
        DataError: missing or malformed results.
    """
    runs = [_read(name, folders) for name, folders in parse_runs(config.runs).items()]
    found = pd.concat({(run.group, run.name): run.benchmarks.drop(columns="metric") for run in runs}).reset_index()
    files = {"leaderboard.csv": csv_text(_CSV, found.to_numpy(object)), "report.md": _report(runs)}
    inputs = {run.label: fingerprint(run.folder / "results.json") for run in runs}
    write_report("compare_openllm", config, inputs, files)


def _read(label: str, folders: list[Path]) -> LeaderboardRun:
    if len(folders) > 1:
        raise UsageError(f"--runs: the name {label} is given twice; pass a different name for every model")
    path = folders[0] / "results.json"
    if not path.is_file():
        raise DataError(f"run {label}: {path}: no such file; openllm_eval.slurm writes it")
    results = read_json_object(path)
    scores = results.get("results")
    if not isinstance(scores, dict) or not all(isinstance(values, dict) for values in scores.values()):
        raise DataError(f'{path}: field "results" is missing or not written by lm-eval')
    manifest = section(read_manifest(folders[0]), "evaluate_openllm")
    versions = section(manifest, "versions")
    facts = {
        **section(manifest, "made_by"),
        **{name: manifest.get(name) for name in ("date", "chat_template_sha256", "max_length")},
        **{f"{name} version": versions.get(name) for name in ("lm-eval", "transformers", "torch", "vllm")},
        "commit": manifest.get("commit"),
    }
    facts = {name: str(value) for name, value in facts.items() if value is not None}
    group, _, name = label.rpartition("/")
    return LeaderboardRun(label, group, name, folders[0], results, facts, benchmarks(scores))


def _report(runs: list[LeaderboardRun]) -> str:
    """The Markdown report, a section per group."""
    groups = {group: [run for run in runs if run.group == group] for group in dict.fromkeys(run.group for run in runs)}
    parts = ["# Open LLM Leaderboard v2"]
    if trials := [run.label for run in runs if section(run.results, "config").get("limit") is not None]:
        parts.append(f"**Trial: {', '.join(trials)} used only part of each task (--limit); not comparable with full runs.**")
    for members in groups.values():
        # Groups are models of different sizes, which may need different settings.
        unlike = differences("evaluation", {run.label: run.facts for run in members}, _MAY_DIFFER)
        parts += [f"> **Not a like-for-like comparison:** {line}" for line in unlike]
    for group, members in groups.items():
        if any(len(run.benchmarks) for run in members):
            parts += [f"## {group}"] if group else []
            parts += _group_sections(group, members)
    # Tasks outside the leaderboard.
    others = [
        [run.label, *row] for run in runs for row in raw_rows(run.results) if not f"{row[0]}_".startswith("leaderboard_")
    ]
    if others:
        parts += ["## Other tasks", markdown_table(["run", *RAW_HEADER], others, left=2)]
    facts = {run.label: run.facts | {"folder": str(run.folder)} for run in runs}
    names = list(dict.fromkeys(name for record in facts.values() for name in record))
    rows = [[f"`{name}`", *(record.get(name, "") for record in facts.values())] for name in names]
    parts += ["## How the models were evaluated", markdown_table(["", *facts], rows, left=1 + len(facts))]
    return "\n\n".join(parts) + "\n"


def _group_sections(group: str, runs: list[LeaderboardRun]) -> list[str]:
    header: list[str] = ["run", *COLUMNS]
    raw, normalised = [], []
    for run in runs:
        found = run.benchmarks.reindex([*COLUMNS, "Average"])
        original = _cell(math_original(run.results["results"]), math.nan, 3)
        raw.append([run.name, *map(_cell, found["raw"][:-1], found["raw_stderr"], [3] * 6), original])
        normalised.append([run.name, *map(_cell, found["normalised"], found["normalised_stderr"], [2] * 7)])
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


def _cell(value: float, error: float, digits: int) -> str:
    """`0.350 ± 0.006`; "-" without a value."""
    shown = ["-" if math.isnan(part) else f"{part:.{digits}f}" for part in (value, error)]
    return " ± ".join(shown).removesuffix(" ± -")

"""The leaderboard's results as tables and as safe JSON."""

import math
from collections.abc import Mapping
from typing import Any

from drdpo.config.evaluation import LeaderboardConfig
from drdpo.evaluation.leaderboard_scores import Benchmark, average, average_stderr, benchmarks
from drdpo.evaluation.tables import markdown_table, text_table


def raw_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """One row a task and metric: task, shots, questions, metric, value, standard error.

    Args:
        results: what lm_eval.simple_evaluate returned.
    """
    rows = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, separator, chosen_filter = key.partition(",")
            if not separator or metric.endswith("_stderr"):
                continue
            name = metric if chosen_filter == "none" else f"{metric} ({chosen_filter})"
            error = values.get(f"{metric}_stderr,{chosen_filter}")
            rows.append([
                task, _count(results.get("n-shot", {}).get(task)), _count(values.get("sample_len")),
                name, _decimal(value), _decimal(error),
            ])  # fmt: skip
    return rows


RAW_HEADER = ["task", "shots", "questions", "metric", "value", "stderr"]
LEADERBOARD_HEADER = ["benchmark", "metric", "raw (0-1)", "stderr", "raw, unweighted", "normalised (0-100)", "stderr"]


def leaderboard_rows(found: list[Benchmark]) -> list[list[str]]:
    """One row a benchmark, and the average where all six are there."""
    rows = [
        [
            b.name, b.metric, f"{b.raw:.4f}", _decimal(b.raw_stderr), f"{b.unweighted:.4f}", f"{b.normalised:.2f}",
            _decimal(b.normalised_stderr, 2),
        ]
        for b in found
    ]  # fmt: skip
    mean = average(found)
    return rows if mean is None else [*rows, ["Average", "", "", "", "", f"{mean:.2f}", _decimal(average_stderr(found), 2)]]


def markdown(config: LeaderboardConfig, results: Mapping[str, Any]) -> str:
    """table.md: the leaderboard's columns, where they are there, then every task."""
    parts = [f"# {config.model_path} on {config.tasks}"]
    if config.limit is not None:
        parts.append(f"**A trial: limited to {config.limit:g} samples per task; not comparable with full runs.**")
    if found := benchmarks(results["results"]):
        parts += [
            "## Open LLM Leaderboard v2",
            "Raw: the harness's mean over all questions; unweighted: over subtasks. Normalised: the public leaderboard's "
            "scale; guessing is 0. The harness has no standard error for IFEval's instructions: that of its prompts stands "
            "for both.",
            markdown_table(LEADERBOARD_HEADER, leaderboard_rows(found), left=2),
        ]
    parts += ["## All tasks", markdown_table(RAW_HEADER, raw_rows(results), left=1)]
    return "\n\n".join(parts) + "\n"


def terminal(results: Mapping[str, Any]) -> str:
    """The same for a terminal, without the subtasks of groups that have a mean of their own."""
    inner = {
        child for group, children in results.get("group_subtasks", {}).items() if group in results.get("groups", {})
        for child in children if child not in results.get("groups", {})
    }  # fmt: skip
    found = benchmarks(results["results"])
    # lm-eval has no group around MMLU-Pro and IFEval, which stay.
    inner -= {"leaderboard_mmlu_pro", "leaderboard_ifeval"}
    rows = [row for row in raw_rows(results) if row[0] not in inner]
    tables = [text_table(RAW_HEADER, rows)]
    if found:
        tables.append(text_table(LEADERBOARD_HEADER, leaderboard_rows(found), left=2))
    return "\n\n".join(tables)


def leaderboard_json(results: Mapping[str, Any]) -> dict[str, Any]:
    """The leaderboard's columns for results.json."""
    found = benchmarks(results["results"])
    return {
        "raw": {benchmark.name: benchmark.raw for benchmark in found},
        "raw_stderr": {benchmark.name: benchmark.raw_stderr for benchmark in found},
        "unweighted": {benchmark.name: benchmark.unweighted for benchmark in found},
        "normalised_stderr": {benchmark.name: benchmark.normalised_stderr for benchmark in found},
        "average_stderr": average_stderr(found),
        "normalised": {benchmark.name: benchmark.normalised for benchmark in found},
        "average": average(found),
    }


def json_safe(value: Any) -> Any:
    """Only what JSON has: numpy numbers become numbers, NaN and infinity null, anything else its text."""
    if isinstance(value, Mapping):
        return {str(name): json_safe(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((json_safe(item) for item in value), key=str)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return json_safe(value.tolist())
    if callable(value) and hasattr(value, "__name__"):
        return f"{getattr(value, '__module__', '')}.{value.__name__}"
    return str(value)


def _count(value: Any) -> str:
    return str(value) if isinstance(value, int) else ""


def _decimal(value: Any, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) and math.isfinite(value) else "n/a"

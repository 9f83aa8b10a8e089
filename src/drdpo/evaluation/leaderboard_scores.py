"""Normalised scores of the public Open LLM Leaderboard from lm-eval's (the harness's) raw scores, and the tables.

The leaderboard (version 2, 2024) maps the score of guessing to 0 and a perfect score to 100:

    normalised = max(raw - low, 0) / (1 - low) * 100,     low = 1 / choices for multiple choice, 0 for generation.

BBH and MuSR are normalised per subtask, because the numbers of choices differ, and then averaged without weights; GPQA,
MMLU-Pro and MATH are normalised as a whole. IFEval is the mean of the strict accuracies per instruction and per prompt. The
average is the plain mean of the six. The harness's raw means are weighted by size, as in published tables.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from drdpo.config.evaluation import LeaderboardConfig
from drdpo.evaluation.report import markdown_table, text_table

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
COLUMNS = ("IFEval", "BBH", "MATH", "GPQA", "MuSR", "MMLU-Pro")
"""The benchmarks, in the order of published tables."""

HUB_BENCHMARKS = {
    "leaderboard_gpqa_diamond": ("Idavidrein/gpqa", "diamond", "acc_norm"),
    "leaderboard_mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro", "acc"),
}
"""{task: (data set on the hub, task id in that data set's eval.yaml, metric)} of the leaderboard's tasks whose data sets
are known to be benchmarks of the hub; its validation refuses results that name another data set."""

TaskScores = Mapping[str, Mapping[str, Any]]
"""The harness's `results`: {task or group: {"metric,filter": value}}."""


@dataclass(frozen=True)
class Benchmark:
    """One of the leaderboard's six columns; standard errors are None if the harness reports none."""

    name: str
    metric: str
    raw: float
    """0 to 1, the harness's mean over all questions."""
    raw_stderr: float | None
    normalised: float
    """0 to 100."""
    normalised_stderr: float | None
    """Of the score before clamping at 0."""


def normalise(raw: float, low: float) -> float:
    """Map `low`, the score of guessing, to 0 and 1 to 100; scores below `low` become 0."""
    return max(raw - low, 0.0) / (1.0 - low) * 100.0


def benchmarks(scores: TaskScores) -> list[Benchmark]:
    """The complete ones of the six benchmarks, in the leaderboard's order.

    Args:
        scores: the harness's `results`.
    """
    bbh = {f"leaderboard_bbh_{task}": 1 / choices for task, choices in BBH_CHOICES.items()}
    musr = {f"leaderboard_musr_{task}": 1 / choices for task, choices in MUSR_CHOICES.items()}
    found = [
        _ifeval(scores),
        _benchmark(scores, "BBH", "leaderboard_bbh", "acc_norm", bbh),
        _benchmark(scores, "MATH", "leaderboard_math_hard", "exact_match", {"leaderboard_math_hard": 0.0}),
        _benchmark(scores, "GPQA", "leaderboard_gpqa", "acc_norm", {"leaderboard_gpqa": 1 / 4}),
        _benchmark(scores, "MuSR", "leaderboard_musr", "acc_norm", musr),
        _benchmark(scores, "MMLU-Pro", "leaderboard_mmlu_pro", "acc", {"leaderboard_mmlu_pro": 1 / 10}),
    ]
    return [benchmark for benchmark in found if benchmark is not None]


def average(found: list[Benchmark]) -> float | None:
    """The leaderboard's average, 0 to 100; None unless all six benchmarks are complete."""
    return sum(benchmark.normalised for benchmark in found) / 6 if len(found) == 6 else None


def average_stderr(found: list[Benchmark]) -> float | None:
    """Standard error of `average`, assuming independent benchmarks; None if one has none."""
    errors = [benchmark.normalised_stderr for benchmark in found]
    total = _root_sum(errors)
    return None if average(found) is None or total is None else total / 6


def metric_value(scores: TaskScores, task: str, metric: str) -> float | None:
    """A task's value of an unfiltered metric; None if it was not run."""
    value = scores.get(task, {}).get(f"{metric},none")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def math_original(scores: TaskScores) -> float | None:
    """MATH by exact_match_original, the comparison of 2024, over all questions; None if it was not run.

    Since version 3 of the task exact_match means Math-Verify, which accepts more answers; lm-eval aggregates only that.
    """
    found = [
        (value, values.get("sample_len", 0)) for task, values in scores.items()
        if task.startswith("leaderboard_math_") and (value := metric_value(scores, task, "exact_match_original")) is not None
    ]  # fmt: skip
    questions = sum(count for _, count in found)
    return sum(value * count for value, count in found) / questions if questions else None


def _root_sum(errors: list[float | None]) -> float | None:
    found = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in found)) if found and len(found) == len(errors) else None


def _benchmark(scores: TaskScores, name: str, task: str, metric: str, lows: dict[str, float]) -> Benchmark | None:
    """None if it is incomplete.

    Args:
        scores: the harness's `results`.
        name, task, metric: of the benchmark.
        lows: {task: score of guessing} of the tasks to normalise, the benchmark itself or its subtasks.
    """
    raw, error = metric_value(scores, task, metric), metric_value(scores, task, f"{metric}_stderr")
    normalised = [normalise(v, low) for part, low in lows.items() if (v := metric_value(scores, part, metric)) is not None]
    if raw is None or len(normalised) < len(lows):
        return None
    errors = {part: metric_value(scores, part, f"{metric}_stderr") for part in lows}
    scaled = _root_sum([None if e is None else e / (1 - lows[part]) * 100 for part, e in errors.items()])
    return Benchmark(
        name, metric, raw, error, sum(normalised) / len(lows), None if scaled is None else scaled / len(lows)
    )  # fmt: skip


def _ifeval(scores: TaskScores) -> Benchmark | None:
    task = "leaderboard_ifeval"
    instruction = metric_value(scores, task, "inst_level_strict_acc")
    prompt = metric_value(scores, task, "prompt_level_strict_acc")
    if instruction is None or prompt is None:
        return None
    raw = (instruction + prompt) / 2
    # The harness has no standard error for instructions, several of which share a prompt: that of the prompts is used.
    error = metric_value(scores, task, "prompt_level_strict_acc_stderr")
    scaled = None if error is None else error * 100
    return Benchmark("IFEval", "mean of strict accuracies", raw, error, normalise(raw, 0.0), scaled)


def hub_results(results: Mapping[str, Any], date: str) -> str:
    """A file of .eval_results/ in a model's repository on the hub, which shows it beside the benchmarks; "" without any.

    Args:
        results: what lm_eval.simple_evaluate returned.
        date: of the evaluation, ISO 8601.

    Source: https://huggingface.co/docs/hub/eval-results; values in percent, as in the benchmarks' tables.
    """
    import yaml

    entries = []
    for task, (dataset, task_id, metric) in HUB_BENCHMARKS.items():
        if (value := metric_value(results["results"], task, metric)) is not None:
            shots = _count(results.get("n-shot", {}).get(task))
            notes = f"lm-eval task {task}: {shots}-shot, by the choices' log-likelihoods, no chain of thought"
            benchmark = {"id": dataset, "task_id": task_id}
            entries.append({"dataset": benchmark, "value": round(100 * value, 2), "date": date, "notes": notes})
    return str(yaml.safe_dump(entries, sort_keys=False)) if entries else ""


# The tables --------------------------------------------------------------------------------------------------------


def raw_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """One row per task and metric: task, shots, questions, metric, value, standard error.

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
LEADERBOARD_HEADER = ["benchmark", "metric", "raw (0-1)", "stderr", "normalised (0-100)", "stderr"]


def leaderboard_rows(found: list[Benchmark]) -> list[list[str]]:
    """One row per benchmark, and the average if all six are complete."""
    rows = [
        [b.name, b.metric, f"{b.raw:.4f}", _decimal(b.raw_stderr), f"{b.normalised:.2f}", _decimal(b.normalised_stderr, 2)]
        for b in found
    ]
    mean = average(found)
    return rows if mean is None else [*rows, ["Average", "", "", "", f"{mean:.2f}", _decimal(average_stderr(found), 2)]]


def markdown(config: LeaderboardConfig, results: Mapping[str, Any]) -> str:
    """table.md: the leaderboard's columns, then every task."""
    parts = [f"# {config.model_path} on {config.tasks}"]
    if config.limit is not None:
        parts.append(f"**Trial: limited to {config.limit:g} samples per task; not comparable with full runs.**")
    if found := benchmarks(results["results"]):
        parts += [
            "## Open LLM Leaderboard v2",
            "Raw: the harness's mean over all questions. Normalised: the scale of the public leaderboard, on which guessing "
            "scores 0. The harness has no standard error for IFEval's instructions; that of its prompts is used for both.",
            markdown_table(LEADERBOARD_HEADER, leaderboard_rows(found), left=2),
        ]
    if (original := math_original(results["results"])) is not None:
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
    if found:
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

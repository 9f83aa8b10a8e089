"""The public Open LLM Leaderboard's normalised scores, from the harness's raw ones.

The leaderboard (version 2, 2024) maps the score of guessing to 0 and a perfect score to 100:

    normalised = max(raw - low, 0) / (1 - low) * 100,     low = 1 / choices for multiple choice, 0 for generation.

BBH and MuSR are normalised per subtask, whose numbers of choices differ, and then averaged without weights; GPQA, MMLU-Pro
and MATH as wholes. IFEval is the mean of the strict accuracies per instruction and per prompt. The average is the plain mean
of the six. The harness itself prints raw means weighted by size; published tables of raw values are those.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BBH_CHOICES: dict[str, int] = {
    "boolean_expressions": 2,
    "causal_judgement": 2,
    "date_understanding": 6,
    "disambiguation_qa": 3,
    "formal_fallacies": 2,
    "geometric_shapes": 11,
    "hyperbaton": 2,
    "logical_deduction_five_objects": 5,
    "logical_deduction_seven_objects": 7,
    "logical_deduction_three_objects": 3,
    "movie_recommendation": 6,
    "navigate": 2,
    "object_counting": 19,
    "penguins_in_a_table": 5,
    "reasoning_about_colored_objects": 18,
    "ruin_names": 6,
    "salient_translation_error_detection": 6,
    "snarks": 2,
    "sports_understanding": 2,
    "temporal_sequences": 4,
    "tracking_shuffled_objects_five_objects": 5,
    "tracking_shuffled_objects_seven_objects": 7,
    "tracking_shuffled_objects_three_objects": 3,
    "web_of_lies": 2,
}
MUSR_CHOICES: dict[str, int] = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}
GPQA_LOW = 1 / 4
MMLU_PRO_LOW = 1 / 10
MATH_LOW = 0.0

TaskScores = Mapping[str, Mapping[str, Any]]
"""The harness's `results`: {task or group: {"metric,filter": value}}."""


@dataclass(frozen=True)
class Benchmark:
    """One of the leaderboard's six columns."""

    name: str
    metric: str
    raw: float
    """0 to 1, the harness's mean over all questions."""
    normalised: float
    """0 to 100."""


def normalise(raw: float, low: float) -> float:
    """Map the score of guessing, `low`, to 0 and 1 to 100; below guessing is 0."""
    return max(raw - low, 0.0) / (1.0 - low) * 100.0


def benchmarks(scores: TaskScores) -> list[Benchmark]:
    """Those of the six benchmarks that the harness has run whole, in the leaderboard's order.

    Args:
        scores: the harness's `results`.
    """
    found = [
        _ifeval(scores),
        _subtasks(scores, "BBH", "leaderboard_bbh", BBH_CHOICES),
        _whole(scores, "MATH", "leaderboard_math_hard", "exact_match", MATH_LOW),
        _whole(scores, "GPQA", "leaderboard_gpqa", "acc_norm", GPQA_LOW),
        _subtasks(scores, "MuSR", "leaderboard_musr", MUSR_CHOICES),
        _whole(scores, "MMLU-Pro", "leaderboard_mmlu_pro", "acc", MMLU_PRO_LOW),
    ]
    return [benchmark for benchmark in found if benchmark is not None]


def average(found: list[Benchmark]) -> float | None:
    """The leaderboard's average, 0 to 100; None unless all six are there."""
    return sum(benchmark.normalised for benchmark in found) / 6 if len(found) == 6 else None


def metric_value(scores: TaskScores, task: str, metric: str) -> float | None:
    """A task's value of a metric without filter; None where it was not run."""
    value = scores.get(task, {}).get(f"{metric},none")
    return float(value) if isinstance(value, int | float) else None


def _whole(scores: TaskScores, name: str, task: str, metric: str, low: float) -> Benchmark | None:
    raw = metric_value(scores, task, metric)
    return None if raw is None else Benchmark(name, metric, raw, normalise(raw, low))


def _subtasks(scores: TaskScores, name: str, group: str, choices: dict[str, int]) -> Benchmark | None:
    raw = metric_value(scores, group, "acc_norm")
    parts = {task: metric_value(scores, f"{group}_{task}", "acc_norm") for task in choices}
    if raw is None or any(value is None for value in parts.values()):
        return None
    total = sum(normalise(value, 1 / choices[task]) for task, value in parts.items() if value is not None)
    return Benchmark(name, "acc_norm", raw, total / len(parts))


def _ifeval(scores: TaskScores) -> Benchmark | None:
    task = "leaderboard_ifeval"
    instruction = metric_value(scores, task, "inst_level_strict_acc")
    prompt = metric_value(scores, task, "prompt_level_strict_acc")
    if instruction is None or prompt is None:
        return None
    raw = (instruction + prompt) / 2
    return Benchmark("IFEval", "mean of strict accuracies", raw, normalise(raw, 0.0))

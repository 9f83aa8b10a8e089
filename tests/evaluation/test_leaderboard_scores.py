"""The leaderboard's normalisation, by hand and on a dictionary as the harness returns it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from drdpo.config.evaluation import LeaderboardConfig
from drdpo.evaluation.leaderboard_scores import (
    BBH_CHOICES,
    MUSR_CHOICES,
    benchmarks,
    hub_results,
    json_safe,
    markdown,
    normalise,
    raw_rows,
    terminal,
)


def task(name: str, questions: int = 10, **metrics: float) -> dict[str, Any]:
    values: dict[str, Any] = {"name": name, "alias": f" - {name}", "sample_len": questions}
    for metric, value in metrics.items():
        values |= {f"{metric},none": value, f"{metric}_stderr,none": 0.01}
    return values


@pytest.fixture
def harness() -> dict[str, Any]:
    """Every BBH subtask at chance but navigate (0.75) and one below chance; the rest at round figures."""
    bbh = {f"leaderboard_bbh_{name}": task(name, acc_norm=1 / choices) for name, choices in BBH_CHOICES.items()}
    bbh["leaderboard_bbh_navigate"] = task("navigate", acc_norm=0.75)
    bbh["leaderboard_bbh_snarks"] = task("snarks", acc_norm=0.2)
    musr = {
        "leaderboard_musr_murder_mysteries": task("murder_mysteries", acc_norm=0.75),
        "leaderboard_musr_object_placements": task("object_placements", acc_norm=0.6),
        "leaderboard_musr_team_allocation": task("team_allocation", acc_norm=0.5),
    }
    results = {
        **bbh, **musr,
        "leaderboard_bbh": task("leaderboard_bbh", 240, acc_norm=0.3),
        "leaderboard_musr": task("leaderboard_musr", 30, acc_norm=0.62),
        "leaderboard_gpqa": task("leaderboard_gpqa", acc_norm=0.625),
        "leaderboard_math_hard": task("leaderboard_math_hard", exact_match=0.08),
        "leaderboard_mmlu_pro": task("leaderboard_mmlu_pro", acc=0.55),
        "leaderboard_ifeval": task(
            "leaderboard_ifeval", prompt_level_strict_acc=0.5, inst_level_strict_acc=0.6, prompt_level_loose_acc=0.9,
        ),
    }  # fmt: skip
    groups = {name: results[name] for name in ("leaderboard_bbh", "leaderboard_musr")}
    subtasks = {
        "leaderboard": ["leaderboard_bbh", "leaderboard_musr", "leaderboard_mmlu_pro", "leaderboard_ifeval"],
        "leaderboard_bbh": list(bbh),
        "leaderboard_musr": list(musr),
    }
    return {"results": results, "groups": groups, "group_subtasks": subtasks, "n-shot": {"leaderboard_mmlu_pro": 5}}


def test_normalise() -> None:
    assert normalise(0.25, 0.25) == 0
    assert normalise(1.0, 0.25) == 100
    assert normalise(0.1, 0.25) == 0
    assert normalise(0.625, 0.25) == pytest.approx(50)


def test_six_benchmarks_by_hand(harness: dict[str, Any]) -> None:
    found = benchmarks(harness["results"])
    average, six = found.loc["Average"], found.drop("Average")
    raw, normalised = six["raw"].to_dict(), six["normalised"].to_dict()
    # BBH: navigate (0.75 - 1/2) / (1/2) = 50, every other 0, over 24. MuSR: 50, 50 and (1/2 - 1/3) / (2/3) = 25, over 3.
    by_hand = {"IFEval": 55, "BBH": 50 / 24, "MATH": 8, "GPQA": 50, "MuSR": 125 / 3, "MMLU-Pro": 50}
    assert normalised == pytest.approx(by_hand)
    # Raw: the harness's own means, not means of subtasks.
    assert raw == pytest.approx({"IFEval": 0.55, "BBH": 0.3, "MATH": 0.08, "GPQA": 0.625, "MuSR": 0.62, "MMLU-Pro": 0.55})
    assert average["normalised"] == pytest.approx((55 + 50 / 24 + 8 + 50 + 125 / 3 + 50) / 6)


def test_no_average_of_five_and_no_half_benchmark(harness: dict[str, Any]) -> None:
    del harness["results"]["leaderboard_musr_team_allocation"]
    found = benchmarks(harness["results"])
    assert list(found.index) == ["IFEval", "BBH", "MATH", "GPQA", "MMLU-Pro"]


def test_choices_are_those_of_the_installed_tasks() -> None:
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "leaderboard"
    group = yaml.safe_load((folder / "bbh_mc" / "_leaderboard_bbh.yaml").read_text())
    assert group["task"] == [f"leaderboard_bbh_{name}" for name in sorted(BBH_CHOICES)]
    for name, choices in BBH_CHOICES.items():
        listed = yaml.safe_load((folder / "bbh_mc" / f"{name}.yaml").read_text())["doc_to_choice"]
        assert len(yaml.safe_load(listed) if isinstance(listed, str) else listed) == choices, name
    group = yaml.safe_load((folder / "musr" / "_musr.yaml").read_text())
    assert group["task"] == [f"leaderboard_musr_{name}" for name in MUSR_CHOICES]
    # The others are read as wholes, by the metric that the harness aggregates with weights by size.
    wholes = {
        "gpqa/_leaderboard_gpqa.yaml": ("leaderboard_gpqa", "acc_norm"),
        "math/_leaderboard_math.yaml": ("leaderboard_math_hard", "exact_match"),
    }
    for file, (name, metric) in wholes.items():
        group = yaml.safe_load((folder / file).read_text())
        assert group["group"] == name
        (aggregated,) = group["aggregate_metric_list"]
        assert aggregated == {"metric": metric, "aggregation": "mean", "weight_by_size": True}


def test_tables(harness: dict[str, Any]) -> None:
    config = LeaderboardConfig(model_path="some/model")
    text = markdown(config, harness)
    assert "| IFEval | mean of strict accuracies | 0.5500 | 0.0100 | 55.00 | 1.00 |" in text
    assert "| Average |  |  |  | 34.46 | " in text
    assert "| leaderboard_mmlu_pro | 5 | 10 | acc | 0.5500 | 0.0100 |" in text
    assert "Trial" not in text
    assert "Trial: limited to 4 samples" in markdown(LeaderboardConfig(model_path="some/model", limit=4), harness)
    printed = terminal(harness)
    # Subtasks of a group with a mean of its own stay out of the terminal.
    assert "leaderboard_bbh_navigate" not in printed
    assert "leaderboard_bbh " in printed
    assert "leaderboard_mmlu_pro" in printed


def test_raw_rows_name_filters_and_missing_errors() -> None:
    values = {"alias": "t", "sample_len": 3, "exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A"}
    assert raw_rows({"results": {"t": values}}) == [["t", "", "3", "exact_match (strict)", "0.5000", "n/a"]]


def test_json_safe() -> None:
    odd = {"a": np.float32(0.5), "b": math.nan, "c": {3, 1}, 4: np.arange(2), "e": normalise, "p": Path("x")}
    safe = json_safe(odd)
    assert json.loads(json.dumps(safe, allow_nan=False)) == safe
    assert safe["a"] == 0.5
    assert safe["b"] is None
    assert safe["c"] == [1, 3]
    assert safe["4"] == [0, 1]
    assert safe["e"] == "drdpo.evaluation.leaderboard_scores.normalise"
    assert safe["p"] == "x"


def test_results_for_the_hub_are_in_its_form() -> None:
    results = {
        "results": {
            "leaderboard_gpqa_diamond": task("leaderboard_gpqa_diamond", acc_norm=0.30303),
            "leaderboard_gpqa_main": task("leaderboard_gpqa_main", acc_norm=0.9),
            "leaderboard_mmlu_pro": task("leaderboard_mmlu_pro", acc=0.125),
        },
        "n-shot": {"leaderboard_gpqa_diamond": 0, "leaderboard_mmlu_pro": 5},
    }
    date = "2026-01-02T03:04:05+00:00"
    text = hub_results(results, date)
    notes = "lm-eval task leaderboard_{}-shot, by the choices' log-likelihoods, no chain of thought"
    assert yaml.safe_load(text) == [
        {"dataset": {"id": "Idavidrein/gpqa", "task_id": "diamond"}, "value": 30.3, "date": date,
         "notes": notes.format("gpqa_diamond: 0")},
        {"dataset": {"id": "TIGER-Lab/MMLU-Pro", "task_id": "mmlu_pro"}, "value": 12.5, "date": date,
         "notes": notes.format("mmlu_pro: 5")},
    ]  # fmt: skip
    assert [entry.task_id for entry in parse_eval_result_entries(yaml.safe_load(text))] == ["diamond", "mmlu_pro"]
    assert hub_results({"results": {"leaderboard_bbh": task("leaderboard_bbh", acc_norm=0.5)}}, date) == ""

"""The leaderboard's scores, compare_openllm and compare_mixtures, on stored results: by hand, pictures, and clear errors."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from drdpo.config.evaluation import CompareMixturesConfig, CompareOpenllmConfig, LeaderboardConfig
from drdpo.errors import DataError, UsageError
from drdpo.evaluation import leaderboard_scores, mixtures
from drdpo.evaluation.leaderboard_scores import (
    BBH_CHOICES,
    COLUMNS,
    MUSR_CHOICES,
    benchmarks,
    compare_openllm,
    hub_results,
)
from drdpo.evaluation.mixtures import SPOKES, compare_mixtures, spiders
from drdpo.evaluation.statistics import Estimate
from drdpo.objectives import ARMORM_OBJECTIVES, GATED_SCORE


def metrics(stderr=0.01, **values):
    """Of one task, as the harness writes them."""
    errors = {f"{name}_stderr,none": stderr for name in values}
    return {f"{name},none": value for name, value in values.items()} | errors | {"sample_len": 10}


@pytest.fixture
def harness():
    """Every BBH subtask at chance but navigate (0.75) and one below chance; the rest at round figures."""
    scores = {f"bbh_{name}": {"acc_norm": 1 / choices} for name, choices in BBH_CHOICES.items()}
    scores |= {
        "bbh_navigate": {"acc_norm": 0.75}, "bbh_snarks": {"acc_norm": 0.2}, "musr_murder_mysteries": {"acc_norm": 0.75},
        "musr_object_placements": {"acc_norm": 0.6}, "musr_team_allocation": {"acc_norm": 0.5}, "bbh": {"acc_norm": 0.3},
        "musr": {"acc_norm": 0.62}, "gpqa": {"acc_norm": 0.625}, "math_hard": {"exact_match": 0.08},
        "ifeval": {"prompt_level_strict_acc": 0.5, "inst_level_strict_acc": 0.6, "prompt_level_loose_acc": 0.9},
        "mmlu_pro": {"acc": 0.55},
    }  # fmt: skip
    results = {f"leaderboard_{name}": metrics(**values) for name, values in scores.items()}
    bbh, musr = ([name for name in results if name.startswith(f"leaderboard_{group}_")] for group in ("bbh", "musr"))
    groups = {name: results[name] for name in ("leaderboard_bbh", "leaderboard_musr")}
    subtasks = {"leaderboard": [*groups, "leaderboard_mmlu_pro", "leaderboard_ifeval"]}
    subtasks |= {"leaderboard_bbh": bbh, "leaderboard_musr": musr}
    return {"results": results, "groups": groups, "group_subtasks": subtasks, "n-shot": {"leaderboard_mmlu_pro": 5}}


def test_six_benchmarks_by_hand(harness):
    assert [leaderboard_scores.normalise(raw, 0.25) for raw in (0.25, 1.0, 0.1, 0.625)] == [0, 100, 0, pytest.approx(50)]
    found = benchmarks(harness["results"])
    # BBH: navigate (0.75 - 1/2) / (1/2) = 50, every other 0, over 24. MuSR: 50, 50 and (1/2 - 1/3) / (2/3) = 25, over 3.
    by_hand = {"IFEval": 55, "BBH": 50 / 24, "MATH": 8, "GPQA": 50, "MuSR": 125 / 3, "MMLU-Pro": 50}
    average, six = found.loc["Average"], found.drop("Average")
    assert six["normalised"].to_dict() == pytest.approx(by_hand)
    # Raw: the harness's own means, not means of subtasks.
    raw = {"IFEval": 0.55, "BBH": 0.3, "MATH": 0.08, "GPQA": 0.625, "MuSR": 0.62, "MMLU-Pro": 0.55}
    assert six["raw"].to_dict() == pytest.approx(raw)
    assert average["normalised"] == pytest.approx((55 + 50 / 24 + 8 + 50 + 125 / 3 + 50) / 6)


def test_no_average_of_five_and_no_half_benchmark(harness):
    del harness["results"]["leaderboard_musr_team_allocation"]
    found = benchmarks(harness["results"])
    assert list(found.index) == ["IFEval", "BBH", "MATH", "GPQA", "MMLU-Pro"]


def test_choices_are_those_of_the_installed_tasks():
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
    for file, name, metric in (("gpqa", "leaderboard_gpqa", "acc_norm"), ("math", "leaderboard_math_hard", "exact_match")):
        group = yaml.safe_load((folder / file / f"_leaderboard_{file}.yaml").read_text())
        assert group["group"] == name
        (aggregated,) = group["aggregate_metric_list"]
        assert aggregated == {"metric": metric, "aggregation": "mean", "weight_by_size": True}


def test_tables(harness):
    config = LeaderboardConfig(model_path="some/model")
    text = leaderboard_scores.markdown(config, harness)
    assert "| IFEval | mean of strict accuracies | 0.5500 | 0.0100 | 55.00 | 1.00 |" in text
    assert "| Average |  |  |  | 34.46 | " in text
    assert "| leaderboard_mmlu_pro | 5 | 10 | acc | 0.5500 | 0.0100 |" in text
    assert "Trial" not in text
    assert "Trial: limited to 4 samples" in leaderboard_scores.markdown(
        LeaderboardConfig(model_path="some/model", limit=4), harness
    )
    printed = leaderboard_scores.terminal(harness)
    # Subtasks of a group with a mean of its own stay out of the terminal.
    assert "leaderboard_bbh_navigate" not in printed
    assert "leaderboard_bbh " in printed and "leaderboard_mmlu_pro" in printed


def test_raw_rows_name_filters_and_missing_errors():
    values = {"alias": "t", "sample_len": 3, "exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A"}
    assert leaderboard_scores.raw_rows({"results": {"t": values}}) == [
        ["t", "", "3", "exact_match (strict)", "0.5000", "n/a"]
    ]


def test_json_safe():
    odd = {
        "a": np.float32(0.5),
        "b": math.nan,
        "c": {3, 1},
        4: np.arange(2),
        "e": leaderboard_scores.normalise,
        "p": Path("x"),
    }
    safe = leaderboard_scores.json_safe(odd)
    assert json.loads(json.dumps(safe, allow_nan=False)) == safe
    name = "drdpo.evaluation.leaderboard_scores.normalise"
    assert safe == {"a": 0.5, "b": None, "c": [1, 3], "4": [0, 1], "e": name, "p": "x"}


def test_results_for_the_hub_are_in_its_form():
    scores = {"gpqa_diamond": {"acc_norm": 0.30303}, "gpqa_main": {"acc_norm": 0.9}, "mmlu_pro": {"acc": 0.125}}
    results = {f"leaderboard_{name}": metrics(**values) for name, values in scores.items()}
    shots, date = {"leaderboard_gpqa_diamond": 0, "leaderboard_mmlu_pro": 5}, "2026-01-02T03:04:05+00:00"
    entries = yaml.safe_load(hub_results({"results": results, "n-shot": shots}, date))
    notes = "lm-eval task leaderboard_{}-shot, by the choices' log-likelihoods, no chain of thought"
    assert entries == [
        {"dataset": {"id": "Idavidrein/gpqa", "task_id": "diamond"}, "value": 30.3, "date": date,
         "notes": notes.format("gpqa_diamond: 0")},
        {"dataset": {"id": "TIGER-Lab/MMLU-Pro", "task_id": "mmlu_pro"}, "value": 12.5, "date": date,
         "notes": notes.format("mmlu_pro: 5")},
    ]  # fmt: skip
    assert [entry.task_id for entry in parse_eval_result_entries(entries)] == ["diamond", "mmlu_pro"]
    assert hub_results({"results": {"leaderboard_bbh": metrics(acc_norm=0.5)}}, date) == ""


def harness_results(mmlu=0.55):
    """All six benchmarks at round figures."""
    scores = {f"bbh_{name}": metrics(0.02, acc_norm=0.5) for name in BBH_CHOICES}
    scores |= {f"musr_{name}": metrics(0.03, acc_norm=0.5) for name in MUSR_CHOICES}
    scores |= {
        "bbh": metrics(0.006, acc_norm=0.51), "musr": metrics(0.018, acc_norm=0.52), "gpqa": metrics(0.015, acc_norm=0.28),
        "math_hard": metrics(0.012, exact_match=0.33), "mmlu_pro": metrics(0.0054, acc=mmlu),
        "ifeval": metrics(0.021, prompt_level_strict_acc=0.5, inst_level_strict_acc=0.6),
    }  # fmt: skip
    scores["ifeval"]["inst_level_strict_acc_stderr,none"] = "N/A"
    return {"results": {f"leaderboard_{name}": values for name, values in scores.items()}, "config": {"limit": None}}


def write_results(folder, results, **made_by):
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    record = {"made_by": {"model_path": folder.name, "seed": 42, **made_by}, "versions": {"lm-eval": "0.4.13"}}
    record |= {"date": "2026-01-02T03:04:05+00:00", "chat_template_sha256": "c0ffee"}
    (folder / "manifest.json").write_text(json.dumps({"evaluate_openllm": record}))
    return folder


def table_row(text, heading, name):
    """The cells of a row, below a heading."""
    below = text.partition(heading)[2]
    line = next(line for line in below.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def compared(tmp_path):
    """The report of these NAME=FOLDER, by compare_openllm or by compare_mixtures."""

    def report(*words, step=compare_openllm):
        config = CompareOpenllmConfig if step is compare_openllm else CompareMixturesConfig
        step(config(list(words), str(tmp_path / "out")))
        return (tmp_path / "out" / "report.md").read_text(encoding="utf-8")

    return report


def test_leaderboard_by_hand(tmp_path, compared):
    base = write_results(tmp_path / "base", harness_results())
    tuned = write_results(tmp_path / "tu ned", harness_results(mmlu=0.64))
    text = compared(f"1B/base={base}", f"1B/tuned={tuned}")
    raw = table_row(text, "### Raw (0-1", "base")
    columns = ["0.550 ± 0.021", "0.510 ± 0.006", "0.330 ± 0.012", "0.280 ± 0.015", "0.520 ± 0.018", "0.550 ± 0.005"]
    assert raw == ["base", *columns, "-"]
    normalised = table_row(text, "### Normalised", "base")
    # BBH: (1/2 - 1/n) / (1 - 1/n) = (n - 2) / (2 (n - 1)), the mean over the 24.
    bbh = 100 * sum((n - 2) / (2 * (n - 1)) for n in BBH_CHOICES.values()) / 24
    bbh_error = 100 * sum((0.02 * n / (n - 1)) ** 2 for n in BBH_CHOICES.values()) ** 0.5 / 24
    # MuSR: n = 2, 5, 3 gives 0, 3/8 and 1/4; errors 0.03 times 2, 5/4 and 3/2.
    musr, musr_error = 100 * (3 / 8 + 1 / 4) / 3, 100 * 0.03 * (4 + 25 / 16 + 9 / 4) ** 0.5 / 3
    values = [55.0, bbh, 33.0, 4.0, musr, 50.0]
    errors = [2.1, bbh_error, 1.2, 2.0, musr_error, 0.6]
    average = sum(values) / 6
    values, errors = [*values, average], [*errors, sum(error**2 for error in errors) ** 0.5 / 6]
    assert normalised[1:] == [f"{value:.2f} ± {error:.2f}" for value, error in zip(values, errors, strict=True)]
    # (0.64 - 0.1) / 0.9 = 0.6.
    assert table_row(text, "### Normalised", "tuned")[6].startswith("60.00")
    published = table_row(text, "### Published raw scores, 1B", "WDPO rho=0.01")
    assert published[1:] == ["0.52", "0.35", "0.10", "0.25", "0.34", "0.19"]
    assert all(fact in text for fact in ("0.4.13", "c0ffee", "2026-01-02T03:04:05+00:00"))
    rows = pd.read_csv(tmp_path / "out" / "leaderboard.csv", index_col=["run", "benchmark"])["normalised"]
    assert rows["base", "Average"] == pytest.approx(average)
    assert rows["tuned", "MMLU-Pro"] == pytest.approx(60)


def test_published_tables_have_a_number_for_every_column():
    for methods in leaderboard_scores.PUBLISHED.values():
        assert all(len(values) == len(COLUMNS) and 0 <= min(values) <= max(values) <= 1 for values in methods.values())
    for methods in mixtures.PUBLISHED.values():
        assert all(len(values) == len(SPOKES) for values in methods.values())
    assert set(SPOKES) <= {*ARMORM_OBJECTIVES, GATED_SCORE}


def test_unlike_trial_and_partial_runs_are_marked(tmp_path, compared):
    part = harness_results()
    del part["results"]["leaderboard_gpqa"]
    part["config"]["limit"] = 3
    part["results"]["my_task"] = metrics(0.1, acc=0.25)
    base = write_results(tmp_path / "base", harness_results())
    text = compared(f"base={base}", f"part={write_results(tmp_path / 'part', part, seed=7)}")
    assert "Trial: part used" in text and "the evaluation differs in seed: base 42, part 7" in text
    row = table_row(text, "### Normalised", "part")
    assert (row[4], row[7]) == ("-", "-")
    assert "| part | my_task |" in text and "### Published" not in text


def test_groups_are_compared_within_themselves(tmp_path, compared):
    """Runs of the same short name in two groups: a difference inside 1B is told, one between the groups is not."""
    settings = {"1B/base": 5, "1B/KLDPO": 0, "8B/base": 0, "8B/KLDPO": 0}
    text = compared(*(
        f"{name}={write_results(tmp_path / name.replace('/', ' '), harness_results(), num_fewshot=shots)}"
        for name, shots in settings.items()
    ))  # fmt: skip
    assert "the evaluation differs in num_fewshot: 1B/base 5, 1B/KLDPO 0" in text
    assert text.count("Not a like-for-like comparison") == 1


def test_the_leaderboards_own_group_is_no_other_task_and_maths_old_metric_is_shown(tmp_path, compared):
    results = harness_results()
    results["results"]["leaderboard"] = metrics(acc=0.4, acc_norm=0.3, exact_match=0.2)
    for name, value, count in (("algebra", 0.1, 30), ("geometry", 0.5, 10)):
        part = metrics(exact_match=0.5, exact_match_original=value) | {"sample_len": count}
        results["results"][f"leaderboard_math_{name}_hard"] = part
    text = compared(f"1B/a={write_results(tmp_path / 'a', results)}")
    assert "Other tasks" not in text
    # (30 * 0.1 + 10 * 0.5) / 40
    assert table_row(text, "### Raw (0-1", "a")[-1] == "0.200"
    assert "since version 3 of the task" in text.partition("### Published raw")[2]


SCORES = "run,objective,prompts,mean,sd,paired_prompts,gain_sd,ci_low,ci_high\n"


def write_scores(folder, objectives, shift):
    folder.mkdir(parents=True)
    lines = [f"base,{name},9,0.0,1.0,,,,\n" for name in objectives]
    for place, run in enumerate(("DPO", "KLDPO", "WDPO")):
        lines += [
            f"{run},{name},9,0.1,1.0,9,{shift + 0.1 * place + 0.01 * k},{shift},{shift + 1}\n"
            for k, name in enumerate(objectives)
        ]
    (folder / "scores.csv").write_text(SCORES + "".join(lines))
    return folder


def test_mixtures_by_hand(tmp_path, compared):
    words = [
        f"{name}={write_scores(tmp_path / 'reports of' / name, SPOKES, shift)}"
        for name, shift in zip(mixtures.PUBLISHED, (0.2, 0.3, -0.1), strict=True)
    ]
    text, output = compared(*words, step=compare_mixtures), tmp_path / "out"
    row = table_row(text, "## truthfulness + complexity", "`helpsteer_correctness`")
    assert row[1::2] == [f"+0.{gain}10 [+0.200, +1.200]" for gain in (2, 3, 4)] and row[2::2] == ["+0.20", "+0.33", "+0.37"]
    assert table_row(text, "## correctness + helpfulness", "`ArmoRM`")[-1] == "+0.21"
    link = re.search(r"\]\(<([^>]+)>\)", text)[1]
    assert (output / link).parent.resolve() == tmp_path / "reports of" / "truthfulness_complexity"
    assert (output / "spiders.svg").read_text(encoding="utf-8").count("published") == 3


def test_a_mixture_of_its_own_and_of_few_objectives(tmp_path, compared):
    runs = [f"mine={write_scores(tmp_path / place, SPOKES[:2], 0.1)}" for place in ("mine", "another")]
    with pytest.raises(UsageError, match="given twice"):
        compared(*runs, step=compare_mixtures)
    text = compared(runs[0], step=compare_mixtures)
    assert not (tmp_path / "out" / "spiders.png").exists()
    assert table_row(text, "## mine", "`helpsteer_helpfulness`")[1] == "+0.100 [+0.100, +1.100]"
    assert "DPO, published" not in text


@pytest.mark.parametrize(
    ("step", "name", "content", "says"),
    [
        (compare_openllm, "results.json", None, "results.json: no such file"),
        (compare_openllm, "results.json", "{", "not JSON"),
        (compare_openllm, "results.json", '{"results": [1]}', 'field "results"'),
        (compare_mixtures, "scores.csv", None, "scores.csv: no such file"),
        (compare_mixtures, "scores.csv", "a,b\n1,2\n", "row 1: not the columns"),
        (compare_mixtures, "scores.csv", SCORES + "base,x,1,0,1,,,,\n", "only one run"),
        (compare_mixtures, "scores.csv", SCORES + "base,x,1,0,1,,,,\nrun,x,1,0,1,1,much,,\n", "row 3: a gain is not a"),
    ],
)
def test_broken_results_and_reports(step, name, content, says, tmp_path, compared):
    (tmp_path / "a").mkdir()
    if content is not None:
        (tmp_path / "a" / name).write_text(content)
    with pytest.raises(DataError, match=says):
        compared(f"a={tmp_path / 'a'}", step=step)
    assert not (tmp_path / "out").exists()


def results_of(runs, gain, count):
    gains = pd.DataFrame({run: [Estimate(gain, None, None)] * len(SPOKES) for run in runs}, SPOKES)
    return dict.fromkeys(list(mixtures.PUBLISHED)[:count], gains)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_spider_labels_are_inside_the_picture(count):
    figure = spiders(results_of(("DPO", "KLDPO", "WDPO"), -0.3, count))
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in [*axes.texts, axes.title]] + list(figure.legends[0].get_texts())
    assert len(texts) == count * 2 * (len(SPOKES) + 1) + 4
    for text in texts:
        box = text.get_window_extent()
        assert figure.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1), text.get_text()


def test_a_published_method_that_was_not_run_is_not_drawn_as_the_base():
    figure = spiders(results_of(("Dpo",), 0.0, 1))
    ours, theirs = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base (0)", "Dpo", "KLDPO", "WDPO"]
    styles = [line.get_color() for line in figure.legends[0].get_lines()]
    assert len(set(styles)) == 4
    # The ring of the base, then one colour a method, in both panels.
    assert [line.get_color() for line in ours.lines] == styles[:2]
    assert [line.get_color() for line in theirs.lines] == styles
    assert ours.get_ylim()[1] > 0.05, "gains of nothing stay near the centre"

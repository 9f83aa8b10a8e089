"""compare_openllm and compare_mixtures on stored results: tables computed by hand, pictures, and clear errors."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from drdpo.config.evaluation import CompareMixturesConfig, CompareOpenllmConfig
from drdpo.errors import DataError, UsageError
from drdpo.evaluation import leaderboard_scores, mixtures
from drdpo.evaluation.leaderboard_scores import BBH_CHOICES, COLUMNS, MUSR_CHOICES, compare_openllm
from drdpo.evaluation.mixtures import SPOKES, compare_mixtures, spiders
from drdpo.evaluation.statistics import Estimate
from drdpo.folder import lock_folder
from drdpo.objectives import ARMORM_OBJECTIVES, GATED_SCORE


def metrics(**values: float | str) -> dict[str, Any]:
    return {f"{name},none": value for name, value in values.items()}


def harness_results(mmlu: float = 0.55) -> dict[str, Any]:
    """All six benchmarks at round figures, as the harness writes them."""
    scores = {f"leaderboard_bbh_{name}": metrics(acc_norm=0.5, acc_norm_stderr=0.02) for name in BBH_CHOICES}
    scores |= {f"leaderboard_musr_{name}": metrics(acc_norm=0.5, acc_norm_stderr=0.03) for name in MUSR_CHOICES}
    scores |= {
        "leaderboard_bbh": metrics(acc_norm=0.51, acc_norm_stderr=0.006),
        "leaderboard_musr": metrics(acc_norm=0.52, acc_norm_stderr=0.018),
        "leaderboard_gpqa": metrics(acc_norm=0.28, acc_norm_stderr=0.015),
        "leaderboard_math_hard": metrics(exact_match=0.33, exact_match_stderr=0.012),
        "leaderboard_mmlu_pro": metrics(acc=mmlu, acc_stderr=0.0054),
        "leaderboard_ifeval": metrics(
            prompt_level_strict_acc=0.5, prompt_level_strict_acc_stderr=0.021, inst_level_strict_acc=0.6,
            inst_level_strict_acc_stderr="N/A",
        ),
    }  # fmt: skip
    return {"results": scores, "config": {"limit": None}}


def write_results(folder: Path, results: dict[str, Any], **made_by: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    record = {"made_by": {"model_path": folder.name, "seed": 42, **made_by}, "versions": {"lm-eval": "0.4.13"}}
    record |= {"date": "2026-01-02T03:04:05+00:00", "chat_template_sha256": "c0ffee"}
    (folder / "manifest.json").write_text(json.dumps({"evaluate_openllm": record}))
    return folder


def table_row(text: str, heading: str, name: str) -> list[str]:
    """The cells of a row, below a heading."""
    below = text.partition(heading)[2]
    line = next(line for line in below.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_leaderboard_by_hand(tmp_path: Path) -> None:
    base = write_results(tmp_path / "base", harness_results())
    tuned = write_results(tmp_path / "tu ned", harness_results(mmlu=0.64))
    output = tmp_path / "out"
    compare_openllm(CompareOpenllmConfig(runs=[f"1B/base={base}", f"1B/tuned={tuned}"], output_path=str(output)))
    text = (output / "report.md").read_text(encoding="utf-8")
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
    for cell, value, error in zip(normalised[1:7], values, errors, strict=True):
        assert cell == f"{value:.2f} ± {error:.2f}"
    average, error = sum(values) / 6, sum(e**2 for e in errors) ** 0.5 / 6
    assert normalised[7] == f"{average:.2f} ± {error:.2f}"
    # (0.64 - 0.1) / 0.9 = 0.6.
    assert table_row(text, "### Normalised", "tuned")[6].startswith("60.00")
    assert table_row(text, "### Published raw scores, 1B", "WDPO rho=0.01")[1:] == [
        "0.52", "0.35", "0.10", "0.25", "0.34", "0.19",
    ]  # fmt: skip
    for fact in ("0.4.13", "c0ffee", "2026-01-02T03:04:05+00:00"):
        assert fact in text
    with (output / "leaderboard.csv").open(encoding="utf-8") as stream:
        rows = {(row["run"], row["benchmark"]): row for row in csv.DictReader(stream)}
    assert float(rows["base", "Average"]["normalised"]) == pytest.approx(average)
    assert float(rows["tuned", "MMLU-Pro"]["normalised"]) == pytest.approx(60)


def test_published_tables_have_a_number_for_every_column() -> None:
    for methods in leaderboard_scores.PUBLISHED.values():
        assert all(len(values) == len(COLUMNS) and 0 <= min(values) <= max(values) <= 1 for values in methods.values())
    for methods in mixtures.PUBLISHED.values():
        assert all(len(values) == len(SPOKES) for values in methods.values())
    assert set(SPOKES) <= {*ARMORM_OBJECTIVES, GATED_SCORE}


def test_unlike_trial_and_partial_runs_are_marked(tmp_path: Path) -> None:
    part = harness_results()
    del part["results"]["leaderboard_gpqa"]
    part["config"]["limit"] = 3
    part["results"]["my_task"] = metrics(acc=0.25, acc_stderr=0.1)
    words = [
        f"base={write_results(tmp_path / 'base', harness_results())}",
        f"part={write_results(tmp_path / 'part', part, seed=7)}",
    ]
    compare_openllm(CompareOpenllmConfig(runs=words, output_path=str(tmp_path / "out")))
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "Trial: part used" in text
    assert "the evaluation differs in seed: base 42, part 7" in text
    row = table_row(text, "### Normalised", "part")
    assert (row[4], row[7]) == ("-", "-")
    assert "| part | my_task |" in text
    assert "### Published" not in text


def test_groups_are_compared_within_themselves(tmp_path: Path) -> None:
    """Runs of the same short name in two groups: a difference inside 1B is told, one between the groups is not."""
    settings = {"1B/base": 5, "1B/KLDPO": 0, "8B/base": 0, "8B/KLDPO": 0}
    words = [
        f"{name}={write_results(tmp_path / name.replace('/', ' '), harness_results(), num_fewshot=shots)}"
        for name, shots in settings.items()
    ]
    compare_openllm(CompareOpenllmConfig(runs=words, output_path=str(tmp_path / "out")))
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "the evaluation differs in num_fewshot: 1B/base 5, 1B/KLDPO 0" in text
    assert text.count("Not a like-for-like comparison") == 1


def test_the_leaderboards_own_group_is_no_other_task_and_maths_old_metric_is_shown(tmp_path: Path) -> None:
    results = harness_results()
    results["results"]["leaderboard"] = metrics(acc=0.4, acc_norm=0.3, exact_match=0.2)
    for name, value, count in (("algebra", 0.1, 30), ("geometry", 0.5, 10)):
        part = metrics(exact_match=0.5, exact_match_original=value) | {"sample_len": count}
        results["results"][f"leaderboard_math_{name}_hard"] = part
    folder = write_results(tmp_path / "a", results)
    compare_openllm(CompareOpenllmConfig(runs=[f"1B/a={folder}"], output_path=str(tmp_path / "out")))
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "Other tasks" not in text
    # (30 * 0.1 + 10 * 0.5) / 40
    assert table_row(text, "### Raw (0-1", "a")[-1] == "0.200"
    assert "since version 3 of the task" in text.partition("### Published raw")[2]


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (None, DataError, "results.json: no such file"),
        ("{", DataError, "not JSON"),
        ('{"results": [1]}', DataError, 'field "results"'),
    ],
)
def test_broken_results(tmp_path: Path, content: str | None, error: type[Exception], says: str) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    if content is not None:
        (folder / "results.json").write_text(content)
    with pytest.raises(error, match=says):
        compare_openllm(CompareOpenllmConfig(runs=[f"a={folder}"], output_path=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


SCORES = "run,objective,prompts,mean,sd,paired_prompts,gain_sd,ci_low,ci_high\n"


def write_scores(folder: Path, objectives: tuple[str, ...], shift: float) -> Path:
    folder.mkdir(parents=True)
    lines = [f"base,{name},9,0.0,1.0,,,,\n" for name in objectives]
    for place, run in enumerate(("DPO", "KLDPO", "WDPO")):
        lines += [
            f"{run},{name},9,0.1,1.0,9,{shift + 0.1 * place + 0.01 * k},{shift},{shift + 1}\n"
            for k, name in enumerate(objectives)
        ]
    (folder / "scores.csv").write_text(SCORES + "".join(lines))
    return folder


def test_mixtures_by_hand(tmp_path: Path) -> None:
    words = [
        f"{name}={write_scores(tmp_path / 'reports of' / name, SPOKES, shift)}"
        for name, shift in zip(mixtures.PUBLISHED, (0.2, 0.3, -0.1), strict=True)
    ]
    output = tmp_path / "out"
    compare_mixtures(CompareMixturesConfig(reports=words, output_path=str(output)))
    text = (output / "report.md").read_text(encoding="utf-8")
    row = table_row(text, "## truthfulness + complexity", "`helpsteer_correctness`")
    assert row[1:] == [
        "+0.210 [+0.200, +1.200]", "+0.20", "+0.310 [+0.200, +1.200]", "+0.33", "+0.410 [+0.200, +1.200]", "+0.37",
    ]  # fmt: skip
    assert table_row(text, "## correctness + helpfulness", "`ArmoRM`")[-1] == "+0.21"
    link = re.search(r"\]\(<([^>]+)>\)", text)
    assert link is not None
    assert (output / link[1]).parent.resolve() == tmp_path / "reports of" / "truthfulness_complexity"
    assert (output / "spiders.svg").read_text(encoding="utf-8").count("published") == 3


def test_a_mixture_of_its_own_and_of_few_objectives(tmp_path: Path) -> None:
    folder = write_scores(tmp_path / "mine", SPOKES[:2], 0.1)
    compare_mixtures(CompareMixturesConfig(reports=[f"mine={folder}"], output_path=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "spiders.png").exists()
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert table_row(text, "## mine", "`helpsteer_helpfulness`")[1] == "+0.100 [+0.100, +1.100]"
    assert "DPO, published" not in text


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (None, DataError, "scores.csv: no such file"),
        ("a,b\n1,2\n", DataError, "row 1: not the columns"),
        (SCORES + "base,x,1,0,1,,,,\n", DataError, "only one run"),
        (SCORES + "base,x,1,0,1,,,,\nrun,x,1,0,1,1,much,,\n", DataError, "row 3: a gain is not a number"),
        ("twice", UsageError, "given twice"),
    ],
)
def test_broken_reports(tmp_path: Path, content: str | None, error: type[Exception], says: str) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    words = [f"a={folder}"]
    if content == "twice":
        words.append(f"a={write_scores(tmp_path / 'b', SPOKES, 0.1)}")
    elif content is not None:
        (folder / "scores.csv").write_text(content)
    with pytest.raises(error, match=says):
        compare_mixtures(CompareMixturesConfig(reports=words, output_path=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def results_of(runs: tuple[str, ...], gain: float, count: int) -> dict[str, pd.DataFrame]:
    gains = pd.DataFrame({run: [Estimate(gain, None, None)] * len(SPOKES) for run in runs}, SPOKES)
    return dict.fromkeys(list(mixtures.PUBLISHED)[:count], gains)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_spider_labels_are_inside_the_picture(count: int) -> None:
    figure = spiders(results_of(("DPO", "KLDPO", "WDPO"), -0.3, count))
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in [*axes.texts, axes.title]] + list(figure.legends[0].get_texts())
    assert len(texts) == count * 2 * (len(SPOKES) + 1) + 4
    for text in texts:
        box = text.get_window_extent()
        assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1), text.get_text()
        assert figure.bbox.containsy(box.y0) and figure.bbox.containsy(box.y1), text.get_text()


def test_a_published_method_that_was_not_run_is_not_drawn_as_the_base() -> None:
    figure = spiders(results_of(("Dpo",), 0.0, 1))
    ours, theirs = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base (0)", "Dpo", "KLDPO", "WDPO"]
    styles = [line.get_color() for line in figure.legends[0].get_lines()]
    assert len(set(styles)) == 4
    # The ring of the base, then one colour a method, in both panels.
    assert [line.get_color() for line in ours.lines] == styles[:2]
    assert [line.get_color() for line in theirs.lines] == styles
    assert ours.get_ylim()[1] > 0.05, "gains of nothing stay near the centre"


def test_a_locked_output_folder_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = CompareMixturesConfig([f"a={write_scores(tmp_path / 'a', SPOKES, 0.1)}"], str(output))
    with lock_folder(output), pytest.raises(UsageError, match="by process"):
        compare_mixtures(config)
    assert list(output.iterdir()) == []
    # The next run removes what a killed one left.
    (output / ".report.md.abcd1234.tmp").write_text("half")
    compare_mixtures(config)
    assert (output / "report.md").is_file()
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []

"""evaluate_armorm on fabricated folders: hand-computed means, gains, pairs and seeds; joins by id; clear errors."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from drdpo.config.evaluation import EvaluateConfig
from drdpo.errors import DataError, UsageError, one_line_errors
from drdpo.evaluation.compare import evaluate_armorm

Scores = dict[int, list[dict[str, float]]]
"""{prompt_id: scores of its completions}"""

H, C = "helpsteer-helpfulness", "helpsteer-coherence"


def rows_of(scores: Scores, token_ids: tuple[int, ...] = (1, 2, 3, 4), finish: str = "stop") -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": prompt_id,
            "sample_id": sample_id,
            "prompt": [{"role": "user", "content": f"question {prompt_id}"}],
            "completion": [{"role": "assistant", "content": "answer"}],
            "token_ids": token_ids,
            "finish_reason": finish,
            "scores": values,
        }
        for prompt_id, samples in scores.items()
        for sample_id, values in enumerate(samples)
    ]


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def write_run(folder: Path, columns: dict[str, list[float]], **more: Any) -> Path:
    """One completion per prompt: {objective: score of prompt 0, 1, ...}."""
    prompts = range(len(next(iter(columns.values()))))
    scores = {prompt: [{name: values[prompt] for name, values in columns.items()}] for prompt in prompts}
    return write_rows(folder, rows_of(scores, **more))


def evaluate(tmp_path: Path, arguments: list[str], **flags: Any) -> Path:
    output = tmp_path / "report of runs"
    evaluate_armorm(EvaluateConfig(runs=arguments, output_path=str(output), **flags))
    return output


def report_of(output: Path) -> str:
    return (output / "report.md").read_text(encoding="utf-8")


def table(output: Path, name: str = "scores") -> pd.DataFrame:
    """A CSV file, indexed by its first two columns."""
    return pd.read_csv(output / f"{name}.csv", index_col=[0, 1])


@pytest.fixture
def two_runs(tmp_path: Path) -> list[str]:
    """Base scores 1, 3 | 5, 7: prompt means 2 and 6, sd sqrt(5). The run is 2 better on both, and has one prompt more."""
    base = rows_of({1: [{H: 1.0}, {H: 3.0}], 2: [{H: 5.0}, {H: 7.0}]})
    run = rows_of({1: [{H: 4.0}, {H: 4.0}], 2: [{H: 6.0}, {H: 10.0}], 9: [{H: 90.0}]}, (1,) * 6, "length")
    random.Random(0).shuffle(run)
    return [f"base={write_rows(tmp_path / 'base', base)}", f"dpo={write_rows(tmp_path / 'd p o', run)}"]


def folder_of(argument: str) -> Path:
    return Path(argument.partition("=")[2])


def test_means_and_gain_by_hand(tmp_path: Path, two_runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    scores = table(evaluate(tmp_path, two_runs))
    base, dpo = scores.loc[("base", H)], scores.loc[("dpo", H)]
    assert (base["prompts"], base["mean"], math.isnan(base["gain_sd"])) == (2, 4.0, True)
    assert base["sd"] == pytest.approx(math.sqrt(5))
    assert (dpo["prompts"], dpo["paired_prompts"], dpo["mean"]) == (3, 2, pytest.approx((4 + 8 + 90) / 3))
    # A constant shift of 2 has an interval of zero width, whatever is drawn.
    assert list(dpo[["gain_sd", "ci_low", "ci_high"]]) == pytest.approx([2 / math.sqrt(5)] * 3, abs=1e-12)
    printed = capsys.readouterr().out
    assert "helpsteer_helpfulness" in printed
    assert "+0.894 [+0.894, +0.894]" in printed


def test_several_completions_count_as_one_prompt(tmp_path: Path) -> None:
    run = write_rows(tmp_path / "one", rows_of({1: [{H: 0.0}] * 9, 2: [{H: 1.0}]}))
    assert table(evaluate(tmp_path, [f"one={run}"])).loc[("one", H), "mean"] == 0.5


def test_runs_are_joined_by_id_not_by_position(tmp_path: Path) -> None:
    scores: Scores = {i: [{H: float(i)}, {H: float(i + 1)}] for i in range(20)}
    rows = rows_of({i: [{H: value[H] + 1} for value in samples] for i, samples in scores.items()})
    random.Random(3).shuffle(rows)
    runs = [f"base={write_rows(tmp_path / 'a', rows_of(scores))}", f"run={write_rows(tmp_path / 'b', rows)}"]
    row = table(evaluate(tmp_path, runs)).loc[("run", H)]
    # Joined by position the gain would be the same, but the interval would not have zero width.
    assert row["ci_low"] == pytest.approx(row["ci_high"], abs=1e-12)


def test_every_two_runs_by_hand(tmp_path: Path) -> None:
    # The base's sd is 1 (scores -1 and 1). b - a is 0.5 on every prompt: an interval of no width, and b always wins.
    columns = {"base": [-1.0, 1.0, -1.0, 1.0], "a": [0.0, 3.0, 1.0, 2.0], "b": [0.5, 3.5, 1.5, 2.5]}
    output = evaluate(tmp_path, [f"{name}={write_run(tmp_path / name, {H: values})}" for name, values in columns.items()])
    pairs = table(output, "pairs")
    assert set(pairs.index) == {("a", "base"), ("b", "base"), ("b", "a")}
    row = pairs.loc[("b", "a")]
    assert list(row[["difference_sd", "ci_low", "ci_high"]]) == pytest.approx([0.5] * 3, abs=1e-12)
    assert list(row[["win_rate", "win_low", "win_high"]]) == [1.0, 1.0, 1.0]
    # a - base: 1, 2, 2, 1.
    assert pairs.loc[("a", "base"), "difference_sd"] == pytest.approx(1.5)
    text = report_of(output)
    assert "| `helpsteer_helpfulness` | +0.500 [+0.500, +0.500] |" in text


def test_many_pairs_are_in_the_csv_file_only(tmp_path: Path) -> None:
    arguments = [
        f"{name}={write_run(tmp_path / name, {H: [-1.0 + k, 1.0], 'ArmoRM': [float(k), 1.0]})}"
        for k, name in enumerate(["base", *"abcde"])
    ]
    output = evaluate(tmp_path, arguments)
    assert len(table(output, "pairs")) == 15 * 2
    assert "The 10 pairs of runs are in pairs.csv." in report_of(output)


def test_win_rate_counts_ties_half(tmp_path: Path) -> None:
    base, run = {"ArmoRM": [0.0] * 4}, {"ArmoRM": [1.0, -1.0, 0.0, 2.0]}
    output = evaluate(tmp_path, [f"base={write_run(tmp_path / 'a', base)}", f"run={write_run(tmp_path / 'b', run)}"])
    assert "| win rate | 62.5% [" in report_of(output)
    # All of the base's scores are 0: there is no unit to measure a gain in.
    assert "there is no gain" in report_of(output)
    assert math.isnan(table(output).loc[("run", "ArmoRM"), "gain_sd"])


def test_seeds_of_a_run_are_averaged(tmp_path: Path) -> None:
    # Seeds one and three higher than the base on every prompt; the first has a prompt more.
    columns = {"base": [-1.0, 1.0], "s1": [0.0, 2.0, 50.0], "s2": [2.0, 4.0]}
    folders = {name: write_run(tmp_path / name, {H: values}) for name, values in columns.items()}
    output = evaluate(tmp_path, [f"base={folders['base']}", f"dpo={folders['s1']}", f"dpo={folders['s2']}"])
    row = table(output).loc[("dpo", H)]
    assert (row["prompts"], row["mean"], row["gain_sd"]) == (2, pytest.approx(2.0), pytest.approx(2.0))
    # Gains 1 and 3 on every prompt: t(1) = 12.7062 times sqrt(2 / 2).
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((2 - 12.7062, 2 + 12.7062))
    assert "| dpo, seed 2 |" in report_of(output)


@pytest.mark.parametrize(
    ("seeds", "tells"), [(1, "says nothing about other training seeds"), (2, "tell no two"), (5, "differ")]
)
def test_fewer_than_five_seeds_tell_no_two_methods_apart(tmp_path: Path, seeds: int, tells: str) -> None:
    runs = [f"base={write_run(tmp_path / 'base', {H: [-1.0, 1.0]})}"]
    for name in ("dpo", "kldpo"):
        folders = [write_run(tmp_path / f"{name} {k}", {H: [0.1 * k, 2.0]}) for k in range(seeds)]
        runs += [f"{name}={folder}" for folder in folders]
    text = report_of(evaluate(tmp_path, runs))
    assert tells in text
    assert ("Two runs differ if the interval excludes 0" in text) == (seeds != 2)


def test_win_rate_of_seeds_is_over_every_two(tmp_path: Path) -> None:
    base = [f"base={write_run(tmp_path / f'b{k}', {'ArmoRM': [value]})}" for k, value in enumerate((0.0, 2.0))]
    run = [f"run={write_run(tmp_path / f'r{k}', {'ArmoRM': [value]})}" for k, value in enumerate((1.0, 2.0))]
    # 1 > 0, 1 < 2, 2 > 0, 2 = 2.
    (win_rate,) = table(evaluate(tmp_path, [*base, *run]), "pairs")["win_rate"]
    assert win_rate == pytest.approx(2.5 / 4)


def record_training(folder: Path, run: Path, weights: dict[str, float]) -> None:
    """Manifests of a run that was sampled from a policy trained on pairs of these weights."""
    pairs, trained = folder / f"{run.name}_pairs", folder / f"{run.name}_trained"
    for place, name, content in (
        (pairs, "manifest.json", {"preferences": {"made_by": {"weights": weights}}}),
        (trained, "config.json", {"dataset_path": str(pairs), "kldpo_tau": None, "beta": 0.1, "seed": 1}),
        (run / "sampled", "manifest.json", {"sample_test": {"made_by": {}, "model_path": str(trained / "global_step_1")}}),
    ):
        place.mkdir()
        (place / name).write_text(json.dumps(content))


def test_the_gain_in_the_mixture_that_was_trained_on(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", {H: [-2.0, 2.0], C: [-1.0, 1.0], "ArmoRM": [0.0, 1.0]})
    # Gains by prompt, in the base's sd (2 and 1): 1 and 2 in H, 4 and -2 in C; 0.75 H + 0.25 C is 1.75 and 1.
    run = write_run(tmp_path / "run", {H: [0.0, 6.0], C: [3.0, -1.0], "ArmoRM": [1.0, 1.0]})
    record_training(tmp_path, run, {H: 0.75, C: 0.25})
    output = evaluate(tmp_path, [f"base={base}", f"run={run}"])
    text = report_of(output)
    gains = text[text.index("## Gain over base") :]
    assert gains.index("| **trained mixture** | +1.375 [+1.000, +1.750] |") < gains.index("| `helpsteer_helpfulness` |")
    assert "The trained mixture is 0.75 `helpsteer_helpfulness` + 0.25 `helpsteer_coherence`" in text
    recorded = json.loads((output / "manifest.json").read_text())["evaluate_armorm"]["trained_mixture"]
    assert recorded["weights"] == {H: 0.75, C: 0.25}
    assert recorded["gains_sd"] == {"run": pytest.approx({"value": 1.375, "low": 1.0, "high": 1.75})}


def test_runs_of_two_mixtures_have_no_gain_in_one(tmp_path: Path) -> None:
    base, *runs = (write_run(tmp_path / name, {H: [-1.0, 1.0], C: [0.0, 2.0]}) for name in ("base", "one", "other"))
    for run, weights in zip(runs, ({H: 1.0}, {H: 0.5, C: 0.5}), strict=True):
        record_training(tmp_path, run, weights)
    output = evaluate(tmp_path, [f"{run.name}={run}" for run in (base, *runs)])
    assert "trained mixture" not in report_of(output)
    assert "trained_mixture" not in json.loads((output / "manifest.json").read_text())["evaluate_armorm"]


def test_a_mixture_that_the_reward_model_does_not_score_has_no_gain(tmp_path: Path) -> None:
    base, run = (write_run(tmp_path / name, {H: [-1.0, 1.0]}) for name in ("base", "run"))
    record_training(tmp_path, run, {H: 0.5, C: 0.5})
    text = report_of(evaluate(tmp_path, [f"base={base}", f"run={run}"]))
    assert "trained mixture" not in text
    assert "Training used `helpsteer_helpfulness`, `helpsteer_coherence`" in text


def test_unseen_objectives_are_marked_from_the_manifests(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", {H: [-1.0, 1.0], C: [-1.0, 1.0], "ArmoRM": [0.0, 1.0]})
    run = write_run(tmp_path / "run", {H: [0.0, 2.0], C: [1.0, 3.0], "ArmoRM": [1.0, 1.0]})
    record_training(tmp_path, run, {H: 1.0})
    output = evaluate(tmp_path, [f"base={base}", f"run={run}"])
    text = report_of(output)
    assert "| `helpsteer_coherence` *unseen* | +2.000 [+2.000, +2.000] |" in text
    assert "| `helpsteer_helpfulness` | +1.000 [+1.000, +1.000] |" in text
    assert "| `ArmoRM` | " in text
    # Of both objectives, without the gated score.
    assert "| mean of all (2) | +1.500 [+1.500, +1.500] |" in text
    assert "| worst of all (2) | +1.000 [+1.000, +1.000] |" in text
    assert "(unseen)" in (output / "spider.svg").read_text(encoding="utf-8")


def test_length_and_repetition(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", {H: [0.0, 1.0]}, token_ids=(1, 2, 3, 4, 5))
    run = write_run(tmp_path / "run", {H: [0.0, 1.0]}, token_ids=(7,) * 13)
    output = evaluate(tmp_path, [f"base={base}", f"run={run}"])
    assert "| run | 13.0 | 0.0% | 90.0% |" in report_of(output)
    assert "| run - base | +8.0 [+8.0, +8.0] | +0.0% [+0.0%, +0.0%] | +90.0% [+90.0%, +90.0%] |" in report_of(output)


def test_the_report_shows_what_was_compared(tmp_path: Path, two_runs: list[str]) -> None:
    base, dpo = map(folder_of, two_runs)
    trained = tmp_path / "trained"
    trained.mkdir()
    flags = {"dataset_path": "pairs", "kldpo_tau": 0.05, "wdpo_rho": None, "beta": 0.01, "seed": 7}
    (trained / "config.json").write_text(json.dumps(flags))
    (dpo / "sampled").mkdir()
    (trained / "manifest.json").write_text('{"train": {"made_by": {"method": "KLDPO (kldpo_tau=0.05)"}}}')
    record = {"made_by": {"temperature": 0.7, "seed": 42}, "model_path": str(trained / "global_step_3")}
    (dpo / "sampled" / "manifest.json").write_text(json.dumps({"sample_test": record}))
    (dpo / "manifest.json").write_text(json.dumps({"score_test": {"made_by": {"reward_model": "f00d"}}}))
    text = report_of(evaluate(tmp_path, two_runs))
    assert "KLDPO (kldpo_tau=0.05), beta=0.01, seed=7" in text
    assert "global_step_3" in text
    assert f"{base / 'manifest.json'} has no record of score_test" in text
    # base: 2 prompts, none left out; dpo: 3, one left out.
    assert "| 4 | 2 | 0 |" in text
    assert "| 5 | 3 | 1 |" in text
    # Lengths and cut answers.
    assert "| base | 4.0 | 0.0% |" in text
    assert "| dpo | 6.0 | 100.0% |" in text


def test_a_comparison_of_unlike_runs_is_marked(tmp_path: Path, two_runs: list[str], capsys: Any) -> None:
    for argument, model in zip(two_runs, ("one", "two"), strict=True):
        record = {"made_by": {"reward_model": model, "sampled": model}, "versions": {}, "commit": "x"}
        (folder_of(argument) / "manifest.json").write_text(json.dumps({"score_test": record}))
    text = report_of(evaluate(tmp_path, two_runs))
    assert "the scoring differs in reward_model: base one, dpo two" in text
    assert "differs in sampled" not in text
    assert "the scoring differs in reward_model" in capsys.readouterr().out


def test_same_input_same_bytes(tmp_path: Path) -> None:
    scores = {H: [0.0, 1.0], C: [2.0, 1.0], "ArmoRM": [0.0, 3.0]}
    runs = [f"{name}={write_run(tmp_path / name, scores)}" for name in ("base", "dpo")]
    output = evaluate(tmp_path, runs)
    assert "](spider.png)" in report_of(output)
    names = ("pairs.csv", "scores.csv", "report.html", "report.md", "spider.png", "spider.svg")
    before = {name: (output / name).read_bytes() for name in names}
    assert before["spider.png"].startswith(b"\x89PNG")
    evaluate(tmp_path, runs)
    assert {name: (output / name).read_bytes() for name in names} == before
    # Two objectives are not drawn, and the older picture goes.
    evaluate(tmp_path, runs, objectives=[H, C])
    assert not (output / "spider.png").exists() and "spider.png" not in report_of(output)


def test_output_into_the_runs_own_folder(two_runs: list[str]) -> None:
    """What generate.sh does: the report joins the scores, whose manifest stays."""
    folder = folder_of(two_runs[0])
    (folder / "manifest.json").write_text(json.dumps({"score_test": {"made_by": {}, "versions": {}, "commit": "x"}}))
    evaluate_armorm(EvaluateConfig(runs=[f"base={folder}"], output_path=str(folder)))
    assert set(json.loads((folder / "manifest.json").read_text())) == {"score_test", "evaluate_armorm"}
    assert (folder / "test.jsonl").is_file()


def test_objectives_in_either_spelling_and_order(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", {"ArmoRM": [1.0], C: [2.0], "my-own": [3.0], H: [4.0]})
    assert [name for _, name in table(evaluate(tmp_path, [f"a={run}"])).index] == [H, C, "my-own", "ArmoRM"]
    chosen = evaluate(tmp_path, [f"a={run}"], objectives=["my_own", "helpsteer-coherence", "helpsteer_coherence"])
    assert [name for _, name in table(chosen).index] == ["my-own", C]


def test_a_name_or_folder_may_contain_an_equals_sign(tmp_path: Path) -> None:
    run = write_run(tmp_path / "tau=0.05", {H: [1.0]})
    assert ("tau=0.05", H) in table(evaluate(tmp_path, [f"tau=0.05={run}"])).index


def broken_run(folder: Path, case: str) -> Path:
    """A second run that cannot be compared with the scores {H: [0, 1], C: [1, 1]}."""
    rows = rows_of({0: [{H: 0.0, C: 1.0}], 1: [{H: 1.0, C: 1.0}]})
    match case:
        case "no common objective":
            rows = rows_of({0: [{"my-own": 1.0}]})
        case "no common prompt":
            rows = rows_of({7: [{H: 1.0}]})
        case "unscored":
            del rows[1]["scores"]
        case "mixed objectives":
            rows[1]["scores"] = {C: 1.0}
        case "key twice":
            rows[1] = rows[0]
        case "other prompt":
            rows[1]["prompt"] = [{"role": "user", "content": "something else"}]
    write_rows(folder, rows)
    if case == "cut line":
        with (folder / "test.jsonl").open("a") as stream:
            stream.write('{"prompt_id": 2, "sam')
    return folder


@pytest.mark.parametrize(
    ("case", "flags", "error", "says"),
    [
        ("no equals", {}, UsageError, "write NAME=FOLDER"),
        ("same folder twice", {}, UsageError, "the name a is given twice"),
        ("other objectives in a seed", {}, DataError, "run a: .* are not both scored in helpsteer-coherence"),
        ("no folder", {}, DataError, "run b: .*nowhere: no such folder"),
        ("one run", {"split": "train"}, DataError, r"run a: .*train.jsonl: no such file; the folder has test.jsonl"),
        ("one run", {"objectives": ["helpsteer_charm"]}, UsageError, "unknown objective 'helpsteer_charm'"),
        ("one run", {"objectives": ["ultrafeedback_verbosity"]}, UsageError, "no such head"),
        ("one run", {"objectives": ["ArmoRM"]}, DataError, r"run a .* has no scores of ArmoRM"),
        ("no common objective", {}, DataError, "share no objective: a has helpsteer_helpfulness, .*; b has my_own"),
        ("no common prompt", {}, DataError, "a .*, b .* have no prompt_id in common"),
        ("unscored", {}, DataError, r'test.jsonl, row 2: field "scores" is missing'),
        ("mixed objectives", {}, DataError, r"row 2: .* other objectives than row 1"),
        ("key twice", {}, DataError, r"row 2: .* repeats \(0, 0\)"),
        ("other prompt", {}, DataError, r"prompt_id 1: .* differs between a .* and b"),
        ("cut line", {}, DataError, r"test.jsonl, row 3: not a whole JSON object"),
    ],
)
def test_errors(
    tmp_path: Path, case: str, flags: dict[str, Any], error: type[Exception], says: str, capsys: Any
) -> None:  # fmt: skip
    good = write_run(tmp_path / "good", {H: [0.0, 1.0], C: [1.0, 1.0]})
    arguments = [f"a={good}"]
    match case:
        case "no equals":
            arguments = [str(good)]
        case "same folder twice":
            arguments.append(f"a={good}")
        case "other objectives in a seed":
            arguments.append(f"a={write_run(tmp_path / 'other', {H: [0.0, 1.0]})}")
        case "no folder":
            arguments.append(f"b={tmp_path / 'nowhere'}")
        case "one run":
            pass
        case _:
            arguments.append(f"b={broken_run(tmp_path / 'b', case)}")
    config = EvaluateConfig(runs=arguments, output_path=str(tmp_path / "out"), **flags)
    with pytest.raises(error, match=says):
        evaluate_armorm(config)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stop, one_line_errors():
        evaluate_armorm(config)
    assert stop.value.code == (2 if error is UsageError else 1)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_failed_report_leaves_the_old_one(tmp_path: Path, two_runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    output = evaluate(tmp_path, two_runs)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    written = []

    def full(path: Path) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("drdpo.evaluation.report.flush", full)
    with pytest.raises(OSError, match="No space"):
        evaluate(tmp_path, two_runs, seed=1)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before

"""evaluate_armorm on fabricated folders: means, gains, pairs and seeds by hand; joins by id; provenance; clear errors."""

import json
import math
from unittest.mock import Mock

import pandas as pd
import pytest

from drdpo.cli import as_dict
from drdpo.config.evaluation import EvaluateConfig
from drdpo.config.training import TrainConfig
from drdpo.errors import DataError, UsageError, one_line_errors
from drdpo.evaluation.compare import evaluate_armorm
from drdpo.evaluation.runs import read_provenance, repeated_share
from drdpo.folder import write_manifest
from drdpo.records import write_rows

H, C = "helpsteer-helpfulness", "helpsteer-coherence"


def rows_of(scores, token_ids=(1, 2, 3, 4), finish="stop"):
    """Of {prompt_id: scores of its completions}."""
    return [
        {
            "prompt_id": prompt_id, "sample_id": sample_id, "prompt": [{"role": "user", "content": f"question {prompt_id}"}],
            "completion": [{"role": "assistant", "content": "answer"}], "token_ids": token_ids, "finish_reason": finish,
            "scores": values,
        }
        for prompt_id, samples in scores.items()
        for sample_id, values in enumerate(samples)
    ]  # fmt: skip


def write_run(folder, columns, **more):
    """One completion per prompt: {objective: score of prompt 0, 1, ...}."""
    samples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    write_rows(folder / "test.jsonl", rows_of({prompt: [values] for prompt, values in enumerate(samples)}, **more))
    return folder


def write_runs(folder, runs):
    return [f"{name}={write_run(folder / name, columns)}" for name, columns in runs.items()]


def evaluate(tmp_path, arguments, **flags):
    output = tmp_path / "report of runs"
    evaluate_armorm(EvaluateConfig(runs=arguments, output_path=str(output), **flags))
    return output


def report_of(output):
    return (output / "report.md").read_text(encoding="utf-8")


def recorded(output):
    return json.loads((output / "manifest.json").read_text())["evaluate_armorm"]


def table(output, name="scores"):
    """A CSV file, indexed by its first two columns."""
    return pd.read_csv(output / f"{name}.csv", index_col=[0, 1])


@pytest.fixture
def two_runs(tmp_path):
    """Base scores 1, 3 | 5, 7: prompt means 2 and 6, sd sqrt(5). The run is 2 better on both, and has one prompt more.
    Its rows are in another order: joined by position the interval of its gain would not have zero width."""
    base = rows_of({1: [{H: 1.0}, {H: 3.0}], 2: [{H: 5.0}, {H: 7.0}]})
    run = rows_of({1: [{H: 4.0}, {H: 4.0}], 2: [{H: 6.0}, {H: 10.0}], 9: [{H: 90.0}]}, (1,) * 6, "length")
    write_rows(tmp_path / "base" / "test.jsonl", base)
    write_rows(tmp_path / "d p o" / "test.jsonl", run[::-1])
    return [f"base={tmp_path / 'base'}", f"dpo={tmp_path / 'd p o'}"]


def test_means_and_gain_by_hand(tmp_path, two_runs, capsys):
    scores = table(evaluate(tmp_path, two_runs))
    base, dpo = scores.loc[("base", H)], scores.loc[("dpo", H)]
    assert (base["prompts"], base["mean"], math.isnan(base["gain_sd"])) == (2, 4.0, True)
    assert base["sd"] == pytest.approx(math.sqrt(5))
    # Every prompt counts once, whatever the number of its completions.
    assert (dpo["prompts"], dpo["paired_prompts"], dpo["mean"]) == (3, 2, pytest.approx((4 + 8 + 90) / 3))
    # A constant shift of 2 has an interval of zero width, whatever is drawn.
    assert list(dpo[["gain_sd", "ci_low", "ci_high"]]) == pytest.approx([2 / math.sqrt(5)] * 3, abs=1e-12)
    printed = capsys.readouterr().out
    assert "helpsteer_helpfulness" in printed and "+0.894 [+0.894, +0.894]" in printed


def test_every_two_runs_by_hand(tmp_path):
    # The base's sd is 1 (scores -1 and 1). b - a is 0.5 on every prompt: an interval of no width, and b always wins.
    columns = {"base": [-1.0, 1.0, -1.0, 1.0], "a": [0.0, 3.0, 1.0, 2.0], "b": [0.5, 3.5, 1.5, 2.5]}
    output = evaluate(tmp_path, write_runs(tmp_path, {name: {H: values} for name, values in columns.items()}))
    pairs = table(output, "pairs")
    assert set(pairs.index) == {("a", "base"), ("b", "base"), ("b", "a")}
    row = pairs.loc[("b", "a")]
    assert list(row[["difference_sd", "ci_low", "ci_high"]]) == pytest.approx([0.5] * 3, abs=1e-12)
    assert list(row[["win_rate", "win_low", "win_high"]]) == [1.0, 1.0, 1.0]
    # a - base: 1, 2, 2, 1.
    assert pairs.loc[("a", "base"), "difference_sd"] == pytest.approx(1.5)
    assert "| `helpsteer_helpfulness` | +0.500 [+0.500, +0.500] |" in report_of(output)


def test_many_pairs_are_in_the_csv_file_only(tmp_path):
    runs = {name: {H: [-1.0 + k, 1.0], "ArmoRM": [float(k), 1.0]} for k, name in enumerate(["base", *"abcde"])}
    output = evaluate(tmp_path, write_runs(tmp_path, runs))
    assert len(table(output, "pairs")) == 15 * 2
    assert "The 10 pairs of runs are in pairs.csv." in report_of(output)


def test_win_rate_counts_ties_half(tmp_path):
    runs = {"base": {"ArmoRM": [0.0] * 4}, "run": {"ArmoRM": [1.0, -1.0, 0.0, 2.0]}}
    output = evaluate(tmp_path, write_runs(tmp_path, runs))
    assert "| win rate | 62.5% [" in report_of(output) and "ties count half" in report_of(output)
    assert "omit the gated" not in report_of(output)
    # All of the base's scores are 0: there is no unit to measure a gain in.
    assert "there is no gain" in report_of(output)
    assert math.isnan(table(output).loc[("run", "ArmoRM"), "gain_sd"])


def test_seeds_of_a_run_are_averaged(tmp_path):
    # Seeds one and three higher than the base on every prompt; the first has a prompt more.
    base, *seeds = write_runs(tmp_path, {"base": {H: [-1.0, 1.0]}, "s1": {H: [0.0, 2.0, 50.0]}, "s2": {H: [2.0, 4.0]}})
    output = evaluate(tmp_path, [base, *(f"dpo={seed[3:]}" for seed in seeds)])
    row = table(output).loc[("dpo", H)]
    assert (row["prompts"], row["mean"], row["gain_sd"]) == (2, pytest.approx(2.0), pytest.approx(2.0))
    # Gains 1 and 3 on every prompt: t(1) = 12.7062 times sqrt(2 / 2).
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((2 - 12.7062, 2 + 12.7062))
    assert "| dpo, seed 2 |" in report_of(output)


@pytest.mark.parametrize(
    ("seeds", "tells"), [(1, "says nothing about other training seeds"), (2, "tell no two"), (5, "differ")]
)
def test_fewer_than_five_seeds_tell_no_two_methods_apart(tmp_path, seeds, tells):
    runs = write_runs(tmp_path, {"base": {H: [-1.0, 1.0]}})
    for name in ("dpo", "kldpo"):
        runs += [f"{name}={write_run(tmp_path / f'{name} {k}', {H: [0.1 * k, 2.0]})}" for k in range(seeds)]
    text = report_of(evaluate(tmp_path, runs))
    assert tells in text
    assert ("Two runs differ if the interval excludes 0" in text) == (seeds != 2)


def test_win_rate_of_seeds_is_over_every_two(tmp_path):
    scores = {"base": (0.0, 2.0), "run": (1.0, 2.0)}
    runs = [f"{name}={write_run(tmp_path / f'{name}{one}', {H: [one]})}" for name, both in scores.items() for one in both]
    # 1 > 0, 1 < 2, 2 > 0, 2 = 2.
    assert table(evaluate(tmp_path, runs), "pairs")["win_rate"].tolist() == [pytest.approx(2.5 / 4)]


def record_training(folder, run, weights, method="DPO"):
    """Manifests of a run that was sampled from a policy trained on pairs of these weights."""
    pairs, trained = folder / f"{run.name}_pairs", folder / f"{run.name}_trained"
    write_manifest(pairs, "preferences", {"weights": weights})
    write_manifest(trained, "train", {"method": method})
    flags = TrainConfig(model_path="m", dataset_path=str(pairs), save_path="s", beta=0.1, seed=5)
    (trained / "config.json").write_text(json.dumps(as_dict(flags)))
    made_by = {"model": "f00d", "temperature": 0.7, "top_k": None}
    write_manifest(run / "sampled", "sample_test", made_by, {}, model_path=str(trained / "global_step_1"))


def test_the_gain_in_the_mixture_that_was_trained_on(tmp_path):
    # Gains by prompt, in the base's sd (2 and 1): 1 and 2 in H, 4 and -2 in C; 0.75 H + 0.25 C is 1.75 and 1.
    runs = {"base": {H: [-2.0, 2.0], C: [-1.0, 1.0], "ArmoRM": [0.0, 1.0]},
            "run": {H: [0.0, 6.0], C: [3.0, -1.0], "ArmoRM": [1.0, 1.0]}}  # fmt: skip
    arguments = write_runs(tmp_path, runs)
    record_training(tmp_path, tmp_path / "run", {H: 0.75, C: 0.25})
    output = evaluate(tmp_path, arguments)
    text = report_of(output)
    gains = text[text.index("## Gain over base") :]
    assert gains.index("| **trained mixture** | +1.375 [+1.000, +1.750] |") < gains.index("| `helpsteer_helpfulness` |")
    assert "The trained mixture is 0.75 `helpsteer_helpfulness` + 0.25 `helpsteer_coherence`" in text
    found = recorded(output)["trained_mixture"]
    assert found["weights"] == {H: 0.75, C: 0.25}
    assert found["gains_sd"] == {"run": pytest.approx({"value": 1.375, "low": 1.0, "high": 1.75})}


@pytest.mark.parametrize(
    ("columns", "mixtures", "says"),
    [
        ({H: [-1.0, 1.0], C: [0.0, 2.0]}, [{H: 1.0}, {H: 0.5, C: 0.5}], ""),
        ({H: [-1.0, 1.0]}, [{H: 0.5, C: 0.5}], "Training used `helpsteer_helpfulness`, `helpsteer_coherence`"),
    ],
    ids=["two mixtures", "an objective that the reward model does not score"],
)
def test_there_is_no_gain_in_one_trained_mixture(columns, mixtures, says, tmp_path):
    runs = write_runs(tmp_path, dict.fromkeys(("base", "one", "other"), columns))
    for name, weights in zip(("one", "other"), mixtures, strict=False):
        record_training(tmp_path, tmp_path / name, weights)
    output = evaluate(tmp_path, runs)
    assert "trained mixture" not in report_of(output) and says in report_of(output)
    assert "trained_mixture" not in recorded(output)


def test_unseen_objectives_are_marked_from_the_manifests(tmp_path):
    base = {H: [-1.0, 1.0], C: [-1.0, 1.0], "ArmoRM": [0.0, 1.0]}
    runs = write_runs(tmp_path, {"base": base, "run": {H: [0.0, 2.0], C: [1.0, 3.0], "ArmoRM": [1.0, 1.0]}})
    record_training(tmp_path, tmp_path / "run", {H: 1.0})
    output = evaluate(tmp_path, runs)
    text = report_of(output)
    assert "| `helpsteer_coherence` *unseen* | +2.000 [+2.000, +2.000] |" in text
    assert "| `helpsteer_helpfulness` | +1.000 [+1.000, +1.000] |" in text and "| `ArmoRM` | " in text
    # Of both objectives, without the gated score.
    assert "| mean of all (2) | +1.500 [+1.500, +1.500] |" in text
    assert "| worst of all (2) | +1.000 [+1.000, +1.000] |" in text and "omit the gated score" in text
    assert "ArmoRM mixes all" in text
    assert "(unseen)" in (output / "spider.svg").read_text(encoding="utf-8")
    alone = report_of(evaluate(tmp_path, runs, objectives=[H, C]))
    assert "No win rate:" in alone and "ArmoRM mixes" not in alone


def test_length_and_repetition(tmp_path):
    # abcd abcd: 5 four-grams (abcd bcda cdab dabc abcd), 4 distinct.
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_share([1, 2, 3]) == 0.0
    assert repeated_share([1, 2, 1, 2], n=2) == pytest.approx(1 / 3)
    base = write_run(tmp_path / "base", {H: [0.0, 1.0]}, token_ids=(1, 2, 3, 4, 5))
    run = write_run(tmp_path / "run", {H: [0.0, 1.0]}, token_ids=(7,) * 13)  # 10 four-grams, one distinct
    text = report_of(evaluate(tmp_path, [f"base={base}", f"run={run}"]))
    assert "| run | 13.0 | 0.0% | 90.0% |" in text
    assert "| run - base | +8.0 [+8.0, +8.0] | +0.0% [+0.0%, +0.0%] | +90.0% [+90.0%, +90.0%] |" in text


def test_the_report_shows_what_was_compared(tmp_path, two_runs):
    base, dpo = tmp_path / "base", tmp_path / "d p o"
    record_training(tmp_path, dpo, {}, "KLDPO (kldpo_tau=0.05)")
    write_manifest(dpo, "score_test", {"reward_model": "f00d"})
    text = report_of(evaluate(tmp_path, two_runs))
    assert "KLDPO (kldpo_tau=0.05), beta=0.1, seed=5" in text and "global_step_1" in text
    assert f"{base / 'manifest.json'} has no record of score_test" in text
    assert read_provenance(dpo, "test").made_by["sampling"] == {"temperature": "0.7"}
    assert read_provenance(dpo, "train").made_by == {}, "the train split was not sampled"
    # base: 2 prompts, none left out; dpo: 3, one left out.
    assert "| 4 | 2 | 0 |" in text and "| 5 | 3 | 1 |" in text
    # Lengths and cut answers.
    assert "| base | 4.0 | 0.0% |" in text and "| dpo | 6.0 | 100.0% |" in text


def test_a_comparison_of_unlike_runs_is_marked(tmp_path, two_runs, capsys):
    for folder, model in ((tmp_path / "base", "one"), (tmp_path / "d p o", "two")):
        write_manifest(folder, "score_test", {"reward_model": model, "sampled": model})
    text = report_of(evaluate(tmp_path, two_runs))
    assert "the scoring differs in reward_model: base one, dpo two" in text
    assert "differs in sampled" not in text
    assert "the scoring differs in reward_model" in capsys.readouterr().out


def test_few_objectives_are_not_drawn_and_an_older_picture_goes(tmp_path):
    scores = {H: [0.0, 1.0], C: [2.0, 1.0], "ArmoRM": [0.0, 3.0]}
    runs = write_runs(tmp_path, {"base": scores, "dpo": scores})
    output = evaluate(tmp_path, runs)
    assert "](spider.png)" in report_of(output) and (output / "spider.png").read_bytes().startswith(b"\x89PNG")
    names = ("pairs.csv", "scores.csv", "report.html", "report.md", "spider.png", "spider.svg")
    before = [(output / name).read_bytes() for name in names]
    evaluate(tmp_path, runs)
    assert [(output / name).read_bytes() for name in names] == before, "the same input makes the same bytes"
    evaluate(tmp_path, runs, objectives=[H, C])
    assert not (output / "spider.png").exists() and "spider.png" not in report_of(output)


def test_objectives_in_either_spelling_and_order_and_names_with_an_equals_sign(tmp_path):
    runs = write_runs(tmp_path, {"tau=0.05": {"ArmoRM": [1.0], C: [2.0], "my-own": [3.0], H: [4.0]}})
    assert list(table(evaluate(tmp_path, runs)).index) == [("tau=0.05", name) for name in (H, C, "my-own", "ArmoRM")]
    chosen = evaluate(tmp_path, runs, objectives=["my_own", "helpsteer-coherence", "helpsteer_coherence"])
    assert [name for _, name in table(chosen).index] == ["my-own", C]


@pytest.mark.parametrize(
    ("runs", "flags", "error", "says"),
    [
        (["{good}"], {}, UsageError, "write NAME=FOLDER"),
        (["a={good}", "a={good}"], {}, UsageError, "the name a is given twice"),
        (["a={good}", "a={other}"], {}, DataError, "run a: .* are not both scored in helpsteer-coherence"),
        (["a={good}", "b=nowhere"], {}, DataError, "run b: nowhere: no such folder"),
        (["a={good}"], {"split": "train"}, DataError, r"train.jsonl: .* has test.jsonl; choose with --split=train or"),
        (["a={good}"], {"objectives": ["helpsteer_charm"]}, UsageError, "unknown objective 'helpsteer_charm'"),
        (["a={good}"], {"objectives": ["ultrafeedback_verbosity"]}, UsageError, "no such head"),
        (["a={good}"], {"objectives": ["ArmoRM"]}, DataError, r"run a .* has no scores of ArmoRM"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, flags, error, says, tmp_path, capsys):
    good = write_run(tmp_path / "good", {H: [0.0, 1.0], C: [1.0, 1.0]})
    other = write_run(tmp_path / "other", {H: [0.0, 1.0]})
    runs = [run.format(good=good, other=other) for run in runs]
    with pytest.raises(error, match=says):
        evaluate(tmp_path, runs, **flags)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        evaluate(tmp_path, runs, **flags)
    assert (stop.value.code, capsys.readouterr().err.count("\n")) == (2 if error is UsageError else 1, 1)
    assert not (tmp_path / "report of runs").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scores": {}}, r'test.jsonl, row 2: field "scores" is missing'),
        ({"scores": {C: 1.0}}, r"row 2: .* other objectives than row 1"),
        ({"prompt_id": 0}, r"row 2: .* repeats \(0, 0\)"),
        ({"prompt_id": 0, "sample_id": 1}, r'row 2: field "prompt" differs'),
        ({"prompt": [{"role": "user", "content": "something else"}]}, r"prompt_id 1: .* differs between a .* and b"),
        ([{"scores": {"my-own": 1.0}}], "share no objective: a has helpsteer_helpfulness, .*; b has my_own"),
        ([{"prompt_id": 7}], "a .*, b .* have no prompt_id in common"),
    ],
)
def test_rows_of_the_second_run_that_cannot_be_compared_are_named(change, says, tmp_path):
    runs = write_runs(tmp_path, {name: {H: [0.0, 1.0], C: [1.0, 1.0]} for name in "ab"})
    rows = rows_of({0: [{H: 0.0, C: 1.0}], 1: [{H: 1.0, C: 1.0}]})
    rows = [rows[0] | change[0]] if isinstance(change, list) else [rows[0], rows[1] | change]
    write_rows(tmp_path / "b" / "test.jsonl", rows)
    with pytest.raises(DataError, match=says):
        evaluate(tmp_path, runs)
    assert not (tmp_path / "report of runs").exists()


def test_a_failed_report_leaves_the_old_one(tmp_path, two_runs, monkeypatch):
    output = evaluate(tmp_path, two_runs)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    # The third file cannot be flushed.
    flush = Mock(side_effect=[None, None, OSError(28, "No space left on device")])
    monkeypatch.setattr("drdpo.folder.flush", flush)
    with pytest.raises(OSError, match="No space"):
        evaluate(tmp_path, two_runs, seed=1)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_what_is_not_recorded(tmp_path):
    found = read_provenance(tmp_path, "test")
    assert (found.policy, found.method, found.made_by) == ("not recorded", "no training recorded", {})
    assert len(found.notes) == 2
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # a model's folder is no training
    write_manifest(tmp_path / "sampled", "sample_test", {}, model_path=str(tmp_path / "model"))
    found = read_provenance(tmp_path, "test")
    assert (found.policy, found.method) == (str(tmp_path / "model"), "no training recorded")
    (tmp_path / "manifest.json").write_text('{"score_test": ')
    with pytest.raises(DataError, match="not JSON"):
        read_provenance(tmp_path, "test")

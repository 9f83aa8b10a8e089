"""evaluate_armorm on fabricated folders: hand-computed means and gains, joins by id, honest errors."""

import csv
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from drdpo.config import EvaluateConfig
from drdpo.errors import DataError, UsageError, one_line_errors
from drdpo.evaluation.armorm import evaluate_armorm

Scores = dict[int, list[dict[str, float]]]
"""{prompt_id: scores of its completions}"""

H, C = "helpsteer-helpfulness", "helpsteer-coherence"


def rows_of(scores: Scores, tokens: int = 4, finish: str = "stop") -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": prompt_id,
            "sample_id": sample_id,
            "prompt": [{"role": "user", "content": f"question {prompt_id}"}],
            "completion": [{"role": "assistant", "content": "answer"}],
            "token_ids": [1] * tokens,
            "finish_reason": finish,
            "scores": values,
        }
        for prompt_id, samples in scores.items()
        for sample_id, values in enumerate(samples)
    ]


def write_run(folder: Path, rows: list[dict[str, Any]], split: str = "test") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def evaluate(tmp_path: Path, runs: dict[str, Path], **flags: Any) -> Path:
    output = tmp_path / "report of runs"
    words = [f"{name}={folder}" for name, folder in runs.items()]
    evaluate_armorm(EvaluateConfig(runs=words, output_path=str(output), **flags))
    return output


def read_csv(output: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (output / "scores.csv").open(encoding="utf-8") as stream:
        return {(row["run"], row["objective"]): row for row in csv.DictReader(stream)}


@pytest.fixture
def two_runs(tmp_path: Path) -> dict[str, Path]:
    """Base scores 1, 3 | 5, 7: prompt means 2 and 6, sd sqrt(5). The run is 2 better on both, and has one prompt more."""
    base = rows_of({1: [{H: 1.0}, {H: 3.0}], 2: [{H: 5.0}, {H: 7.0}]})
    run = rows_of({1: [{H: 4.0}, {H: 4.0}], 2: [{H: 6.0}, {H: 10.0}], 9: [{H: 90.0}]}, tokens=6, finish="length")
    random.Random(0).shuffle(run)
    return {"base": write_run(tmp_path / "base", base), "dpo": write_run(tmp_path / "d p o", run)}


def test_means_and_gain_by_hand(tmp_path: Path, two_runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    output = evaluate(tmp_path, two_runs)
    table = read_csv(output)
    base, dpo = table["base", H], table["dpo", H]
    assert (base["prompts"], float(base["mean"]), base["gain_sd"]) == ("2", 4.0, "")
    assert float(base["sd"]) == pytest.approx(math.sqrt(5))
    assert (dpo["prompts"], dpo["paired_prompts"]) == ("3", "2")
    assert float(dpo["mean"]) == pytest.approx((4 + 8 + 90) / 3)
    # A constant shift of 2 has an interval of zero width, whatever is drawn.
    for column in ("gain_sd", "ci_low", "ci_high"):
        assert float(dpo[column]) == pytest.approx(2 / math.sqrt(5), abs=1e-12)
    printed = capsys.readouterr().out
    assert "helpsteer_helpfulness" in printed
    assert "+0.894 [+0.894, +0.894]" in printed


def test_several_completions_count_as_one_prompt(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", rows_of({1: [{H: 0.0}] * 9, 2: [{H: 1.0}]}))
    assert float(read_csv(evaluate(tmp_path, {"one": run}))["one", H]["mean"]) == 0.5


def test_runs_are_joined_by_id_not_by_position(tmp_path: Path) -> None:
    scores: Scores = {i: [{H: float(i)}, {H: float(i + 1)}] for i in range(20)}
    shifted: Scores = {i: [{H: value[H] + 1} for value in samples] for i, samples in scores.items()}
    rows = rows_of(shifted)
    random.Random(3).shuffle(rows)
    runs = {"base": write_run(tmp_path / "a", rows_of(scores)), "run": write_run(tmp_path / "b", rows)}
    row = read_csv(evaluate(tmp_path, runs))["run", H]
    # Joined by position the gain would be the same, but the interval would not have zero width.
    assert float(row["ci_low"]) == pytest.approx(float(row["ci_high"]), abs=1e-12)


def test_the_report_tells_what_was_compared(tmp_path: Path, two_runs: dict[str, Path]) -> None:
    sampled = two_runs["dpo"] / "sampled"
    trained = tmp_path / "trained"
    trained.mkdir()
    flags = {"dataset_path": "pairs", "kldpo_tau": 0.05, "wdpo_rho": None, "beta": 0.01, "seed": 7}
    (trained / "config.json").write_text(json.dumps(flags))
    sampled.mkdir()
    made_by = {"model_path": str(trained / "global_step_3"), "temperature": 0.7, "seed": 42}
    record = {"made_by": made_by, "versions": {"vllm": "1.2.3"}, "commit": "abc", "prompts": "datasets/some_prompts"}
    (sampled / "manifest.json").write_text(json.dumps({"sample_test": record}))
    scored = {"made_by": {"reward_model": "f00d"}, "versions": {}, "commit": "abc", "reward_model": "models/RM"}
    (two_runs["dpo"] / "manifest.json").write_text(json.dumps({"score_test": scored}))
    text = (evaluate(tmp_path, two_runs) / "report.md").read_text(encoding="utf-8")
    assert "KLDPO (kldpo_tau=0.05, beta=0.01, seed=7)" in text
    for fact in ("global_step_3", "datasets/some_prompts", "models/RM", "f00d", "1.2.3", "](spider.png)"):
        assert fact in text
    assert f"{two_runs['base'] / 'manifest.json'} has no record of score_test" in text
    # base: 2 prompts, none left out; dpo: 3, one left out.
    assert "| 4 | 2 | 0 |" in text
    assert "| 5 | 3 | 1 |" in text
    # Lengths and cut answers.
    assert "| base | 4.0 | 0.0% |" in text
    assert "| dpo | 6.0 | 100.0% |" in text


def test_a_comparison_of_unlike_runs_is_called_so(tmp_path: Path, two_runs: dict[str, Path], capsys: Any) -> None:
    for folder, model in zip(two_runs.values(), ("one", "two"), strict=True):
        record = {"made_by": {"reward_model": model, "sampled": model}, "versions": {}, "commit": "x"}
        (folder / "manifest.json").write_text(json.dumps({"score_test": record}))
    text = (evaluate(tmp_path, two_runs) / "report.md").read_text(encoding="utf-8")
    assert "the scoring differs in reward_model: base one, dpo two" in text
    assert "differs in sampled" not in text
    assert "the scoring differs in reward_model" in capsys.readouterr().out


def test_win_rate_counts_ties_half(tmp_path: Path) -> None:
    base: Scores = {i: [{"ArmoRM": 0.0}] for i in range(4)}
    run: Scores = {i: [{"ArmoRM": value}] for i, value in enumerate([1.0, -1.0, 0.0, 2.0])}
    runs = {"base": write_run(tmp_path / "a", rows_of(base)), "run": write_run(tmp_path / "b", rows_of(run))}
    text = (evaluate(tmp_path, runs) / "report.md").read_text(encoding="utf-8")
    assert "| run | 62.5% [" in text
    # All of the base's scores are 0: there is no unit to measure a gain in.
    assert "so there is no gain in its sd units" in text
    assert read_csv(tmp_path / "report of runs")["run", "ArmoRM"]["gain_sd"] == ""


def test_same_input_same_bytes(tmp_path: Path, two_runs: dict[str, Path]) -> None:
    output = evaluate(tmp_path, two_runs)
    names = ("answers.csv", "pairs.csv", "scores.csv", "report.md", "spider.png", "spider.svg")
    before = {name: (output / name).read_bytes() for name in names}
    assert before["spider.png"].startswith(b"\x89PNG")
    evaluate(tmp_path, two_runs)
    assert {name: (output / name).read_bytes() for name in names} == before
    assert sorted(path.name for path in output.iterdir()) == sorted([*names, "manifest.json"])


def test_output_into_the_runs_own_folder(two_runs: dict[str, Path]) -> None:
    """What generate.sh does: the report joins the scores, whose manifest stays."""
    folder = two_runs["base"]
    (folder / "manifest.json").write_text(json.dumps({"score_test": {"made_by": {}, "versions": {}, "commit": "x"}}))
    evaluate_armorm(EvaluateConfig(runs=[f"base={folder}"], output_path=str(folder)))
    assert set(json.loads((folder / "manifest.json").read_text())) == {"score_test", "evaluate_armorm"}
    assert (folder / "test.jsonl").is_file()


def test_objectives_in_either_spelling_and_order(tmp_path: Path) -> None:
    scores: Scores = {1: [{"ArmoRM": 1.0, C: 2.0, "my-own": 3.0, H: 4.0}]}
    run = write_run(tmp_path / "a", rows_of(scores))
    assert [key[1] for key in read_csv(evaluate(tmp_path, {"a": run}))] == [H, C, "my-own", "ArmoRM"]
    chosen = evaluate(tmp_path, {"a": run}, objectives=["my_own", "helpsteer-coherence", "helpsteer_coherence"])
    assert [key[1] for key in read_csv(chosen)] == ["my-own", C]


def test_a_name_or_folder_may_hold_an_equals_sign(tmp_path: Path) -> None:
    run = write_run(tmp_path / "tau=0.05", rows_of({1: [{H: 1.0}]}))
    assert ("tau=0.05", H) in read_csv(evaluate(tmp_path, {"tau=0.05": run}))


def broken_runs(tmp_path: Path, case: str) -> tuple[list[str], dict[str, Any]]:
    good = write_run(tmp_path / "good", rows_of({1: [{H: 1.0}], 2: [{H: 2.0}]}))
    words, flags = [f"a={good}"], {}
    match case:
        case "no equals":
            words = [str(good)]
        case "name twice":
            words = [f"a={good}", f"a={good}"]
        case "unknown objective":
            flags = {"objectives": ["helpsteer_charm"]}
        case "phantom":
            flags = {"objectives": ["ultrafeedback_verbosity"]}
        case "no folder":
            words.append(f"b={tmp_path / 'nowhere'}")
        case "no split":
            flags = {"split": "train"}
        case "objective lacking":
            flags = {"objectives": ["helpsteer_coherence"]}
        case "no common objective":
            words.append(f"b={write_run(tmp_path / 'b', rows_of({1: [{C: 1.0}]}))}")
        case "no common prompt":
            words.append(f"b={write_run(tmp_path / 'b', rows_of({7: [{H: 1.0}]}))}")
        case "unscored":
            words.append(f"b={write_run(tmp_path / 'b', rows_of({1: [{H: 1.0}, {}]}))}")
        case "mixed objectives":
            words.append(f"b={write_run(tmp_path / 'b', rows_of({1: [{H: 1.0}, {C: 1.0}]}))}")
        case "key twice":
            words.append(f"b={write_run(tmp_path / 'b', rows_of({1: [{H: 1.0}]}) * 2)}")
        case "other prompt":
            rows = rows_of({1: [{H: 1.0}]})
            rows[0]["prompt"][0]["content"] = "something else"
            words.append(f"b={write_run(tmp_path / 'b', rows)}")
        case "cut line":
            folder = write_run(tmp_path / "b", rows_of({1: [{H: 1.0}]}))
            with (folder / "test.jsonl").open("a") as stream:
                stream.write('{"prompt_id": 2, "sam')
            words.append(f"b={folder}")
    return words, flags


@pytest.mark.parametrize(
    ("case", "error", "says"),
    [
        ("no equals", UsageError, "write NAME=FOLDER"),
        ("name twice", UsageError, "the name a is given twice"),
        ("unknown objective", UsageError, "unknown objective 'helpsteer_charm'"),
        ("phantom", UsageError, "no such head"),
        ("no folder", DataError, "run b: .*nowhere: no such folder"),
        ("no split", DataError, r"run a: .*train.jsonl: no such file; the folder has test.jsonl"),
        ("objective lacking", DataError, r"run a .* has no scores of helpsteer-coherence"),
        ("no common objective", DataError, "share no objective: a has helpsteer_helpfulness; b has helpsteer_coherence"),
        ("no common prompt", DataError, "the runs a, b have no prompt_id in common"),
        ("unscored", DataError, r'test.jsonl, row 2: field "scores" is missing'),
        ("mixed objectives", DataError, r"row 2: .* other objectives than row 1"),
        ("key twice", DataError, r"row 2: .* repeats \(1, 0\)"),
        ("other prompt", DataError, r"prompt_id 1: .* differs between a .* and b"),
        ("cut line", DataError, r"test.jsonl, row 2: not a whole JSON object"),
    ],
)
def test_errors(tmp_path: Path, case: str, error: type[Exception], says: str, capsys: Any) -> None:
    words, flags = broken_runs(tmp_path, case)
    output = tmp_path / "out"
    config = EvaluateConfig(runs=words, output_path=str(output), **flags)
    with pytest.raises(error, match=says):
        evaluate_armorm(config)
    assert not output.exists()
    with pytest.raises(SystemExit) as stop, one_line_errors():
        evaluate_armorm(config)
    assert stop.value.code == (2 if error is UsageError else 1)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_failed_report_leaves_the_old_one(
    tmp_path: Path, two_runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = evaluate(tmp_path, two_runs)
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("drdpo.evaluation.armorm.write_scores", full)
    with pytest.raises(OSError, match="No space"):
        evaluate(tmp_path, two_runs, seed=1)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_command_line(root: Path, tmp_path: Path, two_runs: dict[str, Path]) -> None:
    script = [sys.executable, str(root / "src" / "evaluate_armorm.py")]
    words = [f"base={two_runs['base']}", f"dpo={two_runs['dpo']}"]
    done = subprocess.run([*script, "--runs", *words, f"--output_path={tmp_path / 'out'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.md").is_file()
    wrong = subprocess.run([*script, "--runs", *words, "--output_path=x", "--boot=3"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--boot=3" in wrong.stderr

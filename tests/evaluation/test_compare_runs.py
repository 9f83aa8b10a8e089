"""Every two runs, several seeds, unseen objectives, the sweep over mixtures and the answers' own figures: by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drdpo.config import EvaluateConfig
from drdpo.errors import DataError, UsageError
from drdpo.evaluation.armorm import evaluate_armorm
from drdpo.evaluation.repetition import repeated_share
from drdpo.evaluation.resampling import Table, resample, worst

H, C = "helpsteer-helpfulness", "helpsteer-coherence"
Values = dict[str, list[float]]
"""{objective: score of prompt 0, 1, ...}"""


def write_run(folder: Path, values: Values, token_ids: list[int] | None = None, prompts: list[int] | None = None) -> Path:
    """One completion a prompt."""
    folder.mkdir(parents=True)
    count = len(next(iter(values.values())))
    ids = prompts or list(range(count))
    rows = [
        {
            "prompt_id": prompt_id,
            "sample_id": 0,
            "prompt": [{"role": "user", "content": f"question {prompt_id}"}],
            "completion": [{"role": "assistant", "content": "answer"}],
            "token_ids": token_ids or [1, 2, 3, 4],
            "finish_reason": "stop",
            "scores": {name: scores[row] for name, scores in values.items()},
        }
        for row, prompt_id in enumerate(ids)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def evaluate(tmp_path: Path, words: list[str], **flags: Any) -> Path:
    output = tmp_path / "out"
    evaluate_armorm(EvaluateConfig(runs=words, output_path=str(output), **flags))
    return output


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_repeated_share_by_hand() -> None:
    # abcd abcd: 5 four-grams (abcd bcda cdab dabc abcd), 4 distinct.
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_share([7] * 13) == pytest.approx(9 / 10)
    assert repeated_share([1, 2, 3]) == 0.0
    assert repeated_share([1, 2, 1, 2], n=2) == pytest.approx(1 / 3)


def test_every_two_runs_by_hand(tmp_path: Path) -> None:
    # The base's sd is 1 (scores -1 and 1). b - a is 0.5 on every prompt: an interval of no width, and b always wins.
    base = write_run(tmp_path / "base", {H: [-1.0, 1.0, -1.0, 1.0]})
    a = write_run(tmp_path / "a", {H: [0.0, 3.0, 1.0, 2.0]})
    b = write_run(tmp_path / "b", {H: [0.5, 3.5, 1.5, 2.5]})
    output = evaluate(tmp_path, [f"base={base}", f"a={a}", f"b={b}"])
    pairs = {(row["run"], row["against"]): row for row in rows_of(output / "pairs.csv")}
    assert set(pairs) == {("a", "base"), ("b", "base"), ("b", "a")}
    row = pairs["b", "a"]
    assert [float(row[name]) for name in ("difference_sd", "ci_low", "ci_high")] == pytest.approx([0.5] * 3, abs=1e-12)
    assert [float(row[name]) for name in ("win_rate", "win_low", "win_high")] == [1.0, 1.0, 1.0]
    # a - base: 1, 2, 2, 1.
    assert float(pairs["a", "base"]["difference_sd"]) == pytest.approx(1.5)
    text = (output / "report.md").read_text(encoding="utf-8")
    assert "| `helpsteer_helpfulness` | +0.500 [+0.500, +0.500] |" in text
    assert "| `helpsteer_helpfulness` | 100.0% [100.0%, 100.0%] |" in text


def test_seeds_of_a_run_are_averaged_and_their_spread_told(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", {H: [-1.0, 1.0]})
    # Seeds one and three higher than the base on every prompt; the second seed lacks nothing, the first has a prompt more.
    one = write_run(tmp_path / "s1", {H: [0.0, 2.0, 50.0]})
    three = write_run(tmp_path / "s2", {H: [2.0, 4.0]})
    output = evaluate(tmp_path, [f"base={base}", f"dpo={one}", f"dpo={three}"])
    row = {(row["run"], row["objective"]): row for row in rows_of(output / "scores.csv")}["dpo", H]
    assert row["prompts"] == "2"
    assert float(row["mean"]) == pytest.approx(2.0)
    assert float(row["gain_sd"]) == pytest.approx(2.0)
    # Two seeds drawn from {1, 3}: means 1, 2, 3 with chance 1/4, 1/2, 1/4, on whatever prompts.
    assert (float(row["ci_low"]), float(row["ci_high"])) == pytest.approx((1.0, 3.0))
    text = (output / "report.md").read_text(encoding="utf-8")
    # Seed means 1 and 3, sd sqrt(2).
    assert "| `helpsteer_helpfulness` | 1.0000 | 3.0000 | 1.4142 |" in text
    assert "| dpo, seed 2 |" in text


def test_win_rate_of_seeds_is_over_every_two(tmp_path: Path) -> None:
    base = [f"base={write_run(tmp_path / f'b{k}', {'ArmoRM': [value]})}" for k, value in enumerate((0.0, 2.0))]
    run = [f"run={write_run(tmp_path / f'r{k}', {'ArmoRM': [value]})}" for k, value in enumerate((1.0, 2.0))]
    output = evaluate(tmp_path, [*base, *run])
    (row,) = rows_of(output / "pairs.csv")
    # 1 > 0, 1 < 2, 2 > 0, 2 = 2.
    assert float(row["win_rate"]) == pytest.approx(2.5 / 4)


def test_a_crossed_bootstrap_equals_a_plain_one() -> None:
    """Prompts and seeds drawn one by one, with another generator: equal up to the noise of the draws."""
    generator = np.random.default_rng(0)
    values_PS = generator.normal(size=(20, 1)) + generator.normal(size=(1, 4)) + generator.normal(size=(20, 4))
    ours = resample({"x": Table(values_PS, ("run",))}, {"run": 4}, 20000, 1)["x"]
    assert ours.value == pytest.approx(values_PS.mean())
    plain = [
        values_PS[np.ix_(generator.integers(0, 20, 20), generator.integers(0, 4, 4))].mean() for _ in range(20000)
    ]  # fmt: skip
    assert float(ours.draws_B.std()) == pytest.approx(float(np.std(plain)), rel=0.03)
    low, high = np.quantile(plain, [0.025, 0.975])
    assert ours.figure.low == pytest.approx(low, abs=0.05)
    assert ours.figure.high == pytest.approx(high, abs=0.05)


def test_two_runs_of_seeds_draw_their_seeds_apart() -> None:
    values_PS = np.array([[0.0, 1.0]] * 5)
    found = resample({"a": Table(values_PS, ("a",)), "b": Table(values_PS, ("b",))}, {"a": 2, "b": 2}, 4000, 3)
    # Each mean has variance 1/8 over seed draws; apart, the difference has twice that.
    assert float((found["a"] - found["b"]).draws_B.var()) == pytest.approx(1 / 4, rel=0.1)


def test_worst_of_several() -> None:
    tables = {"a": Table(np.array([[1.0], [3.0]]), ()), "b": Table(np.array([[2.5], [2.5]]), ())}
    found = resample(tables, {}, 2000, 0)
    least = worst(list(found.values()))
    # a is 1, 2 or 3, b 2.5: the least is 1, 2 or 2.5.
    assert (least.value, least.figure.low, least.figure.high) == (2.0, 1.0, 2.5)


def record_training(folder: Path, run: Path, weights: dict[str, float]) -> None:
    """Manifests of a run that was sampled from a policy trained on pairs of these weights."""
    pairs, trained = folder / f"{run.name}_pairs", folder / f"{run.name}_trained"
    for place, name, content in (
        (pairs, "manifest.json", {"preferences": {"made_by": {"weights": weights}}}),
        (trained, "config.json", {"dataset_path": str(pairs), "kldpo_tau": None, "beta": 0.1, "seed": 1}),
        (run / "sampled", "manifest.json", {"sample_test": {"made_by": {"model_path": str(trained / "global_step_1")}}}),
    ):
        place.mkdir()
        (place / name).write_text(json.dumps(content))


def test_the_gain_in_the_mixture_that_was_trained_on(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", {H: [-2.0, 2.0], C: [-1.0, 1.0], "ArmoRM": [0.0, 1.0]})
    # Gains by prompt, in the base's sd (2 and 1): 1 and 2 in H, 4 and -2 in C; 0.75 H + 0.25 C is 1.75 and 1.
    run = write_run(tmp_path / "run", {H: [0.0, 6.0], C: [3.0, -1.0], "ArmoRM": [1.0, 1.0]})
    record_training(tmp_path, run, {H: 0.75, C: 0.25})
    output = evaluate(tmp_path, [f"base={base}", f"run={run}"])
    text = (output / "report.md").read_text(encoding="utf-8")
    table = text[text.index("## Gain over base") :]
    assert table.index("| **trained mixture** | +1.375 [+1.000, +1.750] |") < table.index("| `helpsteer_helpfulness` |")
    assert "The trained mixture is 0.75 `helpsteer_helpfulness` + 0.25 `helpsteer_coherence`" in text
    recorded = json.loads((output / "manifest.json").read_text())["evaluate_armorm"]["trained_mixture"]
    assert recorded["weights"] == {H: 0.75, C: 0.25}
    assert recorded["gains_sd"] == {"run": pytest.approx({"value": 1.375, "low": 1.0, "high": 1.75})}


def test_runs_of_two_mixtures_have_no_gain_in_one(tmp_path: Path) -> None:
    base, *runs = (write_run(tmp_path / name, {H: [-1.0, 1.0], C: [0.0, 2.0]}) for name in ("base", "one", "other"))
    for run, weights in zip(runs, ({H: 1.0}, {H: 0.5, C: 0.5}), strict=True):
        record_training(tmp_path, run, weights)
    output = evaluate(tmp_path, [f"{run.name}={run}" for run in (base, *runs)])
    assert "trained mixture" not in (output / "report.md").read_text(encoding="utf-8")
    assert "trained_mixture" not in json.loads((output / "manifest.json").read_text())["evaluate_armorm"]


def test_unseen_objectives_are_marked_from_the_manifests(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", {H: [-1.0, 1.0], C: [-1.0, 1.0], "ArmoRM": [0.0, 1.0]})
    run = write_run(tmp_path / "run", {H: [0.0, 2.0], C: [1.0, 3.0], "ArmoRM": [1.0, 1.0]})
    record_training(tmp_path, run, {H: 1.0})
    text = (evaluate(tmp_path, [f"base={base}", f"run={run}"]) / "report.md").read_text(encoding="utf-8")
    assert "| `helpsteer_coherence` *unseen* | +2.000 [+2.000, +2.000] |" in text
    assert "| `helpsteer_helpfulness` | +1.000 [+1.000, +1.000] |" in text
    assert "| `ArmoRM` | " in text
    # Of both objectives, without the gated score.
    assert "| mean of all (2) | +1.500 [+1.500, +1.500] |" in text
    assert "| worst of all (2) | +1.000 [+1.000, +1.000] |" in text
    given = evaluate(tmp_path, [f"base={base}", f"run={run}"], trained_on=["helpsteer_coherence"])
    assert "`helpsteer_helpfulness` *unseen*" in (given / "report.md").read_text(encoding="utf-8")
    assert "(unseen)" in (given / "spider.svg").read_text(encoding="utf-8")


def test_sweep_by_hand(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", {H: [-2.0, 2.0], C: [-1.0, 1.0]})
    # Gains: (2 / sd 2) = 1 in r1, -1 in r2: alpha - (1 - alpha) = 2 alpha - 1.
    run = write_run(tmp_path / "run", {H: [0.0, 4.0], C: [-2.0, 0.0]})
    words = [f"base={base}", f"run={run}"]
    output = evaluate(tmp_path, words, sweep=["helpsteer_helpfulness", "helpsteer_coherence"])
    gains = {float(row["alpha"]): float(row["gain"]) for row in rows_of(output / "alpha.csv")}
    assert gains == pytest.approx({k / 10: 2 * k / 10 - 1 for k in range(11)})
    assert (output / "alpha.png").read_bytes().startswith(b"\x89PNG")
    assert "| 0.5 | +0.000 [+0.000, +0.000] |" in (output / "report.md").read_text(encoding="utf-8").replace(
        "-0.000", "+0.000"
    )
    # A newer report without the sweep keeps no plot of the older one.
    evaluate(tmp_path, words)
    assert not (output / "alpha.png").exists()
    assert "alpha.png" not in (output / "report.md").read_text(encoding="utf-8")


def test_length_and_repetition(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", {H: [0.0, 1.0]}, token_ids=[1, 2, 3, 4, 5])
    run = write_run(tmp_path / "run", {H: [0.0, 1.0]}, token_ids=[7] * 13)
    output = evaluate(tmp_path, [f"base={base}", f"run={run}"])
    text = (output / "report.md").read_text(encoding="utf-8")
    assert "| run | 13.0 | 0.0% | 90.0% |" in text
    assert "| run | +8.0 [+8.0, +8.0] | +0.0% [+0.0%, +0.0%] | +90.0% [+90.0%, +90.0%] |" in text
    assert [float(row["repeated"]) for row in rows_of(output / "answers.csv")] == pytest.approx([0.0, 0.9])


def test_many_runs_fit_the_report(tmp_path: Path) -> None:
    names = ["base", *"abcde"]
    words = [
        f"{name}={write_run(tmp_path / name, {H: [-1.0 + k, 1.0], 'ArmoRM': [float(k), 1.0]})}"
        for k, name in enumerate(names)
    ]  # fmt: skip
    output = evaluate(tmp_path, words)
    assert len(rows_of(output / "pairs.csv")) == 15 * 2
    text = (output / "report.md").read_text(encoding="utf-8")
    assert "The 10 pairs of runs are in pairs.csv." in text
    # ArmoRM's sd of the base is 1/2; e - d is 1 on one of two prompts.
    (line,) = [line for line in text.splitlines() if line.startswith("| e |") and line.count("|") == 6 and "sd" not in line][
        -1:
    ]
    assert "+1.000 [+0.000, +2.000]" in line


@pytest.mark.parametrize(
    ("case", "error", "says"),
    [
        ("one folder twice", UsageError, "the name run is given twice"),
        ("other objectives", DataError, "run run: .* are not both scored in helpsteer-coherence"),
        ("sweep of one run", UsageError, "--sweep compares runs with a base"),
        ("sweep without spread", UsageError, "--sweep: all scores of base are equal in helpsteer-coherence"),
        ("sweep twice the same", UsageError, "names one objective twice"),
        ("unknown trained_on", UsageError, "unknown objective 'charm'"),
    ],
)
def test_errors(tmp_path: Path, case: str, error: type[Exception], says: str) -> None:
    base = write_run(tmp_path / "base", {H: [0.0, 1.0], C: [1.0, 1.0]})
    run = write_run(tmp_path / "run", {H: [0.0, 1.0], C: [1.0, 1.0]})
    words, flags = [f"base={base}", f"run={run}"], {}
    match case:
        case "one folder twice":
            words.append(f"run={run}")
        case "other objectives":
            words.append(f"run={write_run(tmp_path / 'other', {H: [0.0, 1.0]})}")
        case "sweep of one run":
            words, flags = words[:1], {"sweep": ["helpsteer_helpfulness", "helpsteer_coherence"]}
        case "sweep without spread":
            flags = {"sweep": ["helpsteer_helpfulness", "helpsteer_coherence"]}
        case "sweep twice the same":
            flags = {"sweep": ["helpsteer_helpfulness", "helpsteer-helpfulness"]}
        case "unknown trained_on":
            flags = {"trained_on": ["charm"]}
    with pytest.raises(error, match=says):
        evaluate(tmp_path, words, **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [{"sweep": ["one"]}, {"sweep": ["one", "one"]}, {"sweep_trained_at": 1.5}])
def test_refused_flags(flags: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--sweep"):
        EvaluateConfig(runs=["a=b"], output_path="x", **flags)

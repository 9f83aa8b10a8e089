"""The study of preference shifts: labels, values and tables, by hand on four prompts."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import preference_shift as shift
import pytest
from safetensors.numpy import save_file

from drdpo.errors import DataError, UsageError
from drdpo.records import Completion, Preference, read_records, write_records

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES = ["helpsteer_verbosity", "helpsteer_coherence"]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def study(tmp_path: Path) -> shift.Study:
    """Six prompts with two answers: the first is one deviation better in r1, in r2 one worse (odd prompts: better)."""
    for split, count in (("train", 4), ("test", 2)):
        rows = []
        for prompt, (answer, sign) in itertools.product(range(count), enumerate((1, -1))):
            turn = [{"role": "user", "content": f"{split} {prompt}"}]
            coherence = prompt + 0.5 * sign * (-1) ** (prompt + 1)
            scores = {"helpsteer-verbosity": 5.0 + sign, "helpsteer-coherence": coherence}
            said = [{"role": "assistant", "content": f"answer {answer}"}]
            rows.append(Completion(prompt, answer, turn, said, [answer + 1], "stop", scores))
        write_records(tmp_path / "base" / f"{split}.jsonl", rows)
    return shift.Study(tmp_path, OBJECTIVES, [2, 1, 3])


def run_of(folder: Path, ratios: list[list[float]], prompts: list[int], step: int = 3) -> Path:
    (folder / "candidates").mkdir(parents=True, exist_ok=True)
    tensors = {"log_ratio": np.array(ratios, np.float32), "prompt_id": np.array(prompts)}
    save_file(tensors, folder / "candidates" / f"step_{step}.safetensors")
    return folder


def test_what_prompts_are_for(study, tmp_path):
    assert {part: list(rows) for part, rows in study.rows.items()} == {"pairs": [0, 1], "validation": [2], "test": [3, 4, 5]}
    assert study.facts["correlation_within_prompts"] == pytest.approx(0)
    assert study.facts["objectives"] == ["helpsteer-verbosity", "helpsteer-coherence"]
    with pytest.raises(UsageError, match="no scores of helpsteer-complexity; it has helpsteer-verbosity"):
        shift.Study(tmp_path, ["helpsteer_complexity", "helpsteer_coherence"], [2, 1, 3])
    with pytest.raises(DataError, match="needs 7 prompts"):
        shift.Study(tmp_path, OBJECTIVES, [4, 2, 1])


def test_rewards_by_hand(study):
    """Every answer is one deviation above or below its prompt's mean, in both objectives."""
    up, down = sigmoid(1), sigmoid(-1)
    assert study.reward("linear", 0.1)[:2].tolist() == [
        pytest.approx([0.1 * up + 0.9 * down, 0.1 * down + 0.9 * up]), pytest.approx([up, down])
    ]  # fmt: skip
    assert study.reward("geometric", 0.1)[0].tolist() == pytest.approx([up**0.1 * down**0.9, down**0.1 * up**0.9])


def test_values_by_hand(study, tmp_path):
    """A policy that makes the first answer e times as likely, on prompt 3, where the first answer is better in both."""
    run = run_of(tmp_path / "runs" / "linear" / "DPO_1", [[1.0, 0.0]], [3])
    gains_NA, ess = study.gains(run, "linear")
    share, up, down = sigmoid(1), sigmoid(1), sigmoid(-1)
    # At alpha = 1 half of the answers have `up`: their standard deviation is half the difference.
    assert gains_NA[0, -1] == pytest.approx((share * up + (1 - share) * down - 0.5 * (up + down)) / ((up - down) / 2))
    assert ess == pytest.approx(1 / (share**2 + (1 - share) ** 2))
    start = run_of(tmp_path / "start", [[0.0, 0.0]], [3], step=0)
    assert study.gains(start, "geometric")[0] == pytest.approx(np.zeros((1, 11)))
    with pytest.raises(DataError, match="eval_candidates"):
        study.gains(tmp_path / "pairs", "linear")


def test_labels(study, tmp_path):
    def labelled(seed, scale):
        shift.label(study, [seed], ["linear"], 0.1, scale=scale)
        return read_records(tmp_path / "pairs" / f"linear_{seed}" / "train.jsonl", Preference.from_row)

    pairs = labelled(1, 1e6)
    assert [pair.prompt_id for pair in pairs] == [0, 1]
    assert all(pair.chosen_score > pair.rejected_score for pair in pairs)
    # Coherence decides at 0.1: answer 1 of prompt 0, answer 0 of prompt 1.
    assert [pair.chosen_token_ids for pair in pairs] == [[2], [1]]
    held = read_records(tmp_path / "candidates" / "test" / "test.jsonl", Completion.from_row)
    assert [row.prompt_id for row in held] == [3, 3, 4, 4, 5, 5]
    flipped = sum(pair.chosen_score < pair.rejected_score for seed in range(200) for pair in labelled(seed, 5))
    gaps = [0.8 * (sigmoid(1) - sigmoid(-1)), sigmoid(1) - sigmoid(-1)]
    expected = sum(sigmoid(-5 * gap) for gap in gaps) * 200
    assert abs(flipped - expected) < 4 * math.sqrt(expected)


def test_the_strength_is_the_best_at_alpha_o(study, tmp_path):
    run_of(tmp_path / "trials" / "WDPO=0.1", [[0.0, 1.0]], [2])  # prompt 2 is like prompt 0: its second answer is better
    run_of(tmp_path / "trials" / "WDPO=0.2", [[1.0, 0.0]], [2])
    run_of(tmp_path / "trials" / "WDPO=9", [[0.0, 9.0]], [2])  # of another start, with other trials
    found = shift.trials_of(study, "linear", 0.1, ["WDPO=0.1", "WDPO=0.2"])
    assert found["WDPO"]["0.1"] == pytest.approx(-found["WDPO"]["0.2"]) and found["WDPO"]["0.1"] > 0
    assert shift.best_of(found) == {"WDPO": "0.1"}


def test_methods_are_compared_on_the_same_seeds(study, tmp_path):
    zero, runs = [[0.0, 0.0]] * 3, tmp_path / "runs" / "linear"
    for run in ("DPO_1", "DPO_2", "CVaR_1"):
        run_of(runs / run, zero, [3, 4, 5])
    with pytest.raises(DataError, match="CVaR lacks seeds"):
        shift.results(study, "linear")
    run_of(runs / "CVaR_2", [[1.0, 0.0]] * 3, [3, 4, 5])
    for method in ("DPO", "CVaR"):  # one seed also has a value in the middle
        run_of(runs / f"{method}_2", zero, [3, 4, 5], step=1)
    found = shift.results(study, "linear")
    assert found["steps"] == [1, 3] and found["curves"]["CVaR"][0][-1] == 0 < found["curves"]["CVaR"][1][-1]
    assert found["difference"]["CVaR"][-1][0] == pytest.approx((2 * sigmoid(1) - 1) / 2)
    assert found["gain"]["DPO"][0] == pytest.approx([0, 0, 0], abs=1e-12)
    assert found["worst"]["CVaR"][0] == pytest.approx(min(one[0] for one in found["gain"]["CVaR"]))


def test_the_page_shows_what_was_measured():
    stored = json.loads((ROOT / "docs" / "preference_shift.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "preference_shift.md").read_text(encoding="utf-8")
    assert set(stored["results"]) == {"linear", "geometric"}
    for form in stored["results"]:
        assert shift.table(stored, form) in page, "run experiments/preference_shift.sh and copy its tables"

"""experiments/preference_shift.sh: its data, choice and figures by hand; and, marked slow, a small run of the chain."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from readme import ROOT

from drdpo.errors import DataError
from drdpo.evaluation.runs import load_run
from drdpo.records import Completion, Preference, read_records, write_records

sys.path.insert(0, str(ROOT / "experiments"))

import shift_choice
import shift_data
import shift_report

SCRIPT = "preference_shift.sh"


def start(folder: Path, *words: str, root: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(root / "experiments" / SCRIPT), *words]
    return subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True)


def said(text: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pairs(count: int, word: str = "") -> list[Preference]:
    return [
        Preference(
            k, said(f"question {k}", "user"), said(f"good{word} {k}"), said(f"bad{word} {k}"), 1.0 + k, -1.0, [k, 1], [k, 0]
        )
        for k in range(count)
    ]


def completion(prompt_id: int, sample_id: int, **scores: float) -> Completion:
    return Completion(prompt_id, sample_id, said(f"question {prompt_id}", "user"), said("answer"), [1, 2], "stop", scores)


def test_flipping_swaps_texts_ids_and_scores_of_so_many_pairs() -> None:
    before = pairs(10)
    after = shift_data.flip_pairs(before, 0.3, seed=1)
    assert [row.prompt_id for row in after] == list(range(10))
    flipped = [old for old, new in zip(before, after, strict=True) if old != new]
    assert len(flipped) == 3
    for old, new in zip(before, after, strict=True):
        if old in flipped:
            assert (new.chosen, new.chosen_token_ids, new.chosen_score) == (
                old.rejected,
                old.rejected_token_ids,
                old.rejected_score,
            )
            assert (new.rejected, new.rejected_token_ids, new.rejected_score) == (
                old.chosen,
                old.chosen_token_ids,
                old.chosen_score,
            )
    assert shift_data.flip_pairs(before, 0.3, seed=1) == after
    assert shift_data.flip_pairs(before, 0.3, seed=2) != after
    assert shift_data.flip_pairs(before, 0.0, seed=1) == before


def test_mixing_takes_so_many_prompts_from_the_few_joined_by_their_id() -> None:
    many, few = pairs(12), list(reversed(pairs(10, " by others")))
    mixed = shift_data.mix_pairs(many, few, 0.2, seed=1)
    assert [row.prompt_id for row in mixed] == list(range(10)), "prompts that both have"
    assert sum(row in few for row in mixed) == 2
    assert all(row in few or row in many for row in mixed)
    with pytest.raises(DataError, match="no prompt in common"):
        shift_data.mix_pairs(many[:1], few[:1], 0.5, seed=1)


def test_a_prompt_is_in_one_split_with_all_its_completions() -> None:
    rows = [completion(prompt_id, sample_id, a=0.0) for prompt_id in range(9) for sample_id in range(2)]
    split = shift_data.split_prompts(rows, 1 / 3, seed=0)
    held_out = {row.prompt_id for row in split["test"]}
    assert len(held_out) == 3 and not held_out & {row.prompt_id for row in split["train"]}
    assert len(split["train"]) == 12 and len(split["test"]) == 6
    with pytest.raises(DataError, match="leaves one side empty"):
        shift_data.split_prompts(rows, 0.01, seed=0)


def test_the_choice_is_by_the_gain_in_the_training_objectives(tmp_path: Path) -> None:
    """Base scores 0 and 2: sd 1. A value's gain is the mean of its two; the third objective does not count."""
    (tmp_path / "settings").write_text("first=helpsteer_coherence\nsecond=helpsteer_complexity\n")
    gains = {"": (0.0, 0.0, 0.0), "0.05": (0.4, 0.2, 0.0), "0.1": (-0.1, 0.8, -5.0), "0.2": (0.3, 0.0, 9.0)}
    for value, (first, second, third) in gains.items():
        folder = tmp_path / "choice" / f"DPO_{value}" / "validation" if value else tmp_path / "data" / "completions"
        folder.mkdir(parents=True)
        rows = [
            completion(
                p,
                0,
                **{
                    "helpsteer-coherence": level + first,
                    "helpsteer-complexity": level + second,
                    "helpsteer-correctness": third,
                },
            )
            for p, level in enumerate([0.0, 2.0, 0.0, 2.0])
        ]
        write_records(folder / "test.jsonl", rows)
    trained_on = ["helpsteer_coherence", "helpsteer_complexity"]
    assert shift_choice.validation(tmp_path, "DPO_0.05", trained_on) == pytest.approx(0.3)
    assert shift_choice.choose(tmp_path, "DPO", ["0.05", "0.1", "0.2"]) == "0.1"
    with pytest.raises(DataError, match="no such folder"):
        shift_choice.choose(tmp_path, "DPO", ["0.05", "0.4"])


def test_gains_and_their_worst_by_hand(tmp_path: Path) -> None:
    """Base scores 0 and 2 in both objectives: sd 1. DPO gains 1 and -1, the other method 0.5 and 0.25, on every prompt."""
    gains = {"base": (0.0, 0.0), "DPO": (1.0, -1.0), "KLDPO": (0.5, 0.25)}
    runs = {}
    for name, (first, second) in gains.items():
        rows = [
            completion(p, 0, **{"one": 2.0 * (p % 2) + first, "two": 2.0 * (p % 2) + second, "ArmoRM": 1.0 * p})
            for p in range(6)
        ]
        (tmp_path / name).mkdir()
        write_records(tmp_path / name / "test.jsonl", rows)
        runs[name] = load_run(name, tmp_path / name, "test")
    found = shift_report.arm_figures(runs["base"], [runs["DPO"], runs["KLDPO"]], ["one", "two"])
    for method, mean, worst in (("DPO", 0.0, -1.0), ("KLDPO", 0.375, 0.25)):
        assert found[method]["gain"]["mean of all"].value == pytest.approx(mean)
        assert found[method]["gain"]["worst of all"].value == pytest.approx(worst)
    over = found["KLDPO"]["over DPO"]["worst of all"]
    # The same gain on every prompt: no spread.
    assert (over.value, over.low, over.high) == pytest.approx((1.25, 1.25, 1.25))


def test_groups_leave_the_gated_score_out() -> None:
    of = shift_report.groups(["helpsteer-complexity", "helpsteer-coherence", "ArmoRM"], ["helpsteer_complexity"])
    assert of == {
        "all": ["helpsteer-complexity", "helpsteer-coherence"],
        "trained": ["helpsteer-complexity"],
        "unseen": ["helpsteer-coherence"],
    }


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("--arms=objectives weather", "arm weather"),
        ("--methods=DPO=0.1 PPO=1", "method PPO"),
        ("--methods=DPO", "method DPO: give its strengths"),
        ("--methods=KLDPO=0.1", "no DPO"),
        ("--methods=DPO=0.1 DPO=0.2", "DPO is given twice"),
        ("--seeds=1 2 1", "1 is given twice"),
        ("--arms=", "--arms is empty"),
        ("--first=helpsteer_complexity", "--first and --second are both helpsteer_complexity"),
        ("--jobs=none", "--jobs=none is not a number from 1"),
        ("--keep_models=perhaps", "--keep_models=perhaps: give true or false"),
    ],
)
def test_wrong_words_end_before_anything_runs(tmp_path: Path, word: str, says: str) -> None:
    done = start(tmp_path, f"--output_path={tmp_path / 'out'}", word)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_page_shows_the_stored_figures() -> None:
    stored = json.loads((ROOT / "docs" / "preference_shift.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "preference_shift.md").read_text(encoding="utf-8")
    assert len(stored["settings"]["seeds"].split()) >= 3
    assert set(stored["arms"]) == {"objectives", "noise", "populations"}
    assert not any(value.startswith("/") for value in stored["settings"].values())
    assert shift_report.choice_table(stored) in page
    assert shift_report.weight_table(stored) in page
    for arm in stored["arms"]:
        assert shift_report.arm_table(stored, arm) in page


@pytest.mark.slow
def test_a_small_run_of_the_whole_chain(clone: Path, tiny_policy: Path, tmp_path: Path) -> None:
    """--tiny with fewer methods on a random policy, two parts at a time; then once more: nothing is repeated."""
    (tmp_path / "vllm.py").write_text("raise ImportError('not in this test')\n")
    output = tmp_path / "my out"
    words = [
        "--tiny", f"--output_path={output}", f"--model_path={tiny_policy}", "--methods=DPO=0.1 WDPO=0.001,0.003",
        "--arms=noise populations", "--prompts=12", "--max_new_tokens=8", "--jobs=2",
    ]  # fmt: skip
    done = start(tmp_path, *words, root=clone, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((output / "results.json").read_text())
    assert results["choices"]["WDPO"]["chosen"] in ("0.001", "0.003")
    assert set(results["arms"]) == {"noise", "populations"}
    curve = results["arms"]["noise"]["curves"]["WDPO"]
    assert len(curve["penalty"]) == len(curve["loss"]) and np.isfinite(curve["penalty"]).all()
    text = (output / "report.md").read_text()
    assert "| WDPO |" in text and "worst of all - DPO's" in text
    assert (output / "gains.png").stat().st_size > 5000 and (output / "curves.png").stat().st_size > 5000
    clean = read_records(output / "data" / "objectives" / "train.jsonl", Preference.from_row)
    noisy = read_records(output / "data" / "noise_1" / "train.jsonl", Preference.from_row)
    assert sum(a.chosen == b.rejected for a, b in zip(clean, noisy, strict=True)) == round(0.25 * len(clean))
    assert not list(output.rglob("global_step_*")), "--keep_models=false"
    answers = output / "noise" / "WDPO_seed_1" / "completions" / "test.jsonl"
    made = answers.stat().st_mtime_ns
    again = start(tmp_path, *words, root=clone, PYTHONPATH=str(tmp_path))
    assert again.returncode == 0, again.stderr[-3000:]
    assert answers.stat().st_mtime_ns == made

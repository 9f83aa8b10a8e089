"""Step 2 as a command: pairs computed by hand, and every bad input as one line and the right exit status."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drdpo.config.data import PreferencesConfig
from drdpo.errors import UsageError
from drdpo.pairing import generate_preferences
from drdpo.records import Preference, read_records, write_rows

Row = dict[str, Any]


def row(prompt_id, sample_id, text, **scores):
    return {
        "prompt_id": prompt_id, "sample_id": sample_id, "prompt": [{"role": "user", "content": f"question {prompt_id}"}],
        "completion": [{"role": "assistant", "content": text}], "token_ids": [prompt_id, sample_id, 7],
        "finish_reason": "stop", "scores": {name.replace("_", "-", 1): value for name, value in scores.items()},
    }  # fmt: skip


# Three prompts; honesty alone would choose sample 0, with the mix of two z-scores the choice is another.
GOOD = [
    row(7, 0, "a", ultrafeedback_truthfulness=0.0, helpsteer_complexity=3.0, ArmoRM=0.5),
    row(3, 0, "b", ultrafeedback_truthfulness=2.0, helpsteer_complexity=1.0, ArmoRM=0.1),
    row(7, 1, "c", ultrafeedback_truthfulness=2.0, helpsteer_complexity=3.0, ArmoRM=0.4),
    row(3, 1, "d", ultrafeedback_truthfulness=0.0, helpsteer_complexity=1.0, ArmoRM=0.2),
]
README_MIX = ("--ultrafeedback_truthfulness=0.5", "--helpsteer_complexity=0.5")


@pytest.fixture
def given(tmp_path):
    return tmp_path / "my completions"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "my pairs"


@pytest.fixture
def run(root, forks, given, out):
    """Run the command, which ends with this status."""

    def command(*flags, status=0, given=given, out=out):
        script = root / "src" / "generate_preferences.py"
        done = forks.run([sys.executable, script, f"--completions={given}", f"--output_path={out}", *flags])
        assert done.returncode == status, done.stderr
        return done

    return command


def write(folder, train, test=None):
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "test.jsonl", train if test is None else test)


def written(folder, split="train"):
    return read_records(folder / f"{split}.jsonl", Preference.from_row)


def files_of(folder):
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


def facts_of(folder):
    return json.loads((folder / "manifest.json").read_text())["preferences"]


def test_the_readme_command(root, run, given, out):
    """In a process of its own, where importing torch is an error; then again and with other flags."""
    write(given, GOOD, GOOD[::2])
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [f"--completions={given}", f"--output_path={out}", *README_MIX]
    command = [sys.executable, "-c", code, root / "src" / "generate_preferences.py", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs = {pair.prompt_id: pair for pair in written(out)}
    # truthfulness: mean 1, sd 1; complexity: mean 2, sd 1. Mixes: (7,0) 0, (7,1) 1, (3,0) 0, (3,1) -1.
    assert list(pairs) == [7, 3]
    assert pairs[7].chosen == [{"role": "assistant", "content": "c"}]
    assert pairs[7].rejected == [{"role": "assistant", "content": "a"}]
    assert (pairs[7].chosen_score, pairs[7].rejected_score) == (1.0, 0.0)
    assert (pairs[3].chosen_score, pairs[3].rejected_score) == (0.0, -1.0)
    assert (pairs[3].chosen_token_ids, pairs[3].rejected_token_ids) == ([3, 0, 7], [3, 1, 7])
    assert "train: 2 pairs from 2 prompts; dropped: none" in done.stdout
    assert "test: 1 pairs from 1 prompts" in done.stdout
    facts = facts_of(out)
    assert facts["made_by"]["weights"] == {"ultrafeedback-truthfulness": 0.5, "helpsteer-complexity": 0.5}
    assert facts["train"]["scores"]["helpsteer-complexity"] == {"mean": 2.0, "sd": 1.0}
    assert facts["test"]["scores"]["helpsteer-complexity"] == {"mean": 3.0, "sd": 0.0}
    (again,) = run(*README_MIX).stdout.splitlines()
    assert "skipped" in again
    assert "--overwrite=true" in run("--ArmoRM=1.0", status=2).stderr
    run("--ArmoRM=1.0", "--overwrite=true")
    assert {pair.prompt_id: pair.chosen_token_ids for pair in written(out)} == {7: [7, 0, 7], 3: [3, 1, 7]}


def test_raw_scores_without_standardisation(run, given, out):
    write(given, GOOD)
    run("--ArmoRM=1.0", "--standardize=false")
    pair = written(out, "test")[0]
    assert (pair.prompt_id, pair.chosen_score, pair.rejected_score) == (7, 0.5, 0.4)


def test_ties_equal_texts_empty_and_lonely_completions_are_dropped_and_counted(run, given, out):
    rows = [
        row(1, 0, "x", ArmoRM=1.0), row(1, 1, "y", ArmoRM=1.0), row(1, 2, "z", ArmoRM=1.0),
        row(2, 0, "same", ArmoRM=1.0), row(2, 1, "  same\n", ArmoRM=2.0),
        row(3, 5, "alone", ArmoRM=9.0), row(5, 0, " \n", ArmoRM=1.0), row(5, 1, "said", ArmoRM=2.0),
        row(4, 2, "low", ArmoRM=0.0), row(4, 0, "mid", ArmoRM=1.0), row(4, 9, "high", ArmoRM=3.0),
        row(4, 10, "tied", ArmoRM=3.0),
    ]  # fmt: skip
    write(given, rows)
    done = run("--ArmoRM=1.0")
    (pair,) = written(out)
    assert (pair.prompt_id, pair.chosen_token_ids, pair.rejected_token_ids) == (4, [4, 9, 7], [4, 2, 7])
    assert facts_of(out)["train"]["counts"] == {
        "prompts": 5, "completions": 12, "candidates": 4, "pairs": 1, "prompts_without_pair": 4,
        "dropped_one_completion": 1, "dropped_zero_margin": 1, "dropped_small_margin": 0, "dropped_empty_text": 1,
        "dropped_equal_texts": 1, "dropped_over_max_pairs_per_prompt": 0, "not_drawn": 0,
    }  # fmt: skip
    dropped = "dropped: 1 one completion, 1 zero margin, 1 empty text, 1 equal texts"
    assert f"train: 1 pairs from 5 prompts; {dropped}" in done.stdout


def random_rows(seed, prompts=40):
    """Two to five completions of each prompt, the text as long as the honesty is high, by prompt_id."""
    rng = random.Random(seed)
    rows = []
    for prompt in range(prompts):
        for sample in range(rng.randint(2, 5)):
            honesty = rng.gauss(0, 1)
            text = " ".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=max(1, round(20 + 5 * honesty))))
            one = row(prompt, sample, text, ultrafeedback_honesty=honesty, ArmoRM=rng.gauss(3, 0.1))
            rows.append({**one, "token_ids": list(range(len(text.split()) + 1))})
    return rows


SELECTIONS = {
    "top_bottom": [],
    "top_random": ["--selection=top_random"],
    "all_pairs": ["--selection=all_pairs"],
    "best two pairs": ["--selection=all_pairs", "--min_margin=0.7", "--max_pairs_per_prompt=2"],
}
HALF = ("--ultrafeedback_honesty=0.5", "--ArmoRM=0.5")


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_selection_depends_on_no_order_is_made_once_and_refused_under_other_flags(selection, run, given, out, tmp_path):
    rows, flags = random_rows(1), (*HALF, *SELECTIONS[selection])
    write(given, rows)
    done = run(*flags)
    pairs = written(out)
    assert f"train: {len(pairs)} pairs from 40 prompts" in done.stdout and len(pairs) >= 30
    margins = [pair.chosen_score - pair.rejected_score for pair in pairs]
    assert facts_of(out)["train"]["margins"]["min"] == pytest.approx(min(margins))
    assert run(*flags).stdout.count("skipped") == 1
    assert "min_margin" in run(*flags, "--min_margin=0.8", status=2).stderr
    run(*flags, "--seed=7", status=2 if selection == "top_random" else 0)  # it matters where something is drawn
    random.Random(0).shuffle(rows)
    write(tmp_path / "shuffled", rows)
    run(*flags, given=tmp_path / "shuffled", out=tmp_path / "of shuffled")
    shuffled = written(tmp_path / "of shuffled")
    assert shuffled != pairs, "prompts come in the order of the file"
    assert sorted(shuffled, key=lambda pair: pair.prompt_id) == pairs


def test_standardised_by_train_a_completion_scores_the_same_in_test(run, given, out):
    write(given, GOOD, GOOD[::2])  # prompt 7 in train too; truthfulness mean 1, sd 1; complexity mean 2, sd 1
    done = run(*README_MIX, "--standardize_by=train")
    (of_test,) = written(out, "test")
    assert of_test == next(pair for pair in written(out) if pair.prompt_id == 7)
    assert (of_test.chosen_score, of_test.rejected_score) == (1.0, 0.0)
    facts = facts_of(out)
    assert facts["test"]["scores"]["helpsteer-complexity"] == {"mean": 3.0, "sd": 0.0}
    assert facts["test"]["standardized_by"]["helpsteer-complexity"] == {"mean": 2.0, "sd": 1.0}
    assert facts["made_by"]["standardize_by"] == "train"
    assert "train mean    train sd" in done.stdout
    run(*README_MIX, status=2)
    run(*README_MIX, "--overwrite=true")
    (by_split,) = written(out, "test")
    assert by_split.chosen_score == 0.5, "by its own split complexity has sd 0"


def test_rows_have_the_scores_by_which_another_mixture_would_label_them(run, given, out, tmp_path):
    """What --eval_mixture of the trainer relabels by."""
    rng, train = random.Random(9), random_rows(7, prompts=20)
    for one in train:
        one["scores"] |= {"code-style": rng.gauss(0, 3), "code-readability": 1.0}
    del train[0]["scores"]["code-readability"]  # not an objective of every completion
    write(given, train)
    run(*HALF)
    run("--code_style=1.0", "--selection=all_pairs", out=tmp_path / "other")
    texts = {(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in written(tmp_path / "other")}
    pairs, swapped = written(out), 0
    for pair in pairs:
        first, second = pair.chosen_scores, pair.rejected_scores
        assert list(first) == ["ArmoRM", "code-style", "ultrafeedback-honesty"]
        for score, scores in ((pair.chosen_score, first), (pair.rejected_score, second)):
            assert score == pytest.approx(0.5 * scores["ArmoRM"] + 0.5 * scores["ultrafeedback-honesty"], abs=1e-12)
        swap = first["code-style"] < second["code-style"]
        answers = [pair.chosen[0]["content"], pair.rejected[0]["content"]]
        assert tuple(reversed(answers) if swap else answers) in texts
        swapped += swap
    assert 0 < swapped < len(pairs)


def test_a_dry_run_prints_the_report_and_writes_nothing(run, given, out):
    write(given, random_rows(4, prompts=60), random_rows(5, prompts=3))
    dry = run("--ultrafeedback_honesty=1.0", "--dry_run")
    assert not out.exists()
    assert "dry run: nothing was written" in dry.stdout
    assert "train: length bias: chosen is longer for " in dry.stdout and "no significant bias" in dry.stdout
    real = run("--ultrafeedback_honesty=1.0")
    assert real.stdout.strip() in dry.stdout, "the same report"
    lengths = facts_of(out)["train"]["lengths"]
    assert (lengths["unit"], lengths["biased"]) == ("tokens", True) and lengths["margin_correlation"] > 0.5
    before = files_of(out)
    for other in ([], ["--selection=all_pairs"], ["--overwrite=true", "--min_margin=0.5"]):
        assert "nothing was written" in run("--ultrafeedback_honesty=1.0", *other, "--dry_run=true").stdout
    assert before == files_of(out)


def pair_of(first, **changes):
    """Of a first completion and another of its prompt, changed."""
    return [first, row(1, 1, "b", ArmoRM=2.0) | changes]


BAD_DATA = {
    "scores whose squares overflow": (pair_of(row(1, 0, "a", ArmoRM=1e200)), 'row 1: field "scores": ArmoRM is 1e+200'),
    "unscored": ([row(1, 0, "a"), row(1, 1, "b")], '"scores" is missing'),
    "n = 1": ([row(1, 0, "a", ArmoRM=1.0), row(2, 0, "b", ArmoRM=2.0)], "only one completion"),
    "duplicate key": ([*GOOD, GOOD[2]], 'row 5: field "prompt_id", "sample_id" repeats (7, 1)'),
    "objective missing in one row": (
        [*GOOD[:3], row(3, 1, "d", ultrafeedback_truthfulness=0.0)],
        'row 4: field "scores" lacks ArmoRM; it has ultrafeedback-truthfulness',
    ),
    "only equal texts": (
        [row(1, 0, "a", ArmoRM=1.0), row(1, 1, "a ", ArmoRM=2.0), row(2, 0, "b", ArmoRM=2.0)],
        "no pair is left of 2 prompts (1 one completion, 1 equal texts)",
    ),
    "two prompts": (
        pair_of(row(1, 0, "a", ArmoRM=1.0), prompt=[{"role": "user", "content": "other"}]),
        'row 2: field "prompt" differs',
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_and_status_1_and_writes_nothing(case, run, given, out):
    test, message = BAD_DATA[case]
    write(given, GOOD, test)
    (line,) = run("--ArmoRM=1.0", status=1).stderr.splitlines()
    assert message in line and str(given / "test.jsonl") in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("status", "message", "flags"),
    [
        # ArmoRM 0.5 0.1 0.4 0.2: sd sqrt(0.1 / 4) = 0.158; margins 0.1 / sd = 0.632
        (1, "2 small margin; --min_margin=9, but the largest margin is 0.6325)", ("--ArmoRM=1.0", "--min_margin=9")),
        (2, "--min_margin=-1.0 must not be negative", ("--ArmoRM=1.0", "--min_margin=-1")),
        (2, "top_bottom makes one pair per prompt", ("--ArmoRM=1.0", "--max_pairs_per_prompt=3")),
        (2, "top_random makes one pair", ("--ArmoRM=1.0", "--max_pairs_per_prompt=3", "--selection=top_random")),
        (2, "must be at least 1", ("--ArmoRM=1.0", "--max_pairs_per_prompt=0", "--selection=all_pairs")),
        (2, "requires --standardize=true", ("--ArmoRM=1.0", "--standardize=false", "--standardize_by=train")),
        (2, "ArmoRM has no such head. Its UltraFeedback", ("--ultrafeedback_verbosity=0.5", "--ArmoRM=0.5")),
        (2, "the objective weights sum to 0.7, not to 1", ("--ArmoRM=0.7",)),
        (2, "the objective weights sum to 0, not to 1", ()),
        (2, "--helpsteer_complexity=-0.5: a weight is", ("--ArmoRM=1.5", "--helpsteer_complexity=-0.5")),
        (2, "--weights kind=nan: a weight is", ("--ArmoRM=1.0", "--weights", "kind=nan")),
    ],
)
def test_flags_that_are_wrong_or_leave_no_pair_are_named(status, message, flags, run, given, out):
    write(given, GOOD)
    assert message in " ".join(run(*flags, status=status).stderr.split())
    assert not out.exists()


def test_pairs_never_overwrite_their_completions(run, given):
    write(given, GOOD)
    before = files_of(given)
    done = run("--ArmoRM=1.0", "--overwrite=true", out=f"{given}/", status=2)
    assert "is the folder of the completions" in done.stderr
    assert files_of(given) == before
    (given / "test.jsonl").unlink()
    assert "test.jsonl: no such file" in run("--ArmoRM=1.0", status=1).stderr


@pytest.mark.parametrize("moves", [0, 1])
def test_killed_while_replacing_the_pairs(given, out, monkeypatch, moves):
    """Before or between the two files' moves: neither command takes the folder for its own, nor loses a file unasked."""
    write(given, GOOD)
    old = PreferencesConfig(completions=str(given), output_path=str(out), ArmoRM=1.0)
    generate_preferences(old)
    before = {split: (out / f"{split}.jsonl").read_bytes() for split in ("train", "test")}
    real, moved = os.replace, []

    def killed(source, target):
        if Path(target).suffix == ".jsonl":
            if len(moved) == moves:
                raise KeyboardInterrupt
            moved.append(target)
        real(source, target)

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            generate_preferences(replace(old, ArmoRM=0.0, ultrafeedback_truthfulness=1.0, overwrite=True))
    assert len(list(out.glob("*.jsonl"))) == moves
    if moves:
        with pytest.raises(UsageError, match="contains results from a different configuration"):
            generate_preferences(old)
        old = replace(old, overwrite=True)
    generate_preferences(old)
    assert {split: (out / f"{split}.jsonl").read_bytes() for split in ("train", "test")} == before
    assert facts_of(out)["made_by"]["weights"] == {"ArmoRM": 1.0}

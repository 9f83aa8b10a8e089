"""Step 2 as a command: pairs computed by hand, and every bad input as one line and the right exit status."""

import json
import os
import random
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from drdpo.errors import UsageError
from drdpo.records import Preference, read_records

Row = dict[str, Any]


def row(prompt_id: int, sample_id: int, text: str, **scores: float) -> Row:
    return {
        "prompt_id": prompt_id, "sample_id": sample_id, "prompt": [{"role": "user", "content": f"question {prompt_id}"}],
        "completion": [{"role": "assistant", "content": text}], "token_ids": [prompt_id, sample_id, 7],
        "finish_reason": "stop", "scores": {name.replace("_", "-", 1): value for name, value in scores.items()},
    }  # fmt: skip


def good_rows() -> list[Row]:
    """Three prompts; honesty alone would choose sample 0, with the mix of two z-scores the choice is another."""
    return [
        row(7, 0, "a", ultrafeedback_truthfulness=0.0, helpsteer_complexity=3.0, ArmoRM=0.5),
        row(3, 0, "b", ultrafeedback_truthfulness=2.0, helpsteer_complexity=1.0, ArmoRM=0.1),
        row(7, 1, "c", ultrafeedback_truthfulness=2.0, helpsteer_complexity=3.0, ArmoRM=0.4),
        row(3, 1, "d", ultrafeedback_truthfulness=0.0, helpsteer_complexity=1.0, ArmoRM=0.2),
    ]


def write(folder: Path, train: list[Row] | str | None, test: list[Row] | str | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        if rows is not None:
            text = rows if isinstance(rows, str) else "".join(json.dumps(one) + "\n" for one in rows)
            (folder / f"{split}.jsonl").write_text(text)
    return folder


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@pytest.fixture
def run(root, monkeypatch, capsys):
    """The entrypoint in this process: fast, and otherwise the same."""
    script = root / "src" / "generate_preferences.py"

    def call(*flags):
        monkeypatch.setattr(sys, "argv", [str(script), *flags])
        status = 0
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Done(status, *capsys.readouterr())

    return call


def run_without_torch(root: Path, *flags: str) -> Done:
    """The entrypoint in a process of its own, where importing torch is an error."""
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(root / "src" / "generate_preferences.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "my completions", tmp_path / "my pairs"


def flags_of(paths: tuple[Path, Path], *more: str) -> list[str]:
    return [f"--completions={paths[0]}", f"--output_path={paths[1]}", *more]


README_MIX = ("--ultrafeedback_truthfulness=0.5", "--helpsteer_complexity=0.5")


def test_the_readme_command(root, run, paths):
    write(paths[0], good_rows(), good_rows()[:1] + good_rows()[2:3])
    done = run_without_torch(root, *flags_of(paths, *README_MIX))
    assert done.returncode == 0, done.stderr
    pairs = {pair.prompt_id: pair for pair in read_records(paths[1] / "train.jsonl", Preference.from_row)}
    # truthfulness: mean 1, sd 1; complexity: mean 2, sd 1. Mixes: (7,0) 0, (7,1) 1, (3,0) 0, (3,1) -1.
    assert list(pairs) == [7, 3]
    assert pairs[7].chosen == [{"role": "assistant", "content": "c"}]
    assert pairs[7].rejected == [{"role": "assistant", "content": "a"}]
    assert (pairs[7].chosen_score, pairs[7].rejected_score) == (1.0, 0.0)
    assert (pairs[3].chosen_score, pairs[3].rejected_score) == (0.0, -1.0)
    assert (pairs[3].chosen_token_ids, pairs[3].rejected_token_ids) == ([3, 0, 7], [3, 1, 7])
    assert "train: 2 pairs from 2 prompts; dropped: none" in done.stdout
    assert "test: 1 pairs from 1 prompts" in done.stdout
    facts = json.loads((paths[1] / "manifest.json").read_text())["preferences"]
    assert facts["made_by"]["weights"] == {"ultrafeedback-truthfulness": 0.5, "helpsteer-complexity": 0.5}
    assert facts["train"]["scores"]["helpsteer-complexity"] == {"mean": 2.0, "sd": 1.0}
    assert facts["test"]["scores"]["helpsteer-complexity"] == {"mean": 3.0, "sd": 0.0}
    again = run(*flags_of(paths, *README_MIX))
    assert again.returncode == 0
    assert again.stdout.count("\n") == 1
    assert "skipped" in again.stdout
    other = run(*flags_of(paths, "--ArmoRM=1.0"))
    assert other.returncode == 2
    assert "--overwrite=true" in other.stderr
    assert run(*flags_of(paths, "--ArmoRM=1.0", "--overwrite=true")).returncode == 0
    assert {p.prompt_id: p.chosen_token_ids for p in read_records(paths[1] / "train.jsonl", Preference.from_row)} == {
        7: [7, 0, 7],
        3: [3, 1, 7],
    }


def test_raw_scores_without_standardisation(run, paths):
    write(paths[0], good_rows(), good_rows())
    done = run(*flags_of(paths, "--ArmoRM=1.0", "--standardize=false"))
    assert done.returncode == 0, done.stderr
    pair = read_records(paths[1] / "test.jsonl", Preference.from_row)[0]
    assert (pair.prompt_id, pair.chosen_score, pair.rejected_score) == (7, 0.5, 0.4)


def test_ties_equal_texts_empty_and_lonely_completions_are_dropped_and_counted(run, paths):
    rows = [
        row(1, 0, "x", ArmoRM=1.0), row(1, 1, "y", ArmoRM=1.0), row(1, 2, "z", ArmoRM=1.0),
        row(2, 0, "same", ArmoRM=1.0), row(2, 1, "  same\n", ArmoRM=2.0),
        row(3, 5, "alone", ArmoRM=9.0), row(5, 0, " \n", ArmoRM=1.0), row(5, 1, "said", ArmoRM=2.0),
        row(4, 2, "low", ArmoRM=0.0), row(4, 0, "mid", ArmoRM=1.0), row(4, 9, "high", ArmoRM=3.0),
        row(4, 10, "tied", ArmoRM=3.0),
    ]  # fmt: skip
    write(paths[0], rows, rows)
    done = run(*flags_of(paths, "--ArmoRM=1.0"))
    assert done.returncode == 0, done.stderr
    (pair,) = read_records(paths[1] / "train.jsonl", Preference.from_row)
    assert (pair.prompt_id, pair.chosen_token_ids, pair.rejected_token_ids) == (4, [4, 9, 7], [4, 2, 7])
    assert json.loads((paths[1] / "manifest.json").read_text())["preferences"]["train"]["counts"] == {
        "prompts": 5, "completions": 12, "candidates": 4, "pairs": 1, "prompts_without_pair": 4,
        "dropped_one_completion": 1, "dropped_zero_margin": 1, "dropped_small_margin": 0, "dropped_empty_text": 1,
        "dropped_equal_texts": 1, "dropped_over_max_pairs_per_prompt": 0, "not_drawn": 0,
    }  # fmt: skip
    assert (
        "train: 1 pairs from 5 prompts; dropped: 1 one completion, 1 zero margin, 1 empty text, 1 equal texts" in done.stdout
    )


def random_rows(seed: int, prompts: int = 40) -> list[Row]:
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


def written(folder: Path, split: str = "train") -> list[Preference]:
    return read_records(folder / f"{split}.jsonl", Preference.from_row)


SELECTIONS = {
    "top_bottom": [],
    "top_random": ["--selection=top_random"],
    "all_pairs": ["--selection=all_pairs"],
    "best two pairs": ["--selection=all_pairs", "--min_margin=0.7", "--max_pairs_per_prompt=2"],
}
HALF = ("--ultrafeedback_honesty=0.5", "--ArmoRM=0.5")


@pytest.mark.parametrize("flags", SELECTIONS.values(), ids=SELECTIONS)
def test_the_order_of_the_file_changes_no_pair(run, tmp_path, flags):
    rows, shuffled = random_rows(1), random_rows(1)
    random.Random(0).shuffle(shuffled)
    for name, train in (("in order", rows), ("shuffled", shuffled)):
        write(tmp_path / name, train, rows)
        assert run(*flags_of((tmp_path / name, tmp_path / f"pairs {name}"), *HALF, *flags)).returncode == 0
    first, second = (written(tmp_path / f"pairs {name}") for name in ("in order", "shuffled"))
    assert first != second, "prompts come in the order of the file"
    assert sorted(first, key=lambda pair: pair.prompt_id) == sorted(second, key=lambda pair: pair.prompt_id)
    assert len(first) >= 30


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_selection_is_made_once_and_refused_under_other_flags(run, paths, selection):
    rows, flags = random_rows(3), SELECTIONS[selection]
    write(paths[0], rows, rows)
    done = run(*flags_of(paths, *HALF, *flags))
    assert done.returncode == 0, done.stderr
    pairs = written(paths[1])
    assert f"train: {len(pairs)} pairs from 40 prompts" in done.stdout
    facts = json.loads((paths[1] / "manifest.json").read_text())["preferences"]
    margins = [pair.chosen_score - pair.rejected_score for pair in pairs]  # type: ignore[operator]
    assert facts["train"]["margins"]["min"] == pytest.approx(min(margins))
    assert run(*flags_of(paths, *HALF, *flags)).stdout.count("skipped") == 1
    other = run(*flags_of(paths, *HALF, *flags, "--min_margin=0.8"))
    assert (other.returncode, "min_margin" in other.stderr) == (2, True)
    seeded = run(*flags_of(paths, *HALF, *flags, "--seed=7"))
    assert seeded.returncode == (2 if selection == "top_random" else 0), "the seed matters where something is drawn"


def test_standardised_by_train_a_completion_scores_the_same_in_test(run, paths):
    train = good_rows()  # prompt 7 in train too; truthfulness mean 1, sd 1; complexity mean 2, sd 1
    write(paths[0], train, [train[0], train[2]])
    done = run(*flags_of(paths, *README_MIX, "--standardize_by=train"))
    assert done.returncode == 0, done.stderr
    of_train = {pair.prompt_id: pair for pair in written(paths[1])}
    (of_test,) = written(paths[1], "test")
    assert of_test == of_train[7]
    assert (of_test.chosen_score, of_test.rejected_score) == (1.0, 0.0)
    facts = json.loads((paths[1] / "manifest.json").read_text())["preferences"]
    assert facts["test"]["scores"]["helpsteer-complexity"] == {"mean": 3.0, "sd": 0.0}
    assert facts["test"]["standardized_by"]["helpsteer-complexity"] == {"mean": 2.0, "sd": 1.0}
    assert facts["made_by"]["standardize_by"] == "train"
    assert "train mean    train sd" in done.stdout
    assert run(*flags_of(paths, *README_MIX)).returncode == 2, "a different configuration"
    assert run(*flags_of(paths, *README_MIX, "--overwrite=true")).returncode == 0
    (by_split,) = written(paths[1], "test")
    assert by_split.chosen_score == 0.5, "by its own split complexity has sd 0"


def test_rows_have_the_scores_by_which_another_mixture_would_label_them(run, paths):
    """What --eval_mixture of the trainer relabels by."""
    (source, folder), other, rng = paths, paths[1].parent / "other", random.Random(9)
    train = random_rows(7, prompts=20)
    for one in train:
        one["scores"] |= {"code-style": rng.gauss(0, 3), "code-readability": 1.0}
    del train[0]["scores"]["code-readability"]  # not an objective of every completion
    write(source, train, train)
    assert run(*flags_of(paths, *HALF)).returncode == 0
    assert run(*flags_of((source, other), "--code_style=1.0", "--selection=all_pairs")).returncode == 0
    texts = {(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in written(other)}
    pairs, swapped = written(folder), 0
    for pair in pairs:
        first, second = pair.chosen_scores, pair.rejected_scores
        assert first is not None and second is not None
        assert list(first) == ["ArmoRM", "code-style", "ultrafeedback-honesty"]
        for score, scores in ((pair.chosen_score, first), (pair.rejected_score, second)):
            assert score == pytest.approx(0.5 * scores["ArmoRM"] + 0.5 * scores["ultrafeedback-honesty"], abs=1e-12)
        swap = first["code-style"] < second["code-style"]
        answers = [pair.chosen[0]["content"], pair.rejected[0]["content"]]
        assert tuple(reversed(answers) if swap else answers) in texts
        swapped += swap
    assert 0 < swapped < len(pairs)


def test_a_dry_run_prints_the_report_and_writes_nothing(run, paths):
    write(paths[0], random_rows(4, prompts=60), random_rows(5, prompts=3))
    flags = flags_of(paths, "--ultrafeedback_honesty=1.0")
    dry = run(*flags, "--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert not paths[1].exists()
    assert "dry run: nothing was written" in dry.stdout
    assert "train: length bias: chosen is longer for " in dry.stdout and "no significant bias" in dry.stdout
    real = run(*flags)
    assert real.stdout.strip() in dry.stdout, "the same report"
    lengths = json.loads((paths[1] / "manifest.json").read_text())["preferences"]["train"]["lengths"]
    assert (lengths["unit"], lengths["biased"]) == ("tokens", True) and lengths["margin_correlation"] > 0.5
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in paths[1].iterdir()}
    for other in ([], ["--selection=all_pairs"], ["--overwrite=true", "--min_margin=0.5"]):
        again = run(*flags, *other, "--dry_run=true")
        assert again.returncode == 0, again.stderr
        assert "nothing was written" in again.stdout
    assert before == {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in paths[1].iterdir()}


def nan_score() -> str:
    return "".join(json.dumps(one) + "\n" for one in good_rows()).replace('"ArmoRM": 0.4', '"ArmoRM": NaN')


BAD_DATA: dict[str, tuple[Any, Any, str]] = {
    "missing test split": (good_rows(), None, "test.jsonl: no such file"),
    "scores whose squares overflow": (
        [row(1, 0, "a", ArmoRM=0.0), row(1, 1, "b", ArmoRM=1e200)],
        good_rows(),
        'row 2: field "scores": ArmoRM is 1e+200',
    ),
    "missing objective": ([row(1, 0, "a", kind=1.0), row(1, 1, "b", kind=2.0)], good_rows(), "lacks ArmoRM; it has kind"),
    "unscored": ([row(1, 0, "a"), row(1, 1, "b")], good_rows(), "no scores at all"),
    "NaN score": (good_rows(), nan_score(), 'test.jsonl, row 3: field "scores": not a finite number'),
    "n = 1": (good_rows(), [row(1, 0, "a", ArmoRM=1.0), row(2, 0, "b", ArmoRM=2.0)], "only one completion"),
    "duplicate key": (good_rows(), [*good_rows(), good_rows()[2]], 'row 5: field "prompt_id", "sample_id" repeats (7, 1)'),
    "objective missing in one row": (
        good_rows(),
        [*good_rows()[:3], row(3, 1, "d", ultrafeedback_truthfulness=0.0)],
        'row 4 (prompt_id 3, sample_id 1): field "scores" lacks ArmoRM; it has ultrafeedback-truthfulness',
    ),
    "only equal texts": (
        good_rows(),
        [row(1, 0, "a", ArmoRM=1.0), row(1, 1, "a ", ArmoRM=2.0), row(2, 0, "b", ArmoRM=2.0)],
        "no pair is left of 2 prompts (1 one completion, 1 equal texts)",
    ),
    "no pair left": (good_rows(), [row(1, 0, "a", ArmoRM=1.0), row(1, 1, "b", ArmoRM=1.0)], "no pair is left of 1 prompts"),
    "two prompts": (
        good_rows(),
        [row(1, 0, "a", ArmoRM=1.0), {**row(1, 1, "b", ArmoRM=2.0), "prompt": [{"role": "user", "content": "other"}]}],
        'row 2: field "prompt" differs',
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_and_status_1_and_writes_nothing(run, paths, case):
    train, test, message = BAD_DATA[case]
    write(paths[0], train, test)
    done = run(*flags_of(paths, "--ArmoRM=1.0"))
    assert done.returncode == 1, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert str(paths[0]) in done.stderr
    assert not paths[1].exists() or not list(paths[1].iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--min_margin=9",), "2 small margin; --min_margin=9, but the largest margin is 0.6325)"),
        (("--selection=top_random", "--min_margin=9"), "no pair is left of 2 prompts (2 small margin"),
    ],
)
def test_the_filter_that_left_no_pair_is_named(run, paths, flags, message):
    # ArmoRM 0.5 0.1 0.4 0.2: sd sqrt(0.1 / 4) = 0.158; margins 0.1 / sd = 0.632
    write(paths[0], [{**one, "completion": [{"role": "assistant", "content": f"same{'.' * index}"}]}
                     for index, one in enumerate(good_rows())], good_rows())  # fmt: skip
    done = run(*flags_of(paths, "--ArmoRM=1.0", *flags))
    assert done.returncode == 1
    assert "train.jsonl" in done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not paths[1].exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ArmoRM=1.0", "--min_margin=-1"), "--min_margin=-1.0 must not be negative"),
        (("--ArmoRM=1.0", "--max_pairs_per_prompt=3"), "top_bottom makes one pair per prompt"),
        (
            ("--ArmoRM=1.0", "--max_pairs_per_prompt=3", "--selection=top_random"),
            "requires --selection=all_pairs; top_random makes one pair",
        ),
        (("--ArmoRM=1.0", "--max_pairs_per_prompt=0", "--selection=all_pairs"), "must be at least 1"),
        (
            ("--ArmoRM=1.0", "--standardize=false", "--standardize_by=train"),
            "--standardize_by=train requires --standardize=true",
        ),
        (("--ultrafeedback_verbosity=0.5", "--ArmoRM=0.5"), "ArmoRM has no such head. Its UltraFeedback heads are"),
        (("--ArmoRM=0.7",), "the objective weights sum to 0.7, not to 1"),
        ((), "the objective weights sum to 0, not to 1"),
        (
            ("--ArmoRM=1.5", "--helpsteer_complexity=-0.5"),
            "--helpsteer_complexity=-0.5: a weight is finite and not negative",
        ),
        (("--ArmoRM=1.5", "--weights", "kind=-0.5"), "--weights kind=-0.5: a weight is finite and not negative"),
        (("--ArmoRM=1.0", "--weights", "kind=nan"), "--weights kind=nan: a weight is finite and not negative"),
    ],
)
def test_wrong_flags_are_status_2(run, paths, flags, message):
    write(paths[0], good_rows(), good_rows())
    done = run(*flags_of(paths, *flags))
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split()) or message in done.stderr
    assert not paths[1].exists()


def test_pairs_never_overwrite_their_completions(run, paths):
    write(paths[0], good_rows(), good_rows())
    before = (paths[0] / "train.jsonl").read_bytes()
    done = run(f"--completions={paths[0]}", f"--output_path={paths[0]}/", "--ArmoRM=1.0", "--overwrite=true")
    assert done.returncode == 2
    assert "is the folder of the completions" in done.stderr
    assert (paths[0] / "train.jsonl").read_bytes() == before


@pytest.mark.parametrize("moves", [0, 1])
def test_killed_while_replacing_the_pairs(paths, monkeypatch, moves):
    """Before or between the two files' moves: neither command takes the folder for its own, nor loses a file unasked."""

    from drdpo.config.data import PreferencesConfig
    from drdpo.pairing import generate_preferences

    write(paths[0], good_rows(), good_rows())
    common = {"completions": str(paths[0]), "output_path": str(paths[1])}
    generate_preferences(old := PreferencesConfig(**common, ArmoRM=1.0))
    before = {split: (paths[1] / f"{split}.jsonl").read_bytes() for split in ("train", "test")}
    new = PreferencesConfig(**common, ultrafeedback_truthfulness=1.0, overwrite=True)
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
            generate_preferences(new)
    assert len(list(paths[1].glob("*.jsonl"))) == moves
    if moves:
        with pytest.raises(UsageError, match="contains results from a different configuration"):
            generate_preferences(old)
        old = replace(old, overwrite=True)
    generate_preferences(old)
    assert {split: (paths[1] / f"{split}.jsonl").read_bytes() for split in ("train", "test")} == before
    facts = json.loads((paths[1] / "manifest.json").read_text())["preferences"]
    assert facts["made_by"]["weights"] == {"ArmoRM": 1.0}

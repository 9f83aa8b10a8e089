"""Step 2 as a command: pairs computed by hand, and every bad input as one line and the right exit status."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

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
def run(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The entrypoint in this process: fast, and otherwise the same."""
    script = root / "src" / "generate_preferences.py"

    def call(*flags: str) -> Done:
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
        "sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(root / "src" / "generate_preferences.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "my completions", tmp_path / "my pairs"


def flags_of(paths: tuple[Path, Path], *more: str) -> list[str]:
    return [f"--completions={paths[0]}", f"--output_path={paths[1]}", *more]


README_MIX = ("--ultrafeedback_truthfulness=0.5", "--helpsteer_complexity=0.5")


def test_the_readme_command(root: Path, run: Command, paths: tuple[Path, Path]) -> None:
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


def test_raw_scores_without_standardisation(run: Command, paths: tuple[Path, Path]) -> None:
    write(paths[0], good_rows(), good_rows())
    done = run(*flags_of(paths, "--ArmoRM=1.0", "--standardize=false"))
    assert done.returncode == 0, done.stderr
    pair = read_records(paths[1] / "test.jsonl", Preference.from_row)[0]
    assert (pair.prompt_id, pair.chosen_score, pair.rejected_score) == (7, 0.5, 0.4)


def test_ties_equal_texts_and_lonely_completions_are_dropped_and_counted(run: Command, paths: tuple[Path, Path]) -> None:
    rows = [
        row(1, 0, "x", ArmoRM=1.0), row(1, 1, "y", ArmoRM=1.0), row(1, 2, "z", ArmoRM=1.0),
        row(2, 0, "same", ArmoRM=1.0), row(2, 1, "  same\n", ArmoRM=2.0),
        row(3, 5, "alone", ArmoRM=9.0),
        row(4, 2, "low", ArmoRM=0.0), row(4, 0, "mid", ArmoRM=1.0), row(4, 9, "high", ArmoRM=3.0),
        row(4, 10, "tied", ArmoRM=3.0),
    ]  # fmt: skip
    write(paths[0], rows, rows)
    done = run(*flags_of(paths, "--ArmoRM=1.0"))
    assert done.returncode == 0, done.stderr
    (pair,) = read_records(paths[1] / "train.jsonl", Preference.from_row)
    assert (pair.prompt_id, pair.chosen_token_ids, pair.rejected_token_ids) == (4, [4, 9, 7], [4, 2, 7])
    assert json.loads((paths[1] / "manifest.json").read_text())["preferences"]["train"]["counts"] == {
        "prompts": 4, "completions": 10, "pairs": 1,
        "dropped_one_completion": 1, "dropped_zero_margin": 1, "dropped_equal_texts": 1,
    }  # fmt: skip


def test_the_order_of_the_file_does_not_matter(run: Command, paths: tuple[Path, Path]) -> None:
    write(paths[0], good_rows(), good_rows()[::-1])
    assert run(*flags_of(paths, *README_MIX)).returncode == 0
    train, test = (read_records(paths[1] / f"{split}.jsonl", Preference.from_row) for split in ("train", "test"))
    assert sorted(train, key=lambda pair: pair.prompt_id) == sorted(test, key=lambda pair: pair.prompt_id)


def nan_score() -> str:
    return "".join(json.dumps(one) + "\n" for one in good_rows()).replace('"ArmoRM": 0.4', '"ArmoRM": NaN')


BAD_DATA: dict[str, tuple[Any, Any, str]] = {
    "missing test split": (good_rows(), None, "test.jsonl: no such file"),
    "missing train split": (None, good_rows(), "train.jsonl: no such file"),
    "empty file": (good_rows(), "", "test.jsonl: the file has no rows"),
    "cut line": (good_rows(), json.dumps(good_rows()[0])[:-9], "test.jsonl, row 1: not a whole JSON object"),
    "missing objective": ([row(1, 0, "a", kind=1.0), row(1, 1, "b", kind=2.0)], good_rows(), "lacks ArmoRM; it has kind"),
    "unscored": ([row(1, 0, "a"), row(1, 1, "b")], good_rows(), "no scores at all"),
    "NaN score": (good_rows(), nan_score(), 'test.jsonl, row 3: field "scores" must map objectives to finite numbers'),
    "n = 1": (good_rows(), [row(1, 0, "a", ArmoRM=1.0), row(2, 0, "b", ArmoRM=2.0)], "a pair needs best_of_n >= 2"),
    "duplicate key": (good_rows(), [*good_rows(), good_rows()[2]], 'row 5: field "prompt_id", "sample_id" repeats (7, 1)'),
    "no pair left": (good_rows(), [row(1, 0, "a", ArmoRM=1.0), row(1, 1, "b", ArmoRM=1.0)], "no pair is left of 1 prompts"),
    "two prompts": (
        good_rows(),
        [row(1, 0, "a", ArmoRM=1.0), {**row(1, 1, "b", ArmoRM=2.0), "prompt": [{"role": "user", "content": "other"}]}],
        'row 2: field "prompt" differs',
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_and_status_1_and_writes_nothing(run: Command, paths: tuple[Path, Path], case: str) -> None:
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
        (("--ultrafeedback_verbosity=0.5", "--ArmoRM=0.5"), "ArmoRM has no such head. Its UltraFeedback heads are"),
        (("--ArmoRM=0.7",), "the objective weights sum to 0.7, not to 1"),
        ((), "the objective weights sum to 0, not to 1"),
        (("--ArmoRM=nan",), "--ArmoRM=nan is not a finite number"),
        (
            ("--ArmoRM=1.5", "--helpsteer_complexity=-0.5"),
            "--helpsteer_complexity=-0.5: a weight is finite and not negative",
        ),
        (("--ArmoRM=1.5", "--weights", "kind=-0.5"), "--weights kind=-0.5: a weight is finite and not negative"),
        (("--ArmoRM=1.0", "--weights", "kind=nan"), "--weights kind=nan: a weight is finite and not negative"),
        (("--ArmoRM=1.0", "--helpsteer_kindness=0.5"), "unrecognized arguments"),
    ],
)
def test_wrong_flags_are_status_2(run: Command, paths: tuple[Path, Path], flags: tuple[str, ...], message: str) -> None:
    write(paths[0], good_rows(), good_rows())
    done = run(*flags_of(paths, *flags))
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split()) or message in done.stderr
    assert not paths[1].exists()


def test_bad_commands_in_a_process_of_their_own(root: Path, paths: tuple[Path, Path]) -> None:
    write(paths[0], good_rows(), nan_score())
    done = run_without_torch(root, *flags_of(paths, "--ArmoRM=1.0"))
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("[transformers] PyTorch was not found")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    done = run_without_torch(root, *flags_of(paths, "--ultrafeedback_verbosity=1.0"))
    assert done.returncode == 2
    assert "ArmoRM has no such head" in done.stderr
    assert "Traceback" not in done.stderr


def test_pairs_never_overwrite_their_completions(run: Command, paths: tuple[Path, Path]) -> None:
    write(paths[0], good_rows(), good_rows())
    before = (paths[0] / "train.jsonl").read_bytes()
    done = run(f"--completions={paths[0]}", f"--output_path={paths[0]}/", "--ArmoRM=1.0", "--overwrite=true")
    assert done.returncode == 2
    assert "never overwrite their input" in done.stderr
    assert (paths[0] / "train.jsonl").read_bytes() == before


def test_a_full_disk_leaves_the_old_pairs(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from drdpo.config import PreferencesConfig
    from drdpo.rewards import pairing

    write(paths[0], good_rows(), good_rows())
    config = PreferencesConfig(completions=str(paths[0]), output_path=str(paths[1]), ArmoRM=1.0)
    real, calls = pairing.write_records, []

    def full_at_the_second(path: Path, records: Any) -> int:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, records)

    monkeypatch.setattr(pairing, "write_records", full_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        pairing.generate_preferences(config)
    assert list(paths[1].iterdir()) == []


@pytest.mark.parametrize("moves", [0, 1])
def test_killed_while_replacing_the_pairs(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    """Before or between the two files' moves: neither command then takes the folder for its own."""
    import os

    from drdpo.config import PreferencesConfig
    from drdpo.rewards.pairing import generate_preferences

    write(paths[0], good_rows(), good_rows())
    common: dict[str, Any] = {"completions": str(paths[0]), "output_path": str(paths[1])}
    generate_preferences(old := PreferencesConfig(**common, ArmoRM=1.0))
    before = {split: (paths[1] / f"{split}.jsonl").read_bytes() for split in ("train", "test")}
    new = PreferencesConfig(**common, ultrafeedback_truthfulness=1.0, overwrite=True)
    real, moved = os.replace, []

    def killed(source: Any, target: Any) -> None:
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
    generate_preferences(old)
    assert {split: (paths[1] / f"{split}.jsonl").read_bytes() for split in ("train", "test")} == before
    facts = json.loads((paths[1] / "manifest.json").read_text())["preferences"]
    assert facts["made_by"]["weights"] == {"ArmoRM": 1.0}


def test_pairs_open_in_trl_format(run: Command, paths: tuple[Path, Path]) -> None:
    import datasets

    write(paths[0], good_rows(), good_rows())
    assert run(*flags_of(paths, *README_MIX)).returncode == 0
    files = {split: str(paths[1] / f"{split}.jsonl") for split in ("train", "test")}
    loaded = datasets.load_dataset("json", data_files=files, cache_dir=str(paths[1].parent / "cache"))
    first = loaded["train"][0]
    assert first["prompt"] == [{"role": "user", "content": "question 7"}]
    assert [turn["role"] for turn in first["chosen"] + first["rejected"]] == ["assistant", "assistant"]

"""show_run: a running, a dead and a finished training folder, and folders of other steps."""

import fcntl
import json
import re
import subprocess
import sys

import pytest

from drdpo.config import ShowRunConfig
from drdpo.errors import DataError
from drdpo.evaluation.show_run import _STEPS, show_run
from drdpo.evaluation.show_run_curves import running_mean
from drdpo.evaluation.show_run_state import read_training
from drdpo.manifest import write_manifest


@pytest.fixture
def folder(tmp_path):
    """A KLDPO run of 8 pairs a step, killed in its third line, after two steps of 4 s, of ten."""
    run = tmp_path / "a run"
    write_manifest(run, "train", {"train_batch_size": 8, "kldpo_tau": 0.05, "wdpo_rho": None}, steps=10, complete=False)
    rows = [
        {
            "step": 1,
            "epoch": 0.5,
            "loss": 0.7,
            "accuracy": 0.5,
            "margin": 0.0,
            "pairs_per_second": 2.0,
            "effective_sample_size": 8,
        },
        {"step": 2, "epoch": 1, "loss": 0.6, "accuracy": 1, "margin": 0.2, "pairs_per_second": 2.0, "eval_loss": 0.65},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    for state, files in (("step_2", ["state.json"]), ("step_3", ["part"])):
        (run / "resume" / state).mkdir(parents=True)
        for name in files:
            (run / "resume" / state / name).write_text("{}")
    return run


def shown(folder, capsys, picture=False):
    show_run(ShowRunConfig(str(folder), picture))
    return capsys.readouterr().out


def test_a_dead_run(folder, capsys):
    text = shown(folder, capsys)
    assert "stopped at step 2; the same command continues after step 2" in text
    assert "step 2 of 10 (20%), epoch 1.00" in text
    assert "KLDPO --kldpo_tau=0.05" in text
    assert "4.0 s a step" in text
    assert "loss 0.6" in text and "eval_loss 0.65 at step 2" in text
    assert "not whole after step 2" in text
    assert "time to go" not in text
    assert not (folder / "training.png").exists()


def test_a_running_one_has_an_owner_and_time_to_go(folder, capsys):
    with (folder / ".lock").open("w") as lock:
        json.dump({"pid": 4321, "host": "node7", "started": "2026-01-02T03:04:05+00:00"}, lock)
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = shown(folder, capsys)
        assert "running: process 4321 on node7 since 2026-01-02T03:04:05+00:00" in text
        assert "time to go     32.0 s" in text  # 8 steps of 4 s
    assert "stopped at step 2" in shown(folder, capsys), "the lock's file stays, its owner has gone"


def test_a_finished_one(folder, capsys):
    write_manifest(folder, "train", {"train_batch_size": 8}, steps=2, complete=True)
    text = shown(folder, capsys)
    assert "state          finished" in text and "method         DPO" in text and "step 2 of 2 (100%)" in text


def test_the_picture_is_a_png_and_nothing_else_is_left(folder, capsys):
    before = {path.name for path in folder.iterdir()}
    assert "training.png" in shown(folder, capsys, picture=True)
    assert {path.name for path in folder.iterdir()} == before | {"training.png"}
    assert (folder / "training.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_steps_that_were_logged_twice_count_once(folder):
    whole = (folder / "metrics.jsonl").read_text().splitlines()[:2]
    (folder / "metrics.jsonl").write_text("\n".join([*whole, '{"step": 2, "loss": 0.5, "lr": "x", "nan": NaN}']) + "\n")
    state = read_training(folder)
    assert [row["step"] for row in state.rows] == [1, 2]
    assert state.rows[1] == {"step": 2, "loss": 0.5}
    assert not state.torn


def test_running_mean():
    assert running_mean([1, 2, 3, 4, 5], 3).tolist() == [1, 1.5, 2, 3, 4]


def test_other_steps_folders(tmp_path, capsys):
    for split in ("train", "test"):
        write_manifest(tmp_path, f"score_{split}", {}, counts={"in": 4, "out": 3})
    (tmp_path / "train.jsonl").write_text("")
    text = shown(tmp_path, capsys)
    assert "scored completions (train), complete" in text
    assert "scored completions (test), not complete: test.jsonl is missing" in text
    assert "in 4, out 3" in text


def test_every_step_that_writes_a_manifest_is_known_by_its_name(root):
    """By the names that their sources give to write_manifest."""
    named = {
        re.search(r'^STEP = "(\w+)"', path.read_text(), re.MULTILINE) for path in (root / "src" / "drdpo").rglob("*.py")
    }
    given = re.compile(r'write_manifest\([^"\n]*, "(\w+)"')
    steps = {match[1] for match in named if match}
    steps |= {name for path in (root / "src" / "drdpo").rglob("*.py") for name in given.findall(path.read_text())}
    assert {"preferences", "evaluate_openllm", "compare_mixtures", "assets", "train"} <= steps
    assert steps - {"train"} <= set(_STEPS), "show_run says of the others only that they are results, and misses no file"


def test_a_preference_folder_without_its_pairs_is_not_complete(tmp_path, capsys):
    write_manifest(tmp_path, "preferences", {})
    (tmp_path / "test.jsonl").write_text("")
    assert "preference pairs, not complete: train.jsonl is missing" in shown(tmp_path, capsys)


def test_a_folder_of_nothing_and_no_folder(tmp_path):
    with pytest.raises(DataError, match="no step of the pipeline"):
        show_run(ShowRunConfig(str(tmp_path)))
    with pytest.raises(DataError, match="no such folder"):
        show_run(ShowRunConfig(str(tmp_path / "x")))


def test_the_command(root, folder):
    done = subprocess.run(
        [sys.executable, str(root / "src/show_run.py"), str(folder), "--picture=false"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "stopped at step 2" in done.stdout

"""show_run: a dead, a running and a finished training folder, and folders of other steps."""

import fcntl
import json
import subprocess
import sys

import pytest

from drdpo.config.evaluation import ShowRunConfig
from drdpo.errors import DataError
from drdpo.evaluation.show_run import _curves, read_metrics, show_run
from drdpo.folder import write_manifest


@pytest.fixture
def folder(tmp_path):
    """A KLDPO run of 8 pairs a step, killed in its third line, after two steps of 4 s, of ten."""
    run = tmp_path / "a run"
    method = "KLDPO (kldpo_tau=0.05)"
    write_manifest(run, "train", {"train_batch_size": 8, "method": method}, steps=10, complete=False)
    rows = [
        {"step": 1, "loss": 0.7, "accuracy": 0.5, "pairs_per_second": 2.0, "effective_sample_size": 8},
        {"step": 2, "loss": 0.6, "accuracy": 1, "pairs_per_second": 2.0, "eval_loss": 0.65},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    for state, name in (("step_2", "state.json"), ("step_3", "part")):
        (run / "resume" / state).mkdir(parents=True)
        (run / "resume" / state / name).write_text("{}")
    return run


def shown(folder, capsys, picture=False):
    show_run(ShowRunConfig(str(folder), picture))
    return capsys.readouterr().out


def test_a_dead_run(folder, capsys):
    text = shown(folder, capsys)
    for fragment in ("stopped; rerun the same command to resume after step 2", "step 2 of 10 (20%)",
                     "KLDPO (kldpo_tau=0.05)", "4.0 s a step", "32.0 s, without", "eval_loss 0.65 at step 2"):  # fmt: skip
        assert fragment in text  # 8 of 10 steps are left, of 4 s each
    assert not (folder / "training.png").exists()


def test_a_running_one_has_an_owner(folder, capsys):
    with (folder / ".lock").open("w") as lock:
        json.dump({"pid": 4321, "host": "node7", "command": "train.py", "started": "2026-01-02T03:04:05+00:00"}, lock)
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "running: process 4321 on node7 (train.py), since 2026-01-02T03:04:05+00:00" in shown(folder, capsys)
    assert "stopped" in shown(folder, capsys), "the lock's file stays, its owner has gone"


def test_shifted_test_pairs_have_panels_of_their_own(folder):
    row = {"step": 3, "loss": 0.5, "eval_loss": 0.6, "eval_loss.domain.a": 0.7, "eval_loss.other": 0.8}
    row |= {"eval_accuracy.other": 1}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    axes = {part.get_title(): part for part in _curves(read_metrics(folder / "metrics.jsonl"), "a run").axes}
    shown = {title: [line.get_label() for line in part.lines] for title, part in axes.items()}
    assert shown["loss"] == ["loss", "eval_loss"]
    assert shown["loss, shifted test pairs"] == ["eval_loss.domain.a", "eval_loss.other"]
    assert shown["accuracy, shifted test pairs"] == ["eval_accuracy.other"]


def test_a_finished_one_and_its_picture(folder, capsys):
    write_manifest(folder, "train", {"train_batch_size": 8, "method": "DPO"}, steps=2, complete=True)
    before = {path.name for path in folder.iterdir()}
    text = shown(folder, capsys, picture=True)
    assert "training, finished" in text and "step 2 of 2 (100%)" in text and "DPO" in text
    assert {path.name for path in folder.iterdir()} == before | {"training.png"}
    assert (folder / "training.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_steps_that_were_logged_twice_count_once(folder):
    whole = (folder / "metrics.jsonl").read_text().splitlines()[:2]
    (folder / "metrics.jsonl").write_text("\n".join([*whole, '{"step": 2, "loss": 0.5, "lr": "x"}']) + "\n")
    table = read_metrics(folder / "metrics.jsonl")
    assert table.index.tolist() == [1, 2]
    assert table["loss"].tolist() == [0.7, 0.5] and table["lr"].isna().all()


def test_damaged_files_cause_no_traceback(folder, capsys):
    whole = (folder / "metrics.jsonl").read_text().splitlines()[0]
    for line in ('{"step": "x"}', '{"step": null}', '{"step": 1e400}', '{"step": true}', '{"loss": 1}'):
        (folder / "metrics.jsonl").write_text(f"{whole}\n{line}\n")
        assert "step 1 of 10" in shown(folder, capsys)
    for record in ([1], {"made_by": [], "steps": "8"}, {"made_by": {"train_batch_size": "many"}, "steps": -1}):
        (folder / "manifest.json").write_text(json.dumps({"train": record}))
        assert "step 1" in shown(folder, capsys)


def test_folders_of_other_steps_and_none(tmp_path, capsys):
    for name, says in (("x", "no such folder"), (".", "pass the output folder of a step")):
        with pytest.raises(DataError, match=says):
            show_run(ShowRunConfig(str(tmp_path / name)))
    write_manifest(tmp_path, "score_train", {}, counts={"in": 4, "out": 3})
    text = shown(tmp_path, capsys)
    assert "output of score_train" in text and "'in': 4, 'out': 3" in text


def test_the_command(root, folder):
    command = [sys.executable, str(root / "src/show_run.py"), str(folder), "--picture=false"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "resume after step 2" in done.stdout, done.stderr

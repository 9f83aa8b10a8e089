"""--keep_checkpoints keeps what it must, and a full disk stops a run with its last state intact."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from harness.runs import check_equal, flags_of, run_ranks, said, write_pairs

from drdpo.config import TrainConfig
from drdpo.training.checkpoint import kept_steps, remove_old_checkpoints, states


@pytest.mark.parametrize(
    ("steps", "losses", "newest", "expected"),
    [
        ([2, 4, 6, 8], {2: 0.1}, 0, {2, 4, 6, 8}),
        ([2], {}, 1, {2}),
        ([10, 8, 2, 4], {}, 2, {8, 10}),
        ([2, 4, 6, 8], {2: 0.5, 4: 0.4, 6: 0.6, 8: 0.7}, 1, {4, 8}),
        ([2, 4, 6, 8], {2: 0.4, 4: 0.4, 5: 0.1}, 1, {2, 8}),
        ([2, 4, 6, 8], {8: 0.1}, 1, {8}),
    ],
)
def test_the_newest_and_the_best_stay(steps, losses, newest, expected):
    assert kept_steps(steps, losses, newest) == expected


def test_others_are_removed(tmp_path):
    for step in (1, 2, 3, 4):
        (tmp_path / f"global_step_{step}").mkdir()
        (tmp_path / f"global_step_{step}" / "config.json").write_text("{}")
    (tmp_path / "global_step_4 of mine").mkdir()
    lines = [{"step": step, "loss": 1.0, **({"eval_loss": 1 / step} if step < 3 else {})} for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainConfig("m", "d", "s", keep_checkpoints=1, save_steps=1)
    remove_old_checkpoints(tmp_path, config)
    assert sorted(path.name for path in tmp_path.glob("*global*")) == [
        "global_step_2",
        "global_step_4",
        "global_step_4 of mine",
    ]


def test_a_checkpoint_that_cannot_be_moved_does_not_end_the_run(tmp_path, capsys):
    for step in (1, 2):
        (tmp_path / f"global_step_{step}").mkdir()
    # What an earlier removal left, which no folder can be renamed to.
    (tmp_path / ".global_step_1.old").mkdir()
    (tmp_path / ".global_step_1.old" / ".nfs0001").write_text("")
    remove_old_checkpoints(tmp_path, TrainConfig("m", "d", "s", keep_checkpoints=1, save_steps=1))
    assert (tmp_path / "global_step_2").is_dir()
    assert "global_step_1 could not be removed (Directory not empty)" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 60 MB."""
    place = tmp_path / "small disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "none", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("told", ["before writing", "while writing"])
def test_a_full_disk_keeps_the_last_state_and_room_lets_the_run_go_on(told, forks, small_disk, tiny_policy, tmp_path):
    """A checkpoint takes 6 MB of it, a state 25 MB."""
    data, log = write_pairs(tmp_path / "pairs"), tmp_path / "log"
    save = small_disk / "a run"
    flags = flags_of(tiny_policy, data, save, keep_checkpoints=1, eval_steps=0)
    blind = {"at": "shutil:disk_usage", "returns": {"total": 1e15, "free": 1e15}} if told == "while writing" else None
    statuses = run_ranks(forks, flags, log, [blind] if blind else [], world=1)
    assert statuses == [1], said(log)
    assert "Traceback" not in said(log)
    error = said(log).splitlines()[-1]
    assert (
        error.startswith("error: ") and ("not written, as it takes" if told == "before writing" else "could not be") in error
    )
    kept = states(save / "resume")[0]
    assert kept and all((save / f"global_step_{kept[0].step}" / "config.json").is_file() for _ in kept)
    assert not list((save / "resume").glob(".step_*"))
    os.sync()
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    assert run_ranks(forks, flags, log, world=1) == [0], said(log)
    assert f"continuing after step {kept[0].step} of 4" in said(log)
    assert sorted(path.name for path in save.glob("global_step_*")) == ["global_step_4"]
    whole = flags_of(tiny_policy, data, tmp_path / "whole", eval_steps=0)
    assert run_ranks(forks, whole, log, world=1) == [0], said(log)
    check_equal(save, tmp_path / "whole")

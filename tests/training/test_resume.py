"""A run that is killed again and again ends with the parameters and metrics of the undisturbed one."""

import shutil
from pathlib import Path

import pytest
import torch
from harness.runs import STEPS, check_equal, fault, flags_of, metrics_of, run_ranks, said
from safetensors.torch import load_file

from drdpo.training.checkpoint import states

pytestmark = pytest.mark.slow

# Where a rank kills itself, start after start: in a step, between a step and its line, in the writing of a state.
STEP, LINE, MODEL = "loop:train_step", "log:MetricsLog.write", "loop:save_model"
INDEX, PLACE = "checkpoint:write_index", "checkpoint:_into_place"
CASES = {
    "dpo zero2": ({}, [fault(STEP, 2, rank=1), fault(INDEX, 1), fault(PLACE, 1, when="before"), fault(PLACE, 1)]),
    "kldpo zero3": ({"kldpo_tau": 0.1, "zero_stage": 3}, [fault(MODEL, 2), fault(STEP, 1, when="before"), fault(LINE, 2)]),
    "drdpo zero1 padded": ({"drdpo_beta": 0.5, "zero_stage": 1, "packing": False}, [fault(LINE, 3), fault(INDEX, 1)]),
    # Its groups' weights are kept between steps.
    "group zero2": (
        {"method": "group:2,1", "group_column": "domain", "weight_column": "trust", "eval_columns": "domain"},
        [fault(STEP, 2), fault(LINE, 2)],
    ),
    "wdpo zero2": ({"wdpo_rho": 0.01, "wdpo_fraction": 0.5}, [fault(STEP, 3), fault(LINE, 1, when="before")]),
    "wdpo zero3": ({"wdpo_rho": 0.01, "zero_stage": 3}, [fault(STEP, 2, rank=1)]),
    "dpo lora bfloat16": ({"lora_rank": 4, "dtype": "bfloat16"}, [fault(PLACE, 2), fault(STEP, 1)]),
}
MOVED = ["drdpo zero1 padded", "group zero2", "kldpo zero3", "dpo lora"]
TOLERANCE = 2e-5
"""Between weights of float32 runs whose sums round in another order: a fiftieth of what a step of AdamW, whose moments
magnify what rounds in a gradient near zero, moves a weight by. Measured: 1e-7."""
FLAGS = {"dpo lora": {"lora_rank": 4}} | {case: flags for case, (flags, _) in CASES.items()}


@pytest.fixture(scope="module")
def undisturbed(forks, tiny_policy, data, tmp_path_factory):
    """The folder of a case's undisturbed run."""
    made = {}

    def run(case: str) -> Path:
        if case not in made:
            save = tmp_path_factory.mktemp("undisturbed") / "a run"
            log = save.parent / "log"
            assert run_ranks(forks, flags_of(tiny_policy, data, save, **FLAGS[case]), log) == [0, 0], said(log)
            made[case] = save
        return made[case]

    return run


def check_near(found: Path, expected: Path) -> bool:
    """Weights agree up to TOLERANCE; returns whether in every bit."""
    ours, theirs = (load_file(save / f"global_step_{STEPS}" / "model.safetensors") for save in (found, expected))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=TOLERANCE)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("case", CASES)
def test_resumed_after_sigkill_equals_undisturbed(case, forks, undisturbed, tiny_policy, data, tmp_path):
    flags, log = flags_of(tiny_policy, data, tmp_path / "a run", **FLAGS[case]), tmp_path / "log"
    for planted in CASES[case][1]:
        statuses = run_ranks(forks, flags, log, [planted])
        survivor = 1 - planted["rank"]
        assert statuses[planted["rank"]] == -9, said(log, survivor)
        assert statuses[survivor] == 1, said(log, survivor)
        assert f"error: rank {survivor} lost another rank" in said(log, survivor)
    assert run_ranks(forks, flags, log) == [0, 0], said(log)
    assert "after step" in said(log)
    check_equal(tmp_path / "a run", undisturbed(case))
    left = [path.name for path in (tmp_path / "a run" / "resume").iterdir() if path.is_dir()]
    assert sorted(left) == ["step_3", "step_4"]


@pytest.mark.parametrize("case", MOVED)
def test_on_another_number_of_ranks_a_run_goes_on_and_only_rounds_in_another_order(
    case, forks, undisturbed, tiny_policy, data, tmp_path
):
    flags, log = flags_of(tiny_policy, data, tmp_path / "a run", **FLAGS[case]), tmp_path / "log"
    for before, world, faults in ((0, 2, [fault(STEP, 2)]), (2, 1, [fault(STEP, 2)]), (1, 2, [])):
        statuses = run_ranks(forks, flags, log, faults, world)
        assert statuses == [0] * world if not faults else statuses[0] == -9, said(log)
        reported = [line for line in said(log).splitlines() if "bit-identical" in line]
        assert len(reported) == (before > 0), said(log)
        assert all(f"step_{3 - before}: written by {before} and resumed by {world} process" in line for line in reported)
    check_near(tmp_path / "a run", undisturbed(case))
    for found, expected in zip(metrics_of(tmp_path / "a run"), metrics_of(undisturbed(case)), strict=True):
        # Rewards are beta times differences of log-probs of a hundred, whose last bit is 8e-6.
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert found["lr"] == expected["lr"]


@pytest.fixture(scope="module")
def killed(forks, tiny_policy, data, tmp_path_factory) -> Path:
    """A run that was killed after its third step, with the states of the second and the first."""
    save = tmp_path_factory.mktemp("killed") / "a run"
    assert -9 in run_ranks(forks, flags_of(tiny_policy, data, save), save.parent / "log", [fault(STEP, 3)])
    assert [state.step for state in states(save / "resume")[0]] == [2, 1]
    return save


@pytest.fixture
def save(killed, tmp_path) -> Path:
    """A copy of the killed run."""
    return Path(shutil.copytree(killed, tmp_path / "a run"))


@pytest.mark.parametrize("how", ["changed", "both cut"])
def test_a_damaged_state_is_skipped_for_the_one_before(how, save, forks, undisturbed, tiny_policy, data, tmp_path):
    log = tmp_path / "log"
    newest, before = (state.folder for state in states(save / "resume")[0])
    victim = max(newest.glob("rank_*"))
    content = victim.read_bytes()
    if how == "changed":
        middle = len(content) // 2
        victim.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        victim.write_bytes(content[:-100])
        (before / victim.name).write_bytes(b"")
    assert run_ranks(forks, flags_of(tiny_policy, data, save), log) == [0, 0], said(log)
    (line,) = [line for line in said(log).splitlines() if f"step_2/{victim.name}" in line]
    assert ("the beginning" if how == "both cut" else "after step 1") in line
    check_equal(save, undisturbed("dpo zero2"))


def test_a_smaller_micro_batch_after_a_kill_changes_roundings_alone(save, forks, undisturbed, tiny_policy, data, tmp_path):
    flags, log = flags_of(tiny_policy, data, save, micro_batch_size=2), tmp_path / "log"
    assert run_ranks(forks, flags, log) == [0, 0], said(log)
    (line,) = [line for line in said(log).splitlines() if "bit-identical" in line]
    assert "micro_batch_size (1 -> 2)" in line
    assert not check_near(save, undisturbed("dpo zero2"))
    assert run_ranks(forks, flags_of(tiny_policy, data, save), log) == [2, 2], "a finished run is another one"


def test_reference_log_probs_are_never_those_of_trained_weights(save, forks, undisturbed, tiny_policy, data, tmp_path):
    flags, log = flags_of(tiny_policy, data, save), tmp_path / "log"
    before = {path.name: path.read_bytes() for path in save.glob("reference_*")}
    assert len(before) == 2
    for name in before:
        (save / name).unlink()
    assert run_ranks(forks, flags, log) == [0, 0], said(log)
    assert {path.name: path.read_bytes() for path in save.glob("reference_*")} == before
    check_equal(save, undisturbed("dpo zero2"))


def test_lost_metrics_are_refused(save, forks, tiny_policy, data, tmp_path):
    flags, log = flags_of(tiny_policy, data, save), tmp_path / "log"
    lines = (save / "metrics.jsonl").read_text().splitlines(keepends=True)
    (save / "metrics.jsonl").write_text(lines[0])
    assert run_ranks(forks, flags, log) == [1, 1]
    assert "error" not in said(log, 1) and "Traceback" not in said(log) + said(log, 1)
    assert "metrics.jsonl" in said(log) and "1 whole lines" in said(log)


@pytest.mark.parametrize("name", [".global_step_1.", ".reference_train.safetensors."])
def test_what_rank_0_cannot_write_is_the_one_line_of_all_ranks(name, forks, tiny_policy, data, tmp_path):
    """The process group has been left when the ranks' patience is set back."""
    save, log = tmp_path / "a run", tmp_path / "log"
    full = {"folder": str(save / name), "error": "ENOSPC", "call": 1, "rank": 0}
    assert run_ranks(forks, flags_of(tiny_policy, data, save), log, [full]) == [1, 1]
    texts = [said(log, rank) for rank in range(2)]
    assert [text.count("error") for text in texts] == [1, 0], texts
    assert "error: the disk is full while writing" in texts[0] and "Traceback" not in "".join(texts)

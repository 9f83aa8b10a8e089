"""Checkpoints and states: what counts as one, which stay, what numbers that are not finite do."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from drdpo import chat
from drdpo.config.training import TrainConfig
from drdpo.errors import DataError
from drdpo.training import checkpoint
from drdpo.training.checkpoint import describe, load_state, save_model, save_state, states, write_index
from drdpo.training.lora import add_lora
from drdpo.training.policy import load_policy


def engine_around(model=None, steps: int = 0) -> SimpleNamespace:
    """A float32 engine without ZeRO, after some steps of AdamW."""
    model = torch.nn.Linear(3, 2) if model is None else model
    model.method_state = {}
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    engine = SimpleNamespace(
        module=model, optimizer=optimizer, lr_scheduler=schedule, zero_optimization_stage=lambda: 0,
        device=torch.device("cpu"),
    )  # fmt: skip
    take(engine, steps)
    return engine


def take(engine: SimpleNamespace, steps: int) -> None:
    for _ in range(steps):
        engine.module(torch.tensor([1.0, -2.0, 3.0])).pow(2).sum().backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        engine.lr_scheduler.step()


def full(*_) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.fixture
def policy(tiny_policy):
    return load_policy(str(tiny_policy), torch.float32, "eager", False)


def test_a_full_disk_leaves_no_half_checkpoint(policy, tmp_path, monkeypatch):
    def half(folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        full()

    monkeypatch.setattr(policy.language_model, "save_pretrained", half)
    with pytest.raises(DataError, match=r"global_step_2: the checkpoint could not be written .*No space left"):
        save_model(engine_around(policy), None, tmp_path / "global_step_2", None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_the_checkpoint_before_as_it_was(value, policy, tmp_path):
    (tmp_path / "global_step_2").mkdir()
    (tmp_path / "global_step_2" / "config.json").write_text("old")
    with torch.no_grad():
        policy.language_model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(DataError, match=r"global_step_2: not written, as model.layers.1.mlp.up_proj.weight has"):
        save_model(engine_around(policy), None, tmp_path / "global_step_2", None)
    assert [path.name for path in (tmp_path / "global_step_2").iterdir()] == ["config.json"]
    assert (tmp_path / "global_step_2" / "config.json").read_text() == "old"


def state_in(folder: Path, step: int, content: bytes = b"weights") -> Path:
    """A complete state of one file."""
    place = folder / f"step_{step}"
    place.mkdir(parents=True)
    (place / "a.safetensors").write_bytes(content)
    write_index(place, step, 1, {"a.safetensors": describe(place / "a.safetensors")})
    return place


def test_states_count_when_all_their_files_are_whole_and_newest_first(tmp_path):
    for step in (2, 10, 9, 11, 12):
        state_in(tmp_path, step)
    (tmp_path / "step_11" / "a.safetensors").write_bytes(b"weight")
    (tmp_path / "step_12" / "state.json").write_text('{"step": 12, "world')
    (tmp_path / ".step_13.tmp").mkdir()
    found, torn = states(tmp_path)
    assert [state.step for state in found] == [10, 9, 2]
    assert "step_12/state.json" in torn[0]
    assert torn[1].endswith("step_11/a.safetensors has 6 bytes, not 7")
    assert checkpoint.damage(found[0], ["a.safetensors"]) is None
    (tmp_path / "step_10" / "a.safetensors").write_bytes(b"Weights")
    assert "step_10/a.safetensors was changed" in checkpoint.damage(found[0], ["a.safetensors"])
    (tmp_path / "step_9" / "a.safetensors").unlink()
    assert [state.step for state in states(tmp_path)[0]] == [10, 2]


def test_a_full_disk_keeps_the_state_before(tmp_path, monkeypatch):
    for step in (0, 1):
        state_in(tmp_path, step)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DataError, match=r"step_2: the state could not be written .*the one before is kept"):
        save_state(engine_around(), tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1"]


def test_a_state_is_in_place_whole_and_two_stay(tmp_path):
    state_in(tmp_path, 1)
    for step in (2, 3, 4):
        save_state(engine_around(), tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_3", "step_4"]
    names = ["method.safetensors", "rank_00000_00000.safetensors"]
    for state in states(tmp_path)[0]:
        files = {name: describe(tmp_path / f"step_{state.step}" / name) for name in names}
        assert (state.world_size, state.files) == (1, files)


@pytest.mark.parametrize("at_once", [4, checkpoint.AT_ONCE])
def test_an_engine_with_a_loaded_state_takes_the_same_steps(at_once, tmp_path, monkeypatch):
    """In one file, and in a file per tensor."""
    monkeypatch.setattr(checkpoint, "AT_ONCE", at_once)
    engine, weights_G = engine_around(steps=2), torch.tensor([0.1, 0.9])
    engine.module.method_state = {"weights": weights_G}
    save_state(engine, tmp_path, 2)
    resumed = engine_around()
    assert load_state(resumed, tmp_path) == 2
    assert torch.equal(resumed.module.method_state["weights"], weights_G)
    for each in (engine, resumed):
        take(each, 1)
    assert resumed.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**3
    assert torch.equal(resumed.module.weight, engine.module.weight) and torch.equal(resumed.module.bias, engine.module.bias)


def test_a_state_that_lacks_values_is_not_loaded(tmp_path):
    save_state(engine_around(), tmp_path, 2)
    (path,) = (tmp_path / "step_2").glob("rank_*")
    held = load_file(path)
    assert held.pop("bias/exp_avg/0").shape == (2,)
    save_file(held | {"bias/exp_avg/0": torch.zeros(1)}, path)
    write_index(path.parent, 2, 1, {path.name: describe(path)})
    with pytest.raises(DataError, match=r"step_2 lacks 1 of bias's values \(exp_avg\); start over with --resume=never"):
        load_state(engine_around(), tmp_path)


def test_a_damaged_newest_state_does_not_outlive_the_good_one_that_was_loaded(tmp_path, monkeypatch):
    """By its number and sizes it would be the one to keep."""
    engine = engine_around()
    for step in (4, 6):
        torch.nn.init.constant_(engine.module.weight, step)
        save_state(engine, tmp_path, step)
    for step in (6, 4):
        path = tmp_path / f"step_{step}" / "rank_00000_00000.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert load_state(engine, tmp_path) == (4 if step == 6 else 0)
        assert [state.step for state in states(tmp_path)[0]] == ([4] if step == 6 else [])
        assert engine.module.weight[0, 0] == 4
        if step == 6:
            with monkeypatch.context() as patched:
                patched.setattr(checkpoint, "save_file", full)
                with pytest.raises(DataError, match="step_5"):
                    save_state(engine, tmp_path, 5)
            assert [state.step for state in states(tmp_path)[0]] == [4]
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_removed_is_reported_and_the_run_continues(tmp_path, monkeypatch, capsys):
    def busy(folder, **_):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))

    monkeypatch.setattr(shutil, "rmtree", busy)
    for step in (1, 2, 3):
        save_state(engine_around(), tmp_path, step)
    assert [state.step for state in states(tmp_path)[0]] == [3, 2, 1]
    assert "step_1 could not be removed (Directory not empty)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [{}, {"lora_rank": 4}, {"lora_rank": 4, "lora_merge": False}, {"lora_rank": 4, "lora_quantize": "nf4"}],
    ids=["whole", "merged", "adapters", "nf4"],
)
def test_the_bytes_that_are_checked_for_are_those_that_are_written(flags, tiny_policy, tmp_path):
    config = TrainConfig(str(tiny_policy), "d", "s", dtype="float32", **flags)
    policy = load_policy(str(tiny_policy), torch.float32, "eager", False, quantize=config.lora_quantize)
    if config.lora:
        add_lora(policy, config.lora)
    save_model(engine_around(policy), chat.load_tokenizer(str(tiny_policy)), tmp_path / "global_step_1", config.lora)
    written = sum(path.stat().st_size for path in (tmp_path / "global_step_1").rglob("*.safetensors"))
    counted = checkpoint.written_bytes(policy.language_model, policy.language_model.state_dict(), config.lora)
    # The headers come on top.
    assert counted < written < 1.01 * counted + 2**14


def test_a_disk_without_room_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    state_in(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=checkpoint.SLACK + 8 * 12 - 1))
    monkeypatch.setattr(checkpoint, "save_file", pytest.fail)
    # Eight trained weights, with two moments each.
    with pytest.raises(DataError, match=r"step_2: not written, as it takes 0.02 GB and the disk has 0.02 GB left"):
        save_state(engine_around(), tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    checkpoint.check_room(tmp_path / "x", 10**12)


# --keep_checkpoints.


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
    assert checkpoint.kept_steps(steps, losses, newest) == expected


def test_others_are_removed(tmp_path):
    for step in ("1", "2", "3", "4", "4 of mine"):
        (tmp_path / f"global_step_{step}").mkdir()
    lines = [{"step": step, "loss": 1.0, **({"eval_loss": 1 / step} if step < 3 else {})} for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint.remove_old_checkpoints(tmp_path, 1)
    left = sorted(path.name.removeprefix("global_step_") for path in tmp_path.glob("*global*"))
    assert left == ["2", "4", "4 of mine"]


def test_a_checkpoint_that_cannot_be_moved_does_not_end_the_run(tmp_path, capsys):
    for step in (1, 2):
        (tmp_path / f"global_step_{step}").mkdir()
    # What an earlier removal left, which no folder can be renamed to.
    (tmp_path / ".global_step_1.old").mkdir()
    (tmp_path / ".global_step_1.old" / ".nfs0001").write_text("")
    checkpoint.remove_old_checkpoints(tmp_path, 1)
    assert (tmp_path / "global_step_2").is_dir()
    assert "global_step_1 could not be removed (Directory not empty)" in capsys.readouterr().err

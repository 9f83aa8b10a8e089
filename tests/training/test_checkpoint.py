"""What a full disk does to a checkpoint, and a loss that is not a number to a run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from drdpo.config import TrainConfig
from drdpo.errors import DataError
from drdpo.training.checkpoint import save_model, save_state
from drdpo.training.loop import _check_finite, _check_first_loss
from drdpo.training.newest import read_newest, write_newest
from drdpo.training.policy import load_policy


def engine_around(model=None, save=None) -> SimpleNamespace:
    return SimpleNamespace(module=model, zero_optimization_stage=lambda: 2, save_checkpoint=save)


def test_a_full_disk_leaves_no_half_checkpoint(tiny_policy, tmp_path, monkeypatch):
    import torch

    policy = load_policy(str(tiny_policy), torch.float32, "eager", False)

    def full(folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(policy.language_model, "save_pretrained", full)
    with pytest.raises(DataError, match=r"global_step_2: the checkpoint could not be written .*No space left"):
        save_model(engine_around(policy), None, tmp_path / "global_step_2")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_state_before(tmp_path):
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_0").mkdir()
    write_newest(tmp_path, {"step": 1, "world_size": 1, "tag": "step_1"})

    def full(folder, tag, **_):
        (Path(folder) / tag).mkdir()
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    with pytest.raises(DataError, match="the one before is kept"):
        save_state(engine_around(save=full), tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newest.json", "step_1"]
    assert read_newest(tmp_path)["step"] == 1


@pytest.mark.parametrize("loss", [float("nan"), 0.75, float("inf")])
def test_a_first_loss_that_is_not_ln_2_is_refused(loss):
    config = TrainConfig("m", "d", "s")
    _check_first_loss(0.6935, config)
    with pytest.raises(DataError, match="first loss"):
        _check_first_loss(loss, config)


def test_figures_that_are_not_finite_end_the_run():
    _check_finite({"step": 3, "loss": 0.7, "grad_norm": 2.0})
    with pytest.raises(DataError, match="step 3: grad_norm is inf"):
        _check_finite({"step": 3, "loss": 0.7, "grad_norm": float("inf")})

"""What a full disk does to a checkpoint, and a loss that is not a number to a run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from drdpo.config import TrainConfig
from drdpo.errors import DataError
from drdpo.training.checkpoint import save_model, save_state
from drdpo.training.data import Pair
from drdpo.training.finite import FiniteWatch, check_evaluation, check_step
from drdpo.training.loop import _check_first_loss
from drdpo.training.newest import read_newest, write_newest
from drdpo.training.policy import load_policy


def engine_around(model=None, save=None) -> SimpleNamespace:
    import torch

    model = torch.nn.Linear(1, 1) if model is None else model
    return SimpleNamespace(module=model, zero_optimization_stage=lambda: 2, save_checkpoint=save, device=torch.device("cpu"))


def test_a_full_disk_leaves_no_half_checkpoint(tiny_policy, tmp_path, monkeypatch):
    import torch

    policy = load_policy(str(tiny_policy), torch.float32, "eager", False)

    def full(folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(policy.language_model, "save_pretrained", full)
    with pytest.raises(DataError, match=r"global_step_2: the checkpoint could not be written .*No space left"):
        save_model(engine_around(policy), None, tmp_path / "global_step_2", TrainConfig("m", "d", "s"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_the_checkpoint_before_as_it_was(value, tiny_policy, tmp_path):
    import torch

    policy = load_policy(str(tiny_policy), torch.float32, "eager", False)
    (tmp_path / "global_step_2").mkdir()
    (tmp_path / "global_step_2" / "config.json").write_text("old")
    with torch.no_grad():
        policy.language_model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(DataError, match=r"global_step_2: not written, as model.layers.1.mlp.up_proj.weight holds"):
        save_model(engine_around(policy), None, tmp_path / "global_step_2", TrainConfig("m", "d", "s"))
    assert [path.name for path in (tmp_path / "global_step_2").iterdir()] == ["config.json"]
    assert (tmp_path / "global_step_2" / "config.json").read_text() == "old"


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


def test_figures_that_are_not_finite_end_the_run_and_name_the_pairs():
    import torch

    pairs = [Pair([1], [2], [3], prompt_id) for prompt_id in (40, 41, 42, 43)]
    indices = [torch.tensor([2, 0]), torch.tensor([1, 3])]
    watch = FiniteWatch(torch.device("cpu"))
    for gradient in (1.0, float("nan")):
        watch.next_batch()
        watch.look(torch.tensor([gradient, 2.0]))
        watch.look(torch.tensor(0.5))
    check_step({"step": 3, "loss": 0.7, "grad_norm": 2.0}, watch, indices, pairs)
    with pytest.raises(DataError, match=r"step 3: grad_norm is inf, from the micro-batch of prompt_id 41, 43; nothing"):
        check_step({"step": 3, "loss": 0.7, "grad_norm": float("inf")}, watch, indices, pairs)
    nameless = [Pair([1], [2], [3]) for _ in pairs]
    with pytest.raises(DataError, match="micro-batch of row 2, 4;"):
        check_step({"step": 3, "loss": float("nan")}, watch, indices, nameless)
    good = FiniteWatch(torch.device("cpu"))
    good.next_batch()
    with pytest.raises(DataError, match="from no micro-batch alone but the sum over the step's 4 pairs"):
        check_step({"step": 3, "grad_norm": float("inf")}, good, [torch.cat(indices)], pairs)
    check_evaluation({"eval_loss": 0.5}, 7)
    with pytest.raises(DataError, match="after step 7: eval_loss is nan"):
        check_evaluation({"eval_loss": float("nan")}, 7)

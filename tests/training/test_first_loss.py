"""The check of the first step, by hand numbers; tests/training/test_bad_pairs.py has it in a run."""

import math

import pytest
import torch

from drdpo.config.training import TrainConfig
from drdpo.errors import DataError
from drdpo.training.log import check_first_step
from drdpo.training.losses import Pairs, method_of
from drdpo.training.objective import Objective

REFERENCE_B2 = torch.tensor([[-100.0, -300.0]])  # 200 nats in the mean


def check(apart: list[float], **flags) -> None:
    config = TrainConfig(model_path="a model", dataset_path="-", save_path="out", **{"dtype": "float32", **flags})
    apart_S = torch.tensor(apart)
    margins_B = apart_S[:1] - apart_S[1:]
    losses_B = torch.nn.functional.softplus(-config.beta * margins_B)
    if config.loss_type == "ipo":
        losses_B = (margins_B - 1 / (2 * config.beta)).square()
    part = Objective(losses_B.mean(), losses_B, Pairs(margins_B, apart_S, {}), torch.ones(1))
    stored = "out/reference_train.safetensors"
    check_first_step([part], [REFERENCE_B2], method_of(config), config.dtype, config.model_path, stored)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_policys_own_log_probs_pass(dtype):
    check([0.0, 0.0], dtype=dtype)
    check([0.0, 0.0], dtype=dtype, loss_type="ipo")
    # Allowed are 1e-4 of 200 nats and 1e-3, in bfloat16 1e-2 of 200 nats and 0.05.
    check([0.02, 0.0] if dtype == "float32" else [2.0, -2.0], dtype=dtype)


@pytest.mark.parametrize(("dtype", "nats"), [("float32", 0.022), ("bfloat16", 2.1)])
def test_equal_shifts_that_no_loss_shows_are_refused(dtype, nats):
    with pytest.raises(DataError, match=rf"log-probs are {nats} away.*a model; delete out/reference_train.safetensors"):
        check([nats, nats], dtype=dtype, beta=0.01)
    with pytest.raises(DataError, match="away from the reference"):
        check([-nats, -nats], dtype=dtype, beta=0.01)


def test_a_loss_of_another_margin_is_refused():
    expected = math.log(1 + math.exp(-0.5))
    with pytest.raises(DataError, match=f"the first loss is {expected:.4f}, not 0.6931"):
        check([0.5, -0.5], beta=0.5)

"""Packed micro-batches equal the padded two-row form: losses and parameter gradients, for every method."""

import pytest
import torch
from harness.policies import REFERENCE_M2, config_of

from drdpo.config.training import TrainConfig
from drdpo.kernels import packed_attention
from drdpo.training.data import Pair, form_batch, pack
from drdpo.training.losses import method_of
from drdpo.training.objective import objective, survey
from drdpo.training.policy import Policy, load_policy

METHODS = {
    "dpo": {},
    "ipo": {"loss_type": "ipo"},
    "sigmoid_norm": {"loss_type": "sigmoid_norm"},
    "kldpo": {"kldpo_tau": 0.3},
    "cvar": {"method": "cvar:0.6", "weight_column": "trust"},
    "drdpo": {"drdpo_beta": 0.3},
}


@pytest.fixture(scope="module")
def packed(tiny_policy) -> Policy:
    """With gradient checkpointing, whose recomputation must attend by the plan as well."""
    return load_policy(str(tiny_policy), torch.float32, packed_attention.SHARED_PREFIX, gradient_checkpointing=True)


@pytest.fixture(scope="module")
def padded(tiny_policy) -> Policy:
    return load_policy(str(tiny_policy), torch.float32, "eager", False, second_derivative=True)


def step(policy: Policy, pairs: list[Pair], split: list[list[int]], config: TrainConfig):
    """Losses [4] and the gradient of all parameters of one optimizer step in some micro-batches."""
    parts = [(form_batch(pairs, rows, config.packing), REFERENCE_M2[rows].float()) for rows in split]
    population = survey(policy, parts, method_of(config)) if method_of(config).needs_population else None
    found = [
        objective(policy, batch, reference, method_of(config), population, share=len(reference) / 4)
        for batch, reference in parts
    ]
    total = sum(part.total for part in found)
    gradients = torch.autograd.grad(total, [p for p in policy.parameters() if p.requires_grad])
    losses = torch.cat([part.losses_B.detach() for part in found])[
        torch.tensor([row for rows in split for row in rows]).argsort()
    ]
    return losses, torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("method", METHODS)
def test_packed_equals_padded(method, pairs, packed, padded):
    """WDPO: test_tangent_equals_exact."""
    flags = METHODS[method]
    losses, gradient = step(padded, pairs, [[0, 1, 2, 3]], config_of(packing=False, **flags))
    for split in ([[0, 1, 2, 3]], [[3, 0], [1, 2]]):
        ours, our_gradient = step(packed, pairs, split, config_of(**flags))
        torch.testing.assert_close(ours, losses, atol=1e-5, rtol=1e-5)
        assert float((our_gradient - gradient).norm() / gradient.norm()) < 1e-5


def test_a_packed_row_by_hand():
    batch = pack([Pair([7, 8], [1], [2, 3]), Pair([9], [4, 5], [6])], [1, 0])
    assert batch.input_ids_1N.tolist() == [[9, 4, 5, 6, 7, 8, 1, 2, 3]]
    assert batch.positions_1N.tolist() == [[0, 1, 2, 1, 0, 1, 2, 2, 3]]
    assert batch.pair_N.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert batch.targets_A.tolist() == [4, 5, 6, 1, 2, 3]
    assert batch.states_A.tolist() == [0, 1, 0, 5, 5, 7]
    assert batch.sequence_A.tolist() == [0, 0, 2, 1, 3, 3]
    assert batch.indices_B.tolist() == [1, 0]
    assert batch.tokens == 9

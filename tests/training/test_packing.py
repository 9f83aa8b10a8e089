"""Packed micro-batches equal the padded two-row form: losses and parameter gradients, for every method."""

import pytest
import torch
from harness.policies import REFERENCE_M2, config_of
from transformers import AutoModelForCausalLM, MistralConfig

from drdpo.config.training import TrainConfig
from drdpo.errors import DataError, UsageError
from drdpo.kernels import packed_attention
from drdpo.training.data import Pair, collate, form_batch, pack
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
    "wdpo": {"wdpo_rho": 0.1},
    "wdpo root": {"wdpo_rho": 0.1, "wdpo_penalty": "root"},
    "wdpo once": {"wdpo_rho": 0.1, "wdpo_prompt": "once"},
    "wdpo once root": {"wdpo_rho": 0.1, "wdpo_prompt": "once", "wdpo_penalty": "root"},
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
    """For WDPO: the tangent solver in float32 equals the exact one."""
    flags = METHODS[method]
    losses, gradient = step(padded, pairs, [[0, 1, 2, 3]], config_of(packing=False, **flags))
    for split in ([[0, 1, 2, 3]], [[3, 0], [1, 2]]):
        ours, our_gradient = step(packed, pairs, split, config_of(**flags))
        torch.testing.assert_close(ours, losses, atol=1e-5, rtol=1e-5)
        assert float((our_gradient - gradient).norm() / gradient.norm()) < 1e-5


def test_the_two_ways_to_count_the_prompt_differ(pairs, packed):
    """Or the equality above could not tell one from the other."""
    gradients = [step(packed, pairs, [[0, 1, 2, 3]], config_of(**METHODS[name]))[1] for name in ("wdpo", "wdpo once")]
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) > 1e-3


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


def test_packing_holds_fewer_tokens_than_padding(pairs):
    packed_tokens, padded_rows = pack(pairs, range(4)).tokens, collate(pairs, range(4), 0).input_ids_ST
    assert packed_tokens == sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs) < padded_rows.numel()


def test_the_shortest_pair_stands_for_an_absent_one(pairs):
    shortest = pairs.index(min(pairs, key=len))
    assert torch.equal(pack(pairs, [-1]).input_ids_1N, pack(pairs, [shortest]).input_ids_1N)


def test_a_model_that_cannot_be_packed_is_refused(tmp_path):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"sliding window of 4.*--packing=false"):
        load_policy(str(tmp_path), torch.float32, packed_attention.SHARED_PREFIX, False)


def test_flags_of_attention_and_packing():
    assert config_of().attention == packed_attention.SHARED_PREFIX
    assert config_of(packing=False).attention == "sdpa"
    assert config_of(packing=False, wdpo_rho=0.1).attention == "eager"
    assert config_of().packing and config_of(wdpo_rho=0.1).packing
    assert not config_of(wdpo_rho=0.1, wdpo_solver="exact").packing
    with pytest.raises(UsageError, match="--packing=false as well"):
        config_of(attn="flex")

"""Adapters on a policy: at the start they change nothing; how they are drawn and merged. test_equality.py trains them."""

import pytest
import torch
from harness.policies import config_of
from peft.tuners.tuners_utils import BaseTunerLayer

from drdpo.training.data import pack
from drdpo.training.lora import add_lora, merged
from drdpo.training.policy import load_policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_before_the_first_step_change_no_bit(dtype, tiny_policy, pairs):
    """So the reference, adapters off, is the policy before its first step."""
    config, batch = config_of(lora_rank=4), pack(pairs, range(4))
    policy, plain = (load_policy(str(tiny_policy), dtype, config.attention, False) for _ in range(2))
    add_lora(policy, config.lora)
    with torch.no_grad():
        before = policy(batch).logprob_S
        assert torch.equal(before, plain(batch).logprob_S)
        for name, value in policy.named_parameters():
            if "lora_B" in name:
                value.normal_()
        assert not torch.equal(policy(batch).logprob_S, before)
        for module in policy.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(False)
        assert torch.equal(policy(batch).logprob_S, before)


def test_the_seed_draws_the_adapters(tiny_policy):
    drawn = []
    for seed in (1, 1, 2):
        policy = load_policy(str(tiny_policy), torch.float32, "sdpa", False)
        add_lora(policy, config_of(lora_rank=4, seed=seed).lora)
        drawn.append(policy.language_model.state_dict()["model.layers.0.mlp.up_proj.lora_A.default.weight"])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_merging_by_hand():
    weights = {
        "a.base_layer.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        "a.lora_A.default.weight": torch.tensor([[1.0, 2.0]]),
        "a.lora_B.default.weight": torch.tensor([[0.5], [-1.0]]),
        "a.base_layer.bias": torch.tensor([7.0, 8.0]),
        "norm.weight": torch.tensor([4.0]),
    }
    plain = merged(weights, rank=8)
    assert plain.keys() == {"a.weight", "a.bias", "norm.weight"}
    assert plain["a.weight"].tolist() == [[3.0, 4.0], [-4.0, -7.0]]
    assert weights["a.base_layer.weight"].tolist() == [[1.0, 0.0], [0.0, 1.0]], "training goes on from the old ones"

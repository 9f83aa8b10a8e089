"""Loading a policy: dropout is off in training mode or the model is refused; attention that cannot be packed is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness.architectures import random_model
from harness.policies import config_of
from peft.tuners.tuners_utils import BaseTunerLayer

from drdpo.chat import load_tokenizer
from drdpo.config.training import LoraSettings
from drdpo.errors import DataError
from drdpo.models import check_model
from drdpo.training.checkpoint import _write_model
from drdpo.training.data import Pair, pack
from drdpo.training.lora import add_lora, merged
from drdpo.training.policy import load_policy


def test_dropout_that_is_no_module_is_switched_off(tmp_path):
    """OPT keeps its dropouts as numbers: left on, the policy was not its own reference."""
    random_model("OPT, learned positions", dropout=0.3, attention_dropout=0.3, layerdrop=0.3).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), torch.float32, "shared_prefix", gradient_checkpointing=True)
    assert policy.training
    batch = pack([Pair([5, 6, 7], [8, 9], [10])], [0])
    with torch.no_grad():
        first, second = policy(batch).logprob_S, policy(batch).logprob_S
        assert torch.equal(first, second)
        assert torch.equal(first, policy.eval()(batch).logprob_S)


@pytest.mark.parametrize("lora", [None, LoraSettings("-", "float32", 2, True, "none", 0)])
def test_a_generation_config_that_transformers_reads_and_does_not_write_is_copied(lora, tiny_policy, tmp_path):
    """Llama 2's and Vicuna's: every checkpoint failed."""
    folder = Path(shutil.copytree(tiny_policy, tmp_path / "a model"))
    text = '{"do_sample": false, "temperature": 0.6, "eos_token_id": [2, 0]}'
    (folder / "generation_config.json").write_text(text)
    policy, saved = load_policy(str(folder), torch.float32, "shared_prefix", False), tmp_path / "global_step_1"
    (folder / "generation_config.json").unlink()
    if lora:
        add_lora(policy, lora)
    _write_model(policy, policy.language_model.state_dict(), load_tokenizer(str(folder)), saved, lora, "")
    assert (saved / "generation_config.json").read_text() == text
    assert check_model(str(saved)).tensors == 20
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | json.loads(text)))
    with pytest.raises(DataError, match=r"config\.json contains settings of generation.*move them to a generation_config"):
        load_policy(str(folder), torch.float32, "shared_prefix", False)


def test_dropout_that_cannot_be_switched_off_and_attention_that_cannot_be_packed_are_refused(tmp_path):
    random_model("Falcon", hidden_dropout=0.3, attention_dropout=0.3).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"knows no attention called 'shared_prefix'; pass --packing=false"):
        load_policy(str(tmp_path), torch.float32, "shared_prefix", gradient_checkpointing=False)
    with pytest.raises(DataError, match=r"drops values out in training mode; set the dropouts in its config.json to 0"):
        load_policy(str(tmp_path), torch.float32, "eager", gradient_checkpointing=False)


# Adapters; test_equality.py trains them.


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

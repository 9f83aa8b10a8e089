"""Loading a policy: dropout is off in training mode or the model is refused; attention that cannot be packed is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness.architectures import random_model

from drdpo.chat import load_tokenizer
from drdpo.config.training import LoraSettings
from drdpo.errors import DataError
from drdpo.models import check_model
from drdpo.training.checkpoint import _write_model
from drdpo.training.data import Pair, pack
from drdpo.training.lora import add_lora
from drdpo.training.policy import load_policy


def saved(name: str, folder: Path, **settings: float) -> str:
    """A tiny model with these settings besides."""
    random_model(name).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return str(folder)


def test_dropout_that_is_no_module_is_switched_off(tmp_path):
    """OPT keeps its dropouts as numbers: left on, the policy was not its own reference."""
    path = saved("OPT, learned positions", tmp_path, dropout=0.3, attention_dropout=0.3, layerdrop=0.3)
    policy = load_policy(path, torch.float32, "shared_prefix", gradient_checkpointing=True)
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
    path = saved("Falcon", tmp_path, hidden_dropout=0.3, attention_dropout=0.3)
    with pytest.raises(DataError, match=r"knows no attention called 'shared_prefix'; pass --packing=false"):
        load_policy(path, torch.float32, "shared_prefix", gradient_checkpointing=False)
    with pytest.raises(DataError, match=r"drops values out in training mode; set the dropouts in its config.json to 0"):
        load_policy(path, torch.float32, "eager", gradient_checkpointing=False)

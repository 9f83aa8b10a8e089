"""Rotary positions that change with the batch: exact below the length of the change, refused beyond it."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from drdpo.config.training import TrainConfig
from drdpo.errors import UsageError
from drdpo.training.data import Pair, form_batch
from drdpo.training.losses import method_of
from drdpo.training.memory import preflight, shapes
from drdpo.training.policy import Policy, check_pairs, load_policy
from drdpo.training.run import Run

SIZES = {
    "vocab_size": 90, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LIMIT = 16


@pytest.fixture(scope="module", params=["dynamic", "longrope"])
def model(request, tmp_path_factory) -> Path:
    """Whose frequencies change beyond LIMIT tokens."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / request.param
    if request.param == "dynamic":
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
        LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=LIMIT, rope_parameters=rope)).save_pretrained(path)
    else:
        rope = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 6, "long_factor": [8.0] * 6,
                "original_max_position_embeddings": LIMIT}  # fmt: skip
        settings = Phi3Config(
            **SIZES, max_position_embeddings=64, original_max_position_embeddings=LIMIT, rope_parameters=rope
        )
        Phi3ForCausalLM(settings).save_pretrained(path)
    return path


def config_of(path: Path, **flags) -> TrainConfig:
    return TrainConfig(str(path), "-", "-", **{"dtype": "float32", "train_batch_size": 2, "micro_batch_size": 1, **flags})


def pair_of(*lengths: int) -> Pair:
    return Pair(*([3 + (7 * number + length) % 80 for number in range(length)] for length in lengths))


def logprobs(policy: Policy, pairs: list[Pair], config: TrainConfig) -> torch.Tensor:
    with torch.no_grad():
        return policy(form_batch(pairs, range(len(pairs)), config.packing)).logprob_S.view(2, -1)[:, 0]


@pytest.mark.parametrize("packing", [True, False])
def test_up_to_the_limit_a_pair_does_not_feel_its_neighbours_and_beyond_it_does(packing, model):
    config = config_of(model, packing=packing)
    policy = load_policy(str(model), torch.float32, config.attention, gradient_checkpointing=False)
    short, whole, longer = pair_of(4, 3, 6), pair_of(8, 8, 5), pair_of(8, 24, 5)
    alone = logprobs(policy, [short], config)
    # Three pairs make a row of more than LIMIT tokens, in which no sequence has more.
    beside = logprobs(policy, [short, whole, whole], config)
    torch.testing.assert_close(beside, alone, atol=1e-4, rtol=1e-5)
    assert len(whole) == LIMIT
    check_pairs(policy, [short, whole], config.model_path)
    # What is refused: without the refusal the numbers would change, in either form.
    assert not torch.allclose(logprobs(policy, [short, longer], config), alone, atol=1e-2, rtol=1e-3)
    with pytest.raises(UsageError, match=rf"the longest pair has 32: pass --max_len={LIMIT}"):
        check_pairs(policy, [short, longer], config.model_path)


class _Tokenizer:
    pad_token_id = 0


def test_the_preflight_refuses_and_otherwise_predicts(model, tmp_path, capsys):
    config, counts = config_of(model), {"train": {"answer cut": 0}}
    pairs, longer = [pair_of(4, 3, 6)] * 2, [pair_of(8, 24, 5)]
    with pytest.raises(UsageError, match=rf"beyond {LIMIT} tokens .*{model.name}"):
        preflight(Run(config, method_of(config), tmp_path / "out", _Tokenizer(), pairs, longer, counts, {}))
    preflight(Run(config, method_of(config), tmp_path / "out", _Tokenizer(), pairs, pairs, counts, {}))
    assert "predicted peak" in capsys.readouterr().out


def test_fixed_kinds_have_no_limit_but_a_warning(tmp_path, capsys):
    rope = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 4}  # fmt: skip
    LlamaConfig(
        **SIZES, max_position_embeddings=8, rope_parameters=rope, architectures=["LlamaForCausalLM"]
    ).save_pretrained(tmp_path)
    config = config_of(tmp_path)
    longer = [pair_of(8, 24, 5)]
    check_pairs(shapes(config), longer, config.model_path)
    preflight(
        Run(config, method_of(config), tmp_path / "out", _Tokenizer(), longer * 2, longer, {"train": {"answer cut": 0}}, {})
    )
    assert "the longest pair has 32 tokens, beyond the model's context: pass --max_len=8" in capsys.readouterr().out

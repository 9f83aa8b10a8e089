"""Rotary positions that change with the batch: exact below the length of the change, refused beyond it."""

from pathlib import Path

import pytest
import torch
from harness.policies import config_of, pairs_of_lengths, run_of
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from drdpo.errors import UsageError
from drdpo.training.data import Pair, form_batch
from drdpo.training.memory import preflight
from drdpo.training.policy import Policy, check_pairs, load_policy

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


def run_on(path: Path, train: list[Pair], test: list[Pair]):
    return run_of(config_of(model_path=str(path), train_batch_size=2, micro_batch_size=1), train, test)


def logprobs(policy: Policy, pairs: list[Pair], packing: bool) -> torch.Tensor:
    with torch.no_grad():
        return policy(form_batch(pairs, range(len(pairs)), packing)).logprob_S.view(2, -1)[:, 0]


SHORT, WHOLE, LONGER = pairs_of_lengths((4, 3, 6), (8, 8, 5), (8, 24, 5), vocabulary=90)


@pytest.mark.parametrize("packing", [True, False])
def test_up_to_the_limit_a_pair_does_not_feel_its_neighbours_and_beyond_it_does(packing, model):
    policy = load_policy(str(model), torch.float32, config_of(packing=packing).attention, gradient_checkpointing=False)
    alone = logprobs(policy, [SHORT], packing)
    # Three pairs make a row of more than LIMIT tokens, in which no sequence has more.
    torch.testing.assert_close(logprobs(policy, [SHORT, WHOLE, WHOLE], packing), alone, atol=1e-4, rtol=1e-5)
    assert len(WHOLE) == LIMIT
    check_pairs(policy, [SHORT, WHOLE], "m")
    # What is refused: without the refusal the numbers would change, in either form.
    assert not torch.allclose(logprobs(policy, [SHORT, LONGER], packing), alone, atol=1e-2, rtol=1e-3)
    with pytest.raises(UsageError, match=rf"the longest pair has 32: pass --max_len={LIMIT}"):
        check_pairs(policy, [SHORT, LONGER], "m")


def test_the_preflight_refuses_and_otherwise_predicts(model, capsys):
    with pytest.raises(UsageError, match=rf"beyond {LIMIT} tokens .*{model.name}"):
        preflight(run_on(model, [SHORT] * 2, [LONGER]))
    preflight(run_on(model, [SHORT] * 2, [SHORT]))
    assert "predicted peak" in capsys.readouterr().out


def test_fixed_kinds_have_no_limit_but_a_warning(tmp_path, capsys):
    rope = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 4}  # fmt: skip
    settings = LlamaConfig(**SIZES, max_position_embeddings=8, rope_parameters=rope, architectures=["LlamaForCausalLM"])
    settings.save_pretrained(tmp_path)
    preflight(run_on(tmp_path, [LONGER] * 2, [LONGER]))
    assert "the longest pair has 32 tokens, beyond the model's context: pass --max_len=8" in capsys.readouterr().out

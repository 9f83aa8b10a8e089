"""Families of transformers: log-probs equal plain transformers' own, sequence by sequence, or a refusal names why."""

from pathlib import Path

import pytest
import torch
from harness.architectures import FAMILIES, WINDOW, random_model, settings_of, structure
from harness.policies import answer_logprobs, config_of, pairs_of_lengths, run_of
from torch import Tensor

from drdpo.errors import DataError, UsageError
from drdpo.kernels.packed_attention import SHARED_PREFIX, register_shared_prefix
from drdpo.models import Model, meta_model
from drdpo.training.data import Pair, form_batch
from drdpo.training.memory import preflight
from drdpo.training.policy import Policy, check_numbers, check_pairs, load_policy

WITHIN = 2e-4
"""Nats."""

NOT_TRAINED = {
    "Gemma 2, soft caps": "final_logit_softcapping 30.0",
    "Phi, head bias": "its output head has a bias",
    "Granite, logits scaled": "logits_scaling 8.0",
    "Cohere, logits scaled": "logit_scale 0.0625",
    "Llama 4": "no backbone apart from",
}
NOT_PACKED = {
    "Gemma 2, attention capped": "caps its logits",
    "StableLM, q/k norms": "do not hand arguments on",
    "Nemotron": "do not hand arguments on",
    "GPT-OSS, sinks": "has sinks",
    "LFM2, convolutions": "layers of the kind conv",
    "Falcon": "2 of its 2 layers attend in their own way",
    "Mamba": "layers of the kind linear_attention",
    "MPT": "2 of its 2 layers attend in their own way",
}
EAGER_ONLY = ("Gemma 2, attention capped", "GPT-OSS, sinks", "Mamba")
WINDOWED = {name: WINDOW for name in FAMILIES if "window" in name or name == "Gemma 2 without caps"}
TANGENT = {"Llama, biases", "Llama 3, rope scaled", "Llama, YaRN", "Mistral", "Mistral, window", "Qwen2", "Qwen2, window",
           "Qwen3, q/k norms"}  # fmt: skip


SHORT = pairs_of_lengths((4, 3, 4), (1, 6, 2), (3, 5, 1))
LONG = pairs_of_lengths((14, 9, 16), (1, 7, 2), (20, 30, 11))
"""Within the windows, and beyond them."""


def by_transformers(model, pairs: list[Pair]) -> Tensor:
    """[S] log-probs of the answers, each sequence alone, in plain attention and with full logits."""
    return torch.stack([
        answer_logprobs(model, model.get_input_embeddings()(ids_T), ids_T, len(pair.prompt))
        for side in ("chosen", "rejected") for pair in pairs for ids_T in [torch.tensor(pair.prompt + getattr(pair, side))]
    ])  # fmt: skip


def apart(model, attention: str, pairs: list[Pair]) -> float:
    """Largest difference, in nats, of a micro-batch's log-probs from transformers' own."""
    with torch.no_grad():
        theirs_S = by_transformers(model, pairs)
        model.set_attn_implementation(attention)
        check_numbers(model, "m")
        batch = form_batch(pairs, range(len(pairs)), attention == SHARED_PREFIX)
        ours_S = Policy(model)(batch).logprob_S
        model.set_attn_implementation("eager")
    assert theirs_S.abs().min() > 0.1, "nothing to tell apart"
    return float((ours_S - theirs_S).abs().max())


def check(name: str, **flags) -> None:
    usual = {"packing": True, "eager": False, "tangent": False, "lora": False, "max_len": 8}
    quantized = flags.pop("quantized", False)
    Model("m", "", 0, structure(name), quantized, None, 0, "").refuse_training(**usual | flags)


def refusal(name: str, **flags) -> str:
    with pytest.raises((DataError, UsageError)) as found:
        check(name, **flags)
    return str(found.value)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NOT_TRAINED])
def test_log_probs_are_those_of_transformers(name):
    register_shared_prefix()
    about, model = structure(name), random_model(name)
    assert about.head is None and about.rows == 96
    assert bool(about.eager) == (name in EAGER_ONLY)
    assert about.window == WINDOWED.get(name, 128 if name == "GPT-OSS, sinks" else 4096 if "capped" in name else None)
    if name in NOT_PACKED:
        assert NOT_PACKED[name] in about.packing
        assert "pass --packing=false" in refusal(name)
    else:
        assert about.packing is None
        assert apart(model, SHARED_PREFIX, SHORT if about.window else LONG) < WITHIN
    assert apart(model, "eager" if about.eager else "sdpa", LONG) < WITHIN


@pytest.mark.parametrize("name", NOT_TRAINED)
def test_logits_that_are_not_hidden_states_times_the_head_are_refused(name):
    assert NOT_TRAINED[name] in refusal(name)
    assert "cannot be trained" in refusal(name, packing=False)


@pytest.mark.parametrize("name", [name for name in WINDOWED if name not in NOT_TRAINED])
def test_a_window_is_refused_for_longer_pairs_even_where_it_lives_in_the_mask_alone(name):
    assert f"sliding window of {WINDOW} tokens" in refusal(name, max_len=WINDOW + 1)
    assert f"pass --max_len={WINDOW} or less" in refusal(name, max_len=WINDOW + 1)
    check(name, max_len=WINDOW)
    # What is refused: packed, the window is not seen.
    register_shared_prefix()
    model = random_model(name)
    if "MoE" in name:
        assert apart(model, SHARED_PREFIX, LONG) > 0.1
    else:
        with pytest.raises(ValueError, match="sliding window of 8, less than a sequence of 50"):
            apart(model, SHARED_PREFIX, LONG)


@pytest.mark.parametrize("name", FAMILIES)
def test_which_models_the_tangent_solver_knows(name):
    assert (structure(name).tangent is None) == (name in TANGENT)
    if name not in TANGENT and name not in NOT_TRAINED and name not in NOT_PACKED:
        assert "pass --wdpo_solver=exact" in refusal(name, tangent=True)


@pytest.mark.parametrize("name", EAGER_ONLY)
def test_fused_kernels_that_would_be_wrong_are_refused(name):
    assert "pass --attn=eager" in refusal(name, packing=False)
    check(name, packing=False, eager=True)


def test_positions_adapters_and_codes():
    gpt2 = structure("GPT-2, learned positions")
    assert gpt2.learned and structure("OPT, learned positions").learned and not structure("Qwen2").learned
    assert gpt2.positions == 64 and gpt2.linear == 0, "its layers are of transformers' Conv1D"
    assert "no torch Linear layers; omit it" in refusal("GPT-2, learned positions", lora=True)
    said = refusal("GPT-2, learned positions", quantized=True)
    assert "stored quantized; pass the model in full precision" in said


@pytest.mark.parametrize(
    ("name", "predicted"),
    [("StableLM, q/k norms", False), ("Nemotron", False), ("Mamba", True), ("MPT", False), ("Falcon", True),
     ("Qwen3-MoE", False), ("LFM2, convolutions", True)],
)  # fmt: skip
def test_the_preflight_of_models_that_cannot_be_packed_predicts_or_says_why_not(name, predicted, tmp_path, capsys):
    settings = settings_of(name)
    settings.architectures = [type(random_model(name)).__name__]
    settings.save_pretrained(tmp_path)
    config = config_of(model_path=str(tmp_path), packing=False, train_batch_size=2, micro_batch_size=1)
    preflight(run_of(config, SHORT))
    said = capsys.readouterr().out
    assert ("predicted peak" in said) == predicted
    assert ("not predicted: the model's forward pass needs more than shapes" in said) != predicted


def test_pairs_must_have_rows_and_positions():
    policy = Policy(meta_model(settings_of("GPT-2, learned positions")))
    check_pairs(policy, [Pair([95] * 30, [3] * 34, [3])], "m")
    with pytest.raises(DataError, match="token id 96, and the model's embedding has 96 rows"):
        check_pairs(policy, [Pair([1], [96], [3])], "m")
    with pytest.raises(UsageError, match=r"longest pair has 65 tokens, .* 64 rows: pass --max_len=64"):
        check_pairs(policy, [Pair([95] * 30, [3] * 35, [3])], "m")
    # Rotary positions have no end: the preflight warns.
    check_pairs(Policy(meta_model(settings_of("Qwen2"))), [Pair([1] * 30, [3] * 35, [3])], "m")


# Rotary positions that change with the batch: exact below the length of the change, refused beyond it.

LIMIT = 16
KINDS = {
    "dynamic": ("Llama, biases", LIMIT, {"factor": 4.0, "rope_theta": 100.0}),
    "longrope": ("Phi-3", 64, {"rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4,
                               "original_max_position_embeddings": LIMIT}),
    "llama3": ("Llama, biases", 8, {"rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                    "original_max_position_embeddings": 4}),
}  # fmt: skip


def rotary(kind: str, folder: Path) -> Path:
    name, positions, rope = KINDS[kind]
    more = {"original_max_position_embeddings": LIMIT} if kind == "longrope" else {}
    model = random_model(name, max_position_embeddings=positions, rope_parameters={"rope_type": kind, **rope}, **more)
    model.save_pretrained(folder / kind)
    return folder / kind


@pytest.fixture(scope="module", params=["dynamic", "longrope"])
def model(request, tmp_path_factory) -> Path:
    """Whose frequencies change beyond LIMIT tokens."""
    return rotary(request.param, tmp_path_factory.mktemp("models"))


def run_on(path: Path, train: list[Pair], test: list[Pair]):
    return run_of(config_of(model_path=str(path), train_batch_size=2, micro_batch_size=1), train, test)


def logprobs(policy: Policy, pairs: list[Pair], packing: bool) -> torch.Tensor:
    with torch.no_grad():
        return policy(form_batch(pairs, range(len(pairs)), packing)).logprob_S.view(2, -1)[:, 0]


FIRST, WHOLE, LONGER = pairs_of_lengths((4, 3, 6), (8, 8, 5), (8, 24, 5))


@pytest.mark.parametrize("packing", [True, False])
def test_up_to_the_limit_a_pair_does_not_feel_its_neighbours_and_beyond_it_does(packing, model):
    policy = load_policy(str(model), torch.float32, config_of(packing=packing).attention, gradient_checkpointing=False)
    alone = logprobs(policy, [FIRST], packing)
    # Three pairs make a row of more than LIMIT tokens, in which no sequence has more.
    torch.testing.assert_close(logprobs(policy, [FIRST, WHOLE, WHOLE], packing), alone, atol=1e-4, rtol=1e-5)
    assert len(WHOLE) == LIMIT
    check_pairs(policy, [FIRST, WHOLE], "m")
    # What is refused: without the refusal the numbers would change, in either form.
    assert not torch.allclose(logprobs(policy, [FIRST, LONGER], packing), alone, atol=1e-2, rtol=1e-3)
    with pytest.raises(UsageError, match=rf"the longest pair has 32: pass --max_len={LIMIT}"):
        check_pairs(policy, [FIRST, LONGER], "m")


def test_the_preflight_refuses_and_otherwise_predicts(model, capsys):
    with pytest.raises(UsageError, match=rf"beyond {LIMIT} tokens .*{model.name}"):
        preflight(run_on(model, [FIRST] * 2, [LONGER]))
    preflight(run_on(model, [FIRST] * 2, [FIRST]))
    assert "predicted peak" in capsys.readouterr().out


def test_fixed_kinds_have_no_limit_but_a_warning(tmp_path, capsys):
    preflight(run_on(rotary("llama3", tmp_path), [LONGER] * 2, [LONGER]))
    assert "the longest pair has 32 tokens, beyond the model's context: pass --max_len=8" in capsys.readouterr().out

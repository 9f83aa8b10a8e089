"""Which models the tangent solver takes: those that it takes get the exact gradient, the others are refused by name."""

import pytest
import torch
from harness.policies import apart, policy_of, step
from harness.policies import wdpo_config as config_of
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    HeliumConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from drdpo.errors import DataError
from drdpo.training.data import Pair, form_batch
from drdpo.training.lora import add_lora
from drdpo.training.losses import method_of
from drdpo.training.objective import check_tangent, objective
from drdpo.training.policy import Policy, load_policy, widen_values

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def saved(config, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    model.save_pretrained(folder)
    return folder


LLAMA_LIKE = {
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "yarn": LlamaConfig(**SIZES, head_dim=16, rope_parameters=YARN),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
}


def pairs_of_lengths(*lengths: tuple[int, int, int]) -> list[Pair]:
    numbers = torch.Generator().manual_seed(2)
    return [Pair(*(torch.randint(3, 300, (n,), generator=numbers).tolist() for n in row)) for row in lengths]


def add_adapters(policy, config):
    """Adapters that do something: zero at the start, one half of them would leave half of the gradients zero."""
    add_lora(policy, config.lora)
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("adapters", [0, 3], ids=["whole", "lora"])
@pytest.mark.parametrize("model", LLAMA_LIKE.values(), ids=LLAMA_LIKE)
def test_models_that_are_built_as_llama_pass_and_equal_exact(model, adapters, tmp_path):
    pairs = pairs_of_lengths((14, 9, 16), (15, 2, 12), (1, 1, 3), (7, 30, 1))
    folder, gradients = saved(model, tmp_path), []
    for solver in ("tangent", "exact"):
        config = config_of(wdpo_solver=solver, lora_rank=adapters)
        policy = load_policy(str(folder), torch.float32, config.attention, True, config.second_derivative)
        if adapters:
            add_adapters(policy, config)
        if solver == "tangent":
            check_tangent(policy, config.model_path, method_of(config))
        gradients.append(step(policy.double().train(), pairs, [[3, 0], [1, 2]], config)[1])
    if adapters:
        assert len(gradients[0]) < 8_000, "the adapters alone"
    assert apart(*gradients) < 1e-5


@pytest.mark.parametrize("adapters", [0, 3], ids=["whole", "lora"])
@pytest.mark.parametrize("model", LLAMA_LIKE.values(), ids=LLAMA_LIKE)
def test_they_pass_in_bfloat16_with_first_tokens_in_float32(model, adapters, tmp_path):
    """The first tokens are all of these pairs' tokens but a few."""
    pairs = pairs_of_lengths((14, 9, 16), (15, 2, 12))
    folder, gradients = saved(model, tmp_path), []
    for dtype in ("bfloat16", "float32"):
        config = config_of(wdpo_solver="tangent", lora_rank=adapters, dtype=dtype)
        policy = load_policy(str(folder), getattr(torch, dtype), config.attention, True)
        if adapters:
            add_adapters(policy, config)
        if config.wide_values:
            widen_values(policy)
        assert policy.wide_values == (dtype == "bfloat16")
        check_tangent(policy, config.model_path, method_of(config))
        gradients.append(step(policy, pairs, [[0], [1]], config)[1])
    # Measured .02 to .14: these weights are large, and attention and adapters stay in bfloat16.
    assert apart(*gradients) < 0.3


REFUSED = {
    "Gemma2Model": Gemma2Config(**SIZES, final_logit_softcapping=None, attn_logit_softcapping=None, sliding_window=None),
    "GraniteModel": GraniteConfig(**SIZES, logits_scaling=1.0),
    # Some layers of SmolLM3 have no rotary positions, Helium turns neighbours in place of halves: with small weights
    # neither shows in bfloat16 on a short row.
    "SmolLM3Model": SmolLM3Config(**SIZES | {"initializer_range": 0.02}, pad_token_id=0),
    "HeliumModel": HeliumConfig(**SIZES | {"initializer_range": 0.02}, head_dim=8, pad_token_id=0),
    "not by SiLU": LlamaConfig(**SIZES, hidden_act="gelu"),
}


@pytest.mark.parametrize(("words", "model"), REFUSED.items(), ids=REFUSED)
def test_other_models_are_refused(words, model):
    config = config_of(wdpo_solver="tangent", dtype="bfloat16")
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(model, attn_implementation=config.attention).bfloat16()).train()
    with pytest.raises(DataError, match=rf"--wdpo_solver=tangent cannot .*{words}.*; pass --wdpo_solver=exact"):
        check_tangent(policy, config.model_path, method_of(config))


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "Gemma2Model"])  # its own mask needs a window
def test_exact_takes_the_models_that_are_refused(name):
    """Against the same pairs one sequence at a time, through the model's own logits."""
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(REFUSED[name], attn_implementation="eager").double()
    policy, config = Policy(language_model, second_derivative=True).train(), config_of(wdpo_solver="exact")
    pairs = pairs_of_lengths((4, 9, 6), (1, 1, 3))
    batch, reference_B2 = (
        form_batch(pairs, [0, 1], config.packing),
        torch.tensor([[-50.0, -20.0], [-9.0, -30.0]]).double(),
    )
    total = 0.0
    for pair, reference_2 in zip(pairs, reference_B2, strict=True):
        log_ratios, embeds = [], []
        for answer, reference in zip((pair.chosen, pair.rejected), reference_2, strict=True):
            ids_T = torch.tensor(pair.prompt + answer)
            embeds.append(language_model.get_input_embeddings()(ids_T)[None])
            logprob_TV = language_model(inputs_embeds=embeds[-1], use_cache=False).logits[0, :-1].log_softmax(dim=1)
            log_ratios.append(logprob_TV.gather(1, ids_T[1:, None])[len(pair.prompt) - 1 :].sum() - reference)
        loss = -torch.nn.functional.logsigmoid(config.beta * (log_ratios[0] - log_ratios[1]))
        slopes = torch.autograd.grad(loss, embeds, create_graph=True)
        total += (loss + config.wdpo_rho * sum(slope.square().sum() for slope in slopes)) / len(pairs)
    ours = objective(policy, batch, reference_B2, method_of(config), None).total
    assert ours.item() == pytest.approx(total.item(), rel=1e-6)
    parameters = list(policy.parameters())
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]) for value in (ours, total)]
    assert apart(*gradients) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_computes_something_else_is_found_by_its_numbers(dtype, tiny_policy):
    config = config_of(wdpo_solver="tangent", dtype=str(dtype).removeprefix("torch."))
    policy = policy_of(tiny_policy, config, dtype=dtype)
    if config.wide_values:
        widen_values(policy)
    check_tangent(policy, config.model_path, method_of(config))
    handle = policy.language_model.model.layers[1].mlp.register_forward_hook(lambda module, given, out: out / 2)
    with pytest.raises(DataError, match="hidden states are not"):
        check_tangent(policy, config.model_path, method_of(config))
    handle.remove()
    layer = policy.language_model.model.layers[0].mlp
    layer.up_proj = NotLinear(layer.up_proj)
    with pytest.raises(DataError, match=r"mlp.up_proj is not linear"):
        check_tangent(policy, config.model_path, method_of(config))


class NotLinear(torch.nn.Module):
    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner, self.in_features = inner, inner.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + x.square().mean()

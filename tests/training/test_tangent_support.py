"""Which models the tangent solver takes: those that it takes get the exact gradient, the others are refused by name."""

import pytest
import torch
from harness.architectures import random_model
from harness.policies import answer_logprobs, apart, gradient_of, pairs_of_lengths, policy_of, step
from harness.policies import wdpo_config as config_of

from drdpo.errors import DataError
from drdpo.training.data import form_batch
from drdpo.training.lora import add_lora
from drdpo.training.losses import method_of
from drdpo.training.objective import check_tangent, objective
from drdpo.training.policy import Policy, load_policy, widen_values

LLAMA_LIKE = ("Llama, biases", "Llama, YaRN", "Mistral", "Qwen2", "Qwen3, q/k norms")


def loaded(folder, config):
    """The policy, checked, with adapters that do something: at zero, one half of them has no gradient."""
    policy = load_policy(str(folder), getattr(torch, config.dtype), config.attention, True, config.second_derivative)
    if config.lora:
        add_lora(policy, config.lora)
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if config.wide_values:
        widen_values(policy)
    if not config.second_derivative:
        check_tangent(policy, config.model_path, method_of(config))
    return policy


@pytest.mark.parametrize("adapters", [0, 3], ids=["whole", "lora"])
@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_models_that_are_built_as_llama_pass_and_equal_exact(name, adapters, tmp_path):
    pairs = pairs_of_lengths((14, 9, 16), (15, 2, 12), (1, 1, 3), (7, 30, 1), seed=4)
    random_model(name).save_pretrained(tmp_path)
    gradients = []
    for solver in ("tangent", "exact"):
        config = config_of(wdpo_solver=solver, lora_rank=adapters)
        gradients.append(step(loaded(tmp_path, config).double().train(), pairs, [[3, 0], [1, 2]], config)[1])
    if adapters:
        assert len(gradients[0]) < 8_000, "the adapters alone"
    assert apart(*gradients) < 1e-5
    # And in bfloat16 with values in float32.
    gradients = []
    for dtype in ("bfloat16", "float32"):
        config = config_of(wdpo_solver="tangent", lora_rank=adapters, dtype=dtype)
        policy = loaded(tmp_path, config)
        assert policy.wide_values == (dtype == "bfloat16")
        gradients.append(step(policy, pairs[:2], [[0], [1]], config)[1])
    # Measured .02 to .14: these weights are large, and attention and adapters stay in bfloat16.
    assert apart(*gradients) < 0.3


REFUSED = {
    "Gemma 2 without caps": "Gemma2Model", "Granite, multipliers": "GraniteModel", "SmolLM3": "SmolLM3Model",
    "GLM": "GlmModel", "by gelu": "not by SiLU",
}  # fmt: skip


def refused(name: str):
    return random_model("Llama, biases", hidden_act="gelu") if name == "by gelu" else random_model(name)


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused(name):
    config = config_of(wdpo_solver="tangent", dtype="bfloat16")
    with pytest.raises(DataError, match=rf"--wdpo_solver=tangent cannot .*{REFUSED[name]}.*; pass --wdpo_solver=exact"):
        check_tangent(Policy(refused(name).bfloat16()).train(), config.model_path, method_of(config))


@pytest.mark.parametrize("name", [name for name in REFUSED if "Gemma" not in name])  # its own mask needs a window
def test_exact_takes_the_models_that_are_refused(name):
    """Against the same pairs one sequence at a time, through the model's own logits."""
    language_model = refused(name).double()
    policy, config = Policy(language_model, second_derivative=True).train(), config_of(wdpo_solver="exact")
    pairs, reference_B2 = pairs_of_lengths((4, 9, 6), (1, 1, 3)), torch.tensor([[-50.0, -20.0], [-9.0, -30.0]]).double()
    total = 0.0
    for pair, reference_2 in zip(pairs, reference_B2, strict=True):
        log_ratios, embeds = [], []
        for answer, reference in zip((pair.chosen, pair.rejected), reference_2, strict=True):
            ids_T = torch.tensor(pair.prompt + answer)
            embeds.append(language_model.get_input_embeddings()(ids_T))
            log_ratios.append(answer_logprobs(language_model, embeds[-1], ids_T, len(pair.prompt)) - reference)
        loss = -torch.nn.functional.logsigmoid(config.beta * (log_ratios[0] - log_ratios[1]))
        slopes = torch.autograd.grad(loss, embeds, create_graph=True)
        total += (loss + config.wdpo_rho * sum(slope.square().sum() for slope in slopes)) / len(pairs)
    batch = form_batch(pairs, [0, 1], config.packing)
    ours = objective(policy, batch, reference_B2, method_of(config), None).total
    assert ours.item() == pytest.approx(total.item(), rel=1e-6)
    assert apart(gradient_of(policy, ours), gradient_of(policy, total)) < 1e-5


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

"""A sequence's first tokens in float32 arithmetic on bfloat16 weights."""

from pathlib import Path

import pytest
import torch
from harness.policies import apart, config_of
from torch import nn
from transformers import AutoTokenizer

from drdpo.kernels.packed_attention import PrefixGroup
from drdpo.training.data import Pair, form_batch
from drdpo.training.losses import method_of
from drdpo.training.objective import objective
from drdpo.training.patches import first_rows, rows_in_float32
from drdpo.training.policy import load_policy, widen_first_tokens

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 32).to(torch.bfloat16)


def test_given_rows_are_float32_products_and_others_bfloat16_ones(layer):
    x = torch.randn(2, 10, 48)
    rows = torch.tensor([0, 1, 7])
    with rows_in_float32(rows):
        out = layer(x)
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    rough = layer(x.bfloat16()).float()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[:, rows].double(), exact[:, rows], rtol=1e-5, atol=1e-5)
    others = [row for row in range(10) if row not in rows.tolist()]
    assert torch.equal(out[:, others], rough[:, others])
    assert (rough[:, rows] - exact[:, rows]).abs().max() > 1e-3, "bfloat16 would have done as well"
    # Outside, and for inputs of the weight's dtype, nothing has changed.
    with rows_in_float32(rows):
        assert torch.equal(layer(x.bfloat16()), layer(x.bfloat16()))
    with pytest.raises(RuntimeError):
        layer(x)


def test_gradients_of_given_rows_are_those_of_float32(layer):
    x, grad = torch.randn(2, 3, 48, requires_grad=True), torch.randn(2, 3, 32)
    with rows_in_float32(torch.arange(3)):
        found = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], grad)
    rows_x, rows_grad = x.detach().double().flatten(0, 1), grad.double().flatten(0, 1)
    # Sums over rows are of what bfloat16 keeps of their terms.
    products = rows_grad.bfloat16().double().T @ rows_x.bfloat16().double()
    expected = [grad.double() @ layer.weight.double(), products, rows_grad.sum(dim=0)]
    for ours, theirs, tolerance in zip(found, expected, (1e-5, 1e-2, 1e-2), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    assert [part.dtype for part in found] == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_frozen_weights_get_no_gradient(layer):
    x = torch.randn(3, 48, requires_grad=True)
    with rows_in_float32(torch.arange(3), frozen=True):
        layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.float().sum(dim=0).expand(3, -1))
    assert layer.weight.grad is None and layer.bias.grad is None


def test_a_second_derivative_is_refused(layer):
    """Its backward pass is written by hand: autograd would take the result for a constant."""
    x = torch.randn(6, 48, requires_grad=True)
    with rows_in_float32(torch.arange(2)):
        out = layer(x).square().sum()
    (slope,) = torch.autograd.grad(out, x, retain_graph=True)
    assert slope.isfinite().all()
    with pytest.raises(RuntimeError, match="differentiable once only"):
        torch.autograd.grad(out, x, create_graph=True)


def test_first_rows_are_those_of_every_sequence():
    long, short = PrefixGroup(20, (3, 17)), PrefixGroup(2, (1, 9))
    rows = first_rows([long, short], torch.device("cpu")).tolist()
    assert rows == [*range(4), *range(40, 42), 42, *range(43, 45)]


@pytest.mark.slow
def test_the_penalty_of_a_real_model_is_near_to_float32(smollm):
    """SmolLM2-135M, two pairs of 2 x 64 tokens of the embedded prompts' text; measured 0.10 and 0.08."""
    text = (ROOT / "src/drdpo/assets/prompts/train.jsonl").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(smollm)(text, verbose=False)["input_ids"]
    pairs = [Pair(*(ids[start + 32 * part :][:32] for part in range(3))) for start in (0, 3000)]

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        config = config_of(wdpo_solver="tangent", wdpo_rho=1e9, beta=0.01, dtype=str(dtype).removeprefix("torch."))
        policy = load_policy(str(smollm), dtype, config.attention, True)
        if config.wide_first_tokens:
            widen_first_tokens(policy)
        found = []
        for pair in pairs:
            total = objective(
                policy,
                form_batch([pair], [0], config.packing, config.prompt_once),
                torch.zeros(1, 2),
                method_of(config),
                None,
            ).total
            parts = torch.autograd.grad(total, list(policy.parameters()))
            found.append(torch.cat([part.flatten() for part in parts]).double())
        return found

    for ours, theirs in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert apart(ours, theirs) < 0.2
        assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99

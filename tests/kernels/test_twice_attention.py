"""Packed attention with a second derivative, against plain attention's own in float64."""

import pytest
import torch
from torch import Tensor

from drdpo.kernels import tangent_attention
from drdpo.kernels.shared_prefix import PrefixGroup, PrefixPlan, shared_prefix_attention

GROUPS = [PrefixGroup(4, (3, 6)), PrefixGroup(0, (5,)), PrefixGroup(0, (1,)), PrefixGroup(2, (1, 40))]
TOKENS = sum(group.tokens for group in GROUPS)


def second_derivatives(plan: PrefixPlan, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Of a norm of the gradient and of the value itself, for inputs and upstream gradient."""
    # Made from leaves, as queries are, so that first-order and second-order parts meet.
    parts = [torch.tanh(part) for part in inputs]
    out = shared_prefix_attention(*parts, plan, 0.7)
    grads = torch.autograd.grad((out * upstream).sum().square(), parts, create_graph=True)
    penalty = sum(grad.square().sum() * factor for factor, grad in enumerate(grads, start=1))
    return [out, *grads, *torch.autograd.grad(penalty + out.square().sum(), [*inputs, upstream])]


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_second_derivatives_equal_those_of_plain_attention(kv_heads: int, monkeypatch) -> None:
    monkeypatch.setitem(tangent_attention._BLOCK_ELEMENTS, True, 1)
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, TOKENS, 4, dtype=torch.float64, requires_grad=True) for heads in (6, kv_heads, kv_heads)]
    upstream = torch.randn(1, 6, TOKENS, 4, dtype=torch.float64, requires_grad=True)
    plans = [PrefixPlan(GROUPS, torch.device("cpu"), torch.float64, **kind) for kind in ({"twice": True}, {"plain": True})]
    ours, plain = (second_derivatives(plan, inputs, upstream) for plan in plans)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


def test_the_fused_kernels_alone_refuse_a_second_derivative() -> None:
    inputs = [torch.randn(1, 2, TOKENS, 4, requires_grad=True) for _ in range(3)]
    plan = PrefixPlan(GROUPS, torch.device("cpu"), torch.float32)
    with pytest.raises(RuntimeError, match="not implemented"):
        second_derivatives(plan, inputs, torch.randn(1, 2, TOKENS, 4, requires_grad=True))


def test_a_third_derivative_is_refused() -> None:
    inputs = [torch.randn(1, 2, TOKENS, 4, requires_grad=True) for _ in range(3)]
    plan = PrefixPlan(GROUPS, torch.device("cpu"), torch.float32, twice=True)
    grad = torch.autograd.grad(shared_prefix_attention(*inputs, plan, None).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="twice, not more"):
        torch.autograd.grad(grad[0].square().sum(), inputs, create_graph=True)


def test_nothing_that_is_kept_grows_with_the_square_of_the_row() -> None:
    def kept(tokens: int) -> int:
        inputs = [torch.randn(1, 2, tokens, 4, requires_grad=True) for _ in range(3)]
        plan = PrefixPlan([PrefixGroup(0, (tokens,))], torch.device("cpu"), torch.float32, twice=True)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda part: (sizes.append(part.numel()), part)[1], lambda part: part):
            out = shared_prefix_attention(*inputs, plan, None)
            torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return sum(sizes)

    assert kept(128) == 2 * kept(64)

"""Packed attention that can be differentiated twice, for WDPO's exact solver, in memory that is linear in the row.

The fused kernels of scaled_dot_product_attention have no second derivative, and plain attention keeps N x N weights of every
layer for it. Here the backward pass runs the fused kernels again, and its own derivative is written out. With J the
Jacobian of O(q, k, v) and b the gradient for O, the first backward pass is J^T b; for cotangents u of its results,

    <u, J^T b> = <J u, b> = <dO, b>,    dO the tangent of O along u,

so its gradient for b is dO, and that for q, k, v is what drdpo.kernels.tangent_attention's backward pass gives for the
values when b comes in on the tangent. Shapes as there.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from drdpo.kernels.hand_written import refuse_graph
from drdpo.kernels.shared_prefix import PrefixPlan, fused_attention
from drdpo.kernels.tangent_attention import tangent_attention


def twice_attention(
    query_1HNE: Tensor, key_1KNE: Tensor, value_1KNE: Tensor, plan: PrefixPlan, scale: float | None
) -> Tensor:
    """As drdpo.kernels.shared_prefix.shared_prefix_attention; its gradients for queries, keys and values have a graph."""
    scale = query_1HNE.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(query_1HNE, key_1KNE, value_1KNE, plan, scale)


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: PrefixPlan, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.plan, ctx.scale = plan, scale
        return fused_attention(query, key, value, plan, scale)

    @staticmethod
    def backward(ctx: Any, grad_1HNE: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        return *_Gradient.apply(*ctx.saved_tensors, grad_1HNE, ctx.plan, ctx.scale), None, None


class _Gradient(Function):
    """J^T b as a function of q, k, v and b."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, grad_1HNE: Tensor, plan: PrefixPlan, scale: float
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(query, key, value, grad_1HNE)
        ctx.plan, ctx.scale = plan, scale
        with torch.enable_grad():
            query, key, value = (part.detach().requires_grad_() for part in (query, key, value))
            out_1HNE = fused_attention(query, key, value, plan, scale)
        return torch.autograd.grad(out_1HNE, (query, key, value), grad_1HNE)

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        refuse_graph("the attention of WDPO's exact solver is differentiable twice, not more")
        *inputs, grad_1HNE = ctx.saved_tensors
        with torch.enable_grad():
            pairs = [_stacked(part, moved).requires_grad_() for part, moved in zip(inputs, along, strict=True)]
            query_2NHE, key_2NKE, value_2NKE = pairs
            out_2NHE = tangent_attention(query_2NHE, key_2NKE, value_2NKE, ctx.plan.groups, ctx.scale)
        upstream_2NHE = _stacked(torch.zeros_like(grad_1HNE), grad_1HNE)
        grads = (part[0].transpose(0, 1)[None] for part in torch.autograd.grad(out_2NHE, pairs, upstream_2NHE))
        return *grads, out_2NHE[1].detach().transpose(0, 1)[None], None, None


def _stacked(value_1HNE: Tensor, moved_1HNE: Tensor) -> Tensor:
    """[2, N, H, E]"""
    return torch.cat([value_1HNE, moved_1HNE]).transpose(1, 2).contiguous()

"""Log-probabilities of target tokens straight from hidden states, without ever holding [N, V] logits.

log p(t | h) = h . W_t - logsumexp(W h). The vocabulary is taken in blocks (drdpo.kernels.vocabulary); the backward pass
computes each block's logits again from the hidden states and the log-sum-exp.

WDPO differentiates a gradient. With p = softmax(W h), the log-probability's slope is q = W_t - W^T p, an upstream gradient
g gives g q for h, and that has the vector-Jacobian product along u, with s = W u and m = p . s = u . (W_t - q),
    for g:  u . q
    for h: -g W^T r,                          r = p * (s - m)
    for W:  g (onehot_t - p) u^T - g r h^T
All are written out below, so the second derivative is exact and in blocks as well.

Shape suffixes: N answer tokens, D width, V vocabulary, K columns of one block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from drdpo.kernels.hand_written import refuse_graph, wide
from drdpo.kernels.vocabulary import (
    blocks,
    logit_gradient,
    logprob_and_lse,
    logprob_and_slope,
    probabilities,
    scaled_onehot_less,
)


def linear_logprob(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, twice: bool = False) -> Tensor:
    """Log-probability of every target token under softmax(hidden @ weight.T).

    Args:
        hidden_ND: [N, D] hidden states, any floating dtype.
        weight_VD: [V, D] output head, same dtype; may be tied to the input embeddings.
        targets_N: [N] int64 token ids in [0, V).
        twice: make the gradient for `hidden_ND` differentiable again (WDPO's exact solver). Without it a second
            derivative raises.

    Returns:
        [N] float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if hidden_ND.dim() != 2 or weight_VD.dim() != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden {tuple(hidden_ND.shape)} and weight {tuple(weight_VD.shape)} must be [N, D] and [V, D]")
    if targets_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"targets {tuple(targets_N.shape)} must be [N] with N = {hidden_ND.shape[0]}")
    if hidden_ND.dtype != weight_VD.dtype:
        raise ValueError(f"hidden is {hidden_ND.dtype}, weight is {weight_VD.dtype}; give both the same dtype")
    if not twice:
        return _LogProb.apply(hidden_ND, weight_VD, targets_N)
    # The first-order gradient for W hangs on a node of its own, so that WDPO's inner gradient, which asks for inputs
    # only, does not compute it.
    logprob_N, lse_N = _TwiceLogProb.apply(hidden_ND, weight_VD, targets_N)
    return logprob_N + _WeightGradient.apply(hidden_ND.detach(), weight_VD, targets_N, lse_N)


class _LogProb(Function):
    """Once differentiable; one recomputation gives both gradients."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        if wants_hidden and not wants_weight:
            # A frozen head, as with LoRA: its slope now saves the logits' recomputation later.
            logprob_N, _, slope_ND = logprob_and_slope(hidden_ND, weight_VD, targets_N)
            ctx.save_for_backward(slope_ND)
            return logprob_N
        logprob_N, lse_N = logprob_and_lse(hidden_ND, weight_VD, targets_N)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, lse_N)
        return logprob_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        refuse_graph(
            "linear_logprob has no derivative of this order; pass twice=True to differentiate the gradient for hidden_ND"
        )
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        if not wants_weight:
            (slope_ND,) = ctx.saved_tensors
            return (grad_N[:, None] * slope_ND).to(slope_ND.dtype), None, None
        hidden_ND, weight_VD, targets_N, lse_N = ctx.saved_tensors
        grad_hidden_ND = torch.zeros_like(wide(hidden_ND)) if wants_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD, memory_format=torch.contiguous_format)
        for columns in blocks(hidden_ND, weight_VD):
            gradient_NK = logit_gradient(hidden_ND, weight_VD, columns, targets_N, lse_N, grad_N)
            if grad_hidden_ND is not None:
                grad_hidden_ND += gradient_NK @ weight_VD[columns]
            torch.mm(gradient_NK.T, hidden_ND, out=grad_weight_VD[columns])
        return None if grad_hidden_ND is None else grad_hidden_ND.to(hidden_ND.dtype), grad_weight_VD, None


class _WeightGradient(Function):
    """Zero in value; carries the first-order gradient for W of the log-probabilities."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, lse_N: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, lse_N)
        return torch.zeros_like(lse_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[None, Tensor, None, None]:
        refuse_graph("linear_logprob has no derivative of this order; the gradient for weight_VD is once differentiable")
        hidden_ND, weight_VD, targets_N, lse_N = ctx.saved_tensors
        grad_weight_VD = torch.empty_like(weight_VD, memory_format=torch.contiguous_format)
        for columns in blocks(hidden_ND, weight_VD):
            gradient_NK = logit_gradient(hidden_ND, weight_VD, columns, targets_N, lse_N, grad_N)
            torch.mm(gradient_NK.T, hidden_ND, out=grad_weight_VD[columns])
        return None, grad_weight_VD, None, None


class _TwiceLogProb(Function):
    """The log-probabilities with a gradient for h that is differentiable again."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logprob_N, lse_N, slope_ND = logprob_and_slope(hidden_ND, weight_VD, targets_N)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, lse_N, slope_ND)
        ctx.mark_non_differentiable(lse_N)
        return logprob_N, lse_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        return _HiddenGradient.apply(*ctx.saved_tensors, grad_N), None, None


class _HiddenGradient(Function):
    """g q as a function of h, W and g, [N, D]."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, lse_N: Tensor, slope_ND: Tensor, grad_N: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, lse_N, slope_ND, grad_N)
        return (grad_N[:, None] * slope_ND).to(hidden_ND.dtype)

    @staticmethod
    def backward(ctx: Any, along_ND: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, Tensor]:
        refuse_graph(
            "linear_logprob has no derivative of this order; the gradient for hidden_ND is twice differentiable, not more"
        )
        hidden_ND, weight_VD, targets_N, lse_N, slope_ND, grad_N = ctx.saved_tensors
        moved_N = (wide(along_ND) * wide(slope_ND)).sum(dim=1)
        mean_N = (wide(along_ND) * wide(weight_VD[targets_N])).sum(dim=1) - moved_N
        grad_hidden_ND = torch.zeros_like(wide(hidden_ND))
        wants_weight = ctx.needs_input_grad[1]
        grad_weight_VD = torch.empty_like(weight_VD, memory_format=torch.contiguous_format) if wants_weight else None
        for columns in blocks(hidden_ND, weight_VD):
            weight_KD = weight_VD[columns]
            probs_NK = probabilities(hidden_ND, weight_KD, lse_N)
            curved_NK = wide(along_ND @ weight_KD.T).sub_(mean_N[:, None]).mul_(probs_NK).mul_(-grad_N[:, None])
            curved_NK = curved_NK.to(hidden_ND.dtype)
            grad_hidden_ND += curved_NK @ weight_KD
            if grad_weight_VD is not None:
                straight_NK = scaled_onehot_less(probs_NK, grad_N, targets_N, columns.start).to(hidden_ND.dtype)
                both_2NK = torch.cat([straight_NK, curved_NK])
                torch.mm(both_2NK.T, torch.cat([along_ND, hidden_ND]), out=grad_weight_VD[columns])
        return grad_hidden_ND.to(hidden_ND.dtype), grad_weight_VD, None, None, None, moved_N

"""Log-probabilities of target tokens straight from hidden states, without ever holding [N, V] logits.

log p(t | h) = h . W_t - logsumexp(W h). Tokens are taken in chunks; matrix products run in the input's dtype, the
log-sum-exp in float32; the backward pass computes each chunk's logits again from the hidden states and the log-sum-exp.
On CUDA, for all but float64, log-sum-exp and logit gradients come from drdpo.kernels.triton_logprob.

WDPO differentiates a gradient. With p = softmax(W h) and an upstream gradient g, the gradient for h is
    q(h, W, g) = g (W_t - W^T p)
and its own vector-Jacobian product along u, with s = W u and m = p . s, is
    for g:  u . W_t - m
    for h: -g W^T r,                          r = p * (s - m)
    for W:  g (onehot_t - p) u^T - g r h^T
Both are written out below, so the second derivative is exact and chunked as well.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

_CHUNK_ELEMENTS = 1 << 25
"""Logits held at once: 128 MiB in float32."""


def linear_logprob(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, twice: bool = False) -> Tensor:
    """Log-probability of every target token under softmax(hidden @ weight.T).

    Args:
        hidden_ND: [N, D] hidden states, any floating dtype.
        weight_VD: [V, D] output head, same dtype; may be tied to the input embeddings.
        targets_N: [N] int64 token ids in [0, V).
        twice: make the gradient for `hidden_ND` differentiable again (WDPO's exact solver); costs one more product
            with the head in the backward pass. Without it a second derivative raises.

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


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS // vocabulary)
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _triton(hidden_ND: Tensor) -> Any:
    """The Triton kernels where they can run: on CUDA, or anywhere under Triton's interpreter; else None."""
    if hidden_ND.dtype == torch.float64 or not (hidden_ND.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    from drdpo.kernels import triton_logprob

    return triton_logprob


def _logprob_and_lse(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of the targets and log-sum-exp [N] of the logits."""
    if len(targets_N) and (kernels := _triton(hidden_ND)) is not None:
        return kernels.logprob_and_lse(hidden_ND.contiguous(), weight_VD.contiguous(), targets_N)
    logprob_N, lse_N = (
        torch.empty(len(targets_N), device=hidden_ND.device, dtype=_wide(hidden_ND[:0]).dtype) for _ in range(2)
    )
    for chunk in _chunks(len(targets_N), len(weight_VD)):
        logits_CV = _wide(hidden_ND[chunk] @ weight_VD.T)
        lse_N[chunk] = torch.logsumexp(logits_CV, dim=1)
        logprob_N[chunk] = logits_CV.gather(1, targets_N[chunk, None]).squeeze(1) - lse_N[chunk]
    return logprob_N, lse_N


def _softmax(hidden_CD: Tensor, weight_VD: Tensor, lse_C: Tensor) -> Tensor:
    return (_wide(hidden_CD @ weight_VD.T) - lse_C[:, None]).exp_()


def _logit_gradient(probs_CV: Tensor, targets_C: Tensor, grad_C: Tensor) -> Tensor:
    """g (onehot_t - p), in place."""
    gradient_CV = probs_CV.mul_(-grad_C[:, None])
    return gradient_CV.scatter_add_(1, targets_C[:, None], grad_C[:, None])


def _chunk_gradient(hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, lse_C: Tensor, grad_C: Tensor) -> Tensor:
    """g (onehot_t - p) of one chunk [C, V], in the input's dtype."""
    if (kernels := _triton(hidden_CD)) is not None:
        return kernels.logit_gradient(hidden_CD.contiguous(), weight_VD.contiguous(), targets_C, lse_C, grad_C.contiguous())
    return _logit_gradient(_softmax(hidden_CD, weight_VD, lse_C), targets_C, grad_C).to(hidden_CD.dtype)


def _refuse_graph(advice: str) -> None:
    """Autograd would take the result of a hand-written backward pass for a constant: say so instead."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"linear_logprob has no derivative of this order; {advice}")


class _LogProb(Function):
    """Once differentiable; one recomputation gives both gradients."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        logprob_N, lse_N = _logprob_and_lse(hidden_ND, weight_VD, targets_N)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, lse_N)
        return logprob_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        _refuse_graph("pass twice=True to differentiate the gradient for hidden_ND")
        hidden_ND, weight_VD, targets_N, lse_N = ctx.saved_tensors
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        # Chunks are summed in float32: bfloat16 would lose the small ones.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=_wide(weight_VD[:0]).dtype) if wants_weight else None
        for chunk in _chunks(len(targets_N), len(weight_VD)):
            gradient_CV = _chunk_gradient(hidden_ND[chunk], weight_VD, targets_N[chunk], lse_N[chunk], grad_N[chunk])
            if grad_hidden_ND is not None:
                grad_hidden_ND[chunk] = gradient_CV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += gradient_CV.T @ hidden_ND[chunk]
        return grad_hidden_ND, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype), None


class _WeightGradient(Function):
    """Zero in value; carries the first-order gradient for W of the log-probabilities."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, lse_N: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, lse_N)
        return torch.zeros_like(lse_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[None, Tensor, None, None]:
        _refuse_graph("the gradient for weight_VD is once differentiable")
        hidden_ND, weight_VD, targets_N, lse_N = ctx.saved_tensors
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=_wide(weight_VD[:0]).dtype)
        for chunk in _chunks(len(targets_N), len(weight_VD)):
            gradient_CV = _chunk_gradient(hidden_ND[chunk], weight_VD, targets_N[chunk], lse_N[chunk], grad_N[chunk])
            grad_weight_VD += gradient_CV.T @ hidden_ND[chunk]
        return None, grad_weight_VD.to(weight_VD.dtype), None, None


class _TwiceLogProb(Function):
    """The log-probabilities with a gradient for h that is differentiable again."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logprob_N, lse_N = _logprob_and_lse(hidden_ND, weight_VD, targets_N)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, lse_N)
        ctx.mark_non_differentiable(lse_N)
        return logprob_N, lse_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        hidden_ND, weight_VD, targets_N, lse_N = ctx.saved_tensors
        return _HiddenGradient.apply(hidden_ND, weight_VD, targets_N, lse_N, grad_N), None, None


class _HiddenGradient(Function):
    """q(h, W, g) = g (W_t - W^T p), [N, D]."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, lse_N: Tensor, grad_N: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, lse_N, grad_N)
        gradient_ND = torch.empty_like(hidden_ND)
        for chunk in _chunks(len(targets_N), len(weight_VD)):
            gradient_CV = _chunk_gradient(hidden_ND[chunk], weight_VD, targets_N[chunk], lse_N[chunk], grad_N[chunk])
            gradient_ND[chunk] = gradient_CV @ weight_VD
        return gradient_ND

    @staticmethod
    def backward(ctx: Any, along_ND: Tensor) -> tuple[Tensor, Tensor | None, None, None, Tensor]:
        _refuse_graph("the gradient for hidden_ND is twice differentiable, not more")
        hidden_ND, weight_VD, targets_N, lse_N, grad_N = ctx.saved_tensors
        wants_weight = ctx.needs_input_grad[1]
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_grad_N = torch.empty_like(grad_N)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=_wide(weight_VD[:0]).dtype) if wants_weight else None
        for chunk in _chunks(len(targets_N), len(weight_VD)):
            grad_C, targets_C = grad_N[chunk], targets_N[chunk]
            probs_CV = _softmax(hidden_ND[chunk], weight_VD, lse_N[chunk])
            slope_CV = _wide(along_ND[chunk] @ weight_VD.T)
            mean_C = (probs_CV * slope_CV).sum(dim=1)
            grad_grad_N[chunk] = slope_CV.gather(1, targets_C[:, None]).squeeze(1) - mean_C
            curved_CV = slope_CV.sub_(mean_C[:, None]).mul_(probs_CV).mul_(-grad_C[:, None]).to(hidden_ND.dtype)
            grad_hidden_ND[chunk] = curved_CV @ weight_VD
            if grad_weight_VD is not None:
                straight_CV = _logit_gradient(probs_CV, targets_C, grad_C).to(hidden_ND.dtype)
                grad_weight_VD += straight_CV.T @ along_ND[chunk] + curved_CV.T @ hidden_ND[chunk]
        weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND, weight, None, None, grad_grad_N

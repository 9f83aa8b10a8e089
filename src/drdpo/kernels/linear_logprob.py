"""Log-probabilities of target tokens from hidden states, and their change along a tangent, without [N, V] logits.

    log p(t | h) = h . W_t - logsumexp(W h)

Blocks. The vocabulary is taken in blocks; the backward pass recomputes each block's logits from the hidden states and the
log-sum-exp. Blocks of tokens instead would add up [V, D] gradients of the head; with blocks of the vocabulary each part of
that gradient is one product with float32 sums inside, and only [N, D] is added up.

Precision. Matrix products run in the input's dtype, everything else in float32 (float64 for float64 inputs). Rounding a
logit near 30 to bfloat16 would change its probability by up to 6%. So a number near the token's largest logit is subtracted
inside the product, before the result is rounded, and only the small difference is rounded. On CUDA, except for float64,
log-sum-exp and logit gradients come from drdpo.kernels.triton_logprob.

Tangent (for WDPO). With p = softmax(W h) and the slope q = W_t - W^T p, the log-probability of t changes along dh by
d = dh . q. q is computed together with the log-probability (logprob_and_slope), so neither d nor its gradient for dh, which
is q, needs the head again. With upstream gradients a for the log-probability and b for d, s = W dh and m = p . s =
dh . W_t - d, the other gradients are

    for h:  W^T u,   u = a (onehot_t - p) - b p * (s - m)
    for W:  u h^T + b (onehot_t - p) dh^T

Shape suffixes: N answer tokens, D width, V vocabulary, K columns of one block of it.
"""

import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from drdpo.distributed import use_cuda

_BLOCK_ELEMENTS = {True: 1 << 21, False: 1 << 26}
"""Logits of a block, of which a few copies are alive: on a CPU, where they should fit its cache, and on a GPU."""
_NARROWEST = 256
"""Columns of a block at least: narrower products waste the multiplying units."""
_MULTIPLE = 128
"""The columns of a block are a multiple of this: a GPU's matrix products take tiles of 128 columns, and it reads and writes
16 bytes at a time only if rows begin at multiples of 16 bytes."""

# Helpers of every kernel here that has its own backward pass.


def wide(tensor: Tensor) -> Tensor:
    """float32, or float64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def refuse_graph(message: str = "the tangent kernels are differentiable once only") -> None:
    """Refuse a second derivative: autograd would treat the result of a hand-written backward pass as a constant.

    Raises:
        RuntimeError: a graph of the backward pass is being built.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(message)


def on_cuda(tensor: Tensor) -> bool:
    """Does CUDA do the work? On the meta device: would it?"""
    return tensor.is_cuda or (tensor.is_meta and use_cuda())


def in_pieces(tensor: Tensor) -> bool:
    """Should the work be cut to the size of a cache? On a CPU, and on the meta device if a CPU would do the work."""
    return not on_cuda(tensor)


# Log-sum-exp, slopes and logit gradients, block by block.


class Known(NamedTuple):
    """What `logprob_and_slope` returns for N tokens."""

    logprob_N: Tensor
    lse_N: Tensor
    slope_ND: Tensor
    """[N, D] W_t - W^T p, the gradient of the log-probability for the hidden state."""


def blocks(hidden_ND: Tensor, weight_VD: Tensor) -> Iterator[slice]:
    """The columns of each block: a multiple of 128 except in the last block, and fewer the more tokens there are, so that a
    block's logits need about the same memory."""
    tokens, vocabulary = len(hidden_ND), len(weight_VD)
    width = max(_NARROWEST, _BLOCK_ELEMENTS[in_pieces(hidden_ND)] // max(1, tokens) // _MULTIPLE * _MULTIPLE)
    for start in range(0, vocabulary, width):
        yield slice(start, min(start + width, vocabulary))


class _MetaKernels:
    """The Triton kernels on the meta device: the tensors that they would return; some only fill what they get."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None

    @staticmethod
    def logprob_and_lse(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.empty_like(targets_N, dtype=torch.float32) for _ in range(2))

    @staticmethod
    def logit_gradient(hidden_ND: Tensor, weight_KD: Tensor, targets_N: Tensor, lse_N: Tensor, grad_N: Tensor) -> Tensor:
        return hidden_ND.new_empty(len(hidden_ND), len(weight_KD))


def triton_kernels(tensor: Tensor, module: str = "triton_logprob") -> Any:
    """A module of Triton kernels if they can run here: on CUDA, or anywhere under Triton's interpreter; otherwise None."""
    if tensor.dtype == torch.float64 or not tensor.numel():
        return None
    if tensor.is_meta:
        return _MetaKernels() if on_cuda(tensor) else None
    if not (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return import_module(f"drdpo.kernels.{module}")


def place(targets_N: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each target within a block, [N, 1], and whether it lies in the block; no shape depends on the values."""
    local_N1 = targets_N[:, None] - start
    return local_N1.clamp(0, columns - 1), (local_N1 >= 0) & (local_N1 < columns)


@torch.no_grad()
def logprob_and_slope(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, wants_slope: bool = True) -> Known:
    """Log-probability of every target and, unless not wanted, its gradient for the hidden state, without a graph; arguments
    as linear_logprob.

    Returns:
        Log-probabilities and log-sum-exps in float32 (float64 for float64 inputs), slopes in the input's dtype.
    """
    if (kernels := triton_kernels(hidden_ND)) is not None:
        logprob_N, lse_N = kernels.logprob_and_lse(hidden_ND.contiguous(), weight_VD.contiguous(), targets_N.contiguous())
        slope_ND = torch.zeros_like(wide(hidden_ND)) if wants_slope else hidden_ND.new_empty(0)
        for columns in blocks(hidden_ND, weight_VD) if wants_slope else ():
            gradient_NK = logit_gradient(hidden_ND, weight_VD, columns, targets_N, lse_N, torch.ones_like(lse_N))
            slope_ND += gradient_NK @ weight_VD[columns]
        return Known(logprob_N, lse_N, slope_ND.to(hidden_ND.dtype))
    # Softmax and its product with the head in one pass, as in flash attention: earlier sums are rescaled whenever the
    # largest logit grows. The sums omit the target, W_t - W^T p = (1 - p_t) W_t - (sum over the others): with p_t near 1 the
    # difference would be lost to rounding.
    picked_N = (wide(hidden_ND) * wide(weight_VD[targets_N])).sum(dim=1)
    most_N = torch.full_like(picked_N, float("-inf"))
    rest_N = torch.zeros_like(picked_N)  # of exp(logit - most), over all but the target
    slope_ND = others_ND = torch.zeros_like(wide(hidden_ND)) if wants_slope else hidden_ND.new_empty(0)
    for columns in blocks(hidden_ND, weight_VD):
        logits_NK, less_N = _logits_less(hidden_ND, weight_VD[columns], torch.maximum(most_N, picked_N))
        local_N1, inside_N1 = place(targets_N, columns.start, logits_NK.shape[1])
        higher_N = torch.maximum(most_N, logits_NK.amax(dim=1) + less_N)
        powers_NK = logits_NK.sub_((higher_N - less_N)[:, None]).exp_()
        powers_NK.scatter_(1, local_N1, powers_NK.gather(1, local_N1).masked_fill_(inside_N1, 0))
        scale_N = (most_N - higher_N).exp_()
        rest_N, most_N = rest_N.mul_(scale_N).add_(powers_NK.sum(dim=1)), higher_N
        if wants_slope:
            others_ND.mul_(scale_N[:, None]).add_(powers_NK.to(hidden_ND.dtype) @ weight_VD[columns])
    total_N = rest_N + (picked_N - most_N).exp_()
    if wants_slope:
        slope_ND = wide(weight_VD[targets_N]).mul_(rest_N[:, None]).sub_(others_ND).div_(total_N[:, None])
    log_total_N = total_N.log_()
    # First the logit minus the largest: both may be large, and float32 has 24 bits.
    return Known((picked_N - most_N) - log_total_N, most_N + log_total_N, slope_ND.to(hidden_ND.dtype))


def logit_gradient(
    hidden_ND: Tensor, weight_VD: Tensor, columns: slice, targets_N: Tensor, lse_N: Tensor, grad_N: Tensor
) -> Tensor:
    """[N, K] g (onehot_t - p) of one block, in the input's dtype."""
    weight_KD = weight_VD[columns]
    if (kernels := triton_kernels(hidden_ND)) is not None:
        targets_N = targets_N - columns.start
        return kernels.logit_gradient(hidden_ND.contiguous(), weight_KD.contiguous(), targets_N, lse_N, grad_N.contiguous())
    local_N1, inside_N1 = place(targets_N, columns.start, len(weight_KD))
    gradient_NK = probabilities(hidden_ND, weight_KD, lse_N).mul_(-grad_N[:, None])
    return gradient_NK.scatter_add_(1, local_N1, inside_N1 * grad_N[:, None]).to(hidden_ND.dtype)


def probabilities(hidden_ND: Tensor, weight_KD: Tensor, lse_N: Tensor) -> Tensor:
    """[N, K] one block of the softmax over the vocabulary."""
    if triton_kernels(hidden_ND) is None:
        logits_NK, less_N = _logits_less(hidden_ND, weight_KD, lse_N)
        return logits_NK.sub_((lse_N - less_N)[:, None]).exp_()
    if on_cuda(hidden_ND) and hidden_ND.dtype != torch.float32:
        logits_NK = torch.mm(hidden_ND, weight_KD.T, out_dtype=torch.float32)
    else:
        logits_NK = wide(hidden_ND) @ wide(weight_KD).T
    return logits_NK.sub_(lse_N[:, None]).exp_()


def _logits_less(hidden_ND: Tensor, weight_KD: Tensor, near_N: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] logits minus a number of each token, in float32, and that number [N]: near_N, rounded to the input's dtype."""
    less_N = near_N.to(hidden_ND.dtype)
    return wide(torch.addmm(-less_N[:, None], hidden_ND, weight_KD.T)), wide(less_N)


def linear_logprob(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Log-probability of every target token under softmax(hidden @ weight.T). A second derivative raises.

    Args:
        hidden_ND: [N, D] hidden states, any floating dtype.
        weight_VD: [V, D] output head, same dtype; may be tied to the input embeddings.
        targets_N: [N] int64 token ids in [0, V).

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
        raise ValueError(f"hidden is {hidden_ND.dtype}, weight is {weight_VD.dtype}; pass the same dtype for both")
    return _LogProb.apply(hidden_ND, weight_VD, targets_N)


def plain_logprob(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """linear_logprob by torch's log_softmax in float32 (float64 for float64 inputs), differentiable any number of times.

    It allocates [N, V] logits and recomputes them in the backward pass.
    """

    def picked(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        logprob_NV = torch.log_softmax(wide(hidden_ND) @ wide(weight_VD).T, dim=1)
        return logprob_NV.gather(1, targets_N[:, None]).squeeze(1)

    return checkpoint(picked, hidden_ND, weight_VD, use_reentrant=False, preserve_rng_state=False)


class _LogProb(Function):
    """Once differentiable; one recomputation gives both gradients."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        # With a frozen head, as with LoRA, the slope computed now saves recomputing the logits later.
        frozen = wants_hidden and not wants_weight
        logprob_N, lse_N, slope_ND = logprob_and_slope(hidden_ND, weight_VD, targets_N, frozen)
        if frozen:
            ctx.save_for_backward(slope_ND)
            return logprob_N
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, lse_N)
        return logprob_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        refuse_graph("linear_logprob has no second derivative; use plain_logprob")
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


def tangent_logprob(pair_2ND: Tensor, weight_VD: Tensor, targets_N: Tensor, known: Known) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] and their change d [N] along the tangent, both differentiable once for hidden states and head:
    pair_2ND has the hidden states and their tangents, and `known` is of the former. The rest is as in linear_logprob."""
    return _TangentLogProb.apply(pair_2ND, weight_VD, targets_N, *known)


class _TangentLogProb(Function):
    @staticmethod
    def forward(
        ctx: Any, pair_2ND: Tensor, weight_VD: Tensor, targets_N: Tensor, logprob_N: Tensor, lse_N: Tensor, slope_ND: Tensor
    ) -> tuple[Tensor, Tensor]:
        moved_N = (wide(pair_2ND[1]) * wide(slope_ND)).sum(dim=1)
        ctx.save_for_backward(pair_2ND, weight_VD, targets_N, lse_N, slope_ND, moved_N)
        return logprob_N.clone(), moved_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, along_N: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        refuse_graph()
        pair_2ND, weight_VD, targets_N, lse_N, slope_ND, moved_N = ctx.saved_tensors
        hidden_ND, tangent_ND = pair_2ND
        mean_N = (wide(tangent_ND) * wide(weight_VD[targets_N])).sum(dim=1) - moved_N
        a_N1, b_N1 = grad_N[:, None], along_N[:, None]
        # u = p (b m - a - b s), then a at the target.
        offset_N1 = b_N1 * mean_N[:, None] - a_N1
        grad_hidden_ND = torch.zeros_like(wide(hidden_ND))
        wants_weight = ctx.needs_input_grad[1]
        grad_weight_VD = torch.empty_like(weight_VD, memory_format=torch.contiguous_format) if wants_weight else None
        for columns in blocks(hidden_ND, weight_VD):
            weight_KD = weight_VD[columns]
            local_N1, inside_N1 = place(targets_N, columns.start, len(weight_KD))
            probs_NK = probabilities(hidden_ND, weight_KD, lse_N)
            curved_NK = wide(tangent_ND @ weight_KD.T).mul_(-b_N1).add_(offset_N1).mul_(probs_NK)
            curved_NK = curved_NK.scatter_add_(1, local_N1, inside_N1 * a_N1).to(pair_2ND.dtype)
            grad_hidden_ND += curved_NK @ weight_KD
            if grad_weight_VD is not None:
                straight_NK = probs_NK.mul_(-b_N1).scatter_add_(1, local_N1, inside_N1 * b_N1).to(pair_2ND.dtype)
                both_2NK = torch.cat([curved_NK, straight_NK])
                torch.mm(both_2NK.T, pair_2ND.flatten(0, 1), out=grad_weight_VD[columns])
        grad_tangent_ND = (b_N1 * wide(slope_ND)).to(pair_2ND.dtype)
        grad_pair_2ND = torch.stack([grad_hidden_ND.to(pair_2ND.dtype), grad_tangent_ND])
        return grad_pair_2ND, grad_weight_VD, None, None, None, None

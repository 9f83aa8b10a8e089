"""Log-probabilities of target tokens straight from hidden states, without ever holding [N, V] logits.

log p(t | h) = h . W_t - logsumexp(W h). The vocabulary is taken in blocks (drdpo.kernels.vocabulary); the backward pass
computes each block's logits again from the hidden states and the log-sum-exp.

Shape suffixes: N answer tokens, D width, V vocabulary, K columns of one block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from drdpo.kernels.hand_written import refuse_graph, wide
from drdpo.kernels.vocabulary import blocks, logit_gradient, logprob_and_lse, logprob_and_slope


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
        raise ValueError(f"hidden is {hidden_ND.dtype}, weight is {weight_VD.dtype}; give both the same dtype")
    return _LogProb.apply(hidden_ND, weight_VD, targets_N)


def plain_logprob(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """linear_logprob by torch's log_softmax in float32 (float64 for float64 inputs), differentiable any number of times.

    It holds [N, V] logits while it runs and recomputes them in the backward pass.
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

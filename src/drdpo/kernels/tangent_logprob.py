"""Log-probabilities of target tokens with their slopes for the hidden states, and both along a tangent of these.

As drdpo.kernels.linear_logprob, for WDPO's tangent solver. With p = softmax(W h), the log-probability of t moves along dh by
    d = dh . q,   q = W_t - W^T p.
q is found together with the log-probability (`logprob_and_slope`), so neither d nor the gradient of d for dh, which is q,
needs the head again. With upstream gradients a for the log-probability and b for d, s = W dh and m = p . s, the others are
    for h:  W^T u,             u = a (onehot_t - p) - b p * (s - m)
    for W:  u h^T + b (onehot_t - p) dh^T.
[N, V] is never held. Shapes: N answer tokens, D width, V vocabulary, C tokens of one chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from drdpo.kernels.linear_logprob import _chunk_gradient, _chunks, _logit_gradient, _logprob_and_lse, _triton
from drdpo.kernels.tangent_layers import refuse_graph, wide


@torch.no_grad()
def logprob_and_slope(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of every target and its gradient for the hidden state, without a graph.

    Args:
        hidden_ND: [N, D] hidden states, any floating dtype.
        weight_VD: [V, D] output head, same dtype.
        targets_N: [N] int64 token ids in [0, V).

    Returns:
        [N] float32 (float64 for float64 inputs) and [N, D] in the input's dtype.
    """
    slope_ND = torch.empty_like(hidden_ND)
    if len(targets_N) and _triton(hidden_ND) is not None:
        logprob_N, lse_N = _logprob_and_lse(hidden_ND, weight_VD, targets_N)
        ones_N = torch.ones_like(lse_N)
        for chunk in _chunks(len(targets_N), len(weight_VD)):
            gradient_CV = _chunk_gradient(hidden_ND[chunk], weight_VD, targets_N[chunk], lse_N[chunk], ones_N[chunk])
            slope_ND[chunk] = gradient_CV @ weight_VD
        return logprob_N, slope_ND
    logprob_N = torch.empty(len(targets_N), device=hidden_ND.device, dtype=wide(hidden_ND[:0]).dtype)
    for chunk in _chunks(len(targets_N), len(weight_VD)):
        targets_C = targets_N[chunk]
        logits_CV = wide(hidden_ND[chunk] @ weight_VD.T)
        lse_C = torch.logsumexp(logits_CV, dim=1)
        logprob_N[chunk] = logits_CV.gather(1, targets_C[:, None]).squeeze(1) - lse_C
        probs_CV = logits_CV.sub_(lse_C[:, None]).exp_()
        gradient_CV = _logit_gradient(probs_CV, targets_C, torch.ones_like(lse_C))
        slope_ND[chunk] = gradient_CV.to(hidden_ND.dtype) @ weight_VD
    return logprob_N, slope_ND


def tangent_logprob(
    pair_2ND: Tensor, weight_VD: Tensor, targets_N: Tensor, logprob_N: Tensor, slope_ND: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and how they move along the tangent, both differentiable once for hidden states and head.

    Args:
        pair_2ND: [2, N, D] hidden states and their tangents.
        weight_VD: [V, D] output head, same dtype.
        targets_N: [N] int64 token ids in [0, V).
        logprob_N, slope_ND: what logprob_and_slope says of pair_2ND[0].

    Returns:
        [N] logprob_N itself, now with a graph, and [N] d, float32 (float64).
    """
    return _TangentLogProb.apply(pair_2ND, weight_VD, targets_N, logprob_N, slope_ND)


class _TangentLogProb(Function):
    @staticmethod
    def forward(
        ctx: Any, pair_2ND: Tensor, weight_VD: Tensor, targets_N: Tensor, logprob_N: Tensor, slope_ND: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pair_2ND, weight_VD, targets_N, slope_ND)
        return logprob_N.clone(), (wide(pair_2ND[1]) * wide(slope_ND)).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, along_N: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        refuse_graph()
        pair_2ND, weight_VD, targets_N, slope_ND = ctx.saved_tensors
        wants_weight = ctx.needs_input_grad[1]
        grad_pair_2ND = torch.empty_like(pair_2ND)
        grad_pair_2ND[1] = (along_N[:, None] * wide(slope_ND)).to(pair_2ND.dtype)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide(weight_VD[:0]).dtype) if wants_weight else None
        for chunk in _chunks(2 * len(targets_N), len(weight_VD)):
            rows = slice(chunk.start // 2, chunk.stop // 2)
            if rows.start == rows.stop:
                continue
            a_C1, b_C1, targets_C1 = grad_N[rows, None], along_N[rows, None], targets_N[rows, None]
            probs_CV, moved_CV = wide(pair_2ND[:, rows] @ weight_VD.T)
            probs_CV = torch.softmax(probs_CV, dim=1)
            mean_C1 = torch.linalg.vecdot(probs_CV, moved_CV)[:, None]
            # p (b (m - s) - a), then a at the target.
            curved_CV = moved_CV.sub_(mean_C1).mul_(-b_C1).sub_(a_C1).mul_(probs_CV).scatter_add_(1, targets_C1, a_C1)
            curved_CV = curved_CV.to(pair_2ND.dtype)
            grad_pair_2ND[0, rows] = curved_CV @ weight_VD
            if grad_weight_VD is not None:
                straight_CV = probs_CV.mul_(-b_C1).scatter_add_(1, targets_C1, b_C1).to(pair_2ND.dtype)
                grad_weight_VD += curved_CV.T @ pair_2ND[0, rows]
                grad_weight_VD += straight_CV.T @ pair_2ND[1, rows]
        weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return grad_pair_2ND, weight, None, None, None

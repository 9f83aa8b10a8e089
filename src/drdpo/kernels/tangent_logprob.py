"""Log-probabilities of target tokens and how they move along a tangent of the hidden states, for WDPO's tangent solver.

With p = softmax(W h) and the slope q = W_t - W^T p, the log-probability of t moves along dh by d = dh . q. q is found
together with the log-probability (drdpo.kernels.vocabulary.logprob_and_slope), so neither d nor the gradient of d for dh,
which is q, needs the head again. With upstream gradients a for the log-probability and b for d, s = W dh and
m = p . s = dh . W_t - d, the others are
    for h:  W^T u,             u = a (onehot_t - p) - b p * (s - m)
    for W:  u h^T + b (onehot_t - p) dh^T.
[N, V] is never held. Shape suffixes: N answer tokens, D width, V vocabulary, K columns of one block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from drdpo.kernels.hand_written import refuse_graph, wide
from drdpo.kernels.vocabulary import Known, blocks, place, probabilities


def tangent_logprob(pair_2ND: Tensor, weight_VD: Tensor, targets_N: Tensor, known: Known) -> tuple[Tensor, Tensor]:
    """Log-probabilities and how they move along the tangent, both differentiable once for hidden states and head.

    Args:
        pair_2ND: [2, N, D] hidden states and their tangents.
        weight_VD: [V, D] output head, same dtype.
        targets_N: [N] int64 token ids in [0, V).
        known: of pair_2ND[0].

    Returns:
        [N] log-probabilities as known, now with a graph, and [N] d, float32 (float64).
    """
    return _TangentLogProb.apply(pair_2ND, weight_VD, targets_N, *known)


class _TangentLogProb(Function):
    @staticmethod
    def forward(
        ctx: Any,
        pair_2ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        logprob_N: Tensor,
        lse_N: Tensor,
        slope_ND: Tensor,
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

"""The gradient of every pair for its input embeddings, by one ordinary backward pass: what WDPO's tangent solver needs.

A pair's loss l(m) depends on the embeddings through its margin m alone, so grad_e l = l'(m) q with q = grad_e m, and the
direction q / |q| serves the loss, the penalty and every kind of loss alike. Pairs do not attend to each other: q of the
summed margins separates by pair.

Shape suffixes: B pairs, S = 2B sequences, N tokens of a packed row, A answer tokens, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from drdpo.config import TrainConfig
from drdpo.kernels.vocabulary import logprob_and_slope
from drdpo.training.packing import PackedBatch
from drdpo.training.policy import Policy, sum_by_sequence
from drdpo.training.values import PairValues, losses_of, values_of


class InputGradient(NamedTuple):
    """Of B pairs, all without a graph."""

    values: PairValues
    direction_1ND: Tensor
    """[1, N, D] q / |q| of every pair; zero for a pair without any gradient, so that nothing moves."""
    margin_slopes_B: Tensor
    """[B] |q|, the margin's slope along the direction."""
    loss_slopes_B: Tensor
    """[B] l'(m) |q|, the loss's slope along the direction; its square is the penalty |grad_e l|^2."""


def input_gradient(policy: Policy, batch: PackedBatch, reference_B2: Tensor, config: TrainConfig) -> InputGradient:
    """One forward pass and one backward pass to the input embeddings; no gradient of a parameter is computed.

    Args:
        policy: the bare module.
        batch: B pairs.
        reference_B2: [B, 2] reference log-probs.
        config: of the run.
    """
    embeds_1ND = policy.embed(batch).detach()
    # The direction keeps float32's digits where the layers do.
    embeds_1ND = (embeds_1ND.float() if policy.wide_first else embeds_1ND).requires_grad_()
    with torch.enable_grad():
        hidden_AD, targets_A, sequence_A = policy.answer_states(batch, embeds_1ND, frozen=True)
    known = policy.head(logprob_and_slope, hidden_AD.detach(), targets_A)
    # The margin is the chosen answer's log-prob less the rejected one's.
    signs_A = 1 - 2 * (sequence_A >= len(batch.indices_B)).to(known.slope_ND.dtype)
    (grad_1ND,) = torch.autograd.grad(hidden_AD, embeds_1ND, known.slope_ND * signs_A[:, None])
    grad_1ND = grad_1ND.to(known.logprob_N.dtype)
    squares_N = grad_1ND[0].square().sum(dim=1)
    norm_B = squares_N.new_zeros(len(batch.indices_B)).index_add(0, batch.pair_N, squares_N).sqrt()
    scale_B = torch.where(norm_B > 0, 1 / norm_B, torch.zeros_like(norm_B))
    logprob_S = sum_by_sequence(known.logprob_N, sequence_A, batch)
    values = values_of(logprob_S, embeds_1ND.detach().new_empty(0), reference_B2, config)
    return InputGradient(
        values, scale_B[batch.pair_N][None, :, None] * grad_1ND, norm_B, _loss_slopes(values.margins_B, config) * norm_B
    )


def _loss_slopes(margins_B: Tensor, config: TrainConfig) -> Tensor:
    with torch.enable_grad():
        margins_B = margins_B.detach().requires_grad_()
        return torch.autograd.grad(losses_of(margins_B, config).sum(), margins_B)[0]

"""The gradient of every pair for its input embeddings, by one ordinary backward pass: what WDPO's first-order solvers need.

A pair's loss l(m) depends on the embeddings through its margin m alone, so grad_e l = l'(m) q with q = grad_e m, and the
direction q / |q| serves the loss, the penalty and every kind of loss alike. Pairs do not attend to each other: q of the
summed margins separates by pair.

Shape suffixes: B pairs, S = 2B sequences, T tokens, N answer tokens or tokens of a packed row, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from drdpo.config import TrainConfig
from drdpo.kernels.vocabulary import logprob_and_slope
from drdpo.training.packing import PackedBatch
from drdpo.training.policy import Policy, sum_by_sequence
from drdpo.training.values import AnyBatch, PairValues, losses_of, values_of


class InputGradient(NamedTuple):
    """Of B pairs, all without a graph."""

    values: PairValues
    direction: Tensor
    """[S, T, D], packed [1, N, D]: q / |q| of every pair; on a prompt that counts once, both rows of the padded form hold
    the sum over the two."""
    margin_slopes_B: Tensor
    """[B] |q|, the margin's slope along the direction."""
    loss_slopes_B: Tensor
    """[B] l'(m) |q|, the loss's slope along the direction; its square is the penalty |grad_e l|^2."""
    embeds_norm_B: Tensor
    """[B] norm of the pair's embeddings."""


def input_gradient(policy: Policy, batch: AnyBatch, reference_B2: Tensor, config: TrainConfig) -> InputGradient:
    """One forward pass and one backward pass to the input embeddings; no gradient of a parameter is computed.

    Args:
        policy: the bare module.
        batch: B pairs.
        reference_B2: [B, 2] reference log-probs.
        config: of the run.
    """
    embeds = policy.embed(batch).detach()
    # The direction keeps float32's digits where the layers do.
    embeds = (embeds.float() if policy.wide_first else embeds).requires_grad_()
    with torch.enable_grad():
        hidden_ND, targets_N, sequence_N = policy.answer_states(batch, embeds, frozen=True)
    known = policy.head(logprob_and_slope, hidden_ND.detach(), targets_N)
    # The margin is the chosen answer's log-prob less the rejected one's.
    signs_N = 1 - 2 * (sequence_N >= len(batch.indices_B)).to(known.slope_ND.dtype)
    (margin_grad,) = torch.autograd.grad(hidden_ND, embeds, known.slope_ND * signs_N[:, None])
    logprob_N = known.logprob_N
    logprob_S = sum_by_sequence(logprob_N, sequence_N, batch)
    values = values_of(logprob_S, embeds.detach().new_empty(0), reference_B2, config)
    direction, norm_B = _directions(margin_grad.to(logprob_N.dtype), batch, config)
    embeds_norm_B = _squares(embeds.detach().to(logprob_N.dtype), batch).sqrt()
    slopes_B = _loss_slopes(values.margins_B, config) * norm_B
    return InputGradient(values, direction, norm_B, slopes_B, embeds_norm_B)


def _loss_slopes(margins_B: Tensor, config: TrainConfig) -> Tensor:
    with torch.enable_grad():
        margins_B = margins_B.detach().requires_grad_()
        return torch.autograd.grad(losses_of(margins_B, config).sum(), margins_B)[0]


def _directions(grad: Tensor, batch: AnyBatch, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """q / |q| and |q|."""
    if isinstance(batch, PackedBatch) or config.wdpo_prompt == "per_sequence":
        norm_B = _squares(grad, batch).sqrt()
    else:
        chosen_BTD, rejected_BTD = grad.chunk(2)
        shared_BTD = (chosen_BTD + rejected_BTD) * batch.prompt_mask_BT[:, :, None]
        answers = grad * ~torch.cat([batch.prompt_mask_BT, batch.prompt_mask_BT])[:, :, None]
        norm_B = (_squares(answers, batch) + shared_BTD.square().sum(dim=(1, 2))).sqrt()
        grad = answers + torch.cat([shared_BTD, shared_BTD])
    # A pair without any gradient has no direction: zero, so that nothing moves.
    scale_B = torch.where(norm_B > 0, 1 / norm_B, torch.zeros_like(norm_B))
    return spread(scale_B, batch) * grad, norm_B


def _squares(values: Tensor, batch: AnyBatch) -> Tensor:
    """[B] sums of squares over the positions of each pair."""
    if isinstance(batch, PackedBatch):
        squares_N = values[0].square().sum(dim=1)
        return squares_N.new_zeros(len(batch.indices_B)).index_add(0, batch.pair_N, squares_N)
    squares_S = (values.square().sum(dim=2) * batch.attention_mask_ST).sum(dim=1)
    return sum(squares_S.chunk(2))


def spread(values_B: Tensor, batch: AnyBatch) -> Tensor:
    """A value a pair as a factor of its embeddings: [S, 1, 1], packed [1, N, 1]."""
    if isinstance(batch, PackedBatch):
        return values_B[batch.pair_N][None, :, None]
    return torch.cat([values_B, values_B])[:, None, None]

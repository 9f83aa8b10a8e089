"""What one forward pass tells of pairs: losses, margins, log-ratios.

Shape suffixes: B pairs of a micro-batch, S = 2B sequences, T tokens, N tokens of a packed row, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from drdpo.config import TrainConfig
from drdpo.training import losses
from drdpo.training.batches import Batch
from drdpo.training.packing import PackedBatch
from drdpo.training.policy import Policy

AnyBatch = Batch | PackedBatch


class PairValues(NamedTuple):
    """What one forward pass tells of B pairs."""

    losses_B: Tensor
    margins_B: Tensor
    """[B] h, the difference of the answers' log-ratios to the reference."""
    log_ratios_S: Tensor
    """[S] log pi - log ref of every answer, chosen first."""
    embeds: Tensor
    """[S, T, D], packed [1, N, D]: the policy's input embeddings."""

    def detached(self) -> "PairValues":
        """The figures alone: neither graph nor embeddings stay in memory."""
        losses_B, margins_B, log_ratios_S = (part.detach() for part in self[:3])
        return PairValues(losses_B, margins_B, log_ratios_S, self.embeds.new_empty(0))


def pair_values(policy: Policy, batch: AnyBatch, reference_B2: Tensor, config: TrainConfig) -> PairValues:
    """Run the policy over a micro-batch.

    Args:
        policy: the bare module, or for a method without second derivative the DeepSpeed engine around it.
        batch: B pairs.
        reference_B2: [B, 2] the frozen reference's log-probs of chosen and rejected answers.
        config: beta, loss_type, label_smoothing.
    """
    logprob_S, embeds = policy(batch)
    return values_of(logprob_S, embeds, reference_B2, config)


def values_of(logprob_S: Tensor, embeds: Tensor, reference_B2: Tensor, config: TrainConfig) -> PairValues:
    """The same from the answers' log-probs."""
    log_ratios_S = logprob_S - torch.cat([reference_B2[:, 0], reference_B2[:, 1]])
    chosen_B, rejected_B = log_ratios_S.chunk(2)
    margins_B = chosen_B - rejected_B
    return PairValues(losses_of(margins_B, config), margins_B, log_ratios_S, embeds)


def losses_of(margins_B: Tensor, config: TrainConfig) -> Tensor:
    """[B] pointwise losses of margins: the method's own, else --loss_type's."""
    own_B = config.own_losses(margins_B)
    if own_B is not None:
        return own_B
    return losses.pair_losses(margins_B, config.beta, config.label_smoothing, config.loss_type)

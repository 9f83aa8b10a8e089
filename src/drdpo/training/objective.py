"""A micro-batch's contribution to the step: weighted losses and, for WDPO, the gradient penalty.

Shape suffixes: B pairs of a micro-batch, P pairs of the population, S = 2B sequences, T tokens, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from drdpo import distributed
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


class Population(NamedTuple):
    """What the robust terms need to know of the pairs beyond this micro-batch."""

    losses_P: Tensor | None = None
    mean_penalty: Tensor | None = None
    """Mean of |grad l|^2, for the root penalty."""


class Objective(NamedTuple):
    total: Tensor
    """Scalar: mean over the micro-batch of w l + rho |grad l|^2."""
    values: PairValues
    weights_B: Tensor
    penalties_B: Tensor | None
    """[B] |grad l|^2, WDPO only."""

    def detached(self) -> "Objective":
        """The figures alone: neither graph nor embeddings stay in memory."""
        values = self.values
        figures = (values.losses_B.detach(), values.margins_B.detach(), values.log_ratios_S.detach())
        return Objective(
            self.total.detach(), PairValues(*figures, values.embeds.new_empty(0)), self.weights_B, self.penalties_B
        )


def pair_values(policy: Policy, batch: AnyBatch, reference_B2: Tensor, config: TrainConfig) -> PairValues:
    """Run the policy over a micro-batch.

    Args:
        policy: the bare module, or for a method without second derivative the DeepSpeed engine around it.
        batch: B pairs.
        reference_B2: [B, 2] the frozen reference's log-probs of chosen and rejected answers.
        config: beta, loss_type, label_smoothing; the method decides whether a second derivative is kept.
    """
    logprob_S, embeds = policy(batch, twice=config.method == "wdpo" and torch.is_grad_enabled())
    pairs = len(batch.indices_B)
    log_ratios_S = logprob_S - torch.cat([reference_B2[:, 0], reference_B2[:, 1]])
    margins_B = log_ratios_S[:pairs] - log_ratios_S[pairs:]
    losses_B = losses.pair_losses(margins_B, config.beta, config.label_smoothing, config.loss_type)
    return PairValues(losses_B, margins_B, log_ratios_S, embeds)


def needs_population(config: TrainConfig) -> bool:
    """Does a pair's term depend on the other pairs?"""
    return config.method in ("kldpo", "drdpo") or (config.method == "wdpo" and config.wdpo_penalty == "root")


def survey(policy: Policy, batches: list[tuple[AnyBatch, Tensor]], config: TrainConfig) -> Population:
    """The population of a whole optimizer step, over all its micro-batches and ranks, before any of its gradients.

    Args:
        policy: the bare module.
        batches: this rank's micro-batches with their reference log-probs.
        config: of the run.
    """
    if config.method == "wdpo":
        penalties = []
        for batch, reference_B2 in batches:
            values = pair_values(policy, batch, reference_B2, config)
            penalties.append(_penalties(values, batch, config, create_graph=False))
        return Population(mean_penalty=distributed.gather(torch.cat(penalties)).mean())
    with torch.no_grad():
        local = [pair_values(policy, batch, reference_B2, config).losses_B for batch, reference_B2 in batches]
    return Population(losses_P=distributed.gather(torch.cat(local)))


def objective(
    policy: Policy, batch: AnyBatch, reference_B2: Tensor, config: TrainConfig, population: Population | None
) -> Objective:
    """The differentiable objective of one micro-batch.

    Args:
        policy: as for pair_values.
        batch: B pairs.
        reference_B2: [B, 2] reference log-probs.
        config: of the run.
        population: from `survey`; None where this micro-batch, over all ranks, is the population.
    """
    values = pair_values(policy, batch, reference_B2, config)
    weights_B = torch.ones_like(values.losses_B)
    if config.method in ("kldpo", "drdpo"):
        losses_P = population.losses_P if population else None
        weights_B = _weights(values.losses_B, distributed.gather(values.losses_B) if losses_P is None else losses_P, config)
    total = (weights_B * values.losses_B).mean()
    if config.method != "wdpo":
        return Objective(total, values, weights_B, None)
    assert config.wdpo_rho is not None
    penalties_B = _penalties(values, batch, config, create_graph=True)
    factor = torch.tensor(config.wdpo_rho, dtype=penalties_B.dtype)
    if config.wdpo_penalty == "root":
        # d rho sqrt(M) = rho / (2 sqrt M) dM, with M the population's mean: the square root's slope is a constant here.
        mean = population.mean_penalty if population else None
        mean = distributed.gather(penalties_B).mean() if mean is None else mean
        factor = config.wdpo_rho / (2 * mean.sqrt()) if mean > 0 else torch.zeros_like(mean)
    return Objective(total + factor * penalties_B.mean(), values, weights_B, penalties_B.detach())


def _penalties(values: PairValues, batch: AnyBatch, config: TrainConfig, create_graph: bool) -> Tensor:
    if isinstance(batch, PackedBatch):
        # Packing has put the prompt into the row once or twice, as --wdpo_prompt says.
        return losses.packed_gradient_penalty(values.losses_B, values.embeds, batch.pair_N, create_graph)
    shared_BT = batch.prompt_mask_BT if config.wdpo_prompt == "once" else None
    return losses.gradient_penalty(values.losses_B, values.embeds, create_graph, shared_BT)


def _weights(losses_B: Tensor, losses_P: Tensor, config: TrainConfig) -> Tensor:
    if config.kldpo_tau is not None:
        return losses.kl_weights(losses_B, losses_P, config.kldpo_tau, config.kldpo_cap, config.kldpo_normalize)
    assert config.drdpo_beta is not None
    return losses.drdpo_weights(losses_B, losses_P, config.drdpo_beta)

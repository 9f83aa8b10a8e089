"""A micro-batch's contribution to the step: weighted losses and, for WDPO, the gradient penalty.

Shape suffixes: B pairs of a micro-batch, P pairs of the population, S = 2B sequences, T tokens, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from drdpo import distributed
from drdpo.config import TrainConfig
from drdpo.training import losses
from drdpo.training.fraction import select
from drdpo.training.input_gradient import input_gradient
from drdpo.training.packing import PackedBatch
from drdpo.training.policy import Policy
from drdpo.training.solvers import solve
from drdpo.training.values import AnyBatch, PairValues, pair_values


class Population(NamedTuple):
    """What the robust terms need to know of the pairs beyond this micro-batch."""

    losses_P: Tensor | None = None
    mean_penalty: Tensor | None = None
    """Mean of |grad l|^2, for the root penalty."""


class Objective(NamedTuple):
    total: Tensor
    """Scalar: mean over the micro-batch of w l + c |grad l|^2, c being rho; for the root penalty rho / (2 sqrt M):
    the gradient is then right, though the value is not the root's."""
    values: PairValues
    weights_B: Tensor
    penalties_B: Tensor | None = None
    """[B] |grad l|^2, WDPO only; under --wdpo_fraction zero for a pair without penalty and scaled up for the others."""
    errors_B: Tensor | None = None
    """[B] relative error of the solver, for those that can tell; zero for a pair without penalty."""

    def detached(self) -> "Objective":
        """The figures alone: neither graph nor embeddings stay in memory."""
        return self._replace(total=self.total.detach(), values=self.values.detached())


def needs_population(config: TrainConfig) -> bool:
    """Does a pair's term depend on the other pairs?"""
    return config.weighted or (config.method == "wdpo" and config.wdpo_penalty == "root")


def survey(policy: Policy, batches: list[tuple[AnyBatch, Tensor]], config: TrainConfig) -> Population:
    """The population of a whole optimizer step, over all its micro-batches and ranks, before any of its gradients.

    Args:
        policy: the bare module.
        batches: this rank's micro-batches with their reference log-probs.
        config: of the run.
    """
    if config.method == "wdpo":
        penalties = [_surveyed(policy, batch, reference_B2, config) for batch, reference_B2 in batches]
        return Population(mean_penalty=distributed.gather(torch.cat(penalties)).mean())
    with torch.no_grad():
        local = [pair_values(policy, batch, reference_B2, config).losses_B for batch, reference_B2 in batches]
    return Population(losses_P=distributed.gather(torch.cat(local)))


def objective(
    policy: Policy,
    batch: AnyBatch,
    reference_B2: Tensor,
    config: TrainConfig,
    population: Population | None,
    penalised: frozenset[int] | None = None,
) -> Objective:
    """The differentiable objective of one micro-batch.

    Args:
        policy: the bare module, or for a method without second derivative the DeepSpeed engine around it.
        batch: B pairs.
        reference_B2: [B, 2] reference log-probs.
        config: of the run.
        population: from `survey`; None where this micro-batch, over all ranks, is the population.
        penalised: from `fraction.penalised_pairs`; None where every pair carries WDPO's penalty.
    """
    if config.method == "wdpo":
        if penalised is None:
            return _penalised(policy, batch, reference_B2, config, population)
        keep_B = torch.tensor([index in penalised for index in batch.indices_B.tolist()], device=batch.indices_B.device)
        return _partly_penalised(policy, batch, reference_B2, config, keep_B)
    values = pair_values(policy, batch, reference_B2, config)
    weights_B = torch.ones_like(values.losses_B)
    if config.weighted:
        losses_P = population.losses_P if population else None
        weights_B = _weights(values.losses_B, distributed.gather(values.losses_B) if losses_P is None else losses_P, config)
    return Objective((weights_B * values.losses_B).mean(), values, weights_B)


def _penalised(
    policy: Policy, batch: AnyBatch, reference_B2: Tensor, config: TrainConfig, population: Population | None
) -> Objective:
    """WDPO's objective of pairs that all carry the penalty."""
    if config.solver == "exact":
        values = pair_values(policy, batch, reference_B2, config, twice=True)
        penalties_B = _penalties(values, batch, config, create_graph=True)
        factor = _factor(penalties_B, config, population)
        total = values.losses_B.mean() + factor * penalties_B.mean()
        return Objective(total, values, torch.ones_like(values.losses_B), penalties_B.detach() * config.penalty_scale)
    # The gradient for the embeddings is taken outside the engine, which would take it for the backward pass of the step.
    bare = policy if isinstance(policy, Policy) else policy.module
    found = input_gradient(bare, batch, reference_B2, config)
    factor = _factor(found.loss_slopes_B.square(), config, population)
    solved = solve(policy, batch, found, reference_B2, config, factor)
    ones_B = torch.ones_like(found.values.losses_B)
    return Objective(solved.total, found.values, ones_B, solved.penalties_B * config.penalty_scale, solved.errors_B)


def _partly_penalised(
    policy: Policy, batch: AnyBatch, reference_B2: Tensor, config: TrainConfig, keep_B: Tensor
) -> Objective:
    """WDPO's objective where some pairs carry the penalty: these apart, as pairs do not attend to each other."""
    parts: list[Objective] = []
    shares = []
    for rows_B in (keep_B, ~keep_B):
        if not rows_B.any():
            continue
        few, reference_K2 = (batch, reference_B2) if rows_B.all() else (select(batch, rows_B), reference_B2[rows_B])
        if rows_B is keep_B:
            parts.append(_penalised(policy, few, reference_K2, config, None))
        else:
            values = pair_values(policy, few, reference_K2, config)
            zeros_K = torch.zeros_like(values.losses_B.detach())
            parts.append(Objective(values.losses_B.mean(), values, zeros_K + 1, zeros_K))
        shares.append(float(rows_B.float().mean()))
    order_B = torch.cat([rows_B.nonzero()[:, 0] for rows_B in (keep_B, ~keep_B)]).argsort()

    def joined(figures: list[Tensor]) -> Tensor:
        return torch.cat(figures)[order_B]

    values = PairValues(
        joined([part.values.losses_B for part in parts]),
        joined([part.values.margins_B for part in parts]),
        torch.cat([part.values.log_ratios_S.view(2, -1) for part in parts], dim=1)[:, order_B].flatten(),
        parts[0].values.embeds,
    )
    total = torch.stack([part.total * share for part, share in zip(parts, shares, strict=True)]).sum()
    errors = [torch.zeros_like(part.weights_B) if part.errors_B is None else part.errors_B for part in parts]
    penalties_B = joined([part.penalties_B for part in parts if part.penalties_B is not None])
    return Objective(total, values, torch.ones_like(penalties_B), penalties_B, joined(errors))


def _factor(penalties_B: Tensor, config: TrainConfig, population: Population | None) -> Tensor:
    """What multiplies the mean of |grad l|^2."""
    assert config.wdpo_rho is not None
    if config.wdpo_penalty == "squared":
        return torch.tensor(config.wdpo_rho * config.penalty_scale, dtype=penalties_B.dtype)
    # d rho sqrt(M) = rho / (2 sqrt M) dM, with M the population's mean: the square root's slope is a constant here.
    mean = population.mean_penalty if population else None
    mean = distributed.gather(penalties_B).mean() if mean is None else mean
    # Chosen on the device: a question here would wait for it.
    return torch.where(mean > 0, config.wdpo_rho / (2 * mean.sqrt()), torch.zeros_like(mean))


def _surveyed(policy: Policy, batch: AnyBatch, reference_B2: Tensor, config: TrainConfig) -> Tensor:
    """[B] |grad l|^2 without a graph."""
    if config.solver == "exact":
        values = pair_values(policy, batch, reference_B2, config, twice=True)
        return _penalties(values, batch, config, create_graph=False)
    return input_gradient(policy, batch, reference_B2, config).loss_slopes_B.square()


def _penalties(values: PairValues, batch: AnyBatch, config: TrainConfig, create_graph: bool) -> Tensor:
    if isinstance(batch, PackedBatch):
        # Packing has put the prompt into the row once or twice, as --wdpo_prompt says.
        return losses.packed_gradient_penalty(values.losses_B, values.embeds, batch.pair_N, create_graph)
    shared_BT = batch.prompt_mask_BT if config.wdpo_prompt == "once" else None
    return losses.gradient_penalty(values.losses_B, values.embeds, create_graph, shared_BT)


def _weights(losses_B: Tensor, losses_P: Tensor, config: TrainConfig) -> Tensor:
    own_B = config.own_weights(losses_B.detach(), losses_P.detach())
    if own_B is not None:
        return own_B
    if config.kldpo_tau is not None:
        return losses.kl_weights(losses_B, losses_P, config.kldpo_tau, config.kldpo_cap, config.kldpo_normalize)
    assert config.drdpo_beta is not None
    return losses.drdpo_weights(losses_B, losses_P, config.drdpo_beta)

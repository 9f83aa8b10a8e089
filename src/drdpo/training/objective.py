"""A micro-batch's contribution to the step: weighted losses and, for WDPO, the gradient penalty.

Shape suffixes: B pairs of a micro-batch, P pairs of the population, S = 2B sequences, T tokens, D width.
"""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from drdpo import distributed
from drdpo.config import TrainConfig
from drdpo.errors import DataError
from drdpo.training import losses
from drdpo.training.data import Batch, PackedBatch
from drdpo.training.policy import AnyBatch, PairValues, Policy, losses_of, pair_values, values_of
from drdpo.training.wdpo import input_gradient, tangent_answers


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
    """[B] |grad l|^2 where the micro-batch carries WDPO's penalty."""
    errors_B: Tensor | None = None
    """[B] with the tangent solver: relative difference between two estimates of the margin's slope along the gradient, zero
    without rounding."""

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


def penalty_scales(count: int, config: TrainConfig, step: int) -> list[float]:
    """What multiplies the penalty of each of a step's micro-batches under --wdpo_fraction: zero, or the inverse of the
    chance that a micro-batch carries it, so that the gradient's expectation is the whole penalty's.

    Args:
        count: micro-batches of this rank; all ranks have as many and draw alike.
        config: wdpo_fraction and seed.
        step: optimizer steps done before this one.
    """
    carrying = max(1, round(config.wdpo_fraction * count))
    drawn = random.Random(f"{config.seed}/penalty/{step}").sample(range(count), carrying)
    return [count / carrying if number in drawn else 0.0 for number in range(count)]


def objective(
    policy: Policy,
    batch: AnyBatch,
    reference_B2: Tensor,
    config: TrainConfig,
    population: Population | None,
    penalty_scale: float = 1.0,
) -> Objective:
    """The differentiable objective of one micro-batch.

    Args:
        policy: the bare module, or for a method without second derivative the DeepSpeed engine around it.
        batch: B pairs.
        reference_B2: [B, 2] reference log-probs.
        config: of the run.
        population: from `survey`; None where this micro-batch, over all ranks, is the population.
        penalty_scale: from `penalty_scales`.
    """
    if config.method == "wdpo" and penalty_scale > 0:
        solve = _exact if config.solver == "exact" else _tangent
        return solve(policy, batch, reference_B2, config, population, penalty_scale)
    values = pair_values(policy, batch, reference_B2, config)
    weights_B = torch.ones_like(values.losses_B)
    if config.weighted:
        losses_P = population.losses_P if population else None
        weights_B = _weights(values.losses_B, distributed.gather(values.losses_B) if losses_P is None else losses_P, config)
    return Objective((weights_B * values.losses_B).mean(), values, weights_B)


def _exact(
    policy: Policy, batch: AnyBatch, reference_B2: Tensor, config: TrainConfig, population: Population | None, scale: float
) -> Objective:
    """WDPO by a double backward of torch's own operations: the plain reference, for any architecture."""
    values = pair_values(policy, batch, reference_B2, config)
    penalties_B = _penalties(values, batch, config, create_graph=True)
    total = values.losses_B.mean() + _factor(penalties_B, config, population, scale) * penalties_B.mean()
    return Objective(total, values, torch.ones_like(values.losses_B), penalties_B.detach())


def _tangent(
    policy: Policy, batch: AnyBatch, reference_B2: Tensor, config: TrainConfig, population: Population | None, scale: float
) -> Objective:
    """WDPO by a pass along the gradient: l + c D^2 with D = l'(m) dm, dm the margin's derivative along the unit gradient v,
    which is held fixed.

    |g|^2 is the largest (g . v)^2 of all unit v, so its gradient at that v is the gradient of D^2. What rounding does to v
    changes D to second order only, where |g| from the backward pass bears all of it.
    """
    assert isinstance(batch, PackedBatch), "TrainConfig refuses the padded form"
    # The gradient for the embeddings is taken outside the engine, which would take it for the backward pass of the step.
    bare = policy if isinstance(policy, Policy) else policy.module
    found = input_gradient(bare, batch, reference_B2, config)
    factor = _factor(found.loss_slopes_B.square(), config, population, scale)
    logprob_S, moved_S = policy(batch, run=lambda bare: tangent_answers(bare, batch, found))
    values = values_of(logprob_S, found.values.embeds, reference_B2, config)
    (loss_slopes_B,) = torch.autograd.grad(values.losses_B.sum(), values.margins_B, create_graph=True)
    chosen_B, rejected_B = moved_S.chunk(2)
    moved_B = chosen_B - rejected_B
    penalties_B = (loss_slopes_B * moved_B).square()
    total = (values.losses_B + factor * penalties_B).mean()
    # The figures are those of the first pass, whose losses are the plain ones.
    value = (found.values.losses_B + factor * penalties_B.detach()).mean()
    expected_B = found.margin_slopes_B
    errors_B = (moved_B.detach() - expected_B).abs() / expected_B
    errors_B = torch.where(expected_B > 0, errors_B, torch.zeros_like(expected_B))
    ones_B = torch.ones_like(found.values.losses_B)
    return Objective(total - total.detach() + value, found.values, ones_B, penalties_B.detach(), errors_B)


def _factor(penalties_B: Tensor, config: TrainConfig, population: Population | None, scale: float) -> Tensor:
    """What multiplies the mean of |grad l|^2."""
    assert config.wdpo_rho is not None
    if config.wdpo_penalty == "squared":
        return torch.tensor(config.wdpo_rho * scale, dtype=penalties_B.dtype)
    # d rho sqrt(M) = rho / (2 sqrt M) dM, with M the population's mean: the square root's slope is a constant here.
    mean = population.mean_penalty if population else None
    mean = distributed.gather(penalties_B).mean() if mean is None else mean
    # Chosen on the device: a question here would wait for it.
    return torch.where(mean > 0, config.wdpo_rho / (2 * mean.sqrt()), torch.zeros_like(mean))


def _surveyed(policy: Policy, batch: AnyBatch, reference_B2: Tensor, config: TrainConfig) -> Tensor:
    """[B] |grad l|^2 without a graph."""
    if config.solver == "exact":
        return _penalties(pair_values(policy, batch, reference_B2, config), batch, config, create_graph=False)
    assert isinstance(batch, PackedBatch), "TrainConfig refuses the padded form"
    return input_gradient(policy, batch, reference_B2, config).loss_slopes_B.square()


def _penalties(values: PairValues, batch: AnyBatch, config: TrainConfig, create_graph: bool) -> Tensor:
    assert isinstance(batch, Batch), "TrainConfig refuses the packed form"
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


# Before the first step policy and reference are one model: are their log-probs?

TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 5e-2)}
"""Of the mean |log pi - log ref| of an answer: a share of the mean |log ref|, and nats beside it for the shortest answers.

The same micro-batches through the same code give the same bits. What may differ are compiled layers, a GPU's kernels, and
micro-batches dealt otherwise by an earlier start on another number of processes. On SmolLM2-135M other micro-batches change
a log-prob by 3e-8 of it in float32 and by 2e-4 in bfloat16 (four answers, CPU). The bfloat16 tolerance is fifty times that
by judgement, not by a measurement on a GPU; a reference nearer than that goes unseen."""


def check_first_step(parts: list[Objective], references: list[Tensor], config: TrainConfig) -> None:
    """Refuse reference log-probs that are not the untrained policy's own; every rank must call.

    The loss alone would not tell: at beta 0.01 a margin of 10 nats moves it by 0.05.

    Args:
        parts: what this rank's micro-batches contributed to the first step.
        references: [B, 2] reference log-probs of each.
        config: of the run.

    Raises:
        DataError: the loss is not that of a zero margin, or the log-probs are too far apart.
    """
    losses_P = distributed.gather(torch.cat([part.values.losses_B for part in parts]))
    apart_K = distributed.gather(torch.cat([part.values.log_ratios_S for part in parts])).double().abs()
    size_K = distributed.gather(torch.cat([reference_B2.flatten() for reference_B2 in references])).double().abs()
    share, nats = TOLERANCES[config.dtype]
    # ln 2, 1 / (4 beta^2) for ipo, or what a method's own losses are at a margin of zero.
    loss, expected = float(losses_P.double().mean()), float(losses_of(torch.zeros(1, dtype=torch.float64), config))
    loss_tolerance = (0.05 if config.dtype == "bfloat16" else 1e-3) * max(1.0, expected)
    apart, allowed = float(apart_K.mean()), share * float(size_K.mean()) + nats
    if not abs(loss - expected) <= loss_tolerance:
        reason = f"the first loss is {loss:.4f}, not {expected:.4f}"
    elif not apart <= allowed:
        reason = (
            f"before the first step the policy's log-probs are {apart:.4g} away from the reference's in the mean, where "
            f"rounding allows {allowed:.2g}"
        )
    else:
        return
    raise DataError(
        f"{reason}: the reference log-probs do not belong to {config.model_path}; delete "
        f"{config.save_path}/reference_train.safetensors, or give --resume=never"
    )

"""A micro-batch's contribution to the step: weighted losses and, for WDPO, the gradient penalty; then the checks of a step's
numbers.

Shape suffixes: B pairs of a micro-batch, P pairs of the population, S = 2B sequences, T tokens, D width, K numbers of the
first step's answers, M micro-batches of all ranks.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drdpo import distributed
from drdpo.errors import DataError
from drdpo.training.data import AnyBatch, Batch, PackedBatch, Pair
from drdpo.training.losses import NO_STATE, Method, Pairs, Penalty, State, gradient_penalty
from drdpo.training.policy import FiniteWatch, Policy, pairs_of
from drdpo.training.wdpo import input_gradient, tangent_answers, without_scale


class Population(NamedTuple):
    """What the robust terms need to know of all pairs of the population, which includes this micro-batch."""

    losses_P: Tensor | None = None
    mean_penalty: Tensor | None = None
    """Mean of w |grad l|^2, for the root penalty."""
    state: State = NO_STATE
    """What the method's weights of this step see, of a method that keeps something between steps."""


class Objective(NamedTuple):
    total: Tensor
    """Scalar: the micro-batch's share of the step times its mean of w l + c w |grad l|^2, c being rho; for the root penalty
    rho / (2 sqrt M): the gradient is then right, though the value is not the root's. With the tangent solver the gradient is
    right only if the backward pass begins with 1."""
    losses_B: Tensor
    """[B] plain losses."""
    pairs: Pairs
    weights_B: Tensor
    penalties_B: Tensor | None = None
    """[B] |grad l|^2 if the micro-batch has the penalty."""
    errors_B: Tensor | None = None
    """[B] with the tangent solver: relative difference between two estimates of the margin's slope along the gradient, zero
    without rounding."""
    conditions_B: Tensor | None = None
    """[B] with the tangent solver: how many times rounding is magnified in the margin's slope along the gradient."""
    state: State = NO_STATE
    """The population's."""

    def detached(self) -> "Objective":
        """The numbers alone, without a graph."""
        return self._replace(total=self.total.detach(), losses_B=self.losses_B.detach(), pairs=self.pairs.detached())


def survey(policy: Policy, batches: list[tuple[AnyBatch, Tensor]], method: Method) -> Population:
    """The population of a whole optimizer step, over all its micro-batches and ranks, before any of its gradients.

    Args:
        policy: the bare module.
        batches: this rank's micro-batches with their reference log-probs.
        method: that needs a population.
    """
    if method.penalty is not None:
        penalties = [_penalties_alone(policy, batch, reference_B2, method) for batch, reference_B2 in batches]
        return Population(mean_penalty=distributed.gather(torch.cat(penalties)).mean())
    with torch.no_grad():
        local = [method.loss(pairs_of(policy(batch).logprob_S, reference_B2, batch)) for batch, reference_B2 in batches]
    return _population(torch.cat(local), [batch.columns for batch, _ in batches], method, policy)


def _population(losses_B: Tensor, columns: Sequence[Mapping[str, Tensor]], method: Method, policy: Policy) -> Population:
    """The population of which this rank has these losses and columns, and what the method's weights are to see."""
    losses_P = distributed.gather(losses_B)
    if method.update is None:
        return Population(losses_P)
    columns_P = {name: distributed.gather(torch.cat([part[name] for part in columns])) for name in columns[0]}
    return Population(losses_P, state=method.update(_bare(policy).method_state, losses_P, columns_P))


def penalty_scales(count: int, fraction: float, seed: int, step: int) -> list[float]:
    """What multiplies the penalty of each of a step's micro-batches: zero, or the inverse of the chance that a micro-batch
    has it, so that the gradient's expectation is the whole penalty's.

    Args:
        count: micro-batches of this rank; all ranks have equally many and draw alike.
        fraction: share of them that have the penalty, at least one.
        seed: of the draw.
        step: optimizer steps done before this one.
    """
    chosen = max(1, round(fraction * count))
    drawn = random.Random(f"{seed}/penalty/{step}").sample(range(count), chosen)
    return [count / chosen if number in drawn else 0.0 for number in range(count)]


def objective(
    policy: Policy,
    batch: AnyBatch,
    reference_B2: Tensor,
    method: Method,
    population: Population | None = None,
    penalty_scale: float = 1.0,
    share: float = 1.0,
) -> Objective:
    """The differentiable objective of one micro-batch.

    Args:
        policy: the bare module, or unless the exact solver is used the DeepSpeed engine around it.
        batch: B pairs.
        reference_B2: [B, 2] reference log-probs.
        method: what to minimize.
        population: from `survey`; None if this micro-batch, over all ranks, is the population.
        penalty_scale: from `penalty_scales`.
        share: what the micro-batch counts for in the step. A factor of `total`, which must not be scaled later.
    """
    if method.penalty is not None and penalty_scale > 0:
        solve = _exact if method.penalty.solver == "exact" else _tangent
        return solve(policy, batch, reference_B2, method, population, penalty_scale, share)
    pairs = pairs_of(policy(batch).logprob_S, reference_B2, batch)
    losses_B = method.loss(pairs)
    weights_B, state = _weights(losses_B, pairs, method, population, policy)
    weights_B = _by_column(weights_B, method, batch)
    return Objective(share * (weights_B * losses_B).mean(), losses_B, pairs, weights_B, state=state)


def _weights(
    losses_B: Tensor, pairs: Pairs, method: Method, population: Population | None, policy: Policy
) -> tuple[Tensor, State]:
    """[B] the method's own weights, and what they have seen of the method's state."""
    if method.weights is None:
        return torch.ones_like(losses_B), NO_STATE
    if population is None or population.losses_P is None:
        alone = Population(losses_B.detach())
        population = _population(losses_B, [pairs.columns], method, policy) if method.population else alone
    assert population.losses_P is not None
    seen = pairs.detached()._replace(state=population.state)
    return method.weights(losses_B.detach(), population.losses_P.detach(), seen), population.state


def _by_column(terms_B: Tensor, method: Method, batch: AnyBatch) -> Tensor:
    """[B] terms of pairs, times the numbers in the column of weights if the run has one."""
    return terms_B if method.weight_column is None else terms_B * batch.columns[method.weight_column]


def _bare(policy: Policy) -> Policy:
    """The bare module of a policy or of the engine around it."""
    return policy if isinstance(policy, Policy) else policy.module


def _exact(
    policy: Policy,
    batch: AnyBatch,
    reference_B2: Tensor,
    method: Method,
    population: Population | None,
    scale: float,
    share: float,
) -> Objective:
    """WDPO by a double backward of torch's own operations: the plain reference, for any architecture."""
    losses_B, penalties_B, pairs = _penalties(policy, batch, reference_B2, method, create_graph=True)
    charged_B = _by_column(penalties_B, method, batch)
    factor = _factor(charged_B, method.penalty, population, scale)
    total = _by_column(losses_B, method, batch).mean() + factor * charged_B.mean()
    weights_B = _by_column(torch.ones_like(losses_B), method, batch)
    return Objective(share * total, losses_B, pairs, weights_B, penalties_B.detach())


def _tangent(
    policy: Policy,
    batch: AnyBatch,
    reference_B2: Tensor,
    method: Method,
    population: Population | None,
    scale: float,
    share: float,
) -> Objective:
    """WDPO by drdpo.training.wdpo: the gradient of l + c |g|^2, g = l'(m) q, by passes along 2 c l'^2 q, held fixed.

    |q|^2 is the largest (q . v)^2 of all unit v, so what rounding does to q changes the slope along it to second order only,
    whereas |q| has all of it: the reported penalty is that of the slope.
    """
    assert isinstance(batch, PackedBatch), "TrainConfig refuses the padded form"
    # Taken outside the engine, which would mistake it for the backward pass of the step.
    gradient = input_gradient(_bare(policy), batch, reference_B2, method)
    factor = _factor(_by_column(gradient.penalties_B, method, batch), method.penalty, population, scale)
    norms_B = gradient.margin_slopes_B
    scale_B = share / len(norms_B) * 2 * _by_column(factor * gradient.loss_slopes_B.square(), method, batch)
    logprob_S, slope_S = policy(batch, run=lambda bare: tangent_answers(bare, batch, gradient, scale_B))
    pairs = pairs_of(logprob_S, reference_B2, batch)
    losses_B = method.loss(pairs)
    (loss_slopes_B,) = torch.autograd.grad(losses_B.sum(), pairs.margins_B, create_graph=True)
    chosen_B, rejected_B = slope_S.chunk(2)
    moved_B, expected_B = chosen_B - rejected_B, scale_B * norms_B
    slopes_B = torch.where(expected_B > 0, moved_B.detach() / expected_B, norms_B)
    penalties_B = (loss_slopes_B * slopes_B).square()
    total = share * _by_column(losses_B + factor * penalties_B, method, batch).mean() + without_scale(moved_B.sum())
    errors_B = torch.where(norms_B > 0, (slopes_B - norms_B).abs() / norms_B, torch.zeros_like(norms_B))
    conditions_B = torch.where(expected_B > 0, gradient.passes.spread(len(norms_B)) / expected_B / norms_B, 0.0)
    weights_B, pairs = _by_column(torch.ones_like(norms_B), method, batch), pairs.detached()
    return Objective(total, losses_B.detach(), pairs, weights_B, penalties_B.detach(), errors_B, conditions_B)


def _factor(penalties_B: Tensor, penalty: Penalty | None, population: Population | None, scale: float) -> Tensor:
    """What multiplies the mean of |grad l|^2."""
    assert penalty is not None
    if not penalty.root:
        return torch.tensor(penalty.rho * scale, dtype=penalties_B.dtype)
    # d rho sqrt(M) = rho / (2 sqrt M) dM, with M the population's mean: the square root's slope is a constant here.
    mean = population.mean_penalty if population else None
    mean = distributed.gather(penalties_B).mean() if mean is None else mean
    # Chosen on the device: an if would wait for it.
    return torch.where(mean > 0, penalty.rho / (2 * mean.sqrt()), torch.zeros_like(mean))


def _penalties_alone(policy: Policy, batch: AnyBatch, reference_B2: Tensor, method: Method) -> Tensor:
    """[B] w |grad l|^2 without a graph."""
    assert method.penalty is not None
    if method.penalty.solver == "exact":
        penalties_B = _penalties(policy, batch, reference_B2, method, create_graph=False)[1]
    else:
        assert isinstance(batch, PackedBatch), "TrainConfig refuses the padded form"
        penalties_B = input_gradient(policy, batch, reference_B2, method).penalties_B
    return _by_column(penalties_B, method, batch)


def _penalties(
    policy: Policy, batch: AnyBatch, reference_B2: Tensor, method: Method, create_graph: bool
) -> tuple[Tensor, Tensor, Pairs]:
    """([B] losses, [B] |grad l|^2, pairs) of a padded batch."""
    assert isinstance(batch, Batch) and method.penalty is not None, "TrainConfig refuses the packed form"
    logprob_S, embeds_STD = policy(batch)
    pairs = pairs_of(logprob_S, reference_B2, batch)
    losses_B = method.loss(pairs)
    shared_BT = batch.prompt_mask_BT if method.penalty.prompt_once else None
    return losses_B, gradient_penalty(losses_B, embeds_STD, create_graph, shared_BT), pairs


# Before the first step policy and reference are one model: are their log-probs? -------------------------------------------

TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 5e-2)}
"""Of the mean |log pi - log ref| of an answer: a share of the mean |log ref|, and nats in addition for the shortest answers.

The same micro-batches through the same code give the same bits. What may differ are a GPU's kernels, and micro-batches of an
earlier start on another number of processes. On SmolLM2-135M other micro-batches change a log-prob by 3e-8 of it in float32
and by 2e-4 in bfloat16 (four answers, CPU). The bfloat16 tolerance is fifty times that by judgement, not by a measurement on
a GPU; a reference closer than that is not noticed."""


def check_first_step(
    parts: list[Objective], references: list[Tensor], method: Method, dtype: str, model_path: str, reference_file: str
) -> None:
    """Refuse reference log-probs that are not the untrained policy's own; every rank must call.

    The loss alone would not show it: at beta 0.01 a margin of 10 nats changes it by 0.05.

    Args:
        parts: what this rank's micro-batches contributed to the first step.
        references: [B, 2] reference log-probs of each.
        method: of the run.
        dtype: of the run.
        model_path, reference_file: for the message.

    Raises:
        DataError: the loss is not that of a zero margin, or the log-probs are too far apart.
    """
    losses_P = distributed.gather(torch.cat([part.losses_B for part in parts]))
    # ln 2, 1 / (4 beta^2) for ipo, or what a method's own loss is at a margin of zero.
    expected_P = distributed.gather(torch.cat([_loss_at_zero(part.pairs, method) for part in parts]))
    difference_K = distributed.gather(torch.cat([part.pairs.log_ratios_S for part in parts])).double().abs()
    size_K = distributed.gather(torch.cat([reference_B2.flatten() for reference_B2 in references])).double().abs()
    share, nats = TOLERANCES[dtype]
    loss, expected = float(losses_P.double().mean()), float(expected_P.mean())
    loss_tolerance = (0.05 if dtype == "bfloat16" else 1e-3) * max(1.0, expected)
    difference, allowed = float(difference_K.mean()), share * float(size_K.mean()) + nats
    if not abs(loss - expected) <= loss_tolerance:
        reason = f"the first loss is {loss:.4f}, not {expected:.4f}"
    elif not difference <= allowed:
        reason = (
            f"before the first step the policy's log-probs are {difference:.4g} away from the reference's in the mean, more "
            f"than the {allowed:.2g} of rounding"
        )
    else:
        return
    raise DataError(
        f"{reason}: the reference log-probs do not belong to {model_path}; delete {reference_file}, or pass --resume=never"
    )


def _loss_at_zero(pairs: Pairs, method: Method) -> Tensor:
    """[B] losses if policy and reference were the same, float64."""
    margins_B, log_ratios_S = (torch.zeros_like(part, dtype=torch.float64) for part in (pairs.margins_B, pairs.log_ratios_S))
    return method.loss(pairs._replace(margins_B=margins_B, log_ratios_S=log_ratios_S)).double()


# Are the numbers of a step finite? DeepSpeed silently skips a step whose gradients are not, and would skip all later ones.

SHOWN = 8
"""Pairs that a message names."""


def check_step(metrics: dict[str, float], watch: FiniteWatch, indices: Sequence[Tensor], pairs: Sequence[Pair]) -> None:
    """Stop at a step whose metrics are not finite; every rank must call.

    Args:
        metrics: of the step, the same on all ranks.
        watch: of the step.
        indices: [B] of each of this rank's micro-batches.
        pairs: of the training split.

    Raises:
        DataError: a metric is not finite; names the pairs of the micro-batches it came from.
    """
    wrong = _not_finite(metrics)
    if not wrong:
        return
    bad_M = distributed.gather(watch.bad_M.float()).bool().cpu()
    device = watch.bad_M.device
    indices_P = distributed.gather(torch.cat(list(indices)).to(device)).cpu()
    sizes_M = distributed.gather(torch.tensor([len(part) for part in indices], device=device)).cpu()
    if bad_M.any():
        whose = f"from the micro-batch of {_named(indices_P[bad_M.repeat_interleave(sizes_M)].tolist(), pairs)}"
    else:
        whose = f"from no micro-batch alone but the sum over the step's {len(indices_P)} pairs"
    raise DataError(
        f"step {int(metrics['step'])}: {wrong}, {whose}; nothing of this step is saved and earlier checkpoints are "
        "kept; look at these pairs, or lower --learning_rate or the method's strength"
    )


def check_evaluation(metrics: dict[str, float], step: int) -> None:
    """Raise DataError if metrics of the test pairs are not finite: the step before has broken the weights."""
    wrong = _not_finite(metrics)
    if wrong:
        raise DataError(
            f"after step {step}: {wrong}; nothing of this step is saved and earlier checkpoints are kept; lower "
            "--learning_rate or the method's strength"
        )


def _not_finite(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value))


def _named(indices: list[int], pairs: Sequence[Pair]) -> str:
    ids = [pairs[index].prompt_id for index in indices]
    label = "row" if None in ids else "prompt_id"
    words = [str(index + 1 if label == "row" else prompt_id) for prompt_id, index in zip(ids, indices, strict=True)]
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return f"{label} {', '.join(words[:SHOWN])}{more}"

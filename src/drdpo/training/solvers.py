"""WDPO's first-order solvers: the penalty's parameter gradient without a second derivative.

With g = grad_e l of a pair and v = g / |g| held fixed,
    grad_theta |g|^2 = 2 |g| d/dh grad_theta l(e + h v)   at h = 0.
`input_gradient` gives v and |g|; each solver then makes a scalar whose ordinary gradient is that of
    mean_i( l_i + c |g_i|^2 ),
c being rho, or for the root penalty rho / (2 sqrt M) with M the population's mean of |g|^2.

Shape suffixes: B pairs, S = 2B sequences.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from drdpo.config import TrainConfig
from drdpo.training.input_gradient import InputGradient, spread
from drdpo.training.packing import PackedBatch
from drdpo.training.policy import Policy
from drdpo.training.tangent_pass import tangent_answers
from drdpo.training.values import AnyBatch, values_of

STEP = 3e-6
"""Of the finite differences, relative to the norm of a pair's embeddings. On SmolLM2-135M in float32, two sequences of 64
tokens, the penalty's gradient is off by 0.06% here, by 0.7% at 1e-5, 6% at 3e-5 and 50% at 1e-4 (curvature)."""


class Solved(NamedTuple):
    total: Tensor
    """Scalar whose gradient is that of mean l + c |g|^2; its value too."""
    penalties_B: Tensor
    """[B] |g|^2, without a graph."""
    errors_B: Tensor
    """[B] relative difference between two estimates of the margin's slope along v: zero without rounding and curvature."""


def solve(
    policy: Policy, batch: AnyBatch, found: InputGradient, reference_B2: Tensor, config: TrainConfig, factor: Tensor
) -> Solved:
    """The objective of a micro-batch by config.solver.

    Args:
        policy: the bare module or the DeepSpeed engine around it; called once.
        batch: B pairs.
        found: what input_gradient says of it.
        reference_B2: [B, 2] reference log-probs.
        config: of the run.
        factor: scalar c.
    """
    solvers: dict[str, Callable[..., Solved]] = {
        "tangent": _tangent,
        "finite_difference": _finite_difference,
        "adversarial": _adversarial,
    }
    solved = solvers[config.solver](policy, batch, found, reference_B2, config, factor)
    value = (found.values.losses_B + factor * solved.penalties_B).mean()
    return solved._replace(total=solved.total - solved.total.detach() + value)


def _tangent(
    policy: Policy, batch: AnyBatch, found: InputGradient, reference_B2: Tensor, config: TrainConfig, factor: Tensor
) -> Solved:
    """l + c D^2 with D = l'(m) dm, dm the margin's derivative along v by a forward pass on values and tangents.

    |g|^2 is the largest (g . v)^2 of all unit v, so its gradient at that v is the gradient of D^2. What rounding does to v
    changes D to second order only, where |g| from the backward pass bears all of it.
    """
    assert isinstance(batch, PackedBatch), "TrainConfig refuses the padded form"
    logprob_S, moved_S = policy(batch, run=lambda bare: tangent_answers(bare, batch, found))
    values = values_of(logprob_S, found.values.embeds, reference_B2, config)
    (loss_slopes_B,) = torch.autograd.grad(values.losses_B.sum(), values.margins_B, create_graph=True)
    chosen_B, rejected_B = moved_S.chunk(2)
    moved_B = chosen_B - rejected_B
    penalties_B = (loss_slopes_B * moved_B).square()
    total = (values.losses_B + factor * penalties_B).mean()
    return Solved(total, penalties_B.detach(), _relative(moved_B, found.margin_slopes_B))


def _finite_difference(
    policy: Policy, batch: AnyBatch, found: InputGradient, reference_B2: Tensor, config: TrainConfig, factor: Tensor
) -> Solved:
    """Central: (1 + a) / 2 l(e + h v) + (1 - a) / 2 l(e - h v), a = 2 c |g| / h."""
    step_B = STEP * found.embeds_norm_B
    shifts = [spread(sign * step_B, batch) * found.direction for sign in (1, -1)]
    ends = policy(batch, run=lambda bare: [_logprob_at(bare, batch, shift) for shift in shifts])
    ahead, behind = (values_of(logprob_S, found.values.embeds, reference_B2, config) for logprob_S in ends)
    weight_B = 2 * factor * found.loss_slopes_B / step_B
    terms_B = (ahead.losses_B + behind.losses_B + weight_B * (ahead.losses_B - behind.losses_B)) / 2
    slopes_B = (ahead.margins_B - behind.margins_B) / (2 * step_B)
    return Solved(terms_B.mean(), found.loss_slopes_B.square(), _relative(slopes_B, found.margin_slopes_B))


def _adversarial(
    policy: Policy, batch: AnyBatch, found: InputGradient, reference_B2: Tensor, config: TrainConfig, factor: Tensor
) -> Solved:
    """l(e + 2 c g): its gradient is that of l + c |g|^2 to first order in c."""
    step_B = 2 * factor * found.loss_slopes_B
    shift = spread(step_B, batch) * found.direction
    logprob_S = policy(batch, run=lambda bare: _logprob_at(bare, batch, shift))
    values = values_of(logprob_S, found.values.embeds, reference_B2, config)
    # A flat loss takes no step, and then there is no slope to compare.
    slopes_B = torch.where(step_B == 0, found.margin_slopes_B, (values.margins_B - found.values.margins_B) / step_B)
    return Solved(values.losses_B.mean(), found.loss_slopes_B.square(), _relative(slopes_B, found.margin_slopes_B))


def _logprob_at(policy: Policy, batch: AnyBatch, shift: Tensor) -> Tensor:
    embeds = policy.embed(batch)
    return policy.logprob(batch, embeds + shift.to(embeds.dtype))


def _relative(found_B: Tensor, expected_B: Tensor) -> Tensor:
    found_B = found_B.detach()
    return torch.where(expected_B > 0, (found_B - expected_B).abs() / expected_B, torch.zeros_like(expected_B))

"""Methods, and the losses, weights and penalty they consist of: pure functions of small tensors.

Nothing here knows a process group, a device or a file. The family (arXiv 2502.01930; Dr. DPO: 2407.07880) minimizes, with h
the margin of implicit log-ratios,

    total = mean_i( w_i l(h_i) + rho |grad_{e_i} l_i|^2 ),

where KLDPO and Dr. DPO choose the weights w (detached) and WDPO the penalty. A Method is one choice of l, w and penalty;
`method_of` makes it from the flags, and is the only code of the trainer that knows the methods' names.

Shape suffixes: B pairs of a micro-batch, P pairs of the population, S = 2B sequences (all chosen rows, then all rejected),
T tokens, D width.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    from drdpo.config import TrainConfig


class Pairs(NamedTuple):
    """What a method may know of B pairs."""

    margins_B: Tensor
    """[B] h = [log pi(y_w) - log ref(y_w)] - [log pi(y_l) - log ref(y_l)], log-probs summed over the answer."""
    log_ratios_S: Tensor
    """[S] log pi - log ref of every answer, chosen first."""
    columns: Mapping[str, Tensor]
    """[B] float32 each: the fields of the preference rows that Method.reads names."""

    def detached(self) -> "Pairs":
        """The same without a graph."""
        return Pairs(self.margins_B.detach(), self.log_ratios_S.detach(), self.columns)


@dataclass(frozen=True)
class Penalty:
    """WDPO's penalty on g_i, the gradient of a pair's loss with respect to its input embeddings."""

    rho: float
    """Radius."""
    root: bool = False
    """False: mean of rho |g|^2, as in the authors' code. True: rho sqrt(mean |g|^2), Algorithm 1."""
    prompt_once: bool = False
    """See gradient_penalty."""
    solver: Literal["exact", "tangent"] = "tangent"
    fraction: float = 1.0
    """Share of a step's micro-batches that have the penalty."""


@dataclass(frozen=True)
class Method:
    """What an optimizer step minimizes; with weights or a penalty, not both (ValueError)."""

    name: str
    """In the progress bar and the summary."""
    loss: Callable[[Pairs], Tensor]
    """[B] differentiable losses. Under a penalty with the tangent solver, a function of the margins alone."""
    weights: Callable[[Tensor, Tensor, Pairs], Tensor] | None = None
    """(losses_B, population_P, pairs), all detached -> [B] weights; None: all 1."""
    population: bool = True
    """Do the weights depend on population_P, the losses of all pairs of the population? If not, it is the micro-batch, and
    the step is spared the forward passes that collect it."""
    penalty: Penalty | None = None
    reads: tuple[str, ...] = ()
    """Number fields of the preference rows that loss or weights use, e.g. chosen_score; both splits must have them."""
    strength: Mapping[str, float] = field(default_factory=dict)
    """The method's own flags, for the label in the manifest and the reports."""

    def __post_init__(self) -> None:
        if self.weights is not None and self.penalty is not None:
            raise ValueError(f"{self.name}: a method has weights or a penalty, not both")

    @property
    def label(self) -> str:
        """Name and strength, e.g. `KLDPO (kldpo_tau=0.05)`."""
        strength = ", ".join(f"{flag}={number}" for flag, number in self.strength.items())
        return f"{self.name} ({strength})" if strength else self.name

    @property
    def needs_population(self) -> bool:
        """Does a pair's term depend on other pairs?"""
        root = self.penalty is not None and self.penalty.root
        return root or (self.weights is not None and self.population)


def method_of(config: "TrainConfig") -> Method:
    """The method that the flags choose; without any of their own flags it is DPO."""

    def loss(pairs: Pairs) -> Tensor:
        return pair_losses(pairs.margins_B, config.beta, config.label_smoothing, config.loss_type)

    tau, rho, temperature = config.kldpo_tau, config.wdpo_rho, config.drdpo_beta
    if tau is not None:

        def harder(losses_B: Tensor, population_P: Tensor, pairs: Pairs) -> Tensor:
            return kl_weights(losses_B, population_P, tau, normalize=config.kldpo_normalize)

        return Method("KLDPO", loss, harder, strength={"kldpo_tau": tau})
    if temperature is not None:

        def easier(losses_B: Tensor, population_P: Tensor, pairs: Pairs) -> Tensor:
            return drdpo_weights(losses_B, population_P, temperature)

        return Method("Dr. DPO", loss, easier, strength={"drdpo_beta": temperature})
    if rho is not None:
        once = config.wdpo_prompt == "once"
        penalty = Penalty(rho, config.wdpo_penalty == "root", once, config.solver, config.wdpo_fraction)
        return Method("WDPO", loss, penalty=penalty, strength={"wdpo_rho": rho})
    return Method("DPO", loss)


def pair_losses(
    margins_B: Tensor, beta: float, smoothing: float = 0.0, kind: Literal["sigmoid", "ipo", "robust"] = "sigmoid"
) -> Tensor:
    """Pointwise preference loss of every pair.

    Args:
        margins_B: [B] h, see Pairs.
        beta: KL penalty coefficient.
        smoothing: e, the assumed rate of flipped labels (not for ipo).
        kind: "sigmoid": -(1-e) log s(beta h) - e log s(-beta h), DPO (2305.18290, eq. 7) and, with e > 0, cDPO;
            "ipo": (h - 1/(2 beta))^2 (2310.12036, eq. 17);
            "robust": [-(1-e) log s(beta h) + e log s(-beta h)] / (1 - 2e), rDPO (2403.00409, eq. 12).

    Returns:
        [B] losses; ln 2 for sigmoid and robust at h = 0.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "ipo":
        return (margins_B - 1 / (2 * beta)).square()
    right_B, wrong_B = -logsigmoid(beta * margins_B), -logsigmoid(-beta * margins_B)
    if kind == "sigmoid":
        return (1 - smoothing) * right_B + smoothing * wrong_B
    if kind == "robust":
        return ((1 - smoothing) * right_B - smoothing * wrong_B) / (1 - 2 * smoothing)
    raise ValueError(f"unknown kind of loss {kind!r}")


def kl_weights(losses_B: Tensor, population_P: Tensor, tau: float, cap: float = 10.0, normalize: bool = False) -> Tensor:
    """KLDPO's weights: harder pairs count more.

    Args:
        losses_B: [B] losses.
        population_P: [P] losses of the population they belong to.
        tau: temperature; infinity is DPO.
        cap: largest weight of the code form.
        normalize: False for the authors' code, min(cap, exp((l - mean l) / tau)); True for Algorithm 2,
            P softmax(l / tau) over the population, whose gradient is that of tau log mean exp(l / tau).

    Returns:
        [B] weights, detached.
    """
    losses_B, population_P = losses_B.detach(), population_P.detach()
    if normalize:
        return torch.exp(losses_B / tau - _log_mean_exp(population_P / tau))
    return torch.exp((losses_B - population_P.mean()) / tau).clamp(max=cap)


def drdpo_weights(losses_B: Tensor, population_P: Tensor, temperature: float) -> Tensor:
    """Dr. DPO's weights: a harder pair, more likely mislabelled, counts less (2407.07880, eq. 13).

    Args:
        losses_B: [B] losses.
        population_P: [P] losses of the population they belong to.
        temperature: t; the gradient is that of -t log mean exp(-l / t).

    Returns:
        [B] weights exp(-l / t) / mean exp(-l / t), detached.
    """
    losses_B, population_P = losses_B.detach(), population_P.detach()
    return torch.exp(-losses_B / temperature - _log_mean_exp(-population_P / temperature))


def gradient_penalty(
    losses_B: Tensor, embeds_STD: Tensor, create_graph: bool, shared_prompt_BT: Tensor | None = None
) -> Tensor:
    """WDPO's |grad_{e_i} l_i|^2 of every pair, over the prompt and answer embeddings of both its sequences.

    The pairs do not attend to each other, so the gradient of the summed losses separates by pair (appendix F of
    2502.01930, per-sample squared form). On the prompt, which both sequences hold, the gradients are g_c and g_r: the
    authors' two rows count |g_c|^2 + |g_r|^2, the paper's z = (prompt, chosen, rejected) counts |g_c + g_r|^2.

    Args:
        losses_B: [B] losses that depend on `embeds_STD`.
        embeds_STD: [S, T, D] input embeddings, S = 2B, both sequences of a pair aligned at their start.
        create_graph: keep the graph, so that the penalty can be differentiated.
        shared_prompt_BT: [B, T] True on prompt positions, to count the prompt once; None counts it per sequence.

    Returns:
        [B] squared norms, float32 (float64 for float64 losses).
    """
    (grad_STD,) = torch.autograd.grad(losses_B.sum(), embeds_STD, create_graph=create_graph, retain_graph=True)
    chosen_BTD, rejected_BTD = grad_STD.to(losses_B.dtype).split(len(losses_B))
    squares_B = (chosen_BTD.square() + rejected_BTD.square()).sum(dim=(1, 2))
    if shared_prompt_BT is None:
        return squares_B
    return squares_B + 2 * ((chosen_BTD * rejected_BTD).sum(dim=2) * shared_prompt_BT).sum(dim=1)


def effective_sample_size(weights_P: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2, between 1 (one pair has all the weight) and P (equal weights)."""
    return weights_P.sum().square() / weights_P.square().sum()


def _log_mean_exp(exponents_P: Tensor) -> Tensor:
    return torch.logsumexp(exponents_P, dim=0) - math.log(len(exponents_P))

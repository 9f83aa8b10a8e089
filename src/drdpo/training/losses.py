"""Methods, and the losses, weights and penalty they consist of: pure functions of small tensors.

Nothing here knows a process group or a file. The family (arXiv 2502.01930; Dr. DPO: 2407.07880) minimizes, with h
the margin of implicit log-ratios,

    total = mean_i( w_i l(h_i) + rho |grad_{e_i} l_i|^2 ),

where KLDPO and Dr. DPO choose the weights w (detached) and WDPO the penalty. A Method is one choice of l, w and penalty;
`method_of` makes it from the flags, and drdpo.training.objective sums the terms up.

In order: methods; pointwise losses, with x = beta h; weights, which multiply losses_B [B] and are detached. population_P
[P] are the losses that they are compared with, those of all pairs of the optimizer step unless --robust_scope is micro; the
mean of the weights over it is 1, except in KLDPO's default form, which is capped, and in group DRO if the step lacks a
group. docs/methods.md says what each method assumes, and which formula could be compared with its source.

Shape suffixes: B pairs of a micro-batch, P pairs of the population, S = 2B sequences (all chosen rows, then all rejected),
T tokens, D width, M training pairs, G groups.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    from drdpo.config.training import TrainConfig


TOKENS = ("chosen_tokens", "rejected_tokens")
"""Columns that are no fields of the rows: the number of tokens of each answer that are trained on, counted here."""

State = Mapping[str, Tensor]
"""What a method keeps between steps."""
NO_STATE: State = {}


class Pairs(NamedTuple):
    """What a method may know of B pairs."""

    margins_B: Tensor
    """[B] h = [log pi(y_w) - log ref(y_w)] - [log pi(y_l) - log ref(y_l)], log-probs summed over the answer."""
    log_ratios_S: Tensor
    """[S] log pi - log ref of every answer, chosen first."""
    columns: Mapping[str, Tensor]
    """[B] float32 each: the fields of the preference rows that Method.reads and Method.group name."""
    state: State = NO_STATE
    """Of a method that keeps one, for its weights."""

    @property
    def lengths_S(self) -> Tensor:
        """[S] tokens of every answer, for a method that reads TOKENS."""
        return torch.cat([self.columns[name] for name in TOKENS])

    def detached(self) -> "Pairs":
        """The same without a graph."""
        return self._replace(margins_B=self.margins_B.detach(), log_ratios_S=self.log_ratios_S.detach())


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
    """Do the weights depend on other pairs than their own? If not, population_P is the micro-batch, and the step is spared
    the forward passes that collect the population."""
    penalty: Penalty | None = None
    reads: tuple[str, ...] = ()
    """Number fields of the preference rows that loss or weights use, e.g. chosen_score; both splits must have them. And
    TOKENS."""
    group: str | None = None
    """Field of the preference rows that names a pair's group; its column has the groups' numbers, from 0."""
    weight_column: str | None = None
    """The one of `reads` that multiplies a pair's term, penalty included: numbers that are not negative."""
    begin: Callable[[Mapping[str, Tensor]], State] | None = None
    """From the columns of all training pairs [M]: what the method keeps between steps, at first."""
    update: Callable[[State, Tensor, Mapping[str, Tensor]], State] | None = None
    """(what was kept, population_P, its columns) -> what the weights of this step see, kept for the next."""
    strength: Mapping[str, float] = field(default_factory=dict)
    """The method's own flags, for the label in the manifest and the reports."""

    def __post_init__(self) -> None:
        if self.weights is not None and self.penalty is not None:
            raise ValueError(f"{self.name}: a method has weights or a penalty, not both")
        if self.weight_column is not None and self.weight_column not in self.reads:
            raise ValueError(f"{self.name}: reads does not name {self.weight_column}, the column of weights")
        if (self.begin is None) != (self.update is None):
            raise ValueError(f"{self.name}: what is kept between steps needs begin and update")
        if self.update is not None and not (self.weights is not None and self.population):
            raise ValueError(f"{self.name}: what is kept between steps is for weights, with population=True")

    @property
    def weighted(self) -> bool:
        """May pairs have unequal weights?"""
        return self.weights is not None or self.weight_column is not None

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

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that its loss and weights see."""
        return self.reads if self.group is None else (*self.reads, self.group)


def method_of(config: "TrainConfig") -> Method:
    """The method that the flags choose; without any of their own flags it is DPO."""
    # sigmoid_norm and ipo_norm are losses of the margin per token.
    kind, by_token = config.loss_type.removesuffix("_norm"), config.loss_type.endswith("_norm")

    def loss(pairs: Pairs) -> Tensor:
        margins_B = normalised_margins(pairs.log_ratios_S, pairs.lengths_S) if by_token else pairs.margins_B
        return pair_losses(margins_B, config.beta, config.label_smoothing, kind)

    method = Method("DPO", loss, reads=TOKENS if by_token else ())
    tau, rho, temperature = config.kldpo_tau, config.wdpo_rho, config.drdpo_beta
    if tau is not None:
        weights = partial(kl_weights, tau=tau, normalize=config.kldpo_normalize)
        method = _weighted(method, "KLDPO", weights, {"kldpo_tau": tau})
    elif temperature is not None:
        weights = partial(drdpo_weights, temperature=temperature)
        method = _weighted(method, "Dr. DPO", weights, {"drdpo_beta": temperature})
    elif rho is not None:
        once = config.wdpo_prompt == "once"
        penalty = Penalty(rho, config.wdpo_penalty == "root", once, config.solver, config.wdpo_fraction)
        method = replace(method, name="WDPO", penalty=penalty, strength={"wdpo_rho": rho})
    elif config.named_method is not None:
        method = _named(*config.named_method, config.beta, config.group_column or "", method)
    if config.weight_column is None:
        return method
    reads = dict.fromkeys([*method.reads, config.weight_column])
    return replace(method, reads=tuple(reads), weight_column=config.weight_column)


def _weighted(plain: Method, name: str, weights: Callable[..., Tensor], strength: Mapping[str, float]) -> Method:
    """`plain` with weights(losses_B, population_P)."""
    return replace(plain, name=name, weights=lambda losses, population, _: weights(losses, population), strength=strength)


def _named(name: str, strength: Mapping[str, float], beta: float, group: str, plain: Method) -> Method:
    """A --method of the flags; one that weights pairs has the loss of `plain`."""
    losses: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "ropo": ("ROPO", ropo_losses),
        "holder": ("Hölder-DPO", holder_losses),
        "robust_label": ("robust label", robust_label_losses),
    }
    weights: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "tv": ("TV-DRO", tv_weights),
        "chi2": ("chi-square DRO", chi2_weights),
        "cvar": ("CVaR", cvar_weights),
    }
    if name in losses:
        title, function = losses[name]
        return Method(title, lambda pairs: function(pairs.margins_B, beta, **strength), strength=strength)
    if name in weights:
        title, function = weights[name]
        return _weighted(plain, title, partial(function, **strength), strength)
    if name == "group":
        return replace(
            plain, name="group DRO", strength=strength, group=group,
            weights=lambda losses_B, population_P, pairs: group_weights(
                pairs.columns[group], pairs.state["weights"], pairs.state["present"]
            ),
            begin=lambda columns: group_state(columns[group]),
            update=lambda state, population_P, columns: group_step(
                dict(state), population_P, columns[group], **strength
            ),
        )  # fmt: skip
    if name != "dpo_pro":
        raise ValueError(f"METHODS of drdpo.config.training has {name}, this function does not")
    scores = ("chosen_score", "rejected_score")

    def uncertain(pairs: Pairs) -> Tensor:
        labels_B = soft_labels(pairs.columns[scores[0]], pairs.columns[scores[1]], strength["scale"])
        return soft_label_losses(pairs.margins_B, labels_B, beta, strength["radius"])

    return Method("DPO-PRO", uncertain, reads=scores, strength=strength)


# Losses ----------------------------------------------------------------------------------------------------------------


def pair_losses(margins_B: Tensor, beta: float, smoothing: float = 0.0, kind: str = "sigmoid") -> Tensor:
    """Pointwise preference loss of every pair.

    With h = margins_B, see Pairs, and e = `smoothing`, the assumed rate of flipped labels (not for ipo):

        sigmoid  -(1-e) log s(beta h) - e log s(-beta h): DPO (2305.18290, eq. 7) and, with e > 0, cDPO; ln 2 at h = 0
        ipo      (h - 1/(2 beta))^2 (2310.12036, eq. 17)
        robust   [-(1-e) log s(beta h) + e log s(-beta h)] / (1 - 2e): rDPO (2403.00409, eq. 12); ln 2 at h = 0
    """
    if kind == "ipo":
        return (margins_B - 1 / (2 * beta)).square()
    right_B, wrong_B = -logsigmoid(beta * margins_B), -logsigmoid(-beta * margins_B)
    if kind == "sigmoid":
        return (1 - smoothing) * right_B + smoothing * wrong_B
    if kind == "robust":
        return ((1 - smoothing) * right_B - smoothing * wrong_B) / (1 - 2 * smoothing)
    raise ValueError(f"unknown kind of loss {kind!r}")


def normalised_margins(log_ratios_S: Tensor, lengths_S: Tensor) -> Tensor:
    """[B] margins of the log-ratios [S] per token: Delta_w / |y_w| - Delta_l / |y_l| (Tulu 3, 2411.15124)."""
    chosen_B, rejected_B = (log_ratios_S / lengths_S).chunk(2)
    return chosen_B - rejected_B


def ropo_losses(margins_B: Tensor, beta: float, alpha: float) -> Tensor:
    """4a / (1+a)^2 (-log s(x) + a s(-x)), a = alpha > 0: a pair of large negative margin loses its pull (2404.04102)."""
    return 4 * alpha / (1 + alpha) ** 2 * (-logsigmoid(beta * margins_B) + alpha * torch.sigmoid(-beta * margins_B))


def holder_losses(margins_B: Tensor, beta: float, gamma: float) -> Tensor:
    """-(1+g) p^g + g p^(1+g), p = s(x), g = gamma > 0 (2505.17859); slope -g (1+g) p^g (1-p)^2, which vanishes for a
    pair of large negative margin too."""
    log_p_B = logsigmoid(beta * margins_B)
    return gamma * torch.exp((1 + gamma) * log_p_B) - (1 + gamma) * torch.exp(gamma * log_p_B)


def robust_label_losses(margins_B: Tensor, beta: float, radius: float) -> Tensor:
    """(1-r) l(h) + r max(l(h), l(-h)): the worst label within total variation r = radius of the given one (2607.01715,
    with two answers)."""
    right_B, wrong_B = -logsigmoid(beta * margins_B), -logsigmoid(-beta * margins_B)
    return (1 - radius) * right_B + radius * torch.maximum(right_B, wrong_B)


def soft_labels(chosen_B: Tensor, rejected_B: Tensor, scale: float) -> Tensor:
    """[B] chance that the first of two answers is the better, by Bradley-Terry's s((chosen - rejected) / scale)."""
    return torch.sigmoid((chosen_B - rejected_B) / scale)


def soft_label_losses(margins_B: Tensor, labels_B: Tensor, beta: float, radius: float) -> Tensor:
    """DPO-PRO's worst-case loss under soft labels q = labels_B (2510.23590); radius 0 is DPO with soft labels.

    The worst of all label probabilities p with (p - q)^2 / (q (1-q)) <= radius, the chi-square distance of two coins:
    p l(h) + (1-p) l(-h) with p = q -+ sqrt(radius q (1-q)), clipped to [0, 1], away from the sign of h.
    """
    shift_B = (radius * labels_B * (1 - labels_B)).sqrt() * margins_B.detach().sign()
    worst_B = (labels_B - shift_B).clamp(0, 1)
    return -worst_B * logsigmoid(beta * margins_B) - (1 - worst_B) * logsigmoid(-beta * margins_B)


def gradient_penalty(
    losses_B: Tensor, embeds_STD: Tensor, create_graph: bool, shared_prompt_BT: Tensor | None = None
) -> Tensor:
    """WDPO's |grad_{e_i} l_i|^2 of every pair, over the prompt and answer embeddings of both its sequences.

    The pairs do not attend to each other, so the gradient of the summed losses separates by pair (appendix F of
    2502.01930, per-sample squared form). On the prompt, which both sequences hold, the gradients are g_c and g_r: the
    authors' two rows count |g_c|^2 + |g_r|^2, the paper's z = (prompt, chosen, rejected) counts |g_c + g_r|^2.

    Args:
        losses_B, embeds_STD: losses, and the input embeddings [S, T, D] on which they depend, both sequences of a pair
            aligned at their start.
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


# Weights ---------------------------------------------------------------------------------------------------------------


def kl_weights(losses_B: Tensor, population_P: Tensor, tau: float, cap: float = 10.0, normalize: bool = False) -> Tensor:
    """KLDPO's weights: harder pairs count more; an infinite tau is DPO.

    min(cap, exp((l - mean l) / tau)) as in the authors' code, whose cap is 10 (no flag changes it), or with `normalize`
    Algorithm 2's P softmax(l / tau) over the population, whose gradient is that of tau log mean exp(l / tau)."""
    losses_B, population_P = losses_B.detach(), population_P.detach()
    if normalize:
        return torch.exp(losses_B / tau - _log_mean_exp(population_P / tau))
    return torch.exp((losses_B - population_P.mean()) / tau).clamp(max=cap)


def drdpo_weights(losses_B: Tensor, population_P: Tensor, temperature: float) -> Tensor:
    """Dr. DPO's weights exp(-l / t) / mean exp(-l / t): a harder pair, more likely mislabelled, counts less (2407.07880,
    eq. 13). The gradient is that of -t log mean exp(-l / t)."""
    losses_B, population_P = losses_B.detach(), population_P.detach()
    return torch.exp(-losses_B / temperature - _log_mean_exp(-population_P / temperature))


def tv_weights(losses_B: Tensor, population_P: Tensor, radius: float) -> Tensor:
    """Weights of the worst distribution within total variation `radius` of the population's (2503.00539, Algorithm 3).

    The easiest pairs lose the share `radius` of all weight, at most 1 each, and the hardest pair gets it: 0 is DPO, 1 the
    largest loss alone. Pairs of equal loss share.
    """
    moved_P = (radius * len(population_P) - _ranks(population_P)).clamp(0, 1)
    weights_P = 1 - moved_P
    weights_P[-1] += moved_P.sum()
    return _by_rank(losses_B, population_P, weights_P)


def cvar_weights(losses_B: Tensor, population_P: Tensor, share: float) -> Tensor:
    """Weights of the mean over the hardest `share` of the pairs (CVaR), in (0, 1], 1 is DPO: the worst distribution with
    weights of at most 1 / share. The pair at the edge counts in part; pairs of equal loss share."""
    harder_P = _ranks(population_P).flip(0)
    return _by_rank(losses_B, population_P, (share * len(population_P) - harder_P).clamp(0, 1) / share)


def chi2_weights(losses_B: Tensor, population_P: Tensor, radius: float) -> Tensor:
    """Weights of the worst distribution with mean (w - 1)^2 / 2 <= radius (Duchi and Namkoong, 1810.08750); 0 is DPO.

    They are proportional to (l - eta)+, with the eta at which mean w^2 = c = 1 + 2 radius: the effective sample is the share
    1 / c of the population, unless so few pairs are hardest that these alone get all weight.
    """
    total, largest_square = len(population_P), 1 + 2 * radius
    # In float64, relative to the largest: the losses may differ by rounding alone.
    ordered_P = population_P.detach().double().sort(descending=True).values
    largest, ordered_P = ordered_P[0].clone(), ordered_P - ordered_P[0]
    count_P = 1 + _ranks(ordered_P)
    mean_P = _running_sums(ordered_P) / count_P
    spread_P = (_running_sums(ordered_P.square()) / count_P - mean_P.square()).clamp(min=0)
    # mean w^2 if eta is the loss below the m hardest. It falls as m grows; the first that is small enough is the m sought.
    gap_P = mean_P - torch.cat([ordered_P[1:], ordered_P.new_full((1,), -torch.inf)])
    square_P = torch.where(gap_P > 0, total / count_P * (spread_P / gap_P.square() + 1), torch.inf)
    place = (square_P <= largest_square).int().argmax(dim=0, keepdim=True)
    share = count_P[place] / total
    tiny = torch.finfo(torch.float64).tiny
    distance = (spread_P[place] / (largest_square * share - 1).clamp(min=tiny)).sqrt().clamp(min=tiny)
    nearest_B = _nearest(losses_B, population_P).double() - largest
    return (((nearest_B - mean_P[place]) / distance + 1).clamp(min=0) / share).to(losses_B.dtype)


def _log_mean_exp(exponents_P: Tensor) -> Tensor:
    return torch.logsumexp(exponents_P, dim=0) - math.log(len(exponents_P))


def _ranks(population_P: Tensor) -> Tensor:
    """[P] 0, 1, .., P - 1, float64."""
    return torch.arange(len(population_P), dtype=torch.float64, device=population_P.device)


def _running_sums(values_P: Tensor) -> Tensor:
    """[P] sums of the first 1, 2, .. values."""
    if values_P.is_cuda and torch.are_deterministic_algorithms_enabled():  # for which CUDA's cumsum has no form
        return values_P.cpu().cumsum(0).to(values_P.device)
    return values_P.cumsum(0)


def _nearest(losses_B: Tensor, population_P: Tensor) -> Tensor:
    """[B] the population's values of these losses, which another forward pass may have rounded differently."""
    losses_B, ordered_P = losses_B.detach(), population_P.detach().sort().values
    above_B = torch.searchsorted(ordered_P, losses_B).clamp(max=len(ordered_P) - 1)
    below_B = (above_B - 1).clamp(min=0)
    nearer_B = losses_B - ordered_P[below_B] < ordered_P[above_B] - losses_B
    return torch.where(nearer_B, ordered_P[below_B], ordered_P[above_B])


def _by_rank(losses_B: Tensor, population_P: Tensor, weights_P: Tensor) -> Tensor:
    """[B] weights by rank, the easiest pair first; pairs of equal loss have the mean of theirs."""
    ordered_P, value_B = population_P.detach().sort().values, _nearest(losses_B, population_P)
    first_B, last_B = (torch.searchsorted(ordered_P, value_B, right=right) for right in (False, True))
    sums = torch.cat([weights_P.new_zeros(1), _running_sums(weights_P)])
    return ((sums[last_B] - sums[first_B]) / (last_B - first_B)).to(losses_B.dtype)


# Groups, whose weights are kept between steps ------------------------------------------------------------------------------


def group_state(group_M: Tensor) -> dict[str, Tensor]:
    """What group DRO begins with: equal weights [G] of the groups, their training pairs [G], and those of a step [G]."""
    counts_G = torch.bincount(group_M.long()).float()
    return {"weights": (counts_G > 0) / (counts_G > 0).sum(), "counts": counts_G, "present": torch.zeros_like(counts_G)}


def group_step(
    state: dict[str, Tensor], losses_P: Tensor, group_P: Tensor, rate: float, adjustment: float
) -> dict[str, Tensor]:
    """Group DRO's ascent step on the groups' weights (2405.20304): q_g exp(rate (L_g + adjustment / sqrt(n_g))), to sum 1.

    L_g is the mean loss of the group's pairs in the step, 0 if there are none, and n_g counts its training pairs.
    """
    zeros_G, index_P = torch.zeros_like(state["weights"]), group_P.long()
    losses_P = losses_P.to(zeros_G.dtype)
    present_G = zeros_G.index_add(0, index_P, torch.ones_like(losses_P))
    means_G = zeros_G.index_add(0, index_P, losses_P) / present_G.clamp(min=1)
    # A group without a training pair has weight 0, whose logarithm keeps it there.
    raised_G = state["weights"].log() + rate * (means_G + adjustment / state["counts"].clamp(min=1).sqrt())
    return {**state, "weights": raised_G.softmax(dim=0), "present": present_G}


def group_weights(group_B: Tensor, weights_G: Tensor, present_G: Tensor) -> Tensor:
    """[B] weights q_g P / P_g of pairs, so that the step's objective is the sum of q_g L_g over its groups; their mean is 1
    if the step has pairs of every group."""
    return (weights_G * present_G.sum() / present_G.clamp(min=1))[group_B.long()]


# Of any method's weights ---------------------------------------------------------------------------------------------------


def effective_sample_size(weights_P: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2, between 1 (one pair has all the weight) and P (equal weights); 0 if all weights are."""
    return weights_P.sum().square() / weights_P.square().sum().clamp(min=torch.finfo(weights_P.dtype).tiny)

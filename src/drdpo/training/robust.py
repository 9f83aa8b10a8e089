"""The weights of all methods, and the losses of --method: pure functions of small tensors, as drdpo.training.losses.

With x = beta h, h the margin, the losses [B] replace -log s(x). The weights [B] multiply losses_B [B], and are detached;
population_P [P] are the losses of the population to which those belong. The mean of the weights over it is 1, but for
KLDPO's of Algorithm 1, which are capped. docs/methods.md says what each method assumes, and which formula could be compared
with its source.

Shape suffixes: B pairs of a micro-batch, P pairs of the population, S = 2B sequences, M training pairs, G groups.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def normalised_margins(log_ratios_S: Tensor, lengths_S: Tensor) -> Tensor:
    """[B] margins of the log-ratios [S] per token: Delta_w / |y_w| - Delta_l / |y_l| (Tulu 3, 2411.15124)."""
    chosen_B, rejected_B = (log_ratios_S / lengths_S).chunk(2)
    return chosen_B - rejected_B


# Losses ----------------------------------------------------------------------------------------------------------------


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


# Weights ---------------------------------------------------------------------------------------------------------------


def kl_weights(losses_B: Tensor, population_P: Tensor, tau: float, cap: float = 10.0, normalize: bool = False) -> Tensor:
    """KLDPO's weights: harder pairs count more; an infinite tau is DPO.

    min(cap, exp((l - mean l) / tau)) as in the authors' code, or with `normalize` Algorithm 2's P softmax(l / tau) over the
    population, whose gradient is that of tau log mean exp(l / tau).
    """
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
    total, second = len(population_P), 1 + 2 * radius
    # In float64, relative to the largest: the losses may differ by rounding alone.
    ordered_P = population_P.detach().double().sort(descending=True).values
    largest, ordered_P = ordered_P[0].clone(), ordered_P - ordered_P[0]
    count_P = 1 + _ranks(ordered_P)
    mean_P = ordered_P.cumsum(0) / count_P
    spread_P = (ordered_P.square().cumsum(0) / count_P - mean_P.square()).clamp(min=0)
    # mean w^2 if eta is the loss below the m hardest. It falls as m grows; the first that is small enough is the m sought.
    gap_P = mean_P - torch.cat([ordered_P[1:], ordered_P.new_full((1,), -torch.inf)])
    second_P = torch.where(gap_P > 0, total / count_P * (spread_P / gap_P.square() + 1), torch.inf)
    place = (second_P <= second).int().argmax(dim=0, keepdim=True)
    share = count_P[place] / total
    tiny = torch.finfo(torch.float64).tiny
    distance = (spread_P[place] / (second * share - 1).clamp(min=tiny)).sqrt().clamp(min=tiny)
    nearest_B = _nearest(losses_B, population_P).double() - largest
    return (((nearest_B - mean_P[place]) / distance + 1).clamp(min=0) / share).to(losses_B.dtype)


def _log_mean_exp(exponents_P: Tensor) -> Tensor:
    return torch.logsumexp(exponents_P, dim=0) - math.log(len(exponents_P))


def _ranks(population_P: Tensor) -> Tensor:
    """[P] 0, 1, .., P - 1, float64."""
    return torch.arange(len(population_P), dtype=torch.float64, device=population_P.device)


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
    sums = torch.cat([weights_P.new_zeros(1), weights_P.cumsum(0)])
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

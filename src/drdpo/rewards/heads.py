"""Fitting of ArmoRM's second stage (arXiv 2406.12845, section 3): the debiasing transform and the gate.

Shape suffixes: N answers, D width, K objectives, P pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from drdpo.progress import progress
from drdpo.rewards.armorm import GatingNetwork
from drdpo.rewards.scores import Floats
from drdpo.rewards.statistics import spearman

FOLDS = 5
LARGEST_SCALE = 1000.0
"""Of the gated score: where every margin has the right sign, no finite factor is the most likely one."""
LARGEST_SPEARMAN = 0.03
"""What the transform leaves of an objective's rank correlation with verbosity."""


def prompt_folds(prompt_N: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """[N] fold of each row; the rows of a prompt share one, so that no prompt is on both sides."""
    prompts = np.unique(prompt_N)
    order = np.random.default_rng(seed).permutation(len(prompts))
    fold_of = dict(zip(prompts[order].tolist(), (np.arange(len(prompts)) % folds).tolist(), strict=True))
    return np.array([fold_of[prompt] for prompt in prompt_N.tolist()])


def debiasing_transform(rewards_NK: Floats, verbosity: int | None) -> Floats:
    """The matrix T that takes the rank correlation with verbosity out of every objective.

    Column j of `rewards @ T` is r_j - p_j r_verbosity: T is the identity minus the penalties in the verbosity row. p_j is
    the smallest penalty for which Spearman(r_j - p_j r_verbosity, r_verbosity) <= 0.03; 0 where it is so from the start.
    For verbosity itself that is 1: its column is empty, or a gate fitted on people's taste for long answers would choose it.

    Args:
        rewards_NK: stage-1 rewards of the training answers.
        verbosity: its column; None gives the identity.
    """
    transform_KK = np.eye(rewards_NK.shape[1])
    if verbosity is not None:
        verbose_N = rewards_NK[:, verbosity]
        transform_KK[verbosity] -= [_penalty(reward_N, verbose_N) for reward_N in rewards_NK.T]
    return transform_KK


class GatePairs(NamedTuple):
    """P pairs of answers to one prompt each."""

    prompt_PD: Tensor
    """Hidden states at the gate position."""
    margin_PK: Tensor
    """Transformed stage-1 rewards of the better answer minus those of the worse."""

    def loss(self, gate: GatingNetwork) -> Tensor:
        """Bradley-Terry: mean of -log sigmoid(score of the better - score of the worse)."""
        return -logsigmoid((gate(self.prompt_PD) * self.margin_PK).sum(dim=-1)).mean()

    def take(self, rows: np.ndarray) -> "GatePairs":
        """The pairs where `rows` is True."""
        chosen = torch.from_numpy(rows)
        return GatePairs(self.prompt_PD[chosen], self.margin_PK[chosen])


def log_odds_scale(margin_P: Tensor) -> float:
    """The factor under which margins of a score are log-odds: the maximum of the Bradley-Terry likelihood in one number.

    Args:
        margin_P: score of the better answer minus that of the worse.

    Returns:
        A positive number; 1 where the score prefers the worse answers, and no scale helps.
    """
    margin_P = margin_P.double()
    if float(margin_P.mean()) <= 0:
        return 1.0
    low, high = 0.0, 1.0
    while _gain(margin_P, high) > 0 and high < LARGEST_SCALE:
        high *= 2
    for _ in range(50):  # The likelihood is concave, so its slope crosses zero once.
        middle = (low + high) / 2
        low, high = (middle, high) if _gain(margin_P, middle) > 0 else (low, middle)
    return high


def fit_gate(gate: GatingNetwork, pairs: GatePairs, steps: int, stop: int, held_out: GatePairs | None = None) -> list[float]:
    """Fit a gate by AdamW at 1e-3 with a cosine to 0, every step on all pairs.

    The last layer starts at zero, so an unfitted gate weighs all objectives alike, and a fit has to earn its departure.
    logit_scale is set first, to what makes the equally weighed score's differences log-odds, and stays. At ArmoRM's initial
    1 the margins, parts of a unit, hardly move the loss, and neither would the gate.

    Args:
        gate: changed in place.
        pairs: to fit on.
        steps: over which the cosine falls.
        stop: steps that are made.
        held_out: pairs to watch.

    Returns:
        [stop + 1] the loss before each step and at the end, on `held_out` where given, else on `pairs`.
    """
    torch.nn.init.zeros_(gate.layers[-1].weight)
    torch.nn.init.zeros_(gate.layers[-1].bias)
    gate.logit_scale.requires_grad_(False).fill_(log_odds_scale(pairs.margin_PK.mean(dim=1)))
    optimizer = torch.optim.AdamW([weight for weight in gate.parameters() if weight.requires_grad], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    watched, losses = held_out or pairs, []
    for _ in range(stop):
        with torch.no_grad():
            losses.append(float(watched.loss(gate)))
        optimizer.zero_grad()
        pairs.loss(gate).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return [*losses, float(watched.loss(gate))]


def choose_gate_steps(
    new_gate: Callable[[], GatingNetwork], pairs: GatePairs, fold_P: np.ndarray, steps: int
) -> tuple[int, float, float]:
    """After how many steps to stop, by the loss on held-out prompts; 0 where no step helps.

    Args:
        new_gate: an unfitted gate, the same one every time.
        pairs: to fit on.
        fold_P: fold of each pair's prompt.
        steps: most steps.

    Returns:
        The steps, the held-out loss there, and that of the unfitted gate.
    """
    total_S = np.zeros(steps + 1)
    for fold in progress(np.unique(fold_P), desc="gate", unit="fold"):
        held_out = fold_P == fold
        curve = fit_gate(new_gate(), pairs.take(~held_out), steps, steps, pairs.take(held_out))
        total_S += np.array(curve) * held_out.sum()
    mean_S = total_S / len(fold_P)
    best = int(mean_S.argmin())
    return best, float(mean_S[best]), float(mean_S[0])


def _gain(margin_P: Tensor, scale: float) -> float:
    """Slope of the Bradley-Terry log-likelihood in the scale of its margins."""
    return float((margin_P * torch.sigmoid(-scale * margin_P)).mean())


def _penalty(reward_N: Floats, verbose_N: Floats) -> float:
    def correlation(penalty: float) -> float:
        return spearman(reward_N - penalty * verbose_N, verbose_N)

    if correlation(0.0) <= LARGEST_SPEARMAN:
        return 0.0
    high = 1.0
    while correlation(high) > LARGEST_SPEARMAN and high < 1e6:
        high *= 2
    low = 0.0
    for _ in range(40):  # The correlation falls as the penalty grows.
        middle = (low + high) / 2
        low, high = (middle, high) if correlation(middle) > LARGEST_SPEARMAN else (low, middle)
    return high

"""What the tests of the objective share: configs, a few pairs of token ids, and one optimizer step written out."""

import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from scipy.optimize import minimize_scalar

from drdpo.config.training import TrainConfig
from drdpo.training.data import Pair, form_batch
from drdpo.training.losses import method_of
from drdpo.training.objective import objective, survey
from drdpo.training.policy import Policy, load_policy
from drdpo.training.run import Run

REFERENCE_M2 = torch.tensor([[-20.0, -45.0], [-40.0, -9.0], [-15.0, -14.0], [-60.0, -30.0]], dtype=torch.float64)
"""Log-probabilities of `four_pairs` under a reference, chosen and rejected."""


def config_of(**flags: Any) -> TrainConfig:
    """A config in float32 without folders, with beta 0.5."""
    defaults = {"model_path": "-", "dataset_path": "-", "save_path": "-", "beta": 0.5, "dtype": "float32"}
    return TrainConfig(**defaults | flags)


def wdpo_config(**flags: Any) -> TrainConfig:
    return config_of(**{"wdpo_rho": 0.1, **flags})


def four_pairs() -> list[Pair]:
    """Pairs of unequal lengths; two have an answer or a prompt of one token."""
    numbers = random.Random(2)

    def ids(length: int) -> list[int]:
        return [numbers.randrange(3, 500) for _ in range(length)]

    return with_facts([Pair(ids(p), ids(c), ids(r)) for p, c, r in ((4, 3, 6), (1, 5, 1), (15, 2, 2), (3, 7, 4))])


def facts_of(number: int, chosen: int, rejected: int) -> dict[str, float]:
    """Columns of the pair with this number whose answers have these tokens: all that the methods read."""
    return {
        "chosen_tokens": float(chosen), "rejected_tokens": float(rejected), "chosen_score": 0.25 * number,
        "rejected_score": 1.5 - 0.125 * number, "trust": 0.5 + number % 3,
        "group": float([0, 1, 1, 0, 2, 0, 2, 1][number % 8]),
    }  # fmt: skip


def shifted_reference(reference_M2: torch.Tensor) -> torch.Tensor:
    """[M, 2] reference log-probs with which no two pairs have equal margins, not even at the first step."""
    numbers = torch.arange(reference_M2.numel(), dtype=reference_M2.dtype).view_as(reference_M2)
    return reference_M2 + 2 * torch.sin(numbers)


def with_facts(pairs: list[Pair]) -> list[Pair]:
    return [
        replace(pair, columns=facts_of(number, len(pair.chosen), len(pair.rejected))) for number, pair in enumerate(pairs)
    ]


def random_pairs(seed: int, count: int) -> list[list[list[int]]]:
    """[prompt, chosen, rejected] of token ids, as the workers on several ranks read them from a file."""
    numbers = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [numbers.randrange(3, 400) for _ in range(numbers.randint(low, high))]

    return [[ids(2, 6), ids(1, 7), ids(1, 7)] for _ in range(count)]


def policy_of(path: Path, config: TrainConfig, checkpointing: bool = False, dtype: torch.dtype = torch.float64) -> Policy:
    policy = load_policy(str(path), torch.float32, config.attention, checkpointing, config.second_derivative)
    return policy.to(dtype).train()


def step(policy: Policy, pairs: list[Pair], split: list[list[int]], config: TrainConfig, scales: list[float] | None = None):
    """The objective's value and the gradient of all parameters of one optimizer step in some micro-batches."""
    scales = [1.0] * len(split) if scales is None else scales
    dtype = next(policy.parameters()).dtype
    parts = [(form_batch(pairs, rows, config.packing), REFERENCE_M2[rows].to(dtype)) for rows in split]
    population = survey(policy, parts, method_of(config))
    found = [
        objective(policy, batch, reference, method_of(config), population, scale, len(reference) / len(pairs))
        for (batch, reference), scale in zip(parts, scales, strict=True)
    ]
    total = sum(part.total for part in found)
    return total.item(), gradient_of(policy, total).double(), found


def pairs_of_lengths(*lengths: tuple[int, int, int], seed: int = 1, vocabulary: int = 96) -> list[Pair]:
    """Pairs of random token ids."""
    numbers = torch.Generator().manual_seed(seed)
    return [Pair(*(torch.randint(3, vocabulary, (n,), generator=numbers).tolist() for n in row)) for row in lengths]


def run_of(config: TrainConfig, train: list[Pair], test: list[Pair] | None = None, cut: int = 0) -> Run:
    """What the preflight reads of a run; `cut` answers were cut."""
    counts = {"train": {"answer cut": cut}}
    return Run(config, method_of(config), Path("-"), SimpleNamespace(pad_token_id=0), train, test or train, counts, {})


def gradient_of(policy: Policy, total: torch.Tensor) -> torch.Tensor:
    """For all trained parameters, in one vector."""
    found = torch.autograd.grad(total, [p for p in policy.parameters() if p.requires_grad])
    return torch.cat([gradient.flatten() for gradient in found])


def answer_logprobs(model, embeds: torch.Tensor, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Plain form: whole sequence, full logits; the sum over the answer's tokens."""
    logits = model(inputs_embeds=embeds[None]).logits[0, :-1].log_softmax(dim=-1)
    return logits.gather(1, ids[1:, None]).squeeze(1)[prompt - 1 :].sum()


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative distance of two vectors."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def worst_mean(name: str, losses: torch.Tensor, strength: float) -> torch.Tensor:
    """The largest mean loss that --method=NAME:STRENGTH allows, by its dual or by its definition, with a graph."""
    losses = losses.double()
    ordered = losses.sort().values
    if name == "chi2":

        def upper(eta: float) -> torch.Tensor:
            return eta + math.sqrt(1 + 2 * strength) * (losses - eta).clamp(min=0).square().mean().sqrt()

        bounds = (losses.min().item() - 100, losses.max().item())
        options = {"xatol": 1e-12}
        return upper(minimize_scalar(lambda eta: upper(eta).item(), bounds=bounds, method="bounded", options=options).x)
    if name == "cvar":  # the minimum over eta lies at one of the losses
        return torch.stack([eta + (losses - eta).clamp(min=0).mean() / strength for eta in losses]).min()
    left, total = strength, ordered[-1] * strength  # tv: so much moves from the smallest losses to the largest
    for loss in ordered:
        taken = min(left, 1 / len(losses))
        total, left = total + (1 / len(losses) - taken) * loss, left - taken
    return total

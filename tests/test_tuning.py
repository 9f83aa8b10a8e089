"""docs/tuning.md: its tables are computed, its numbers and claims hold for the trainer's own losses and weights."""

import math

import pytest
import torch
import tuning_numbers
from harness import ROOT

from drdpo.training.losses import drdpo_weights, kl_weights, pair_losses

PAGE = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["margins", "kldpo", "sample sizes"])
def test_the_tables_are_computed(name):
    assert tuning_numbers.tables()[name] in PAGE, "run: PYTHONPATH=src python experiments/tuning_numbers.py"


def test_numbers_in_the_text_hold():
    def loss(margin: float) -> float:
        return float(pair_losses(torch.tensor([margin], dtype=torch.float64), 0.01))

    assert loss(0) - loss(10) == pytest.approx(0.049, abs=5e-4)
    # Two or so nats behind the mean reach the cap at tau 0.005.
    assert (loss(-2.31) - loss(0)) / 0.005 == pytest.approx(math.log(10), rel=0.01)


def minimum(weights, losses_of, chance: float) -> float:
    """beta h where the weighted pull of the label and of its opposite cancel, by bisection."""
    low, high = -30.0, 30.0
    for _ in range(200):
        middle = (low + high) / 2
        losses = torch.tensor([losses_of(middle), losses_of(-middle)], dtype=torch.float64)
        w = weights(losses, losses)
        right, wrong = 1 / (1 + math.exp(middle)), 1 / (1 + math.exp(-middle))
        pull = chance * float(w[0]) * right - (1 - chance) * float(w[1]) * wrong
        low, high = (middle, high) if pull > 0 else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize("chance", [0.6, 0.9])
def test_where_a_temperature_puts_the_margin(chance):
    odds = math.log(chance / (1 - chance))

    def dpo(u: float) -> float:
        return math.log1p(math.exp(-u))

    for tau in (0.5, 2.0):
        found = minimum(lambda b, p, tau=tau: kl_weights(b, p, tau, cap=math.inf), dpo, chance)
        assert found == pytest.approx(tau / (1 + tau) * odds)
    assert minimum(lambda b, p: drdpo_weights(b, p, 3.0), dpo, chance) == pytest.approx(1.5 * odds)
    assert minimum(lambda b, p: drdpo_weights(b, p, 1.0), dpo, chance) > 29, "no finite margin"


def test_sample_sizes_are_those_of_a_normal_distribution():
    # E[w]^2 / E[w^2] of w = exp(x), x normal with deviation s: exp(-s^2).
    for ratio in (0.3, 1.0):
        losses = tuning_numbers.normal_losses(ratio)
        weights = kl_weights(losses, losses, 1.0, normalize=True)
        share = float(weights.sum() ** 2 / (weights**2).sum()) / len(losses)
        assert share == pytest.approx(math.exp(-(ratio**2)), rel=0.01)

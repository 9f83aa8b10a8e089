"""The log-linear toy: formulas as in the trainer, correct minimisers, and a measurement that finds a known rate."""

import json
import math
import sys

import numpy as np
import pytest
import theory_check
import torch
import toy_estimators as toy
from harness import ROOT
from torch.func import grad_and_value

from drdpo.training import losses


@pytest.fixture(scope="module")
def sample() -> tuple[np.ndarray, np.ndarray]:
    """Features of the chosen and the rejected answers of 7 pairs, [7, 4] each."""
    numbers = np.random.default_rng(3)
    return numbers.normal(size=(7, 4)), numbers.normal(size=(7, 4))


def trainers_value(name: str, chosen: np.ndarray, rejected: np.ndarray, theta: torch.Tensor) -> torch.Tensor:
    """The same objective from drdpo.training.losses; the embeddings are the answers' features, one position each."""
    embeds_STD = torch.tensor(np.concatenate([chosen, rejected]))[:, None].requires_grad_()
    scores_S = (embeds_STD @ theta)[:, 0]
    losses_B = losses.pair_losses(scores_S[:7] - scores_S[7:], toy.BETA)
    if not name.startswith("WDPO"):
        weights_B = losses.kl_weights(losses_B, losses_B, toy.TAU, normalize=True) if name != "DPO" else 1
        return (weights_B * losses_B).mean()
    penalty = losses.gradient_penalty(losses_B, embeds_STD, create_graph=True).mean()
    return losses_B.mean() + toy.RHO * (penalty if name == "WDPO, squared" else penalty.sqrt())


@pytest.mark.parametrize("name", ["DPO", "KLDPO, fixed tau", "WDPO, squared", "WDPO, root"])
def test_formulas_are_the_trainers(name, sample):
    chosen, rejected = sample
    theta = torch.tensor([0.4, -1.1, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    theirs = trainers_value(name, chosen, rejected, theta)
    (slope,) = torch.autograd.grad(theirs, theta)
    uniform = torch.full((7,), 1 / 7, dtype=torch.float64)
    gradient, value = grad_and_value(toy.ESTIMATORS[name], 1)(uniform, theta.detach(), torch.tensor(chosen - rejected))
    assert gradient.tolist() == pytest.approx(slope.tolist(), abs=1e-12)
    if name != "KLDPO, fixed tau":  # its weights are constants: only the gradient matches
        assert value.item() == pytest.approx(theirs.item(), abs=1e-12)


def test_the_wasserstein_ball_by_hand():
    # One pair, theta = z = (2 ln 3 / |z|^2 scale): beta h = ln 3, so l = ln(4/3).
    z = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    value = toy.ESTIMATORS["Wasserstein-1 ball"](torch.ones(1), z[0] * math.log(3) / toy.BETA, z)
    assert value.item() == pytest.approx(math.log(4 / 3) + toy.RHO * math.sqrt(2) * math.log(3))


def test_kl_ball_is_the_worst_distribution_of_the_ball(sample):
    """The dual's minimum is an upper bound of the mean loss over random Q in the ball, and nearly reached."""
    chosen, rejected = sample
    theta, uniform = torch.tensor([0.4, -1.1, 0.3, 2.0]).double(), torch.full((7,), 1 / 7, dtype=torch.float64)
    features = torch.tensor(chosen - rejected)
    losses_A = losses.pair_losses(features @ theta, toy.BETA).numpy()
    points = (torch.cat([theta, log_lambda[None]]) for log_lambda in torch.linspace(-3, 3, 4001).double())
    worst = min(toy.kl_ball(uniform, point, features).item() for point in points)
    numbers, largest = np.random.default_rng(0), 0.0
    for _ in range(4000):
        q = numbers.dirichlet(np.full(7, 30.0))
        if (q * np.log(7 * q)).sum() <= toy.KL_RADIUS:
            largest = max(largest, float(q @ losses_A))
    assert losses_A.mean() < largest <= worst + 1e-9
    assert worst - largest < 0.3 * (worst - losses_A.mean()), "the ball is nearly filled"


def test_unclamped_code_weights_have_the_same_answer_as_algorithm_2():
    population = toy.draw_population(0)
    (theta_D,) = toy.minimise(toy.kldpo, population.shares_A[None], toy.start_of(toy.kldpo, 1), population.features_AD)
    margins_A, shares_A = torch.tensor(population.features_AD @ theta_D), torch.tensor(population.shares_A)
    losses_A, s_A = losses.pair_losses(margins_A, toy.BETA), torch.sigmoid(-toy.BETA * margins_A)
    # kl_weights takes the population's plain mean; shift the losses so that it is the weighted one.
    mean = (shares_A * losses_A).sum()
    weights_A = losses.kl_weights(losses_A, mean[None], toy.TAU, cap=math.inf)
    gradient_D = (shares_A * weights_A * s_A) @ torch.tensor(population.features_AD)
    assert gradient_D.abs().max() < 1e-8
    plain_D = (shares_A * s_A) @ torch.tensor(population.features_AD)
    assert plain_D.abs().max() > 1e-2, "it is not DPO's answer"


def test_exponents_of_known_rates():
    sizes = np.array(theory_check.SIZES, dtype=float)
    errors_PNR = np.stack([np.repeat(3 * sizes[:, None] ** rate, 2, axis=1) for rate in (-0.25, -0.5)])
    assert theory_check.exponents(errors_PNR).tolist() == pytest.approx([-0.25, -0.5])


def test_the_delta_method_by_hand():
    """DPO and one pair z = 1 per parameter, chosen with probability 3/4: n Var(theta) = 1 / (beta^2 p (1 - p) share)."""
    features = np.concatenate([np.eye(4), -np.eye(4)])
    population = toy.Population(features, np.array([3, 3, 3, 3, 1, 1, 1, 1]) / 16)
    (target_D,) = toy.minimise(toy.dpo, population.shares_A[None], toy.start_of(toy.dpo, 1), features)
    assert target_D.tolist() == pytest.approx([math.log(3) / toy.BETA] * 4)
    by_hand = math.sqrt(4 / (toy.BETA**2 * (3 / 16) / 4))
    assert toy.asymptotic_rms(toy.dpo, population, target_D) == pytest.approx(by_hand, rel=1e-5)


def test_the_command(forks, tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "theory_check.py"), f"--output={tmp_path / 'a b'}",
               "--populations=2", "--replicates=30"]  # fmt: skip
    done = forks.run(command)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "a b.json").read_text())
    assert done.stdout.strip() == theory_check.table(written["estimators"])
    assert (tmp_path / "a b.png").read_bytes()[:4] == b"\x89PNG"
    for row in written["estimators"].values():
        assert row["exponent_interval"][0] - 0.03 < -0.5 < row["exponent_interval"][1] + 0.03
        assert row["ratio"] == pytest.approx(1, abs=0.25)
    refused = forks.run([*command[:2], "--replicates=1"])
    assert refused.returncode == 2 and "at least 2" in refused.stderr


def test_the_page_shows_what_was_measured():
    stored = json.loads((ROOT / "docs" / "theory_check.json").read_text())
    page = (ROOT / "docs" / "theory_check.md").read_text()
    assert theory_check.table(stored["estimators"]) in page
    settings = stored["settings"]
    for name, value in (("beta", toy.BETA), ("tau", toy.TAU), ("kl_radius", toy.KL_RADIUS), ("rho", toy.RHO)):
        assert settings[name] == value, "run experiments/theory_check.py again"
    assert settings["sizes"] == list(theory_check.SIZES)
    smallest = [row["ratios"][0] - 1 for row in stored["estimators"].values()]
    assert f"at n = 512 the errors are {min(smallest):.0%} to {max(smallest):.0%} above the prediction" in page
    assert all(abs(row["ratios"][-1] - 1) < 0.03 for row in stored["estimators"].values()), "predicted within 3%"

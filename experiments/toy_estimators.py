"""DPO's robust estimators on a log-linear policy, solved to machine precision by torch's derivatives, for theory_check.py.

The toy: pi(y|x) is proportional to ref(y|x) exp(<theta, psi(x, y)>), so that a pair's margin is h = <theta, z> with
z = psi(chosen) - psi(rejected). A population is a finite set of pairs, each labelled by a mixture of two kinds of
annotators; its expectations are finite sums. A sample of n labelled pairs is a vector of shares.

tests/test_theory_check.py checks that the formulas are those of drdpo.training.losses.

Shape suffixes: A atoms (signed pairs) of the population, D parameters, R problems solved at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, hessian, jacrev, vmap

BETA, TAU, KL_RADIUS, RHO = 0.5, 0.5, 0.02, 0.1
WIDTH, PAIRS = 4, 32
Array = np.ndarray
Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(shares_A, parameters_D, features_AD) -> the objective."""


def losses_of(theta_D: Tensor, features_AD: Tensor) -> Tensor:
    """[A] -log sigmoid(beta h)."""
    scaled_A = BETA * features_AD @ theta_D
    return torch.logaddexp(torch.zeros_like(scaled_A), -scaled_A)


def dpo(shares_A: Tensor, theta_D: Tensor, features_AD: Tensor) -> Tensor:
    """Mean loss."""
    return (shares_A * losses_of(theta_D, features_AD)).sum()


def kldpo(shares_A: Tensor, theta_D: Tensor, features_AD: Tensor, tau: float | Tensor = TAU) -> Tensor:
    """tau log mean exp(l / tau), whose gradient is that of Algorithm 2's weights."""
    return tau * torch.logsumexp(shares_A.log() + losses_of(theta_D, features_AD) / tau, 0)


def kl_ball(shares_A: Tensor, parameters_D: Tensor, features_AD: Tensor) -> Tensor:
    """Largest mean loss over all Q with KL(Q || P) <= r, by its dual.

    That is the minimum of lambda (r + log mean exp(l / lambda)) over lambda > 0. The last parameter is log lambda, which is
    minimised together with theta.
    """
    lam = parameters_D[-1].exp()
    return lam * KL_RADIUS + kldpo(shares_A, parameters_D[:-1], features_AD, lam)


def squared_norm(shares_A: Tensor, theta_D: Tensor, features_AD: Tensor) -> Tensor:
    """Mean |grad l|^2 over the features of both answers: dl/dpsi(chosen) = -beta s theta = -dl/dpsi(rejected)."""
    s_A = torch.sigmoid(-BETA * features_AD @ theta_D)
    return 2 * BETA**2 * (shares_A * s_A.square()).sum() * theta_D.square().sum()


def wdpo_squared(shares_A: Tensor, theta_D: Tensor, features_AD: Tensor) -> Tensor:
    """Mean of l + rho |grad l|^2, the authors' code and our default."""
    return dpo(shares_A, theta_D, features_AD) + RHO * squared_norm(shares_A, theta_D, features_AD)


def wdpo_root(shares_A: Tensor, theta_D: Tensor, features_AD: Tensor) -> Tensor:
    """Mean l + rho sqrt(mean |grad l|^2), Algorithm 1."""
    return dpo(shares_A, theta_D, features_AD) + RHO * squared_norm(shares_A, theta_D, features_AD).sqrt()


def w1_ball(shares_A: Tensor, theta_D: Tensor, features_AD: Tensor) -> Tensor:
    """Largest mean loss over all Q with W_1(Q, P) <= rho, the labels fixed: mean l + rho Lip(l) (1509.09259, remark 1).

    Lip(l) = sqrt(2) beta |theta| in the Euclidean norm of (psi(chosen), psi(rejected)).
    """
    return dpo(shares_A, theta_D, features_AD) + RHO * math.sqrt(2) * BETA * theta_D.norm()


ESTIMATORS: dict[str, Estimator] = {
    "DPO": dpo,
    "KLDPO, fixed tau": kldpo,
    "KL ball": kl_ball,
    "WDPO, squared": wdpo_squared,
    "WDPO, root": wdpo_root,
    "Wasserstein-1 ball": w1_ball,
}


@dataclass(frozen=True)
class Population:
    """Every pair twice, once with each answer chosen, and their probabilities."""

    features_AD: Array
    shares_A: Array


def draw_population(seed: int) -> Population:
    """Normal features; labels from a 70:30 mixture of two Bradley-Terry models, which no policy of the class fits."""
    numbers = np.random.default_rng([seed, 0])
    pairs_KD = numbers.normal(size=(PAIRS, WIDTH))
    likes_2D = 2 * numbers.normal(size=WIDTH) + numbers.normal(size=(2, WIDTH))
    first_K, second_K = 1 / (1 + np.exp(-BETA * likes_2D @ pairs_KD.T))
    chosen_K = 0.7 * first_K + 0.3 * second_K
    return Population(np.concatenate([pairs_KD, -pairs_KD]), np.concatenate([chosen_K, 1 - chosen_K]) / PAIRS)


def minimise(estimator: Estimator, shares_RA: Array, start_RD: Array, features_AD: Array) -> Array:
    """Damped Newton on R problems at once.

    Raises:
        ArithmeticError: a gradient stays above 1e-9.
    """
    value, slope, curvature = (
        vmap(part, (0, 0, None)) for part in (estimator, grad_and_value(estimator, 1), hessian(estimator, 1))
    )
    shares, point_RD, features = (torch.tensor(part) for part in (shares_RA, start_RD, features_AD))
    for _ in range(60):
        gradient_RD, value_R = slope(shares, point_RD, features)
        if gradient_RD.abs().max() < 1e-9:
            return point_RD.numpy()
        curvature_RDD = curvature(shares, point_RD, features)
        lowest_R = torch.linalg.eigvalsh(curvature_RDD)[:, 0]
        shift_R = torch.where(lowest_R < 1e-6, 1e-3 - lowest_R, 0)
        curvature_RDD += shift_R[:, None, None] * torch.eye(point_RD.shape[1])
        move_RD = torch.linalg.solve(curvature_RDD, gradient_RD)
        length_R1 = torch.ones(len(point_RD), 1, dtype=point_RD.dtype)
        for _ in range(40):
            worse_R = value(shares, point_RD - length_R1 * move_RD, features) > value_R + 1e-13
            if not worse_R.any():
                break
            length_R1[worse_R] /= 2
        point_RD = point_RD - length_R1 * move_RD
    raise ArithmeticError(f"{estimator.__name__}: the largest gradient is {gradient_RD.abs().max():.1e}")


def start_of(estimator: Estimator, replicates: int) -> Array:
    """Small but not zero, where the root penalties have no gradient; lambda starts at tau."""
    theta_RD = np.full((replicates, WIDTH), 0.1)
    return np.column_stack([theta_RD, np.full(replicates, math.log(TAU))]) if estimator is kl_ball else theta_RD


def asymptotic_rms(estimator: Estimator, population: Population, target_D: Array) -> float:
    """c of the delta method: sqrt(n) times the root mean square error goes to c = sqrt tr(J Sigma J').

    J = -H^-1 d gradient / d shares at the target, Sigma = diag(p) - p p' the multinomial covariance.
    """
    given = p_A, *_ = [torch.tensor(part) for part in (population.shares_A, target_D, population.features_AD)]
    slopes_DA, hessian_DD = jacrev(grad(estimator, 1))(*given), hessian(estimator, 1)(*given)
    influence_DA = torch.linalg.solve(hessian_DD, slopes_DA)[:WIDTH]
    return float(((influence_DA.square() @ p_A).sum() - (influence_DA @ p_A).square().sum()).sqrt())

"""DPO's robust estimators on a log-linear policy, solved to machine precision with numpy, for theory_check.py.

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

BETA, TAU, KL_RADIUS, RHO = 0.5, 0.5, 0.02, 0.1
WIDTH, PAIRS = 4, 32
Array = np.ndarray
Estimator = Callable[[Array, Array, Array], tuple[Array, Array]]
"""(shares_RA, parameters_RD, features_AD) -> value_R, gradient_RD."""


def pair_terms(theta_RD: Array, features_AD: Array) -> tuple[Array, Array]:
    """The DPO loss l = -log sigmoid(beta h) of every atom and s = sigmoid(-beta h), both [R, A]."""
    scaled_RA = BETA * theta_RD @ features_AD.T
    losses_RA = np.logaddexp(0, -scaled_RA)
    return losses_RA, np.exp(-np.logaddexp(0, scaled_RA))


def dpo(shares_RA: Array, theta_RD: Array, features_AD: Array) -> tuple[Array, Array]:
    """Mean loss."""
    losses_RA, s_RA = pair_terms(theta_RD, features_AD)
    return (shares_RA * losses_RA).sum(1), -BETA * (shares_RA * s_RA) @ features_AD


def kldpo(shares_RA: Array, theta_RD: Array, features_AD: Array) -> tuple[Array, Array]:
    """tau log mean exp(l / tau), whose gradient is that of Algorithm 2's weights."""
    losses_RA, s_RA = pair_terms(theta_RD, features_AD)
    soft_R, weights_RA = _tilt(shares_RA, losses_RA, np.full((len(theta_RD), 1), TAU))
    return soft_R, -BETA * (weights_RA * s_RA) @ features_AD


def kl_ball(shares_RA: Array, parameters_RD: Array, features_AD: Array) -> tuple[Array, Array]:
    """Largest mean loss over all Q with KL(Q || P) <= r, by its dual.

    That is the minimum of lambda (r + log mean exp(l / lambda)) over lambda > 0. The last parameter is log lambda, which is
    minimised together with theta.
    """
    theta_RD, lambda_R1 = parameters_RD[:, :-1], np.exp(parameters_RD[:, -1:])
    losses_RA, s_RA = pair_terms(theta_RD, features_AD)
    soft_R, weights_RA = _tilt(shares_RA, losses_RA, lambda_R1)
    value_R = lambda_R1[:, 0] * KL_RADIUS + soft_R
    # d/d log lambda = lambda (r + log mean exp) - E_Q l
    slope_R = value_R - (weights_RA * losses_RA).sum(1)
    return value_R, np.column_stack([-BETA * (weights_RA * s_RA) @ features_AD, slope_R])


def _tilt(shares_RA: Array, losses_RA: Array, temperature_R1: Array) -> tuple[Array, Array]:
    """temperature log mean exp(l / temperature), and the distribution Q with dQ/dP proportional to exp(l / temperature)."""
    top_R1 = losses_RA.max(1, keepdims=True)
    weights_RA = shares_RA * np.exp((losses_RA - top_R1) / temperature_R1)
    total_R1 = weights_RA.sum(1, keepdims=True)
    return (top_R1 + temperature_R1 * np.log(total_R1))[:, 0], weights_RA / total_R1


def squared_norm(shares_RA: Array, theta_RD: Array, features_AD: Array) -> tuple[Array, Array]:
    """Mean |grad l|^2 over the features of both answers, 2 beta^2 s^2 |theta|^2, and its gradient.

    dl/dpsi(chosen) = -beta s theta and dl/dpsi(rejected) = beta s theta, hence the 2.
    """
    _, s_RA = pair_terms(theta_RD, features_AD)
    size_R1 = (theta_RD**2).sum(1, keepdims=True)
    mean_R1 = (shares_RA * s_RA**2).sum(1, keepdims=True)
    through_s = -2 * BETA * (shares_RA * s_RA**2 * (1 - s_RA)) @ features_AD
    return (2 * BETA**2 * mean_R1 * size_R1)[:, 0], 2 * BETA**2 * (2 * mean_R1 * theta_RD + size_R1 * through_s)


def wdpo_squared(shares_RA: Array, theta_RD: Array, features_AD: Array) -> tuple[Array, Array]:
    """Mean of l + rho |grad l|^2, the authors' code and our default."""
    value_R, gradient_RD = dpo(shares_RA, theta_RD, features_AD)
    penalty_R, slope_RD = squared_norm(shares_RA, theta_RD, features_AD)
    return value_R + RHO * penalty_R, gradient_RD + RHO * slope_RD


def wdpo_root(shares_RA: Array, theta_RD: Array, features_AD: Array) -> tuple[Array, Array]:
    """Mean l + rho sqrt(mean |grad l|^2), Algorithm 1."""
    value_R, gradient_RD = dpo(shares_RA, theta_RD, features_AD)
    penalty_R, slope_RD = squared_norm(shares_RA, theta_RD, features_AD)
    return value_R + RHO * np.sqrt(penalty_R), gradient_RD + RHO * slope_RD / (2 * np.sqrt(penalty_R))[:, None]


def w1_ball(shares_RA: Array, theta_RD: Array, features_AD: Array) -> tuple[Array, Array]:
    """Largest mean loss over all Q with W_1(Q, P) <= rho, the labels fixed: mean l + rho Lip(l) (1509.09259, remark 1).

    Lip(l) = sqrt(2) beta |theta| in the Euclidean norm of (psi(chosen), psi(rejected)).
    """
    value_R, gradient_RD = dpo(shares_RA, theta_RD, features_AD)
    size_R1 = np.linalg.norm(theta_RD, axis=1, keepdims=True)
    factor = RHO * math.sqrt(2) * BETA
    return value_R + factor * size_R1[:, 0], gradient_RD + factor * theta_RD / size_R1


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
    """Damped Newton on R problems at once; Hessians by central differences of the gradient.

    Raises:
        ArithmeticError: a gradient stays above 1e-9.
    """
    point_RD = start_RD.copy()
    for _ in range(60):
        value_R, gradient_RD = estimator(shares_RA, point_RD, features_AD)
        if np.abs(gradient_RD).max() < 1e-9:
            return point_RD
        curvature_RDD = _hessian(estimator, shares_RA, point_RD, features_AD)
        lowest_R = np.linalg.eigvalsh(curvature_RDD)[:, 0]
        shift_R = np.where(lowest_R < 1e-6, 1e-3 - lowest_R, 0)
        curvature_RDD += shift_R[:, None, None] * np.eye(point_RD.shape[1])
        move_RD = np.linalg.solve(curvature_RDD, gradient_RD[:, :, None])[:, :, 0]
        length_R1 = np.ones((len(point_RD), 1))
        for _ in range(40):
            worse_R = estimator(shares_RA, point_RD - length_R1 * move_RD, features_AD)[0] > value_R + 1e-13
            if not worse_R.any():
                break
            length_R1[worse_R] /= 2
        point_RD -= length_R1 * move_RD
    raise ArithmeticError(f"{estimator.__name__}: the largest gradient is {np.abs(gradient_RD).max():.1e}")


def _hessian(estimator: Estimator, shares_RA: Array, point_RD: Array, features_AD: Array) -> Array:
    step, columns = 1e-5, []
    for direction_D in np.eye(point_RD.shape[1]):
        up, down = (estimator(shares_RA, point_RD + sign * step * direction_D, features_AD)[1] for sign in (1, -1))
        columns.append((up - down) / (2 * step))
    hessian_RDD = np.stack(columns, axis=2)
    return (hessian_RDD + hessian_RDD.transpose(0, 2, 1)) / 2


def start_of(estimator: Estimator, replicates: int) -> Array:
    """Small but not zero, where the root penalties have no gradient; lambda starts at tau."""
    theta_RD = np.full((replicates, WIDTH), 0.1)
    return np.column_stack([theta_RD, np.full(replicates, math.log(TAU))]) if estimator is kl_ball else theta_RD


def asymptotic_rms(estimator: Estimator, population: Population, target_D: Array) -> float:
    """c of the delta method: sqrt(n) times the root mean square error goes to c = sqrt tr(J Sigma J').

    J = -H^-1 d gradient / d shares at the target, Sigma = diag(p) - p p' the multinomial covariance.
    """
    p_A, step = population.shares_A, 1e-7
    point_1D = target_D[None]
    ups, downs = (
        estimator(p_A + sign * step * np.eye(len(p_A)), np.repeat(point_1D, len(p_A), 0), population.features_AD)[1]
        for sign in (1, -1)
    )
    slopes_DA = ((ups - downs) / (2 * step)).T
    hessian_DD = _hessian(estimator, p_A[None], point_1D, population.features_AD)[0]
    influence_DA = np.linalg.solve(hessian_DD, slopes_DA)[:WIDTH]
    covariance_DD = (influence_DA * p_A) @ influence_DA.T - np.outer(influence_DA @ p_A, influence_DA @ p_A)
    return float(np.sqrt(np.trace(covariance_DD)))

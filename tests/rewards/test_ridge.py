"""Ridge regression against its closed form, and the choice of what stage 1 reads."""

import numpy as np
import pytest

from drdpo.rewards.baselines import Claim, baselines, claim, compare, folded_baselines
from drdpo.rewards.choice import choose
from drdpo.rewards.heads import prompt_folds
from drdpo.rewards.ridge import ALPHAS, RidgeFolds, cross_fitted, fit_ridges
from drdpo.rewards.scores import Floats
from drdpo.rewards.statistics import spearman


def closed_form(x_ND: Floats, y_N: Floats, alpha: float) -> Floats:
    return np.asarray(np.linalg.solve(x_ND.T @ x_ND + alpha * np.eye(x_ND.shape[1]), x_ND.T @ y_N))


def problem(rows: int) -> tuple[Floats, Floats, np.ndarray]:
    g = np.random.default_rng(0)
    x_ND = g.normal(size=(rows, 4))
    return x_ND, x_ND @ [0.6, -0.8, 0.4, 0.2] + g.normal(size=rows), prompt_folds(np.arange(rows), 5, 0)


def best_alpha(x_ND: Floats, y_N: Floats, fold_N: np.ndarray) -> tuple[float, float]:
    errors = {}
    for alpha in ALPHAS:
        total = 0.0
        for fold in np.unique(fold_N):
            held = fold_N == fold
            total += float(((y_N[held] - x_ND[held] @ closed_form(x_ND[~held], y_N[~held], alpha)) ** 2).sum())
        errors[alpha] = total / len(y_N)
    best = min(errors, key=lambda alpha: errors[alpha])
    return best, errors[best]


def test_ridge_is_the_closed_form_without_intercept() -> None:
    x_ND, y_N, fold_N = problem(60)
    (fit,) = fit_ridges(x_ND, y_N[:, None], fold_N)
    assert (fit.alpha, fit.error) == pytest.approx(best_alpha(x_ND, y_N, fold_N))
    np.testing.assert_allclose(fit.weight_D, closed_form(x_ND, y_N, fit.alpha), rtol=1e-9)
    held = fold_N == 3
    expected_N = x_ND[held] @ closed_form(x_ND[~held], y_N[~held], fit.alpha)
    np.testing.assert_allclose(fit.held_out_N[held], expected_N, rtol=1e-9)


def test_every_label_is_fitted_on_the_rows_that_have_it() -> None:
    x_ND, y_N, fold_N = problem(90)
    labels_NK = np.stack(
        [y_N, np.where(np.arange(90) < 50, y_N, np.nan), np.where(np.arange(90) >= 50, 3 * y_N, np.nan)], axis=1
    )
    fits = fit_ridges(x_ND, labels_NK, fold_N)
    for fit, label_N, rows in zip(fits, labels_NK.T, (slice(None), slice(50), slice(50, None)), strict=True):
        (alone,) = fit_ridges(x_ND[rows], label_N[rows, None], fold_N[rows])
        np.testing.assert_allclose(fit.weight_D, alone.weight_D, rtol=1e-9)
        np.testing.assert_array_equal(fit.held_out_N[rows], alone.held_out_N)
    assert np.isnan(fits[1].held_out_N[50:]).all()


def test_cross_fitted_rewards_never_saw_the_prompt() -> None:
    x_ND, y_N, fold_N = problem(150)
    labels_NK = np.stack([y_N, np.where(np.arange(150) % 3 == 0, np.nan, y_N)], axis=1)
    rewards_NK = cross_fitted(x_ND, labels_NK, fold_N)
    for fold in range(5):
        held, fit = fold_N == fold, (fold_N != fold) & ~np.isnan(labels_NK[:, 1])
        alpha, _ = best_alpha(x_ND[fit], labels_NK[fit, 1], fold_N[fit])  # the penalty too is chosen without the fold
        expected_N = x_ND[held] @ closed_form(x_ND[fit], labels_NK[fit, 1], alpha)
        np.testing.assert_allclose(rewards_NK[held, 1], expected_N, rtol=1e-8)
    assert not np.isnan(rewards_NK).any()


def test_the_grid_goes_on_where_the_best_penalty_is_at_its_end() -> None:
    g = np.random.default_rng(1)
    x_ND = 1000 * g.normal(size=(40, 3))
    fold_N = prompt_folds(np.arange(40), 5, 0)
    assert RidgeFolds(x_ND, fold_N).fit(g.normal(size=40)).alpha > max(ALPHAS)  # nothing to learn: shrink, far
    x_ND = 1e-4 * g.normal(size=(400, 3))
    fit = RidgeFolds(x_ND, prompt_folds(np.arange(400), 5, 0)).fit(x_ND @ [1.0, 2.0, 3.0])  # noiseless: hardly shrink
    assert fit.alpha < min(ALPHAS)
    np.testing.assert_allclose(fit.weight_D, [1, 2, 3], rtol=1e-3)


def readings(noise: dict[tuple[int, str], float]) -> tuple[dict[tuple[int, str], Floats], Floats, np.ndarray, np.ndarray]:
    """Features that tell of the label, more or less blurred; 300 answers to 150 prompts, two objectives."""
    g = np.random.default_rng(7)
    signal_ND = g.normal(size=(300, 2))
    labels_NK = signal_ND + 0.3 * g.normal(size=(300, 2))
    labels_NK[:100, 1] = np.nan
    features = {place: signal_ND + blur * g.normal(size=(300, 2)) for place, blur in noise.items()}
    prompt_N = np.arange(300) // 2
    return features, labels_NK, prompt_N, prompt_folds(prompt_N, 5, 0)


def test_the_best_reading_is_chosen() -> None:
    features, labels_NK, prompt_N, fold_N = readings(
        {(1, "last"): 2.0, (2, "last"): 1.0, (2, "mean"): 0.1, (3, "mean"): 1.0}
    )
    chosen, candidates = choose(features, labels_NK, prompt_N, fold_N, 0)
    assert chosen.place == (2, "mean")
    assert [candidate.place for candidate in candidates] == list(features)
    assert chosen.behind == chosen.standard_error == 0
    predicted_N = fit_ridges(features[2, "mean"], labels_NK, fold_N)[1].held_out_N
    error_N = predicted_N[100:] - labels_NK[100:, 1]
    assert chosen.explained_K[1] == pytest.approx(1 - (error_N**2).mean() / labels_NK[100:, 1].var())
    worst = candidates[0]
    assert worst.behind == pytest.approx(chosen.score - worst.score)
    assert 0 < worst.standard_error < worst.behind


def test_a_shallower_layer_wins_within_one_standard_error() -> None:
    blur = {(2, "last"): 2.0, (4, "last"): 0.6, (4, "mean"): 0.27, (6, "mean"): 0.3}  # the draw favours the last
    features, labels_NK, prompt_N, fold_N = readings(blur)
    chosen, candidates = choose(features, labels_NK, prompt_N, fold_N, 0)
    by_place = {candidate.place: candidate for candidate in candidates}
    assert by_place[6, "mean"].behind == 0
    assert chosen.place == (4, "mean")
    assert 0 < chosen.behind <= chosen.standard_error
    assert by_place[4, "last"].behind > by_place[4, "last"].standard_error
    assert by_place[2, "last"].behind > by_place[2, "last"].standard_error


def test_the_comparison_with_the_baselines_by_hand() -> None:
    length_N, label_N = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.1, 0.3, 0.5, 0.9])
    train = np.array([0.0, 2.0]), np.array([0.2, 0.6])  # mean 0.4; line 0.2 + 0.2 length
    found = compare("x", 5, np.array([0.1, 0.3, 0.5, 0.7]), label_N, baselines(length_N, *train))
    # Errors in rating points: (5 * 0.2)^2 / 4; 25 * (0.3^2 + 0.1^2 + 0.1^2 + 0.5^2) / 4; 25 * 4 * ... by the line.
    assert found.error == pytest.approx(0.25)
    assert found.constant_error == pytest.approx(25 * 0.36 / 4)
    assert found.length_error == pytest.approx(25 * (0.01 + 0.01 + 0.01 + 0.01) / 4)
    assert found.spearman == found.length_spearman == pytest.approx(1)
    assert not found.beats_baselines  # length orders as well
    blind = compare("x", 5, label_N, label_N, baselines(-(length_N**2) * np.array([1, -1, 1, -1]), *train))
    assert blind.beats_baselines
    masked = compare("x", 5, np.array([0.1, 9.0]), np.array([0.1, np.nan]), np.zeros((2, 2)))
    assert (masked.rows, masked.error) == (1, 0)


def test_a_lead_over_length_must_be_more_than_chance() -> None:
    g = np.random.default_rng(5)
    length_N, prompt_N = g.normal(size=200), np.arange(200) // 2
    label_N = length_N + g.normal(size=200)
    trivial_N2 = np.stack([np.full(200, label_N.mean()), length_N], axis=1)

    def made(blur: float) -> Claim:
        noise_N = np.random.default_rng(6).normal(size=200)
        return claim("x", 5, 0.7 * (label_N + blur * noise_N), label_N, trivial_N2, prompt_N, 0)

    clear, chance = made(0.3), made(1.1)
    assert clear.holds
    assert clear.lead == pytest.approx(clear.against.spearman - spearman(length_N, label_N))
    assert chance.against.beats_baselines  # but by less than two standard errors
    assert 0 < chance.lead < 2 * chance.standard_error
    assert not chance.holds
    assert not made(3.0).holds


def test_folded_baselines_leave_their_fold_out() -> None:
    g = np.random.default_rng(3)
    length_N, label_N, fold_N = g.normal(size=30), g.normal(size=30), np.arange(30) % 3
    label_N[4] = np.nan
    made_N2 = folded_baselines(length_N, label_N, fold_N)
    rest = (fold_N != 1) & ~np.isnan(label_N)
    slope, intercept = np.polyfit(length_N[rest], label_N[rest], 1)
    np.testing.assert_allclose(made_N2[1], [label_N[rest].mean(), slope * length_N[1] + intercept])

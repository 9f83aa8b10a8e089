"""Intervals over prompts and seeds: by hand, laws, simulated coverage, and equality with a plain bootstrap."""

import numpy as np
import pytest
from scipy.special import stdtrit

from drdpo.evaluation.statistics import Estimate, Observations, estimate, resample


def bootstrap_means(values_PK, draws, seed):
    """Means over P of K columns of one run with one seed."""
    tables = {column: Observations(values_PK[:, column], ()) for column in range(values_PK.shape[1])}
    found, layout = resample(tables, {}, draws, seed)
    return [estimate(means, layout) for means in found.values()]


def test_two_prompts_by_hand_and_one_has_no_interval():
    # Draws of two from {0, 1} have mean 0, 1/2 or 1 with chance 1/4, 1/2, 1/4: the 95% interval is [0, 1].
    assert bootstrap_means(np.array([[0.0], [1.0]]), draws=1000, seed=0) == [Estimate(0.5, 0.0, 1.0)]
    assert bootstrap_means(np.array([[3.0]]), draws=1000, seed=0) == [Estimate(3.0, None, None)]


def test_interval_equals_a_plain_bootstrap():
    """Against resampling rows one by one with another generator: equal up to the noise of the draws."""
    generator = np.random.default_rng(1)
    values_PK = generator.gamma(2.0, size=(30, 2))
    estimates = bootstrap_means(values_PK, draws=20000, seed=5)
    rows = generator.integers(0, 30, size=(20000, 30))
    low_K, high_K = np.quantile(values_PK[rows].mean(axis=1), [0.025, 0.975], axis=0)
    for found, low, high in zip(estimates, low_K, high_K, strict=True):
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_prompts_are_drawn_as_whole_rows_by_the_seed():
    values_P = np.random.default_rng(2).normal(size=40)
    values_PK = np.stack([values_P, -values_P], axis=1)
    one, mirrored = bootstrap_means(values_PK, draws=500, seed=3)
    assert (one.low, one.high) == pytest.approx((-mirrored.high, -mirrored.low))
    assert bootstrap_means(values_PK, draws=500, seed=3) == [one, mirrored] != bootstrap_means(values_PK, 500, 4)


def test_coverage():
    """The true mean lies in about 95% of the intervals (the percentile interval of 40 normal values covers 93.6%)."""
    generator = np.random.default_rng(6)
    hits = 0
    for trial in range(400):
        (estimate,) = bootstrap_means(generator.normal(0.3, 1.0, size=(40, 1)), draws=400, seed=trial)
        hits += estimate.low <= 0.3 <= estimate.high
    assert 0.90 <= hits / 400 <= 0.97


def test_two_seeds_by_hand():
    """Every prompt has 1 for one seed and 3 for the other: prompts add nothing, seeds t(1) sqrt(2 / 2) = 12.706."""
    found, layout = resample({"x": Observations(np.array([[1.0, 3.0]] * 4), ("run",))}, {"run": 2}, 500, 1)
    assert estimate(found["x"], layout) == Estimate(2.0, pytest.approx(2 - 12.7062), pytest.approx(2 + 12.7062))
    assert estimate(found["x"], layout, (0.0, 3.0)) == Estimate(2.0, 0.0, 3.0)


def test_two_runs_of_seeds_add_their_variances_and_others_none():
    seeds_b, seeds_c = np.array([[0.0, 1.0, 2.0]] * 5), np.array([[0.0, 2.0]] * 5)
    tables = {
        "a": Observations(np.arange(5.0)[:, None], ("a",)),
        "b": Observations(seeds_b, ("b",)),
        "c": Observations(seeds_c, ("c",)),
        "wins": Observations((seeds_b[:, :, None] > seeds_c[:, None, :]) / 1.0, ("b", "c")),
    }
    found, layout = resample(tables, {"a": 1, "b": 3, "c": 2}, 4000, 3)
    # t(2) = 4.30265 with variance 1 over 3 seeds, t(1) = 12.7062 with variance 2 over 2.
    half = (4.30265**2 / 3 + 12.7062**2) ** 0.5
    assert estimate(found["b"] - found["c"], layout) == Estimate(0.0, pytest.approx(-half), pytest.approx(half))
    # Seed by seed b wins 0, 1/2, 1/2 (variance 1/12) and c loses 2/3, 0 (variance 2/9).
    half = (4.30265**2 / 36 + 12.7062**2 / 9) ** 0.5
    assert estimate(found["wins"], layout).low == pytest.approx(1 / 3 - half)
    # Five prompts, 0 to 4, and no seeds: percentiles.
    alone, layout_of_one = resample({"a": tables["a"]}, {"a": 1}, 4000, 3)
    assert estimate(found["a"], layout) == estimate(alone["a"], layout_of_one)


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_coverage_over_seeds(count, spread):
    """600 studies of 60 prompts, whose seeds differ by `spread` of the prompts' sd: 95% of the intervals hold the truth."""
    generator = np.random.default_rng([count, int(100 * spread)])
    hits, widths = 0, []
    for trial in range(600):
        noise_PS = generator.normal(size=(60, 1)) + 0.3 * generator.normal(size=(60, count))
        values_PS = 0.2 + noise_PS + spread * generator.normal(size=count)
        found, layout = resample({"x": Observations(values_PS, ("run",))}, {"run": count}, 200, trial)
        interval = estimate(found["x"], layout)
        hits += interval.low <= 0.2 <= interval.high
        widths.append(interval.high - interval.low)
    assert hits / 600 >= 0.93
    # Not by being wide: at most what both parts need for themselves.
    needed = 2 * (2.0**2 / 60 * 1.1 + stdtrit(count - 1, 0.975) ** 2 * (spread**2 + 0.0015) / count) ** 0.5
    assert np.median(widths) <= 1.1 * needed


def test_the_worst_of_several_is_taken_in_every_sample():
    tables = {"a": Observations(np.array([1.0, 3.0]), ()), "b": Observations(np.array([2.5, 2.5]), ())}
    found, layout = resample(tables, {}, 2000, 0)
    # a is 1, 2 or 3, b 2.5: the least is 1, 2 or 2.5.
    assert estimate(np.min(list(found.values()), axis=0), layout) == Estimate(2.0, 1.0, 2.5)

"""The bootstrap over prompts and seeds: intervals computed by hand, laws, and equality with a plain one."""

import numpy as np
import pytest

from drdpo.evaluation.statistics import Estimate, Observations, estimate, resample


def bootstrap_means(values_PK: np.ndarray, draws: int, seed: int) -> list[Estimate]:
    """Means over P of K columns of one run with one seed."""
    tables = {column: Observations(values_PK[:, column : column + 1], ()) for column in range(values_PK.shape[1])}
    return [estimate(means) for means in resample(tables, {}, draws, seed).values()]


def test_two_prompts_by_hand() -> None:
    # Draws of two from {0, 1} have mean 0, 1/2 or 1 with chance 1/4, 1/2, 1/4: the 95% interval is [0, 1].
    (estimate,) = bootstrap_means(np.array([[0.0], [1.0]]), draws=1000, seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.0, 1.0)


def test_one_prompt_has_no_interval() -> None:
    (estimate,) = bootstrap_means(np.array([[3.0]]), draws=1000, seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (3.0, None, None)


def test_interval_equals_a_plain_bootstrap() -> None:
    """Against resampling rows one by one with another generator: equal up to the noise of the draws."""
    generator = np.random.default_rng(1)
    values_PK = generator.gamma(2.0, size=(30, 2))
    estimates = bootstrap_means(values_PK, draws=20000, seed=5)
    rows = generator.integers(0, 30, size=(20000, 30))
    low_K, high_K = np.quantile(values_PK[rows].mean(axis=1), [0.025, 0.975], axis=0)
    for found, low, high in zip(estimates, low_K, high_K, strict=True):
        assert found.low == pytest.approx(low, abs=0.02)
        assert found.high == pytest.approx(high, abs=0.02)


def test_prompts_are_drawn_as_whole_rows() -> None:
    values_P = np.random.default_rng(2).normal(size=40)
    one, mirrored = bootstrap_means(np.stack([values_P, -values_P], axis=1), draws=500, seed=3)
    assert one.low == pytest.approx(-mirrored.high)
    assert one.high == pytest.approx(-mirrored.low)


def test_seed_decides_and_blocks_do_not_change_the_count() -> None:
    values_PK = np.random.default_rng(4).normal(size=(25, 1))
    same = [bootstrap_means(values_PK, draws=130, seed=7) for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != bootstrap_means(values_PK, draws=130, seed=8)


def test_coverage() -> None:
    """The true mean lies in about 95% of the intervals (the percentile interval of 40 normal values covers 93.6%)."""
    generator = np.random.default_rng(6)
    hits = 0
    for trial in range(400):
        (estimate,) = bootstrap_means(generator.normal(0.3, 1.0, size=(40, 1)), draws=400, seed=trial)
        assert estimate.low is not None
        assert estimate.high is not None
        hits += estimate.low <= 0.3 <= estimate.high
    assert 0.90 <= hits / 400 <= 0.97


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_constant_shift_has_zero_width(noise: float) -> None:
    generator = np.random.default_rng(8)
    base_P = generator.normal(size=50)
    shifted_P = base_P + 0.25 + noise * generator.normal(size=50)
    (estimate,) = bootstrap_means((shifted_P - base_P)[:, None], draws=500, seed=0)
    assert estimate.low is not None
    assert estimate.high is not None
    assert (estimate.high - estimate.low < 1e-12) == (noise == 0.0)


def test_a_crossed_bootstrap_equals_a_plain_one() -> None:
    """Prompts and seeds drawn one by one, with another generator: equal up to the noise of the draws."""
    generator = np.random.default_rng(0)
    values_PS = generator.normal(size=(20, 1)) + generator.normal(size=(1, 4)) + generator.normal(size=(20, 4))
    ours = resample({"x": Observations(values_PS, ("run",))}, {"run": 4}, 20000, 1)["x"]
    assert ours[0] == pytest.approx(values_PS.mean())
    plain = [
        values_PS[np.ix_(generator.integers(0, 20, 20), generator.integers(0, 4, 4))].mean() for _ in range(20000)
    ]  # fmt: skip
    assert float(ours[1:].std()) == pytest.approx(float(np.std(plain)), rel=0.03)
    low, high = np.quantile(plain, [0.025, 0.975])
    assert estimate(ours).low == pytest.approx(low, abs=0.05)
    assert estimate(ours).high == pytest.approx(high, abs=0.05)


def test_two_runs_of_seeds_draw_their_seeds_apart() -> None:
    values_PS = np.array([[0.0, 1.0]] * 5)
    found = resample({"a": Observations(values_PS, ("a",)), "b": Observations(values_PS, ("b",))}, {"a": 2, "b": 2}, 4000, 3)
    # Each mean has variance 1/8 over seed draws; apart, the difference has twice that.
    assert float((found["a"] - found["b"])[1:].var()) == pytest.approx(1 / 4, rel=0.1)


def test_the_worst_of_several_is_taken_in_every_sample() -> None:
    tables = {"a": Observations(np.array([[1.0], [3.0]]), ()), "b": Observations(np.array([[2.5], [2.5]]), ())}
    found = resample(tables, {}, 2000, 0)
    # a is 1, 2 or 3, b 2.5: the least is 1, 2 or 2.5.
    assert estimate(np.min(list(found.values()), axis=0)) == Estimate(2.0, 1.0, 2.5)

"""The picture: what is drawn where, from 3 to 20 objectives and 1 to 5 runs."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from drdpo.evaluation.runs import ANSWERS, ScoredRun
from drdpo.evaluation.spider import draw_spider, gain_limits, raw_range
from drdpo.evaluation.statistics import Estimate, compare
from drdpo.objectives import ARMORM_OBJECTIVES, GATED_SCORE


def fabricate(names: list[str], objectives: list[str], shift: float = 0.1) -> list[ScoredRun]:
    """Two completions for each of 12 prompts; every run is higher than the one before."""
    generator = np.random.default_rng(0)
    prompts = {i: [{"role": "user", "content": str(i)}] for i in range(12)}
    runs = []
    for place, name in enumerate(names):
        scores = {
            objective: 10.0**index * (generator.normal(size=(12, 2)) + shift * place)
            for index, objective in enumerate(objectives)
        }
        completions = pd.DataFrame({("scores", key): values.ravel() for key, values in scores.items()})
        completions[[("answers", key) for key in ANSWERS]] = 0.0
        completions.index = pd.MultiIndex.from_arrays([[0] * 24, np.repeat(np.arange(12), 2)])
        runs.append(ScoredRun(name, [Path("x")], prompts, completions))
    return runs


@pytest.mark.parametrize("objectives", [3, 6, 20])
@pytest.mark.parametrize("runs", [1, 2, 5])
def test_every_size_is_drawn(objectives: int, runs: int) -> None:
    names = [*ARMORM_OBJECTIVES, GATED_SCORE][:objectives]
    fabricated = fabricate(["base", "dpo", "kldpo", "wdpo", "drdpo"][:runs], names)
    files = draw_spider(compare(fabricated, names, 100, 0, []))
    # matplotlib notes every text of an svg in a comment.
    svg = files["spider.svg"].decode()
    assert svg.count("<!-- base -->") >= 1
    assert ("Gain over base" in svg) == (runs > 1)
    for name in names:
        quality = name.partition("-")[2] or name
        assert quality.replace("_", " ") in svg
    assert len(files["spider.png"]) > 10_000


def test_an_objective_without_spread_has_no_gain_axis() -> None:
    names = list(ARMORM_OBJECTIVES[:4])
    runs = fabricate(["base", "dpo"], names)
    runs[0].completions["scores", names[0]] = 1.0
    comparison = compare(runs, names, 100, 0, [])
    assert set(comparison.gains["dpo", "base"]) & set(names) == set(names[1:])
    svg = draw_spider(comparison)["spider.svg"].decode()
    assert svg.count("helpfulness") < svg.count("correctness")


def test_raw_axis_is_the_quartiles_widened_to_hold_every_mean() -> None:
    (objective,) = names = [ARMORM_OBJECTIVES[0]]
    for shift in (0.0, 3.0):
        runs = fabricate(["base", "dpo"], names, shift)
        ends = raw_range(runs, objective)
        low, high = np.quantile(np.concatenate([run.completions["scores", objective] for run in runs]), [0.25, 0.75])
        assert ends[0] <= low and ends[1] >= high
        assert all(ends[0] < run.mean(objective) < ends[1] for run in runs)


def test_raw_axis_of_equal_scores() -> None:
    runs = fabricate(["only"], [ARMORM_OBJECTIVES[0]])
    runs[0].completions["scores", ARMORM_OBJECTIVES[0]] = 5.0
    assert sum(raw_range(runs, ARMORM_OBJECTIVES[0])) / 2 == pytest.approx(5.0)


@pytest.mark.parametrize(("smallest", "largest"), [(-0.5, -0.1), (-0.2, 0.3), (0.1, 0.4), (0.0, 0.0)])
def test_negative_gains_lie_inside_the_bases_ring(smallest: float, largest: float) -> None:
    low, high = gain_limits([Estimate(smallest, None, None), Estimate(largest, None, None)])
    assert low < min(smallest, 0.0)
    assert high > max(largest, 0.0)
    assert (0.0 - low) / (high - low) > 0.15

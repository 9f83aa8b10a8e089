"""The picture: what is drawn where, from 3 to 20 objectives and 1 to 5 runs."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from drdpo.evaluation.runs import ANSWERS, ScoredRun
from drdpo.evaluation.spider import draw_spider, gain_limits, raw_spoke
from drdpo.evaluation.statistics import compare
from drdpo.objectives import ARMORM_OBJECTIVES, GATED_SCORE


def fabricate(names, objectives, shift=0.1):
    """Two completions for each of 12 prompts; every run is higher than the one before."""
    generator = np.random.default_rng(0)
    prompts = {i: [{"role": "user", "content": str(i)}] for i in range(12)}
    runs = []
    for place, name in enumerate(names):
        drawn = {key: 10.0**index * (generator.normal(size=(12, 2)) + shift * place) for index, key in enumerate(objectives)}
        means = pd.DataFrame({key: values.mean(axis=1) for key, values in drawn.items()})
        completions = pd.DataFrame({key: values.ravel() for key, values in drawn.items()})
        answers = pd.DataFrame(0.0, index=means.index, columns=list(ANSWERS))
        runs.append(ScoredRun(name, Path("x"), prompts, means, answers, completions))
    return runs


@pytest.mark.parametrize("objectives", [3, 6, 20])
@pytest.mark.parametrize("runs", [1, 2, 5])
def test_every_size_is_drawn(objectives, runs):
    names = [*ARMORM_OBJECTIVES, GATED_SCORE][:objectives]
    fabricated = fabricate(["base", "dpo", "kldpo", "wdpo", "drdpo"][:runs], names)
    files = draw_spider(fabricated, compare(fabricated, names, list(range(12)), 100, 0, [], {}))
    # matplotlib notes every text of an svg in a comment.
    svg = files["spider.svg"].decode()
    assert svg.count("<!-- base -->") >= 1
    assert ("Gain over base" in svg) == (runs > 1)
    assert all((name.partition("-")[2] or name).replace("_", " ") in svg for name in names)
    assert len(files["spider.png"]) > 10_000


def test_an_objective_without_spread_has_no_gain_axis():
    names = list(ARMORM_OBJECTIVES[:4])
    runs = fabricate(["base", "dpo"], names)
    runs[0].completions[names[0]] = runs[0].scores[names[0]] = 1.0
    comparison = compare(runs, names, list(range(12)), 100, 0, [], {})
    assert set(comparison.gains["dpo"]) == set(names[1:])
    svg = draw_spider(runs, comparison)["spider.svg"].decode()
    assert svg.count("helpfulness") < svg.count("correctness")


def test_raw_axis_is_the_quartiles_widened_to_hold_every_mean():
    (objective,) = names = [ARMORM_OBJECTIVES[0]]
    for shift in (0.0, 3.0):
        runs = fabricate(["base", "dpo"], names, shift)
        axis = raw_spoke(runs, objective)
        low, high = np.quantile(np.concatenate([run.completions[objective] for run in runs]), [0.25, 0.75])
        assert axis.low <= low < high <= axis.high
        assert all(0 < axis.place(run.mean(objective)) < 1 for run in runs)
    assert (axis.place(axis.low), axis.place(axis.high)) == (0, 1)
    runs[:] = runs[:1]  # a single run of equal scores
    runs[0].completions[objective] = runs[0].scores[objective] = 5.0
    assert raw_spoke(runs, objective).place(5.0) == pytest.approx(0.5)


@pytest.mark.parametrize(("smallest", "largest"), [(-0.5, -0.1), (-0.2, 0.3), (0.1, 0.4), (0.0, 0.0)])
def test_negative_gains_lie_inside_the_bases_ring(smallest, largest):
    low, high = gain_limits(smallest, largest)
    assert low < min(smallest, 0.0) and high > max(largest, 0.0)
    assert (0.0 - low) / (high - low) > 0.15

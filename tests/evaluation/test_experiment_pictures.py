"""The pictures of the experiments' reports: what is drawn in whose colour, and that every word is on them, apart."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from test_experiment_reports import harness_results

from drdpo.evaluation.heatmap import heatmap, shades
from drdpo.evaluation.leaderboard_runs import LeaderboardRun
from drdpo.evaluation.mixtures_report import MixtureResult
from drdpo.evaluation.published import LEADERBOARD, MIXTURES, SPOKES
from drdpo.evaluation.resampling import Figure
from drdpo.evaluation.spiders import spiders


def test_no_two_words_over_the_heat_map_touch() -> None:
    runs = [LeaderboardRun("8B", f"KLDPO tau=0.005 step {n}", Path("x"), harness_results(), {}) for n in (158, 316)]
    canvas = heatmap({"8B": runs}, {"8B": LEADERBOARD["8B"]})
    canvas.draw_without_rendering()
    assert len(canvas.axes) == 3
    for axes in canvas.axes:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
        assert boxes[-1].x1 <= canvas.bbox.x1


def test_shades_are_per_column() -> None:
    shaded = shades(np.array([[0.0, 5.0, np.nan], [1.0, 5.0, 2.0], [0.5, 5.0, 4.0]]))
    np.testing.assert_array_equal(shaded, [[0, 0, np.nan], [1, 0, 0], [0.5, 0, 1]])


def mixtures(runs: tuple[str, ...], gain: float, count: int) -> list[MixtureResult]:
    gains = {(run, name): Figure(gain, None, None) for run in runs for name in SPOKES}
    return [
        MixtureResult(name, Path("x"), list(SPOKES), list(runs), gains, mixture.published)
        for name, mixture in list(MIXTURES.items())[:count]
    ]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_word_of_the_spiders_is_on_the_picture(count: int) -> None:
    canvas = spiders(mixtures(("DPO", "KLDPO", "WDPO"), -0.3, count))
    canvas.draw_without_rendering()
    texts = [text for axes in canvas.axes for text in [*axes.texts, axes.title]] + list(canvas.legends[0].get_texts())
    assert len(texts) == count * 2 * (len(SPOKES) + 1) + 4
    for text in texts:
        box = text.get_window_extent()
        assert canvas.bbox.containsx(box.x0) and canvas.bbox.containsx(box.x1), text.get_text()
        assert canvas.bbox.containsy(box.y0) and canvas.bbox.containsy(box.y1), text.get_text()


def test_a_published_method_that_was_not_run_is_not_drawn_as_the_base() -> None:
    canvas = spiders(mixtures(("Dpo",), 0.0, 1))
    ours, theirs = canvas.axes
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == ["base (0)", "Dpo", "KLDPO", "WDPO"]
    styles = [line.get_color() for line in canvas.legends[0].get_lines()]
    assert len(set(styles)) == 4
    # One colour a method, in both panels.
    assert [line.get_color() for line in ours.lines] == styles[1:2]
    assert [line.get_color() for line in theirs.lines] == styles[1:]
    assert ours.get_ylim()[1] > 0.05, "gains of nothing stay near the centre"

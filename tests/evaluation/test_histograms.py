"""The histograms: bins that tell the truth, pictures from 1 to 40 panels with names the data chose."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drdpo.evaluation.excerpts import Reservoir
from drdpo.evaluation.histograms import Panel, Series, bin_edges, draw, draw_lengths, draw_scores, short_path
from drdpo.evaluation.kinds import COMPLETIONS, Row
from drdpo.evaluation.tally import Group, Tally
from drdpo.objectives import ARMORM_OBJECTIVES, GATED_SCORE


def counts(values: Any) -> tuple[list[int], list[float], str]:
    array = np.array(values, dtype=np.float64)
    edges, outside = bin_edges(array)
    return np.histogram(array, edges)[0].tolist(), edges.tolist(), outside


def test_few_whole_numbers_get_a_bin_each() -> None:
    assert counts([0, 0, 1, 3, 3, 3]) == ([2, 1, 0, 3], [-0.5, 0.5, 1.5, 2.5, 3.5], "")
    assert counts([7]) == ([1], [6.5, 7.5], "")


def test_many_whole_numbers_get_equal_bins_of_whole_numbers_that_begin_at_zero() -> None:
    found, edges, outside = counts(range(-30, 70))  # 100 values: 10 bins, of 10 numbers each
    assert found == [10] * 10
    assert edges == [-30.5 + 10 * place for place in range(11)]
    assert outside == ""
    assert 0 - 0.5 in edges, "no bin holds both negative and positive values"
    found, edges, _ = counts([*range(5, 42), 41])
    assert sum(found) == 38
    assert len(set(np.diff(edges))) == 1


def test_every_value_is_drawn_or_told() -> None:
    generator = np.random.default_rng(0)
    body = generator.normal(size=1000)
    found, edges, outside = counts([*body, 50.0, 60.0])
    assert outside.startswith("6 higher, up to 60") or outside.startswith("5 higher, up to 60")
    assert sum(found) == 1002 - int(outside.split()[0])
    assert edges[-1] < 5
    found, edges, outside = counts([*body, -50.0])
    assert "lower, from -50" in outside
    found, edges, outside = counts(body)
    assert (sum(found), outside) == (1000, "")


@pytest.mark.parametrize("value", [0.25, -3e99, 1e-300, 0.0, 1e20])
def test_equal_values_have_a_bin(value: float) -> None:
    found, edges, _ = counts([value] * 5)
    assert sum(found) == 5
    assert edges[0] < edges[-1]


def group(objectives: list[str], files: int) -> Group:
    generator = np.random.default_rng(0)
    tallies = []
    for place in range(files):
        tally = Tally(["train", "test", "third"][place], Path("x"), COMPLETIONS, Reservoir(0, 0))
        for number in range(40):
            scores = {name: float(generator.normal()) for name in objectives}
            messages = [{"role": "user", "content": "q" * generator.integers(1, 90)}]
            tally.add(Row(number, messages, {"answer": "a"}, {"answer": [1] * number}, scores, number, 0, "stop"))
        tallies.append(tally)
    return Group(COMPLETIONS, tallies)


def texts(picture: Any) -> list[Any]:
    return [text for axes in picture.axes if axes.axison for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]


@pytest.mark.parametrize("objectives", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("files", [1, 3])
def test_no_words_overlap_at_any_size(objectives: int, files: int) -> None:
    made = group([*ARMORM_OBJECTIVES, GATED_SCORE][:objectives], files)
    source = "/somewhere/outputs/llama1b_wdpo_rho=0.01/global_step_316"
    for picture, panels in ((draw_scores(made, source), objectives), (draw_lengths(made, source), 2)):
        assert sum(axes.axison for axes in picture.axes) == panels
        picture.draw_without_rendering()
        words = [text for text in texts(picture) if text.get_text()] + [picture._suptitle, picture.legends[0]]
        boxes = [text.get_window_extent() for text in words]
        for place, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:place]), words[place]
        assert all(box.x0 >= 0 and box.x1 <= picture.bbox.width for box in boxes)
        assert all(box.y0 >= 0 and box.y1 <= picture.bbox.height for box in boxes)


def test_the_shares_of_a_file_add_up(tmp_path: Path) -> None:
    picture = draw(
        "x", [Panel("p", "a", [Series("train", np.array([0.0, 0.0, 1.0, 4.0])), Series("test", np.array([2.0]))])]
    )
    train, test = (patch for patch in picture.axes[0].patches if not patch.get_fill())
    assert train.get_data().values.tolist() == [50, 25, 0, 0, 25]
    assert test.get_data().values.tolist() == [0, 0, 100, 0, 0]


def test_names_of_the_data_are_no_formulas(tmp_path: Path) -> None:
    picture = draw_scores(group(["$\\frac$ \x1b[2J", "x" * 500, "a\nb\n\n\nc"], 1), "fol$der\\ ^_{ \x07")
    picture.savefig(tmp_path / "p.png")
    shown = [axes.title.get_text() for axes in picture.axes]
    assert "$\\frac$ \\x1b[2J" in shown
    assert max(len(line) for title in shown for line in title.split("\n")) <= 34


def test_a_long_path_keeps_its_end() -> None:
    assert short_path("a/b") == "a/b"
    assert short_path("x" * 100 + "/end", 10) == "…xxxxx/end"

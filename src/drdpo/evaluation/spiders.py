"""Spider plots as the paper draws them: one a mixture, a polygon a method; ours above, the published below."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from drdpo.evaluation.published import SPOKES
from drdpo.evaluation.spider import spoke_label
from drdpo.evaluation.style import BASE_STYLE, RC, Style, axis_label, run_styles
from drdpo.folder import atomic_file

if TYPE_CHECKING:
    from drdpo.evaluation.mixtures_report import MixtureResult

_PANEL, _ROW, _DISC, _BELOW, _FOOT = 5.3, 4.8, 2.95, 0.7, 0.6
"""Inches: a panel's width and height, its disc, room for words below the disc, and for the legend."""

_LEAST_RIM = 0.05
"""Standard deviations: a rim nearer than that would show gains of nothing as large."""

Values = Mapping[str, Sequence[float]]
"""{method: one value a spoke}"""


def draw_spiders(folder: Path, results: "list[MixtureResult]") -> bool:
    """Write spiders.png and spiders.svg.

    Ours have one scale over all mixtures, and the published have theirs.

    Args:
        folder: where to.
        results: one a mixture.

    Returns:
        False, and nothing is written, where a mixture has fewer than three objectives with gains.
    """
    if any(len(result.spokes) < 3 for result in results):
        return False
    with rc_context(RC):
        canvas = spiders(results)
        for suffix in ("png", "svg"):
            with atomic_file(folder / f"spiders.{suffix}", "wb") as stream:
                canvas.savefig(stream, format=suffix, dpi=120, metadata={"Date": None} if suffix == "svg" else None)
    return True


def spiders(results: "list[MixtureResult]") -> Canvas:
    """The picture, for mixtures of three spokes or more.

    A published method has the style of our run of that name in any case; one that was not run has a style of its own.
    """
    ours = [{run: [result.gains[run, name].value for name in result.spokes] for run in result.runs} for result in results]
    theirs: list[Values] = [result.published for result in results]
    rows, columns = 2 if any(theirs) else 1, len(results)
    names = {name.upper(): name for values in [*theirs, *ours] for name in values}
    # Ours first, in their order.
    order = list(dict.fromkeys(name.upper() for values in [*ours, *theirs] for name in values))
    looks = run_styles(["base", *order])
    canvas = Canvas(figsize=(_PANEL * columns, _ROW * rows + _FOOT))
    for column, result in enumerate(results):
        title = result.name.replace("_", " + ")
        axes = _panel(canvas, rows - 1, column, columns)
        _spider(axes, f"{title}\nours: gain in sd of the base", result.spokes, ours[column], looks, _limits(ours))
        if theirs[column]:
            axes = _panel(canvas, 0, column, columns)
            _spider(axes, f"{title}\npublished", list(SPOKES), theirs[column], looks, _limits(theirs))
    handles = [
        Line2D([], [], color=looks[name].color, linestyle=looks[name].line, marker=looks[name].marker)
        for name in ("base", *order)
    ]
    labels = ["base (0)", *(names[name] for name in order)]
    canvas.legend(handles, labels, loc="lower center", ncols=min(len(labels), 2 * columns + 1), frameon=False, fontsize=12)
    return canvas


def _panel(canvas: Canvas, above: int, column: int, columns: int) -> Any:
    """Axes with `above` rows of panels below them; words around a disc fit into its panel."""
    width, height = canvas.get_size_inches()
    left, bottom = (column + 0.5) * _PANEL - _DISC / 2, _FOOT + above * _ROW + _BELOW
    return canvas.add_axes((left / width, bottom / height, _DISC / width, _DISC / height), projection="polar")


def _limits(panels: Sequence[Values]) -> tuple[float, float]:
    """Centre and rim of every panel; negative gains lie inside the base's ring."""
    values = [value for panel in panels for row in panel.values() for value in row]
    low, high = min(0.0, *values), max(_LEAST_RIM, *values)
    reach = high - low
    return (low - 0.25 * reach if low < 0 else 0.0), high + 0.08 * reach


def _spider(
    axes: Any, title: str, spokes: Sequence[str], values: Values, styles: Mapping[str, Style], limits: tuple[float, float]
) -> None:
    angles = [2 * np.pi * index / len(spokes) for index in range(len(spokes))]
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(*limits)
    axes.set_rorigin(limits[0])
    axes.set_xticks(angles, labels=[])
    for angle, name in zip(angles, spokes, strict=True):
        spoke_label(axes, angle, axis_label(name), len(spokes))
    axes.tick_params(axis="y", labelsize=8, labelcolor="#555555")
    axes.set_rlabel_position(180 / len(spokes))
    axes.grid(color="#cccccc", linewidth=0.8)
    if limits[0] < 0:
        circle = np.linspace(0, 2 * np.pi, 361)
        axes.plot(circle, np.zeros_like(circle), color=BASE_STYLE.color, linestyle=BASE_STYLE.line, linewidth=1.2)
    for name, row in values.items():
        look = styles[name.upper()]
        closed_angles, closed = [*angles, angles[0]], [*row, row[0]]
        axes.plot(closed_angles, closed, color=look.color, marker=look.marker, markersize=4.5, linewidth=1.8)
        axes.fill(closed_angles, closed, color=look.color, alpha=0.08)
    axes.set_title(title, fontsize=11, pad=48)

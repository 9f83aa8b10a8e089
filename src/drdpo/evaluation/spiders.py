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
from drdpo.files import atomic_file

if TYPE_CHECKING:
    from drdpo.evaluation.mixtures_report import MixtureResult

_PANEL = 4.9
"""Inches."""

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
    ours = [{run: [result.gains[run, name].value for name in result.spokes] for run in result.runs} for result in results]
    theirs: list[Values] = [result.published for result in results]
    rows = 2 if any(theirs) else 1
    names = list(dict.fromkeys(name for values in ours for name in values))
    looks = run_styles(["base", *names])
    by_upper = {name.upper(): style for name, style in looks.items()}
    with rc_context(RC):
        canvas = Canvas(figsize=(_PANEL * len(results), _PANEL * rows + 0.5))
        for column, result in enumerate(results):
            axes = canvas.add_subplot(rows, len(results), column + 1, projection="polar")
            title = result.name.replace("_", " + ")
            _spider(axes, f"{title}\nours: gain in sd of the base", result.spokes, ours[column], looks, _limits(ours))
            if theirs[column]:
                axes = canvas.add_subplot(rows, len(results), len(results) + column + 1, projection="polar")
                styles = {name: by_upper.get(name.upper(), BASE_STYLE) for name in theirs[column]}
                _spider(axes, f"{title}\npublished", list(SPOKES), theirs[column], styles, _limits(theirs))
        handles = [
            Line2D([], [], color=looks[name].color, linestyle=looks[name].line, marker=looks[name].marker)
            for name in ("base", *names)
        ]
        canvas.legend(handles, ["base (0)", *names], loc="lower center", ncols=len(names) + 1, frameon=False, fontsize=12)
        canvas.subplots_adjust(left=0.09, right=0.91, top=0.86 if rows == 2 else 0.74, bottom=0.1 if rows == 2 else 0.2)
        canvas.subplots_adjust(hspace=0.62, wspace=0.7)
        for suffix in ("png", "svg"):
            with atomic_file(folder / f"spiders.{suffix}", "wb") as stream:
                canvas.savefig(stream, format=suffix, dpi=120, metadata={"Date": None} if suffix == "svg" else None)
    return True


def _limits(panels: Sequence[Values]) -> tuple[float, float]:
    """Centre and rim of every panel; negative gains lie inside the base's ring."""
    values = [value for panel in panels for row in panel.values() for value in row]
    low, high = min(0.0, *values), max(0.0, *values)
    reach = max(high - low, 1e-3)
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
        look = styles[name]
        closed_angles, closed = [*angles, angles[0]], [*row, row[0]]
        axes.plot(closed_angles, closed, color=look.color, marker=look.marker, markersize=4.5, linewidth=1.8)
        axes.fill(closed_angles, closed, color=look.color, alpha=0.08)
    axes.set_title(title, fontsize=11, pad=48)

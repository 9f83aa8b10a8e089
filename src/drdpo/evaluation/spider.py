"""The picture: raw means, and the gain over the first run with its confidence interval.

Objectives are on different scales, so the raw panel gives every axis its own range, printed under its name. The range is
no choice of taste: it is the interquartile range of all runs' completion scores, widened only as far as a mean lies
outside it. A difference that looks small is small beside the spread of single answers. The gain panel has one scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from drdpo.evaluation.bars import draw_gain_bars, draw_raw_bars
from drdpo.evaluation.runs import Run
from drdpo.evaluation.statistics import Comparison, mean
from drdpo.evaluation.style import BASE_STYLE, RC, Style, axis_label, run_styles
from drdpo.folder import atomic_file
from drdpo.objectives import GATED_SCORE

_PANEL_WIDTH, _HEIGHT, _DISC = 7.6, 7.75, 4.8
"""Inches: a panel, the picture, and a spider's disc with room for the words around it."""

_MARGIN = 0.12
"""Share of an axis's range left free beyond a mean that lies outside the interquartile range."""


@dataclass(frozen=True)
class Axis:
    """One spoke: an objective and the values at the centre and at the rim."""

    objective: str
    low: float
    high: float

    def place(self, value: float) -> float:
        """Where a value lies between centre (0) and rim (1)."""
        return (value - self.low) / (self.high - self.low)


def raw_axis(runs: list[Run], objective: str) -> Axis:
    """The raw panel's range of an objective; see the module's docstring."""
    scores_C = np.concatenate([run.scores_C[objective] for run in runs])
    low, high = (float(value) for value in np.quantile(scores_C, [0.25, 0.75]))
    means = [mean(run, objective) for run in runs]
    if high <= low:
        # All scores equal, or nearly all: any range will do that shows the means.
        reach = max(max(means) - min(means), 1e-3 * abs(low), 1e-6)
        low, high = low - reach, high + reach
    margin = _MARGIN * (high - low)
    return Axis(objective, min(low, min(means) - margin), max(high, max(means) + margin))


def draw_pictures(folder: Path, runs: list[Run], comparison: Comparison, trained_on: Sequence[str] = ()) -> None:
    """Write spider.png and spider.svg.

    Args:
        folder: where to.
        runs: the base first; with one run there is no gain panel.
        comparison: from statistics.compare. Fewer than three objectives are drawn as bars, for a spider needs three spokes.
        trained_on: the objectives that training saw; the others are marked in the gain panel. Empty where that is not known.
    """
    objectives = comparison.objectives
    gain_names = [name for name in objectives if any(name in gains for gains in comparison.gains.values())]
    panels = 2 if gain_names else 1
    with rc_context(RC):
        canvas = Canvas(figsize=(_PANEL_WIDTH * panels, _HEIGHT))
        raw_is_spider, gain_is_spider = len(objectives) >= 3, len(gain_names) >= 3
        styles = run_styles([run.name for run in runs])
        if raw_is_spider:
            _draw_raw(_panel(canvas, 1, panels), runs, objectives, styles)
        else:
            draw_raw_bars(canvas, panels, runs, objectives, styles)
        if panels == 2 and gain_is_spider:
            _draw_gains(_panel(canvas, 2, panels), runs, comparison, gain_names, styles, trained_on)
        elif panels == 2:
            draw_gain_bars(canvas, panels, runs, comparison, gain_names, styles)
        _legend(canvas, runs, styles)
        for suffix in ("png", "svg"):
            with atomic_file(folder / f"spider.{suffix}", "wb") as stream:
                # No date inside: the same scores give the same bytes.
                canvas.savefig(stream, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)


def _panel(canvas: Canvas, index: int, panels: int) -> Any:
    width = _DISC / _PANEL_WIDTH / panels
    left = (index - 0.5) / panels - width / 2
    return canvas.add_axes((left, 1.25 / _HEIGHT, width, _DISC / _HEIGHT), projection="polar")


def _draw_raw(axes: Any, runs: list[Run], objectives: list[str], styles: dict[str, Style]) -> None:
    spokes = [raw_axis(runs, objective) for objective in objectives]
    angles = _web(axes, len(spokes))
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], labels=[])
    for run in runs:
        values = [spoke.place(mean(run, spoke.objective)) for spoke in spokes]
        _polygon(axes, angles, values, styles[run.name])
    for angle, spoke in zip(angles, spokes, strict=True):
        label = f"{axis_label(spoke.objective)}\n{_range(spoke)}"
        if len(runs) == 1:
            label += f"\nmean {mean(runs[0], spoke.objective):.4g}"
        spoke_label(axes, angle, label, len(spokes))
    axes.set_title("Mean score per prompt\n(each axis: value at the centre … value at the rim)", pad=66, fontsize=12)


def _range(spoke: Axis) -> str:
    # As many digits as tell the two ends apart.
    digits = max(0, 2 - int(np.floor(np.log10(2.5 * (spoke.high - spoke.low)))))
    return f"{spoke.low:.{digits}f} … {spoke.high:.{digits}f}"


def _draw_gains(
    axes: Any,
    runs: list[Run],
    comparison: Comparison,
    objectives: list[str],
    styles: dict[str, Style],
    trained_on: Sequence[str],
) -> None:
    angles = _web(axes, len(objectives))
    base, *others = runs
    figures = {run.name: [comparison.gains[run.name][name] for name in objectives] for run in others}
    ends = [end for row in figures.values() for f in row for end in (f.low, f.high, f.value) if end is not None]
    low, high = _limits(min(ends), max(ends))
    axes.set_ylim(low, high)
    axes.set_rorigin(low)
    rings = MaxNLocator(nbins=6).tick_values(low, high)
    rings = [float(ring) for ring in rings if low < ring <= high]
    axes.set_yticks(rings, labels=[])
    circle = np.linspace(0, 2 * np.pi, 361)
    axes.plot(circle, np.zeros_like(circle), color=BASE_STYLE.color, linewidth=1.8, linestyle=BASE_STYLE.line, zorder=3)
    # Runs are turned against each other by a little, all spokes of a run alike, so that intervals do not cover each other.
    step = min(0.045, 0.5 * 2 * np.pi / len(objectives) / len(others))
    for index, run in enumerate(others):
        style = styles[run.name]
        turned = [angle + step * (index - (len(others) - 1) / 2) for angle in angles]
        _polygon(axes, turned, [figure.value for figure in figures[run.name]], style, fill=False)
        for angle, figure in zip(turned, figures[run.name], strict=True):
            if figure.low is not None and figure.high is not None:
                axes.plot([angle, angle], [figure.low, figure.high], color=style.color, linewidth=2.2, alpha=0.55, zorder=4)
    _ring_labels(axes, rings, np.pi / len(objectives))
    for angle, objective in zip(angles, objectives, strict=True):
        unseen = trained_on and objective not in (*trained_on, GATED_SCORE)
        spoke_label(axes, angle, axis_label(objective) + ("\n(unseen)" if unseen else ""), len(objectives))
    axes.set_title(
        f"Gain over {base.name}, in standard deviations of its scores\n(bars: 95% confidence; dashed ring: {base.name})",
        pad=66,
        fontsize=12,
    )


def _limits(smallest: float, largest: float) -> tuple[float, float]:
    low, high = min(smallest, 0.0), max(largest, 0.0)
    reach = max(high - low, 1e-3)
    # The base's ring must not shrink to a point: negative gains lie inside it.
    return low - 0.25 * reach, high + 0.08 * reach


def _ring_labels(axes: Any, rings: list[float], angle: float) -> None:
    for ring in rings:
        text = "0" if abs(ring) < 1e-12 else f"{ring:+.4g}"
        axes.text(
            angle, ring, text, fontsize=8, color="#444444", ha="center", va="center", zorder=6,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
        )  # fmt: skip


def _web(axes: Any, spokes: int) -> list[float]:
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    angles = [2 * np.pi * index / spokes for index in range(spokes)]
    axes.set_xticks(angles, labels=[])
    axes.grid(color="#cccccc", linewidth=0.8)
    axes.spines["polar"].set_color("#999999")
    return angles


def _polygon(axes: Any, angles: list[float], values: list[float], style: Style, fill: bool = True) -> None:
    closed_angles, closed_values = [*angles, angles[0]], [*values, values[0]]
    axes.plot(
        closed_angles, closed_values, color=style.color, linestyle=style.line, marker=style.marker, markersize=5.5,
        linewidth=1.8, zorder=5, clip_on=False,
    )  # fmt: skip
    if fill:
        axes.fill(closed_angles, closed_values, color=style.color, alpha=0.06, zorder=2)


def spoke_label(axes: Any, angle: float, text: str, spokes: int) -> None:
    """Write the name of a spoke outside the rim, clear of it."""
    across, up = np.sin(angle), np.cos(angle)
    low, high = axes.get_ylim()
    size = 10 if spokes <= 8 else 8
    # Above and below the disc a label is pushed out by half its height to clear the rim, beside it not at all.
    push = np.sign(up) * up**8 * 0.5 * 1.25 * size * (text.count("\n") + 1)
    axes.annotate(
        text, (angle, low + (high - low) * 1.07), (0, push), textcoords="offset points", fontsize=size, linespacing=1.15,
        ha="center" if abs(across) < 0.1 else "left" if across > 0 else "right", va="center", annotation_clip=False,
    )  # fmt: skip


def _legend(canvas: Canvas, runs: list[Run], styles: dict[str, Style]) -> None:
    looks = [styles[run.name] for run in runs]
    handles = [Line2D([], [], color=look.color, linestyle=look.line, marker=look.marker, linewidth=1.8) for look in looks]
    names = [run.name for run in runs]
    canvas.legend(handles, names, loc="lower center", ncols=min(len(runs), 6), frameon=False, fontsize=12)

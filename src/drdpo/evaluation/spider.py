"""Spider plots of one report: mean scores, and gains over the base.

Objectives have different scales, so every axis of the panel of mean scores has its own range, printed under its name: the
interquartile range of all runs' completion scores, widened to include every mean. Differences that look small are small
compared with the spread of single answers. The panel of gains has one scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from drdpo.evaluation.report import STYLE, save_picture
from drdpo.evaluation.runs import ScoredRun
from drdpo.evaluation.statistics import Comparison
from drdpo.objectives import GATED_SCORE

_PANEL_WIDTH, _HEIGHT, _DISC = 7.6, 7.75, 4.8
"""Inches: width of a panel, height of the picture, and diameter of a disc, which leaves room for labels."""
_MARGIN = 0.12
"""Free share of an axis beyond a mean outside the interquartile range."""


@dataclass(frozen=True)
class Style:
    """How one run is drawn; colour and marker both identify it."""

    color: str
    line: str
    marker: str


BASE_STYLE = Style("#333333", "--", "o")

# Okabe and Ito's palette for colour-blind readers, without black (the base) and yellow (too pale on white).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("s", "^", "D", "v", "P")


def run_styles(names: list[str]) -> dict[str, Style]:
    """{run: style}; the first run is the dashed grey base unless it is alone."""
    if len(names) == 1:
        return {names[0]: Style(_COLORS[0], "-", "o")}
    looks = zip(cycle(_COLORS), cycle(_MARKERS), strict=False)
    return {names[0]: BASE_STYLE} | {
        name: Style(color, "-", marker) for name, (color, marker) in zip(names[1:], looks, strict=False)
    }


def axis_label(objective: str) -> str:
    """`helpsteer-helpfulness` -> two lines, the rating scheme above the quality."""
    if objective == GATED_SCORE:
        return f"{GATED_SCORE}\n(gated score)"
    scheme, separator, quality = objective.partition("-")
    return f"{scheme}\n{quality.replace('_', ' ')}" if separator else objective.replace("_", " ")


@rc_context(STYLE)
def draw_spider(runs: list[ScoredRun], comparison: Comparison) -> dict[str, bytes]:
    """spider.png and spider.svg; none for fewer than three objectives.

    Args:
        runs: the base first; one run has no gain panel.
        comparison: of these runs; objectives that training did not see are marked in the gain panel.
    """
    objectives = comparison.objectives
    gain_names = [name for name in objectives if any(name in gains for gains in comparison.gains.values())]
    if len(objectives) < 3:
        return {}
    panels = 2 if len(gain_names) >= 3 else 1
    figure = Figure(figsize=(_PANEL_WIDTH * panels, _HEIGHT))
    styles = run_styles([run.name for run in runs])
    _draw_raw(_panel(figure, 1, panels), runs, objectives, styles)
    if panels == 2:
        _draw_gains(_panel(figure, 2, panels), runs, comparison, gain_names, styles)
    legend(figure, [run.name for run in runs], list(styles.values()), min(len(runs), 6))
    return save_picture(figure, "spider", dpi=150)


def legend(figure: Figure, labels: list[str], styles: list[Style], columns: int) -> None:
    """One legend below all panels."""
    handles = [Line2D([], [], color=look.color, linestyle=look.line, marker=look.marker, linewidth=1.8) for look in styles]
    figure.legend(handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=12)


@dataclass(frozen=True)
class Spoke:
    """One spoke: an objective and its values at the centre and at the rim."""

    objective: str
    low: float
    high: float

    def place(self, value: float) -> float:
        """Where a value lies between centre (0) and rim (1)."""
        return (value - self.low) / (self.high - self.low)


def raw_spoke(runs: list[ScoredRun], objective: str) -> Spoke:
    """The raw panel's range of an objective; see the module's docstring."""
    scores_C = np.concatenate([run.completions[objective] for run in runs])
    low, high = (float(value) for value in np.quantile(scores_C, [0.25, 0.75]))
    means = [run.mean(objective) for run in runs]
    if high <= low:
        # Nearly all scores are equal: any range that shows the means will do.
        reach = max(max(means) - min(means), 1e-3 * abs(low), 1e-6)
        low, high = low - reach, high + reach
    margin = _MARGIN * (high - low)
    return Spoke(objective, min(low, min(means) - margin), max(high, max(means) + margin))


def _panel(figure: Figure, index: int, panels: int) -> Any:
    width = _DISC / _PANEL_WIDTH / panels
    left = (index - 0.5) / panels - width / 2
    return figure.add_axes((left, 1.25 / _HEIGHT, width, _DISC / _HEIGHT), projection="polar")


def _draw_raw(axes: Any, runs: list[ScoredRun], objectives: list[str], styles: dict[str, Style]) -> None:
    spokes = [raw_spoke(runs, objective) for objective in objectives]
    angles = web(axes, len(spokes), (0, 1))
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], labels=[])
    for run in runs:
        polygon(axes, angles, [spoke.place(run.mean(spoke.objective)) for spoke in spokes], styles[run.name])
    for angle, spoke in zip(angles, spokes, strict=True):
        # Enough digits to distinguish the two ends.
        digits = max(0, 2 - int(np.floor(np.log10(2.5 * (spoke.high - spoke.low)))))
        label = f"{axis_label(spoke.objective)}\n{spoke.low:.{digits}f} … {spoke.high:.{digits}f}"
        if len(runs) == 1:
            label += f"\nmean {runs[0].mean(spoke.objective):.4g}"
        spoke_label(axes, angle, label, len(spokes))
    axes.set_title("Mean score per prompt\n(each axis: value at the centre … value at the rim)", pad=66, fontsize=12)


def _draw_gains(
    axes: Any, runs: list[ScoredRun], comparison: Comparison, objectives: list[str], styles: dict[str, Style]
) -> None:
    base, *others = runs
    gains = {run.name: [comparison.gains[run.name][name] for name in objectives] for run in others}
    ends = [end for row in gains.values() for gain in row for end in (gain.low, gain.high, gain.value) if end is not None]
    low, high = gain_limits(min(ends), max(ends))
    angles = web(axes, len(objectives), (low, high))
    rings = [float(ring) for ring in MaxNLocator(nbins=6).tick_values(low, high) if low < ring <= high]
    axes.set_yticks(rings, labels=[])
    zero_ring(axes, 1.8)
    # Each run is rotated slightly, so that intervals do not overlap.
    step = min(0.045, 0.5 * 2 * np.pi / len(objectives) / len(others))
    for index, run in enumerate(others):
        style = styles[run.name]
        turned = [angle + step * (index - (len(others) - 1) / 2) for angle in angles]
        polygon(axes, turned, [gain.value for gain in gains[run.name]], style, fill=False)
        for angle, gain in zip(turned, gains[run.name], strict=True):
            if gain.low is not None and gain.high is not None:
                axes.plot([angle, angle], [gain.low, gain.high], color=style.color, linewidth=2.2, alpha=0.55, zorder=4)
    for ring in rings:
        axes.text(
            np.pi / len(objectives), ring, "0" if abs(ring) < 1e-12 else f"{ring:+.4g}", fontsize=8, color="#444444",
            ha="center", va="center", zorder=6, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
        )  # fmt: skip
    for angle, objective in zip(angles, objectives, strict=True):
        unseen = comparison.trained_on and objective not in (*comparison.trained_on, GATED_SCORE)
        spoke_label(axes, angle, axis_label(objective) + ("\n(unseen)" if unseen else ""), len(objectives))
    axes.set_title(
        f"Gain over {base.name}, in standard deviations of its scores\n(bars: 95% confidence; dashed ring: {base.name})",
        pad=66,
        fontsize=12,
    )


def gain_limits(smallest: float, largest: float) -> tuple[float, float]:
    """Values at the centre and the rim. Negative gains lie inside the ring of the base, which keeps some size."""
    low, high = min(smallest, 0.0), max(largest, 0.0)
    reach = max(high - low, 1e-3)
    return low - 0.25 * reach, high + 0.08 * reach


def web(axes: Any, spokes: int, limits: tuple[float, float]) -> list[float]:
    """Prepare polar axes with values `limits` at the centre and the rim; returns the spokes' angles, the first on top."""
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(*limits)
    axes.set_rorigin(limits[0])
    angles = [2 * np.pi * index / spokes for index in range(spokes)]
    axes.set_xticks(angles, labels=[])
    axes.grid(color="#cccccc", linewidth=0.8)
    axes.spines["polar"].set_color("#999999")
    return angles


def zero_ring(axes: Any, width: float) -> None:
    """The base: a dashed ring at a gain of 0."""
    circle = np.linspace(0, 2 * np.pi, 361)
    axes.plot(circle, np.zeros_like(circle), color=BASE_STYLE.color, linewidth=width, linestyle=BASE_STYLE.line, zorder=3)


def polygon(axes: Any, angles: list[float], values: Sequence[float], style: Style, fill: bool = True) -> None:
    """One run, closed."""
    closed_angles, closed_values = [*angles, angles[0]], [*values, values[0]]
    axes.plot(
        closed_angles, closed_values, color=style.color, linestyle=style.line, marker=style.marker, markersize=5.5,
        linewidth=1.8, zorder=5, clip_on=False,
    )  # fmt: skip
    if fill:
        axes.fill(closed_angles, closed_values, color=style.color, alpha=0.06, zorder=2)


def spoke_label(axes: Any, angle: float, text: str, spokes: int) -> None:
    """Write the name of a spoke outside the rim."""
    across, up = np.sin(angle), np.cos(angle)
    low, high = axes.get_ylim()
    size = 10 if spokes <= 8 else 8
    # Labels above and below the disc are moved by half their height to clear the rim.
    push = np.sign(up) * up**8 * 0.5 * 1.25 * size * (text.count("\n") + 1)
    axes.annotate(
        text, (angle, low + (high - low) * 1.07), (0, push), textcoords="offset points", fontsize=size, linespacing=1.15,
        ha="center" if abs(across) < 0.1 else "left" if across > 0 else "right", va="center", annotation_clip=False,
    )  # fmt: skip

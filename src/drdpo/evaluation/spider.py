"""Spider plots of one report: mean scores, and gains over the base.

Objectives have different scales, so every axis of the panel of mean scores has its own range, printed under its name: the
interquartile range of all runs' completion scores, widened to include every mean. Differences that look small are small
compared with the spread of single answers. The panel of gains has one scale.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from drdpo.evaluation.report import STYLE, save_picture
from drdpo.evaluation.runs import ScoredRun
from drdpo.evaluation.statistics import Comparison, Estimate
from drdpo.objectives import GATED_SCORE

_MARGIN = 0.12
"""Free share of an axis beyond a mean outside the interquartile range."""

Style = dict[str, Any]
"""matplotlib's arguments for one run; colour and marker both identify it."""
BASE_STYLE = {"color": "#333333", "linestyle": "--", "marker": "o"}

# Okabe and Ito's palette for colour-blind readers, without black (the base) and yellow (too pale on white).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("s", "^", "D", "v", "P")


def run_styles(names: Sequence[str]) -> dict[str, Style]:
    """{run: style}; the first run is the dashed grey base unless it is alone."""
    if len(names) == 1:
        return {names[0]: {"color": _COLORS[0], "marker": "o"}}
    looks = zip(names[1:], cycle(_COLORS), cycle(_MARKERS), strict=False)
    return {names[0]: BASE_STYLE} | {name: {"color": color, "marker": marker} for name, color, marker in looks}


@rc_context(STYLE)
def draw_spider(comparison: Comparison) -> dict[str, bytes]:
    """spider.png and spider.svg; none for fewer than three objectives. One run has no gain panel, in which objectives that
    training did not see are marked."""
    base, others = comparison.base, comparison.others
    if len(comparison.objectives) < 3:
        return {}
    # Objectives in which all scores of the base are equal have no gain.
    names = [name for name in comparison.objectives if others and name in comparison.gains[others[0], base]]
    figure, ((means_axes, *gain_axes),) = panels(1, 2 if len(names) >= 3 else 1)
    looks = run_styles([base, *others])
    _draw_means(means_axes, comparison.runs, comparison.objectives, looks)
    for axes in gain_axes:
        labels = [axis_label(name) + ("\n(unseen)" if comparison.is_unseen(name) else "") for name in names]
        values = {run: [comparison.gains[run, base][name] for name in names] for run in others}
        draw_gains(axes, labels, values, looks, gain_limits(gain for row in values.values() for gain in row))
        axes.set_title(
            f"Gain over {base}, in standard deviations of its scores\n(bars: 95% confidence; dashed ring: {base})", pad=66
        )
    legend(figure, looks, columns=6)
    return save_picture(figure, "spider", dpi=150)


def panels(rows: int, columns: int) -> tuple[Figure, Any]:
    """A figure and its polar axes [rows, columns]."""
    figure = Figure(figsize=(6.6 * columns, 7.0 * rows + 0.4), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, subplot_kw={"projection": "polar"})


def legend(figure: Figure, looks: Mapping[str, Style], columns: int) -> None:
    """One legend below all panels."""
    lines = [Line2D([], [], linewidth=1.8, label=name, **look) for name, look in looks.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), columns), frameon=False, fontsize=12)


def axis_label(objective: str) -> str:
    """`helpsteer-helpfulness` -> two lines, the rating scheme above the quality."""
    if objective == GATED_SCORE:
        return f"{GATED_SCORE}\n(gated score)"
    return objective.replace("-", "\n", 1).replace("_", " ")


def raw_range(runs: list[ScoredRun], objective: str) -> tuple[float, float]:
    """Values at the centre and the rim of an objective's axis in the panel of means; see the module's docstring."""
    scores_C = np.concatenate([run.completions["scores", objective] for run in runs])
    low, high = (float(value) for value in np.quantile(scores_C, [0.25, 0.75]))
    means = [run.mean(objective) for run in runs]
    if high <= low:
        # Nearly all scores are equal: any range that shows the means will do.
        reach = max(max(means) - min(means), 1e-3 * abs(low), 1e-6)
        low, high = low - reach, high + reach
    margin = _MARGIN * (high - low)
    return min(low, min(means) - margin), max(high, max(means) + margin)


def _draw_means(axes: Any, runs: list[ScoredRun], objectives: list[str], looks: dict[str, Style]) -> None:
    ranges = {name: raw_range(runs, name) for name in objectives}
    labels = []
    for name, (low, high) in ranges.items():
        # Enough digits to distinguish the two ends.
        digits = max(0, 2 - int(np.floor(np.log10(2.5 * (high - low)))))
        alone = f"\nmean {runs[0].mean(name):.4g}" if len(runs) == 1 else ""
        labels.append(f"{axis_label(name)}\n{low:.{digits}f} … {high:.{digits}f}{alone}")
    angles = _web(axes, labels, (0, 1))
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], labels=[])
    for run in runs:
        places = [(run.mean(name) - low) / (high - low) for name, (low, high) in ranges.items()]
        _polygon(axes, angles, places, looks[run.name])
    axes.set_title("Mean score per prompt\n(each axis: value at the centre … value at the rim)", pad=66)


def gain_limits(gains: Iterable[Estimate], least: float = 0.0) -> tuple[float, float]:
    """Values at the centre and the rim, which is at least `least`. Negative gains lie inside the ring of the base, which
    keeps some size."""
    ends = [end for gain in gains for end in (gain.low, gain.high, gain.value) if end is not None]
    low, high = min(*ends, 0.0), max(*ends, least)
    reach = max(high - low, 1e-3)
    return low - 0.25 * reach, high + 0.08 * reach


def draw_gains(
    axes: Any, labels: Sequence[str], gains: Mapping[str, Sequence[Estimate]], looks: Mapping[str, Style],
    limits: tuple[float, float],
) -> None:  # fmt: skip
    """Polygons of {run: gain by spoke}, with their intervals, around the dashed ring of the base."""
    angles = _web(axes, labels, limits)
    rings = [float(ring) for ring in MaxNLocator(nbins=6).tick_values(*limits) if limits[0] < ring <= limits[1]]
    axes.set_yticks(rings, labels=["0" if abs(ring) < 1e-12 else f"{ring:+.4g}" for ring in rings])
    axes.tick_params(axis="y", labelsize=8, labelcolor="#444444", zorder=6)
    axes.set_rlabel_position(180 / len(labels))
    circle = np.linspace(0, 2 * np.pi, 361)
    axes.plot(circle, np.zeros_like(circle), linewidth=1.8, zorder=3, **(BASE_STYLE | {"marker": ""}))
    # Each run is rotated slightly, so that intervals do not overlap.
    step = min(0.045, np.pi / len(labels) / len(gains))
    for index, (run, row) in enumerate(gains.items()):
        turned = [angle + step * (index - (len(gains) - 1) / 2) for angle in angles]
        _polygon(axes, turned, [gain.value for gain in row], looks[run])
        for angle, gain in zip(turned, row, strict=True):
            if gain.low is not None and gain.high is not None:
                axes.plot([angle] * 2, [gain.low, gain.high], color=looks[run]["color"], linewidth=2.2, alpha=0.55, zorder=4)


def _web(axes: Any, labels: Sequence[str], limits: tuple[float, float]) -> list[float]:
    """Prepare polar axes with values `limits` at the centre and the rim; returns the spokes' angles, the first on top."""
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(*limits)
    axes.set_rorigin(limits[0])
    angles = [2 * np.pi * index / len(labels) for index in range(len(labels))]
    axes.set_xticks(angles, labels=[])
    axes.grid(color="#cccccc", linewidth=0.8)
    axes.spines["polar"].set_color("#999999")
    size, rim = 10 if len(labels) <= 8 else 8, limits[0] + (limits[1] - limits[0]) * 1.07
    for angle, label in zip(angles, labels, strict=True):
        across, up = np.sin(angle), np.cos(angle)
        # Labels above and below the disc are moved by half their height to clear the rim.
        push = np.sign(up) * up**8 * 0.5 * 1.25 * size * (label.count("\n") + 1)
        axes.annotate(
            label, (angle, rim), (0, push), textcoords="offset points", fontsize=size, linespacing=1.15, va="center",
            ha="center" if abs(across) < 0.1 else "left" if across > 0 else "right", annotation_clip=False,
        )  # fmt: skip
    return angles


def _polygon(axes: Any, angles: list[float], values: Sequence[float], look: Style) -> None:
    """One run, closed."""
    closed_angles, closed_values = [*angles, angles[0]], [*values, values[0]]
    axes.plot(closed_angles, closed_values, markersize=5.5, linewidth=1.8, zorder=5, clip_on=False, **look)
    axes.fill(closed_angles, closed_values, color=look["color"], alpha=0.06, zorder=2)

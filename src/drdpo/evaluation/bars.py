"""Bars, for one or two objectives: a spider needs three spokes."""

from typing import Any

from matplotlib.figure import Figure as Canvas

from drdpo.evaluation.runs import Run
from drdpo.evaluation.statistics import Comparison, mean
from drdpo.evaluation.style import Style, axis_label

_BOTTOM, _HEIGHT = 0.17, 0.62


def draw_raw_bars(canvas: Canvas, panels: int, runs: list[Run], objectives: list[str], styles: dict[str, Style]) -> None:
    """Mean scores, one plot an objective for each has its own scale; every scale holds zero."""
    width = 0.76 / panels / len(objectives)
    for index, objective in enumerate(objectives):
        axes = canvas.add_axes((0.12 / panels + index * 1.15 * width, _BOTTOM, 0.72 * width, _HEIGHT))
        for place, run in enumerate(runs):
            _bar(axes, place, mean(run, objective), styles[run.name], f"{mean(run, objective):.4g}")
        axes.set_title(axis_label(objective), fontsize=11)
        _finish(axes, runs)
    canvas.text(0.5 / panels, 0.93, "Mean score per prompt", ha="center", fontsize=12)


def draw_gain_bars(
    canvas: Canvas, panels: int, runs: list[Run], comparison: Comparison, objectives: list[str], styles: dict[str, Style]
) -> None:
    """Gains over the first run in its standard deviations, with the 95% interval, on one scale."""
    base, *others = runs
    axes = canvas.add_axes((0.5 + 0.12 / panels, _BOTTOM, 0.80 / panels, _HEIGHT))
    centres = []
    for group, objective in enumerate(objectives):
        start = group * (len(others) + 1)
        centres.append(start + (len(others) - 1) / 2)
        for offset, run in enumerate(others):
            figure = comparison.gains[run.name][objective]
            _bar(axes, start + offset, figure.value, styles[run.name], "")
            if figure.low is not None and figure.high is not None:
                ends = [figure.low, figure.high]
                axes.plot([start + offset] * 2, ends, color="black", linewidth=1.4, marker="_", zorder=4)
    axes.axhline(0, color="#333333", linewidth=1.2)
    axes.set_xticks(centres, labels=[axis_label(objective) for objective in objectives], fontsize=11)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    canvas.text(
        0.5 + 0.5 / panels, 0.9, f"Gain over {base.name}, in standard deviations of its scores\n(bars: 95% confidence)",
        ha="center", fontsize=12,
    )  # fmt: skip


def _bar(axes: Any, place: float, value: float, style: Style, text: str) -> None:
    axes.bar(place, value, width=0.8, color=style.color, alpha=0.85, zorder=3)
    if text:
        axes.annotate(
            text, (place, value), (0, 3 if value >= 0 else -3), textcoords="offset points",
            ha="center", va="bottom" if value >= 0 else "top", fontsize=9,
        )  # fmt: skip


def _finish(axes: Any, runs: list[Run]) -> None:
    axes.axhline(0, color="#333333", linewidth=1.2)
    axes.set_xlim(-0.7, len(runs) - 0.3)
    axes.set_xticks([])
    axes.margins(y=0.12)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)

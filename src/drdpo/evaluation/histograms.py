"""Pictures of a look at the data: histograms of lengths, scores and margins, files or answers laid over each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from drdpo.display import one_line
from drdpo.evaluation.kinds import PREFERENCES, RATINGS
from drdpo.evaluation.style import RC, axis_label, palette
from drdpo.evaluation.tally import Array, Group

MOST_PANELS = 40
"""More objectives than this are not drawn: nobody would look at them."""

HEAD = 0.35
"""Inches for the picture's title."""

_TAIL = 0.005
"""Share of the values on either side that a panel may leave out where they would squeeze the others."""

_LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Series:
    """Values of one file or answer in a panel."""

    name: str
    """The series of one name look the same in all panels."""
    values: Array


@dataclass(frozen=True)
class Panel:
    """One histogram."""

    title: str
    axis: str
    series: list[Series]
    zero: bool = False
    """Mark zero?"""


def draw_lengths(group: Group, source: str) -> Canvas:
    """Lengths of prompts and answers: files over each other; of pairs, chosen over rejected in one panel a file."""
    panels = [Panel("prompt", f"{group.unit('prompt')} per prompt", _lengths(group, "prompt"))]
    if group.kind is PREFERENCES:
        for tally in group.tallies:
            chosen, rejected = group.pair_lengths(tally)
            series = [Series("chosen", chosen), Series("rejected", rejected)]
            panels.append(Panel(f"answers, {tally.name}", f"{group.unit('chosen')} per answer", series))
    else:
        panels.append(Panel("answer", f"{group.unit('answer')} per answer", _lengths(group, "answer")))
    return draw(f"Lengths in {short_path(source)}", panels)


def draw_scores(group: Group, source: str) -> Canvas:
    """One panel an objective, each on its own scale, files over each other."""
    what = "Ratings" if group.kind is RATINGS else "Scores"
    panels = [
        Panel(
            axis_label(name), "", [Series(t.name, np.array(t.scores.get(name, ()), dtype=np.float64)) for t in group.tallies]
        )
        for name in group.objectives()[:MOST_PANELS]
    ]
    return draw(f"{what} in {short_path(source)}", panels)


def draw_margins(group: Group, source: str) -> Canvas:
    """Of pairs: how far the scores of chosen and rejected answer lie apart, and their lengths."""
    margins = [Series(tally.name, np.array(tally.margins, dtype=np.float64)) for tally in group.tallies]
    differences = [Series(tally.name, np.subtract(*group.pair_lengths(tally))) for tally in group.tallies]
    return draw(
        f"Chosen against rejected in {short_path(source)}",
        [
            Panel("margin", "score of chosen - score of rejected", margins, zero=True),
            Panel("length difference", f"{group.unit('chosen')}: chosen - rejected", differences, zero=True),
        ],
    )


def draw(title: str, panels: Sequence[Panel]) -> Canvas:
    """Draw histograms in a grid.

    Args:
        title: of the picture.
        panels: those without a value are left out; one must have some.
    """
    panels = [panel for panel in panels if any(len(series.values) for series in panel.series)]
    # What comes first in a panel is solid and filled, what comes next is dashed; a colour belongs to a name.
    lines = {series.name: _LINES[place % len(_LINES)] for panel in panels for place, series in enumerate(panel.series)}
    looks = {name: (color, lines[name]) for name, color in zip(lines, palette(len(lines)), strict=True)}
    with rc_context({**RC, "text.parse_math": False}):  # a name of the data's may hold "$"
        canvas, grid = grid_of(title, len(panels))
        for place, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
            _draw_panel(axes, panel, looks)
            if axes.get_subplotspec().is_first_col() or place == 0:
                axes.set_ylabel("share (%)", fontsize=9)
        handles = [Line2D([], [], color=color, linestyle=line, linewidth=2) for color, line in looks.values()]
        labels = [one_line(name, 40) for name in looks]
        handles.append(Line2D([], [], color="#333333", linestyle="none", marker="|", markersize=11, markeredgewidth=1.6))
        labels.append("median")
        columns = min(len(labels), 5)
        foot = 0.12 + 0.24 * ceil(len(labels) / columns)
        canvas.legend(handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=10)
        height = canvas.get_size_inches()[1]
        canvas.tight_layout(rect=(0, foot / height, 1, 1 - HEAD / height), h_pad=1.2, w_pad=1.4)
    return canvas


def grid_of(title: str, panels: int) -> tuple[Canvas, list[Any]]:
    """A picture with so many axes under its title, in reading order."""
    columns = panels if panels <= 3 else min(ceil(panels**0.5), 5)
    rows = ceil(panels / columns)
    # A few panels stand alone, and are larger.
    width, height = (4.6, 3.4) if panels <= 4 else (3.4, 2.5)
    canvas = Canvas(figsize=(max(columns * width, 6.4), rows * height + 0.9))
    canvas.suptitle(one_line(title, 80), fontsize=12.5, y=1 - 0.12 / (rows * height + 0.9), va="top").set_in_layout(False)
    grid = list(canvas.subplots(rows, columns, squeeze=False).ravel())
    for axes in grid[panels:]:
        axes.set_axis_off()
    return canvas, grid[:panels]


def plain_axes(axes: Any, title: str, label: str) -> None:
    """What all panels have in common."""
    axes.set_title("\n".join(one_line(line, 34) for line in title.split("\n")), fontsize=10.5)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd")


def _draw_panel(axes: Any, panel: Panel, looks: dict[str, tuple[str, str]]) -> None:
    series = [one for one in panel.series if len(one.values)]
    edges, outside = bin_edges(np.concatenate([one.values for one in series]))
    for place, one in enumerate(series):
        color, line = looks[one.name]
        shares = 100 * np.histogram(one.values, edges)[0] / len(one.values)
        if place == 0:
            axes.stairs(shares, edges, fill=True, color=color, alpha=0.25)
        axes.stairs(shares, edges, color=color, linestyle=line, linewidth=1.6)
    # Marks at the foot, one above the other: lines over the whole height would hide each other and the bars.
    for place, one in enumerate(series):
        median = float(np.median(one.values))
        axes.plot(
            [median, median], [0.07 * place, 0.07 * (place + 1)], transform=axes.get_xaxis_transform(),
            color=looks[one.name][0], linewidth=2.6, solid_capstyle="butt", zorder=5,
        )  # fmt: skip
    if panel.zero:
        axes.axvline(0, color="#333333", linewidth=1)
    plain_axes(axes, panel.title, panel.axis)
    room = 0.01 * (edges[-1] - edges[0])
    if edges[0] % 1 == 0.5:  # bins of whole numbers
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlim(edges[0] - room, edges[-1] + room)
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    if outside:
        axes.text(0.98, 0.97, outside, transform=axes.transAxes, ha="right", va="top", fontsize=8, color="#444444")


def bin_edges(values: Array) -> tuple[Array, str]:
    """Edges of the bins for all values of a panel, and in words what lies outside of them.

    Integers get bins of whole numbers, few of them a bin each: bins of now two, now three would draw a comb.
    A tail of at most half a percent is left out where it would take more than half as much room as all the rest.
    """
    low, high = float(values.min()), float(values.max())
    core_low, core_high = (float(value) for value in np.quantile(values, (_TAIL, 1 - _TAIL)))
    room = 0.5 * (core_high - core_low)
    shown_low = core_low if low < core_low - room and room > 0 else low
    shown_high = core_high if high > core_high + room and room > 0 else high
    below, above = int((values < shown_low).sum()), int((values > shown_high).sum())
    words = ([f"{below:,} lower, from {low:,.6g}"] if below else []) + (
        [f"{above:,} higher, up to {high:,.6g}"] if above else []
    )
    bins = int(np.clip(np.sqrt(len(values)), 10, 40))
    if np.all(values == np.round(values)) and abs(values).max() < 1e15:
        step = max(1, ceil((shown_high - shown_low + 1) / bins)) if shown_high - shown_low >= 12 else 1
        # A bin begins at zero, so that none holds both negative and positive values.
        first, last = floor(shown_low / step), floor(ceil(shown_high) / step)
        return step * np.arange(first, last + 2, dtype=np.float64) - 0.5, "\n".join(words)
    if shown_high <= shown_low:
        reach = max(1e-3 * abs(shown_low), 1e-6)
        shown_low, shown_high = shown_low - reach, shown_high + reach
    return np.linspace(shown_low, shown_high, bins + 1, dtype=np.float64), "\n".join(words)


def short_path(path: str, most: int = 34) -> str:
    """A path for a title; of a long one the end."""
    line = one_line(path)
    return line if len(line) <= most else f"…{line[1 - most :]}"


def _lengths(group: Group, name: str) -> list[Series]:
    return [
        Series(tally.name, tally.lengths[name].values(group.in_tokens(name)))
        for tally in group.tallies
        if name in tally.lengths
    ]

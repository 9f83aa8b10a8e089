"""The leaderboard as a heat map, like the paper's table: one row a model, one column a benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine

from drdpo.evaluation.leaderboard_runs import LeaderboardRun
from drdpo.evaluation.leaderboard_scores import COLUMNS, average
from drdpo.evaluation.runs import Array
from drdpo.evaluation.style import RC
from drdpo.folder import atomic_file

_ROW, _PANEL = 0.36, 6.3
"""Inches."""

Published = dict[str, tuple[float, ...]]


def draw_heatmap(folder: Path, groups: dict[str, list[LeaderboardRun]], published: dict[str, Published]) -> bool:
    """Write heatmap.png and heatmap.svg: per group our raw values, the published ones, our normalised scores.

    Colours are per column and panel: dark is the best of the column, so they compare models, not benchmarks; a column of
    equal values is pale.

    Args:
        folder: where to.
        groups: {group: its runs}.
        published: {group: {method: raw values in the order of COLUMNS}}, empty where nothing is.

    Returns:
        False, and nothing is written, where no run has any of the six benchmarks.
    """
    shown = {name: runs for name, runs in groups.items() if any(run.benchmarks for run in runs)}
    if not shown:
        return False
    with rc_context(RC):
        canvas = heatmap(shown, published)
        for suffix in ("png", "svg"):
            with atomic_file(folder / f"heatmap.{suffix}", "wb") as stream:
                canvas.savefig(stream, format=suffix, dpi=120, metadata={"Date": None} if suffix == "svg" else None)
    return True


def heatmap(shown: dict[str, list[LeaderboardRun]], published: dict[str, Published]) -> Canvas:
    """The picture, for groups that have runs with benchmarks."""
    columns = 3 if any(published[name] for name in shown) else 2
    heights = [max(len(runs), len(published[name])) * _ROW + 1.25 for name, runs in shown.items()]
    canvas = Canvas(figsize=(_PANEL * columns, sum(heights)), layout=ConstrainedLayoutEngine(h_pad=0.14))
    # By their numbers of columns.
    widths = [len(COLUMNS)] * (columns - 1) + [len(COLUMNS) + 1]
    grid = canvas.subplots(len(shown), columns, squeeze=False, height_ratios=heights, width_ratios=widths)
    for axes, (name, runs) in zip(grid, shown.items(), strict=True):
        title = f"{name}: " if name else ""
        names = [run.name for run in runs]
        _panel(axes[0], f"{title}raw values, ours", names, COLUMNS, _values(runs, "raw"), "{:.3f}")
        if columns == 3 and published[name]:
            theirs = np.array(list(published[name].values()))
            _panel(axes[1], f"{title}raw values, published", list(published[name]), COLUMNS, theirs, "{:.2f}")
        elif columns == 3:
            axes[1].set_axis_off()
        averages = np.array([[np.nan if (mean := average(run.benchmarks)) is None else mean] for run in runs])
        scores = np.concatenate([_values(runs, "normalised"), averages], axis=1)
        _panel(axes[-1], f"{title}normalised scores, ours", names, [*COLUMNS, "Average"], scores, "{:.1f}")
    return canvas


def _values(runs: list[LeaderboardRun], name: str) -> Array:
    """[runs, benchmarks]; NaN where a benchmark was not run whole."""
    found = [{benchmark.name: float(getattr(benchmark, name)) for benchmark in run.benchmarks} for run in runs]
    return np.array([[values.get(column, np.nan) for column in COLUMNS] for values in found])


def shades(values: Array) -> Array:
    """[rows, columns] from 0 (worst of its column) to 1 (best); 0 in a column of equal values, NaN where none is."""
    shaded = np.full(values.shape, np.nan)
    for column in range(values.shape[1]):
        known = values[:, column][~np.isnan(values[:, column])]
        if known.size:
            reach = np.ptp(known)
            shaded[:, column] = (values[:, column] - known.min()) / reach if reach > 0 else values[:, column] * 0
    return shaded


def _panel(axes: Any, title: str, rows: Sequence[str], columns: Sequence[str], values: Array, form: str) -> None:
    shaded = shades(values)
    axes.imshow(np.ma.masked_invalid(shaded), cmap="YlGnBu", vmin=-0.1, vmax=1.3, aspect="auto")
    axes.set_xticks(range(len(columns)), labels=columns, fontsize=9)
    axes.set_yticks(range(len(rows)), labels=rows)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_title(title, fontsize=11)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    for row in range(len(rows)):
        for column in range(len(columns)):
            value = values[row, column]
            text = "-" if np.isnan(value) else form.format(value)
            dark = not np.isnan(value) and shaded[row, column] > 0.6
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "#222222")

"""A look at a training run's metrics.jsonl: figures over the steps."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas

from drdpo.display import one_line
from drdpo.errors import DataError
from drdpo.evaluation.histograms import HEAD, MOST_PANELS, grid_of, plain_axes, short_path
from drdpo.evaluation.kinds import METRICS, checked_rows
from drdpo.evaluation.style import RC, palette
from drdpo.evaluation.tables import text_table

Metrics = dict[str, list[tuple[float, float]]]
"""{figure: [(step, value), ...]} in the order of the file."""


def read_metrics(path: Path) -> Metrics:
    """Read the figures of every step.

    Raises:
        DataError: naming file, row and field.
    """
    found: Metrics = {}
    for number, row in checked_rows(path, METRICS):
        step = _number(path, number, "step", row["step"])
        for name, value in row.items():
            if name != "step" and value is not None:
                found.setdefault(name, []).append((step, _number(path, number, name, value)))
    return found


def metrics_table(metrics: Metrics) -> str:
    """First, last, smallest, largest and mean value of every figure."""
    rows = []
    for name, points in metrics.items():
        values = np.array([value for _, value in points])
        figures = (values[0], values[-1], values.min(), values.max(), values.mean())
        rows.append([one_line(name, 50), f"{len(values):,}", *(f"{figure:.4g}" for figure in figures)])
    return text_table(["figure", "steps", "first", "last", "min", "max", "mean"], rows)


def draw_metrics(metrics: Metrics, source: str) -> Canvas:
    """One panel a figure, over the steps."""
    names = list(metrics)[:MOST_PANELS]
    with rc_context({**RC, "text.parse_math": False}):
        canvas, grid = grid_of(f"Training metrics in {short_path(source)}", len(names))
        for axes, name in zip(grid, names, strict=False):
            steps, values = zip(*metrics[name], strict=True)
            axes.plot(steps, values, color=palette(1)[0], linewidth=1.4, marker="." if len(steps) < 60 else None)
            plain_axes(axes, one_line(name, 34), "step")
        canvas.tight_layout(rect=(0, 0, 1, 1 - HEAD / canvas.get_size_inches()[1]), h_pad=1.2, w_pad=1.4)
    return canvas


def _number(path: Path, number: int, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < float("inf"):
        raise DataError(f"{path}, row {number}: field {one_line(name, 40)!r} is {value!r}, not a finite number")
    return float(value)

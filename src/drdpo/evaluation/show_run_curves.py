"""The training curves of a run as one picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from drdpo.evaluation.histograms import HEAD, grid_of, plain_axes, short_path
from drdpo.evaluation.show_run_state import TrainingState
from drdpo.evaluation.style import RC, palette

_SMOOTH_FROM = 40
"""Steps from which a running mean is drawn over the single steps."""

_PANELS = (
    ("loss", (("loss", "train"), ("eval_loss", "evaluation"))),
    ("accuracy", (("accuracy", "train"), ("eval_accuracy", "evaluation"))),
    ("margin of the rewards", (("margin", "train"), ("eval_margin", "evaluation"))),
    ("rewards", (("chosen_reward", "chosen"), ("rejected_reward", "rejected"))),
    ("WDPO's penalty |grad l|²", (("penalty", "train"),)),
    ("effective sample size (pairs)", (("effective_sample_size", "train"),)),
    ("gradient norm", (("grad_norm", "train"),)),
)
"""(title, ((figure of metrics.jsonl, its name), ...)); what a run does not have is left out."""


def draw_training(state: TrainingState, source: str) -> Canvas:
    """Loss, accuracy, margin, rewards, the method's own figure and the gradient norm over the steps.

    Args:
        state: with at least one row.
        source: path of the folder, for the title.
    """
    names = {name for row in state.rows for name in row}
    panels = [(title, [(name, label) for name, label in figures if name in names]) for title, figures in _PANELS]
    panels = [panel for panel in panels if panel[1]]
    with rc_context({**RC, "text.parse_math": False}):
        total = f" of {state.steps:,}" if state.steps else ""
        method = f"{state.method}, " if state.method else ""
        title = f"{short_path(source)}: {method}step {state.done:,}{total}"
        canvas, grid = grid_of(title, len(panels))
        for axes, (title, figures) in zip(grid, panels, strict=True):
            for (name, label), color in zip(figures, palette(len(figures)), strict=True):
                _draw(axes, state.rows, name, label, color)
            plain_axes(axes, title, "optimizer step")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
            if len(figures) > 1:
                axes.legend(fontsize=8.5, frameon=False)
        canvas.tight_layout(rect=(0, 0, 1, 1 - HEAD / canvas.get_size_inches()[1]), h_pad=1.2, w_pad=1.4)
    return canvas


def running_mean(values: Sequence[float], window: int) -> Any:
    """Mean of the last `window` values at each place, fewer at the beginning: [N] float64."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _draw(axes: Any, rows: list[dict[str, float]], name: str, label: str, color: str) -> None:
    steps, values = zip(*((row["step"], row[name]) for row in rows if name in row), strict=True)
    if name.startswith("eval_"):
        axes.plot(steps, values, color=color, linewidth=1.2, marker="o", markersize=4.5, label=label, zorder=4)
        return
    if len(steps) < _SMOOTH_FROM:
        axes.plot(steps, values, color=color, linewidth=1.4, marker=".", label=label)
        return
    window = max(5, len(steps) // 25)
    axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
    axes.plot(steps, running_mean(values, window), color=color, linewidth=1.7, label=f"{label}, mean of {window} steps")

"""The pictures of preference_shift.sh, from what shift_report.py collects."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#777777")
"""Okabe and Ito's, one a method."""

SHOWN = ("worst of all", "mean of all", "worst of trained", "worst of unseen")
PANELS = (
    ("loss", "loss, mean of the step's pairs"),
    ("margin", "margin, beta h"),
    ("effective_sample_size", "effective sample size [pairs]"),
)


def draw_gains(results: dict[str, Any]) -> Figure:
    """One panel a shift: mean and worst gain of every method over the base model, with 95% intervals."""
    arms = results["arms"]
    methods = list(results["choices"])
    figure = Figure(figsize=(4.6 * len(arms) + 1.2, 0.42 * len(methods) * 2 + 2.2), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(arms), sharex=True, sharey=True))
    for axis, (arm, found) in zip(axes, arms.items(), strict=True):
        for row, method in enumerate(methods):
            for place, name in enumerate(SHOWN):
                if name not in found["figures"][method]["gain"]:
                    continue
                value, low, high = found["figures"][method]["gain"][name]
                height = row + (place - 1.5) * 0.2
                axis.plot([low, high], [height, height], color=COLORS[place + 1], linewidth=2)
                axis.plot(value, height, "o", markersize=4, color=COLORS[place + 1], label=name if row == 0 else None)
        axis.axvline(0, color="#777777", linewidth=0.8)
        axis.set(
            title=arm, xlabel="gain over the base model [sd of its scores]", yticks=range(len(methods)), yticklabels=methods
        )
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SHOWN), fontsize=9)
    return figure


def draw_curves(results: dict[str, Any]) -> Figure:
    """A row a shift: loss, margin and effective sample size over the steps, mean over the seeds; what no method has is left
    out."""
    arms = results["arms"]
    known = {name for found in arms.values() for curve in found["curves"].values() for name in curve}
    panels = [panel for panel in PANELS if panel[0] in known]
    figure = Figure(figsize=(4 * len(panels), 2.7 * len(arms) + 0.6), layout="constrained")
    grid = figure.subplots(len(arms), len(panels), squeeze=False)
    for axes, (arm, found) in zip(grid, arms.items(), strict=True):
        for axis, (name, title) in zip(axes, panels, strict=True):
            for (method, curve), color in zip(found["curves"].items(), COLORS, strict=False):
                # IPO's loss has another scale.
                if name in curve and not (name == "loss" and method == "IPO"):
                    axis.plot(np.arange(1, len(curve[name]) + 1), curve[name], color=color, linewidth=1.4, label=method)
            axis.set(title=f"{arm}: {title}", xlabel="optimizer step")
            axis.title.set_fontsize(9.5)
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    methods = list(results["choices"])
    lines = [Line2D([], [], color=color) for _, color in zip(methods, COLORS, strict=False)]
    figure.legend(lines, methods, loc="outside lower center", ncols=len(methods), fontsize=9)
    return figure

"""Colours, lines and words of the pictures."""

from dataclasses import dataclass
from itertools import cycle

from drdpo.objectives import GATED_SCORE

RC = {
    "font.family": "DejaVu Sans",
    "svg.hashsalt": "drdpo",
    "figure.facecolor": "white",
    "axes.titleweight": "normal",
}


@dataclass(frozen=True)
class Style:
    """How one run is drawn; marker and colour both tell runs apart."""

    color: str
    line: str
    marker: str


BASE_STYLE = Style("#333333", "--", "o")

# Okabe and Ito's palette, which readers with any common colour blindness can tell apart; without black (the base's) and
# without yellow, which is too pale on white.
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


def palette(count: int) -> list[str]:
    """Colours of things that are drawn over each other; after six they begin anew."""
    return [color for color, _ in zip(cycle(_COLORS), range(count), strict=False)]


def axis_label(objective: str) -> str:
    """`helpsteer-helpfulness` -> two lines, the rating scheme above the quality."""
    if objective == GATED_SCORE:
        return f"{GATED_SCORE}\n(gated score)"
    scheme, separator, quality = objective.partition("-")
    return f"{scheme}\n{quality.replace('_', ' ')}" if separator else objective.replace("_", " ")

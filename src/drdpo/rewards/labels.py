"""Ratings as labels on ArmoRM's scale; what is missing or no rating is masked, counted and said."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from drdpo.errors import DataError

MOST_WRONG = 0.1
"""Of a column's values, at most this share may be wrong: more of them mean another scale, not slips."""


class Scale(NamedTuple):
    """Ratings run from 0 to `highest`; a rating r is the label (r + shift) / (highest + 2 * shift), from 0 to 1."""

    highest: float
    shift: float

    def label(self, rating: float) -> float:
        """ArmoRM's label of a rating: for HelpSteer's 0-4 it is (r + 0.5) / 5, for UltraFeedback's 1-10 r / 10."""
        return (rating + self.shift) / self.points

    @property
    def points(self) -> float:
        """What a difference of 1 in labels is in rating points."""
        return self.highest + 2 * self.shift

    @property
    def meaning(self) -> str:
        """In words, which rating a score x stands for."""
        back = f" - {self.shift:g}" if self.shift else ""
        return f"{self.points:g} x{back}, from 0 to {self.highest:g}"


class LabelColumn:
    """One rating field, read row by row.

    Args:
        field: named in messages.
        scale: of its ratings.
    """

    def __init__(self, field: str, scale: Scale) -> None:
        self.field = field
        self.scale = scale
        self.labels: list[float] = []
        self.wrong: dict[str, int] = {"missing": 0, "not a number": 0, "out of range": 0}
        self._first_wrong = ""

    def read(self, row: int, value: Any) -> None:
        """Append the label of a value, NaN where it is none; `row` is named where it is the first wrong one."""
        reason = self._reason(value)
        if reason is None:
            self.labels.append(self.scale.label(float(value)))
            return
        self.labels.append(math.nan)
        self.wrong[reason] += 1
        if reason != "missing" and not self._first_wrong:
            self._first_wrong = f"row {row} has {value!r}"

    def check(self, path: Path, advice: str = "") -> None:
        """Raise DataError where no row has a rating (with `advice`), or more than a tenth of the values are none."""
        there = len(self.labels) - self.wrong["missing"]
        bad = there - sum(not math.isnan(label) for label in self.labels)
        if bad > MOST_WRONG * there:
            raise DataError(
                f'{path}: {bad} of {there} values of the field "{self.field}" are no ratings from 0 to '
                f"{self.scale.highest:g} (the first: {self._first_wrong}); more than {MOST_WRONG:.0%} means another scale"
            )
        if not there:
            raise DataError(f'{path}: no row has a rating in the field "{self.field}"{advice}')

    def masked(self) -> str:
        """In words, what was masked and why; empty where nothing was."""
        parts = ", ".join(f"{count} {reason}" for reason, count in self.wrong.items() if count)
        return f"{self.field}: {parts}" if parts else ""

    def _reason(self, value: Any) -> str | None:
        if value is None:
            return "missing"
        if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
            return "not a number"
        return None if 0 <= value <= self.scale.highest else "out of range"

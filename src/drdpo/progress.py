"""Progress of a loop: a bar on a terminal, or a line every ten percent, and every minute, in a file."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

PATIENT_SECONDS = 60.0
"""Maximum between two lines, if a unit is finished in it."""

QUIET_SECONDS = 2.0
"""Minimum between two lines and before the first, so that quick work prints none."""


class Lines(Iterable[Item]):
    """The part of tqdm's interface that drdpo uses, as lines on stderr."""

    def __init__(self, items: Iterable[Item], desc: str, total: int | None, unit: str, initial: int) -> None:
        self._items, self._desc, self._total, self._unit = items, desc, total, unit
        self._done, self._postfix = initial, ""
        self._started = self._printed = time.monotonic()
        self._tenth = self._tenths()

    def __iter__(self) -> Iterator[Item]:
        for item in self._items:
            yield item
            self.update()

    def __enter__(self) -> "Lines[Item]":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        """Count, and print a line if another tenth is finished or a minute is over."""
        self._done += count
        now, tenth = time.monotonic(), self._tenths()
        since = now - self._printed
        if since >= PATIENT_SECONDS or (tenth > self._tenth and since >= QUIET_SECONDS):
            self._tenth, self._printed = tenth, now
            what = f"{self._unit} {self._done} of {self._total}, {now - self._started:.0f} s{self._postfix}"
            print(
                f"{self._desc}: {100 * self._done // self._total if self._total else 0}% ({what})",
                file=sys.stderr,
                flush=True,
            )

    def set_postfix(self, values: dict[str, Any]) -> None:
        """Metrics for the next line."""
        self._postfix = "".join(f", {name}={value}" for name, value in values.items())

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Text for the next line."""
        self._postfix = f", {text}"

    def close(self) -> None:
        """Nothing to do: every line is complete."""

    def _tenths(self) -> int:
        return 10 * self._done // self._total if self._total else 0


def progress(
    items: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    disable: bool = False,
    **of_a_bar: Any,
) -> Any:
    """Show the progress of a loop.

    Args:
        items: to iterate over; None if the caller counts by `update`.
        desc: name of the work.
        unit: singular.
        total: number of units; len(items) by default.
        initial: units that are finished already.
        disable: show nothing, e.g. on other ranks.
        of_a_bar: further arguments of tqdm.

    Returns:
        A tqdm or Lines of the items: an iterable and a context manager with `update`.
    """
    if total is None:
        total = len(items) if isinstance(items, Sized) else None
    if disable or sys.stderr.isatty():
        return tqdm(items, desc=desc, unit=unit, total=total, initial=initial, disable=disable, **of_a_bar)
    return Lines(() if items is None else items, desc, total, unit, initial)

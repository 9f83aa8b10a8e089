"""Progress of a loop: a bar on a terminal, or a line every ten percent, and every minute, in a file."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

PATIENT_SECONDS = 60.0
"""Maximum between two lines, if a unit is finished in it."""

QUIET_SECONDS = 2.0
"""Minimum between two lines and before the first, so that quick work prints none."""


class Lines(tqdm):
    """A bar that prints lines on stderr: every unit that is finished calls `display`."""

    monitor_interval = 0

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self._started = self._printed = time.monotonic()
        super().__init__(*arguments, **settings, mininterval=0, miniters=1)
        self._tenth = self._tenths()

    def _tenths(self) -> int:
        return 10 * self.n // self.total if self.total else 0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print a line if another tenth is finished or a minute is over."""
        now = time.monotonic()
        since = now - self._printed
        if since >= PATIENT_SECONDS or (since >= QUIET_SECONDS and self._tenths() > self._tenth):
            self._tenth, self._printed = self._tenths(), now
            share = 100 * self.n // self.total if self.total else 0
            metrics = f", {self.postfix}" if self.postfix else ""
            what = f"{self.unit} {self.n} of {self.total}, {now - self._started:.0f} s{metrics}"
            print(f"{self.desc}: {share}% ({what})", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to draw: every line is complete."""
        self._decr_instances(self)


def progress(items: Iterable[Any] | None = None, *, desc: str, unit: str, disable: bool = False, **of_a_bar: Any) -> Any:
    """Show the progress of a loop over items, or, without them, of what the caller counts by `update`.

    Args:
        desc, unit: name of the work, and of one unit, singular.
        disable: show nothing, e.g. on other ranks.
        of_a_bar: tqdm's `total` (len(items) by default), `initial` and others.
    """
    kind = tqdm if disable or sys.stderr.isatty() else Lines
    return kind(items, desc=desc, unit=unit, disable=disable, **of_a_bar)

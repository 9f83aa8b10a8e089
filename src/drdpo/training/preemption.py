"""SIGTERM and SIGUSR1: end at the next step boundary, on every rank at the same one, with a state to go on from.

A signal reaches a rank directly, or as a file that the wrapper makes in its place (src/env.sh): DeepSpeed's launcher does
not hand SIGUSR1 on, and kills the ranks 30 s after a SIGTERM, which is short for writing a state.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from drdpo import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STATUS = os.EX_TEMPFAIL
"""Exit status of a run that was stopped and can go on: 75, "temporary failure, try again" of sysexits.h."""
STOP_FILE = "DRDPO_STOP_FILE"
"""Environment variable that names the wrapper's file."""


class StopRequest:
    """Has this process been asked to stop?"""

    def __init__(self) -> None:
        self._name: str | None = None
        path = os.environ.get(STOP_FILE)
        self._file = Path(path) if path else None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self._name = signal.Signals(number).name

    @property
    def name(self) -> str | None:
        """Of the signal, or None."""
        if self._name is None and self._file is not None and self._file.is_file():
            self._name = self._file.read_text(encoding="utf-8").strip()
        return self._name

    def agreed(self, device: torch.device) -> str | None:
        """Name of the signal that any rank was sent, the same answer on every rank; every rank must call.

        Args:
            device: of the ranks' collectives.
        """
        name = self.name
        number = 0 if name is None else int(signal.Signals.__members__.get(name, signal.SIGTERM))
        asked = int(distributed.gather(torch.tensor([number], device=device)).max())
        return signal.Signals(asked).name if asked else None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGUSR1, also those that came while the launcher had them blocked; main thread only."""
    request = StopRequest()
    before = {number: signal.signal(number, request.note) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield request
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)

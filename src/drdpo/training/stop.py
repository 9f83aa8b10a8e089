"""How a run ends early: by a signal, with a saved state, or because another rank is lost, with one line.

SIGTERM and SIGUSR1 end the run at the next step boundary, the same one on every rank.
A rank whose process dies closes its connections, which the others notice at once under gloo. One that hangs, or whose host
loses power or its network, is noticed after DRDPO_TIMEOUT seconds by those that wait for it. Under NCCL torch's watchdog
then ends the process, and torchrun the other ranks of a machine where one has died. drdpo.distributed has their one line.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch

from drdpo import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_SLOWEST = 1e7
"""Bytes per second of the slowest disk that is waited for."""


class StopRequest:
    """Has this process been asked to stop?"""

    def __init__(self) -> None:
        self._number = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self._number = number

    def agreed(self, device: torch.device) -> str | None:
        """Name of the signal that any rank was sent, the same answer on every rank; every rank must call.

        Args:
            device: of the ranks' collectives.
        """
        asked = int(distributed.gather(torch.tensor([self._number], device=device)).max())
        return signal.Signals(asked).name if asked else None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGUSR1, also those that arrived while src/train_alignment.py blocked them; main thread only."""
    request = StopRequest()
    before = {number: signal.signal(number, request.note) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield request
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def patient(size: int) -> Iterator[None]:
    """Let the ranks wait longer for each other, by as much as writing takes on a slow disk.

    Args:
        size: bytes to be written; a second is allowed for every 10 MB.
    """
    if not torch.distributed.is_initialized():
        yield
        return
    before = _timeout()
    torch.distributed.distributed_c10d._set_pg_timeout(before + timedelta(seconds=size / _SLOWEST))
    try:
        yield
    finally:
        # on_main has left the group where rank 0 failed, and its error is the one to print.
        if torch.distributed.is_initialized():
            torch.distributed.distributed_c10d._set_pg_timeout(before)


def _timeout() -> timedelta:
    group = torch.distributed.distributed_c10d._get_default_group()
    device = torch.device("cuda" if distributed.use_cuda() else "cpu")
    timeout: timedelta = group._get_backend(device).options._timeout
    return timeout

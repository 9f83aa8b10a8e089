"""How long ranks wait for each other, and one line in place of a traceback when one is gone.

A rank whose process dies closes its connections, which the others notice at once under gloo. One that hangs, or whose host
loses power or its network, is noticed after --comm_timeout seconds by those that wait for it. Under NCCL torch's watchdog
then ends the process, and DeepSpeed's launcher the other ranks of a machine where one has died.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from drdpo import distributed
from drdpo.errors import ProcessError

_LOST = re.compile(
    r"[/\\]gloo[/\\]|Gloo \w+ failed|NCCL (error|operation|communicator)|nccl(Remote|System|Internal|InProgress)\w*"
    r"|[Ww]atchdog caught collective|client socket has timed out|[Cc]onnection (was )?(closed|reset|refused) by"
)
"""In messages of gloo (which name its source file), NCCL and torch's store; not in those of disks, models and data."""


def is_lost_rank(error: BaseException) -> bool:
    """Does this error of a collective say that another rank does not answer?"""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))
    )


_SLOWEST = 1e7
"""Bytes a second of the slowest disk that is waited for."""


@contextmanager
def lost_rank_in_one_line(timeout: int) -> Iterator[None]:
    """Turn what torch raises when a rank does not answer into a ProcessError.

    Args:
        timeout: --comm_timeout, seconds.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ProcessError(
            f"rank {distributed.rank()} lost another rank: it died, or did not answer for --comm_timeout={timeout} seconds "
            f"({reason}); the same command goes on from the last saved state"
        ) from error


@contextmanager
def patient(size: int) -> Iterator[None]:
    """Let the ranks wait for each other for as much longer as writing takes on a slow disk.

    Args:
        size: bytes that are written; a second is allowed for every 10 MB.
    """
    if not torch.distributed.is_initialized():
        yield
        return
    before = _timeout()
    torch.distributed.distributed_c10d._set_pg_timeout(before + timedelta(seconds=size / _SLOWEST))
    try:
        yield
    finally:
        torch.distributed.distributed_c10d._set_pg_timeout(before)


def _timeout() -> timedelta:
    group = torch.distributed.distributed_c10d._get_default_group()
    device = torch.device("cuda" if distributed.use_cuda() else "cpu")
    timeout: timedelta = group._get_backend(device).options._timeout
    return timeout

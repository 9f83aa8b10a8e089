"""Is there room on the disk for a checkpoint, before a byte of it is written?"""

import shutil
from pathlib import Path

import torch

from drdpo import distributed
from drdpo.errors import DataError

SLACK = 2**24
"""Bytes for a tokenizer and headers."""


def check_room(folder: Path, needed: int, device: torch.device) -> None:
    """Stop every rank where the disk has no room; every rank must call.

    Args:
        folder: to be written; its parent is there.
        needed: bytes, by rank 0's count.
        device: of the ranks' collectives.

    Raises:
        DataError: on every rank.
    """
    usage = shutil.disk_usage(folder.parent)
    # File systems that cannot tell say zero.
    short = distributed.is_main() and usage.total > 0 and usage.free < needed + SLACK
    if distributed.gather(torch.tensor([float(short)], device=device)).any():
        raise DataError(
            f"{folder}: not written, as it takes {gigabytes(needed + SLACK)} and the disk has {gigabytes(usage.free)} left; "
            "earlier checkpoints are kept; make room, then give the same command again"
        )


def gigabytes(size: int) -> str:
    """A size in bytes, for people."""
    return f"{size / 1e9:.2f} GB"

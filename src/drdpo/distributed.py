"""Rank, world size, sharding and gathering: the same code for one process without a launcher and for many with one."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from drdpo.errors import DataError, ProcessError, UsageError, reason

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")

DEFAULT_TIMEOUT = timedelta(hours=2)
"""How long ranks wait for each other by default; in scoring, if DRDPO_TIMEOUT is not set."""

_SLOWEST = 1e7
"""Bytes per second of the slowest disk that is waited for."""

_LOST = re.compile(
    r"[/\\]gloo[/\\]|Gloo \w+ failed|NCCL (error|operation|communicator)|nccl(Remote|System|Internal|InProgress)\w*"
    r"|[Ww]atchdog caught collective|client socket has timed out|[Cc]onnection (was )?(closed|reset|refused) by"
)
"""In messages of gloo (which name its source file), NCCL and torch's store; not in those of disks, models and data."""


def rank() -> int:
    """This process's rank among all; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank on its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Is this rank 0, which prints and writes?"""
    return rank() == 0


def say(message: str) -> None:
    """Print it, on rank 0."""
    if is_main():
        print(message, flush=True)


class Machines(NamedTuple):
    """Those that divide the parts of a result. They share only the folder, so that the loss of one disturbs no other."""

    nodes: int
    this: int | None
    """None for the process that divides the parts before the others make them, and writes the result afterwards."""
    writes: bool = False
    """Is nothing left to be divided, as the others have ended?"""

    @property
    def by_others(self) -> bool:
        """Is this the process that only divides and writes?"""
        return self.nodes > 1 and self.this is None


ALONE = Machines(1, None)


def machines() -> Machines:
    """What the environment variables DRDPO_NODES (1 by default), DRDPO_NODE_RANK and DRDPO_WRITE say.

    Raises:
        UsageError: they are not a number and a number below it.
    """
    words = os.environ.get("DRDPO_NODES") or "1", os.environ.get("DRDPO_NODE_RANK") or None
    count, this = (int(word) if word and word.isdecimal() else None for word in words)
    if count == 1:
        return ALONE
    if not count or (words[1] is not None and (this is None or this >= count)):
        raise UsageError(f"DRDPO_NODES={words[0]} and DRDPO_NODE_RANK={words[1]} must be a number and one below it, from 0")
    return Machines(count, this, os.environ.get("DRDPO_WRITE") == "true")


def shard(items: Sequence[Item]) -> list[Item]:
    """This rank's share: every world_size-th item, so that shares differ by one item at most."""
    return list(items[rank() :: world_size()])


def use_cuda() -> bool:
    """Is there a GPU to use? DS_ACCELERATOR=cpu, DeepSpeed's switch, keeps torch from it too."""
    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def device() -> "torch.device":
    """This rank's GPU, or the CPU."""
    import torch

    return torch.device("cuda", local_rank()) if use_cuda() else torch.device("cpu")


def send(tensor: "torch.Tensor", device: "torch.device | str") -> "torch.Tensor":
    """Copy a CPU tensor to a device; to CUDA from page-locked memory, so that the copy does not wait for the GPU."""
    import torch

    device = torch.device(device)
    pinned = device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available()
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)


def join(timeout: timedelta = DEFAULT_TIMEOUT) -> None:
    """Join the process group, once: NCCL on GPUs, gloo on CPUs. A rank waits up to `timeout` for the others. A single
    process joins none."""
    import torch

    if use_cuda():
        torch.cuda.set_device(local_rank())
    if world_size() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if use_cuda() else "gloo", timeout=timeout)


def leave() -> None:
    """Leave the process group, if any; otherwise the threads of its connections may abort the process at its end."""
    import torch

    if joined():
        torch.distributed.destroy_process_group()


def joined() -> bool:
    """Is this process in a process group? Without one it is alone, whatever a cluster's template set RANK to."""
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def barrier() -> None:
    """Wait for every rank."""
    import torch

    if joined():
        torch.distributed.barrier()


def on_main(action: Callable[[], object], status: int = 1) -> None:
    """Run `action` on rank 0, e.g. to write a file; every rank must call this.

    If it fails, rank 0 raises its error and the others exit silently with this status; otherwise they would wait for rank 0
    in their next collective and report it lost.
    """
    failure: BaseException = SystemExit(status)
    try:
        if is_main() or not joined():
            action()
        failed = False
    except Exception as error:
        failed, failure = True, error
    if any_rank(failed):
        leave()
        raise failure


def any_rank(flag: bool) -> bool:
    """Is it so on any rank? Every rank must call this. A process without a group does not touch its GPU for it."""
    return any(gather_floats([float(flag)])) if joined() else flag


def is_lost_rank(error: BaseException) -> bool:
    """Does this error of a collective mean that another rank does not answer?"""
    import torch

    said = isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    return said or isinstance(error, torch.distributed.DistError)


def seconds_to_wait(usual: int = 1800) -> int:
    """How long ranks wait for one that does not answer: the environment variable DRDPO_TIMEOUT, `usual` by default.

    Raises:
        UsageError: it is not a positive whole number.
    """
    text = os.environ.get("DRDPO_TIMEOUT") or str(usual)
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"DRDPO_TIMEOUT={text} must be a number of seconds, 1 or more")
    return int(text)


@contextmanager
def patient(size: int) -> Iterator[None]:
    """Raise the ranks' timeout by the time that writing `size` bytes takes on a slow disk."""
    import torch

    if not torch.distributed.is_initialized():
        yield
        return
    groups = torch.distributed.distributed_c10d
    backend = groups._get_default_group()._get_backend(torch.device("cuda" if use_cuda() else "cpu"))
    before = backend.options._timeout
    groups._set_pg_timeout(before + timedelta(seconds=size / _SLOWEST))
    try:
        yield
    finally:
        # on_main has left the group where rank 0 failed, and its error is the one to print.
        if torch.distributed.is_initialized():
            groups._set_pg_timeout(before)


@contextmanager
def lost_rank_in_one_line(timeout: int) -> Iterator[None]:
    """Turn what torch raises when a rank does not answer into a ProcessError; otherwise leave the process group at the end.

    A rank whose process dies is noticed at once under gloo; one that hangs, or whose host is gone, after `timeout` seconds.
    Under NCCL torch's watchdog then ends the process. Under torchrun the error goes to the rank's error.json, with the
    traceback, and drdpo.launch prints one line for all ranks.
    """
    try:
        yield
        leave()
    except (UsageError, DataError, ProcessError, SystemExit):
        leave()  # All ranks raise these together. After other errors, such as a lost rank, this would wait forever.
        raise
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        lost = ProcessError(
            f"rank {rank()} lost another rank: it died, or did not answer for DRDPO_TIMEOUT={timeout} seconds "
            f"({reason(error)}); rerun the same command to resume from the last saved state"
        )
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(lost)
            sys.exit(1)
        raise lost from error


def gather(values_B: "torch.Tensor") -> "torch.Tensor":
    """The values [B, ...] of all ranks in rank order, detached: [sum of B, ...]. B may differ between ranks."""
    import torch

    values_B = values_B.detach().contiguous()
    if world_size() == 1:
        return values_B
    sizes = [torch.empty(1, dtype=torch.int64, device=values_B.device) for _ in range(world_size())]
    torch.distributed.all_gather(sizes, torch.tensor([len(values_B)], device=values_B.device))
    longest = int(torch.cat(sizes).max())
    # Collectives need equal shapes: pad the shorter ones, and cut the padding off again.
    filled = values_B.new_zeros(longest, *values_B.shape[1:])
    filled[: len(values_B)] = values_B
    parts = [torch.empty_like(filled) for _ in range(world_size())]
    torch.distributed.all_gather(parts, filled)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def gather_floats(values: Sequence[float]) -> list[float]:
    """Numbers of all ranks in rank order."""
    import torch

    found: list[float] = gather(torch.tensor(values, dtype=torch.float64, device=device())).tolist()
    return found

"""What the kernels with hand-written backward passes have in common."""

import torch
from torch import Tensor

from drdpo.distributed import use_cuda


def wide(tensor: Tensor) -> Tensor:
    """float32, or float64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def refuse_graph(message: str = "the tangent kernels are differentiable once only") -> None:
    """Autograd would take the result of a hand-written backward pass for a constant: say so instead.

    Raises:
        RuntimeError: a graph of the backward pass is being asked for.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(message)


def on_cuda(tensor: Tensor) -> bool:
    """Does CUDA do the work? For tensors without content: will it?"""
    return tensor.is_cuda or (tensor.is_meta and use_cuda())


def in_pieces(tensor: Tensor) -> bool:
    """Is the work to be cut to the size of a cache? On a CPU, and for tensors without content where a CPU will do it."""
    return not on_cuda(tensor)

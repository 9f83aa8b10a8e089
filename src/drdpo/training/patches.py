"""A sequence's first tokens in float32 arithmetic on bfloat16 weights, for WDPO's input gradient and tangent pass.

A model's activations at a sequence's first tokens grow a thousandfold, and all later tokens attend to them. What rounding
does there is most of what separates the penalty's gradient in bfloat16 from float32's, and these rows are few: their
products are taken in float32, and for all rows sums over layers and attention (Policy.attention_dtype). Products of the
other rows stay in bfloat16, as do adapters. Over six pairs of 2 x 256 tokens on SmolLM2-135M the worst error is 8% so; with
attention in bfloat16 it was 27% on one of them, without any row in float32 72%.

Shape suffixes: N rows, I inputs, O outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from drdpo.distributed import send
from drdpo.kernels.linear_logprob import refuse_graph
from drdpo.kernels.packed_attention import PrefixGroup

POSITIONS = 4
"""Tokens of a sequence that count as its first."""


class WideRows(NamedTuple):
    """What a decoder layer under `widen` is given along with its hidden states."""

    rows_R: Tensor
    """Indices of the rows in float32."""
    frozen: bool
    """No gradient of a parameter is wanted."""


class _LinearOfRows(Function):
    """x W^T + b in float32, of which the product of the given rows is taken in float32, and that of the others in the
    weight's dtype; so for the gradient of x. Sums over rows are taken of what that dtype keeps of their terms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, rows_R: Tensor, frozen: bool) -> Tensor:
        ctx.frozen = frozen
        narrow_NI = x.to(weight_OI.dtype).flatten(0, -2)
        ctx.save_for_backward(None if frozen else narrow_NI, weight_OI, rows_R)
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        # Not by nn.functional.linear, which the tangent pass replaces where there is a bias.
        rough_NO = narrow_NI @ weight_OI.T if bias_O is None else torch.addmm(bias_O, narrow_NI, weight_OI.T)
        out = rough_NO.to(x.dtype).view(*x.shape[:-1], -1)
        fine = x.index_select(-2, rows_R) @ weight_OI.to(x.dtype).T
        return out.index_copy_(-2, rows_R, fine if bias_O is None else fine + bias_O.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        refuse_graph("linear layers with rows in float32 are differentiable once only")
        narrow_NI, weight_OI, rows_R = ctx.saved_tensors
        narrow_NO = grad.to(weight_OI.dtype).flatten(0, -2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (narrow_NO @ weight_OI).to(grad.dtype).view(*grad.shape[:-1], -1)
            grad_x.index_copy_(-2, rows_R, grad.index_select(-2, rows_R) @ weight_OI.to(grad.dtype))
        weight, bias = (needed and not ctx.frozen for needed in ctx.needs_input_grad[1:3])
        grad_weight_OI = narrow_NO.T @ narrow_NI if weight else None
        grad_bias_O = grad.flatten(0, -2).sum(dim=0).to(ctx.bias_dtype) if bias else None
        return grad_x, grad_weight_OI, grad_bias_O, None, None


def first_rows(groups: Sequence[PrefixGroup], device: torch.device) -> Tensor:
    """Indices of the rows of a packed row that are among the first tokens of a sequence."""
    rows: list[int] = []
    start = 0
    for group in groups:
        rows += range(start, start + min(group.prefix, POSITIONS))
        start += group.prefix
        for length in group.suffixes:
            rows += range(start, start + max(0, min(length, POSITIONS - group.prefix)))
            start += length
    return send(torch.tensor(rows, dtype=torch.int64), device)


def widen(layers: Sequence[nn.Module]) -> None:
    """Let decoder layers that are called with a keyword `wide_rows` (a WideRows) run as that says.

    In the layer, so that its recomputation under gradient checkpointing does so too.
    """
    for layer in layers:
        layer.forward = partial(_widened, layer.forward)


def _widened(forward: Callable[..., Any], *arguments: Any, wide_rows: WideRows | None = None, **options: Any) -> Any:
    if wide_rows is None:
        return forward(*arguments, **options)
    with rows_in_float32(*wide_rows):
        return forward(*arguments, **options)


@contextmanager
def rows_in_float32(rows_R: Tensor, frozen: bool = False) -> Iterator[None]:
    """Within it, linear maps of float32 inputs [..., N, I] by weights of less precision give float32 results [..., N, O]:
    the product of the given rows is taken in float32, that of the others in the weight's dtype.

    A checkpointed layer must enter it itself, to find it in its recomputation too.

    Args:
        rows_R: indices in [0, N).
        frozen: weights are taken for constants: autograd would have their gradients computed, and thrown away, wherever
            they are trained at all.
    """
    linear = nn.functional.linear

    def linear_of_rows(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        if x.dtype == weight_OI.dtype:
            return linear(x, weight_OI, bias_O)
        return _LinearOfRows.apply(x, weight_OI, bias_O, rows_R, frozen)

    nn.functional.linear = linear_of_rows
    try:
        yield
    finally:
        nn.functional.linear = linear

"""A sequence's first tokens in float32 arithmetic on bfloat16 weights, for WDPO's input gradient and tangent pass.

A model's activations at a sequence's first tokens grow a thousandfold, and all later tokens attend to them. What rounding
does there is most of what separates the penalty's gradient in bfloat16 from float32's, and these rows are few: their
products are taken in float32, and sums over layers in float32 for all rows. Products of the other rows stay in bfloat16.

Shape suffixes: N rows, I inputs, O outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

POSITIONS = 16
"""Tokens of a sequence that count as its first."""


class _WideLinear(Function):
    """x W^T + b with x and the result in float32; keeps W as it is stored, not its widened copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        return nn.functional.linear(x, weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        rows_NO = grad.flatten(0, -2)
        grad_x = grad @ weight_OI.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight_OI = (rows_NO.T @ x.flatten(0, -2)).to(weight_OI.dtype) if ctx.needs_input_grad[1] else None
        grad_bias_O = rows_NO.sum(dim=0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight_OI, grad_bias_O


def first_rows(positions_1N: Tensor) -> Tensor:
    """Indices of the rows of a packed row that are a sequence's first tokens."""
    return (positions_1N[0] < POSITIONS).nonzero()[:, 0]


@contextmanager
def wide_rows(rows: Tensor) -> Iterator[None]:
    """Within it, linear maps of float32 inputs [..., N, I] by weights of less precision give float32 results [..., N, O]:
    the product of the given rows is taken in float32, that of the others in the weight's dtype.

    A checkpointed layer must enter it itself, to find it in its recomputation too.

    Args:
        rows: indices in [0, N).
    """
    linear = nn.functional.linear

    def linear_of_rows(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        if x.dtype == weight_OI.dtype:
            return linear(x, weight_OI, bias_O)
        rough = linear(x.to(weight_OI.dtype), weight_OI, bias_O).to(x.dtype)
        return rough.index_copy(-2, rows, _WideLinear.apply(x.index_select(-2, rows), weight_OI, bias_O))

    nn.functional.linear = linear_of_rows
    try:
        yield
    finally:
        nn.functional.linear = linear

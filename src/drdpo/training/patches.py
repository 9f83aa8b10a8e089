"""Every patch of a library's code, with its reason.

* torch.nn.functional.linear, within `rows_in_float32` and `bias_of_value_only`. Modules are called as they are, so that
  adapters around them and the hooks by which ZeRO-3 fetches their weights work. A TorchFunctionMode would not do: it does
  not see the linear map that ZeRO-3 puts in place of torch's.
* The forward of decoder layers, by `widen`: a layer enters `rows_in_float32` itself, so that its recomputation under
  gradient checkpointing does too.
* DeepSpeed's clipping without ZeRO, by `note_gradient_norm`.
* Values, not code, are changed where they are used: the dropouts, the rotary kind and bitsandbytes' layers of a model
  (drdpo.training.policy), and DeepSpeed's list of compiled operations (drdpo.training.engine).

Why rows in float32: a model's activations at a sequence's first tokens grow a thousandfold, and all later tokens attend to
them. Rounding there is most of what separates the penalty's gradient in bfloat16 from float32's, and these rows are few. So
WDPO's input gradient and tangent pass take their products in float32, and for all rows sums over layers and attention
(Policy.attention_dtype). Products of the other rows stay in bfloat16, as do adapters. Over six pairs of 2 x 256 tokens on
SmolLM2-135M the worst error is 8% so; with attention in bfloat16 it was 27% on one of them, without any row in float32 72%.

Shape suffixes: N rows, R rows in float32, I inputs, O outputs, D width.
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


@contextmanager
def linear_by(by: Callable[..., Tensor]) -> Iterator[None]:
    """Within it, nn.functional.linear is by(the linear before, x, weight, bias)."""
    linear = nn.functional.linear
    nn.functional.linear = partial(by, linear)
    try:
        yield
    finally:
        nn.functional.linear = linear


POSITIONS = 4
"""Tokens of a sequence that count as its first."""


class WideRows(NamedTuple):
    """The keyword `wide_rows` of a decoder layer under `widen`."""

    rows_R: Tensor
    """Indices of the rows in float32."""
    frozen: bool
    """See rows_in_float32."""


def product(x: Tensor, weight_OI: Tensor, rows_R: Tensor | None) -> Tensor:
    """x W^T [..., N, O] in the dtype of x, without a graph. If the weight has another, the product is taken in that, and of
    the given rows in the dtype of x."""
    if x.dtype == weight_OI.dtype:
        return x @ weight_OI.T
    y = (x.to(weight_OI.dtype) @ weight_OI.T).to(x.dtype)
    if rows_R is None:
        return y
    return y.index_copy_(-2, rows_R, x.index_select(-2, rows_R) @ weight_OI.to(x.dtype).T)


def weight_gradient(dtype: torch.dtype, first: tuple[Tensor, Tensor], *others: tuple[Tensor, Tensor]) -> Tensor:
    """[O, I] the sum of grad^T x over pairs (grad [N, O], x [N, I]), of what a weight's dtype keeps of both."""
    grad_NO, x_NI = first
    total_OI = grad_NO.to(dtype).T @ x_NI.to(dtype)
    for grad_NO, x_NI in others:
        total_OI.addmm_(grad_NO.to(dtype).T, x_NI.to(dtype))
    return total_OI


class _LinearOfRows(Function):
    """x W^T + b in float32, of which the product of the given rows is taken in float32, and that of the others in the
    weight's dtype; so for the gradient of x. Sums over rows are taken of what that dtype keeps of their terms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, rows_R: Tensor, frozen: bool) -> Tensor:
        ctx.frozen = frozen
        narrow_NI = x.to(weight_OI.dtype).flatten(0, -2)
        ctx.save_for_backward(None if frozen else narrow_NI, weight_OI, rows_R)
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        # Not by nn.functional.linear, which bias_of_value_only may have replaced.
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
    """Let decoder layers that are called with a keyword `wide_rows` (a WideRows) run under rows_in_float32."""
    for layer in layers:
        layer.forward = partial(_widened, layer.forward)


def _widened(forward: Callable[..., Any], *arguments: Any, wide_rows: WideRows | None = None, **options: Any) -> Any:
    if wide_rows is None:
        return forward(*arguments, **options)
    with rows_in_float32(*wide_rows):
        return forward(*arguments, **options)


def rows_in_float32(rows_R: Tensor, frozen: bool = False) -> Any:
    """Within it, linear maps of float32 inputs [..., N, I] by weights of less precision give float32 results [..., N, O]:
    the product of the given rows is taken in float32, that of the others in the weight's dtype.

    Args:
        rows_R: indices in [0, N).
        frozen: treat weights as constants: autograd would otherwise compute, and discard, the gradients of trained ones.
    """

    def linear_of_rows(linear: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        if x.dtype == weight_OI.dtype:
            return linear(x, weight_OI, bias_O)
        return _LinearOfRows.apply(x, weight_OI, bias_O, rows_R, frozen)

    return linear_by(linear_of_rows)


def note_gradient_norm(engine: Any, parameters: list[nn.Parameter], max_norm: float) -> None:
    """Let a DeepSpeed engine without ZeRO, which clips but keeps no norm, keep it: a gradient that is not finite would
    otherwise go unnoticed."""

    def clip() -> None:
        engine._global_grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))

    engine.clip_fp32_gradients = clip

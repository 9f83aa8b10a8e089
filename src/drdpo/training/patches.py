"""Every patch of a library's code, with its reason.

* torch.nn.functional.linear, within `linear_by`. Modules are called as they are, so that adapters around them and the hooks
  by which ZeRO-3 fetches their weights work. A TorchFunctionMode would not do: it does not see the linear map that ZeRO-3
  puts in place of torch's.
* The forward of decoder layers, by `widen`: a layer enters `linear_by` itself, so that its recomputation under gradient
  checkpointing does too.
* DeepSpeed's clipping without ZeRO, by `note_gradient_norm`.
* Values, not code, are changed where they are used: the dropouts, the rotary kind and bitsandbytes' layers of a model
  (drdpo.training.policy), and DeepSpeed's list of compiled operations (drdpo.training.engine).

Why values in float32: rounding a layer's values to bfloat16 moves the point at which the model is differentiated. Where an
early layer magnifies a token's tangent a hundred times, it magnifies this error as well, and the penalty's gradient depends
on it to first order. So WDPO takes the linear maps of values in float32, in every pass alike: the policy's, its reference's
and the evaluation's. Tangents and gradients enter linearly; their products stay in the weights' dtype, and so do adapters.
Over twelve pairs of 2 x 64 tokens on SmolLM2-135M the penalty's gradient is 3% off at worst; with values in float32 at each
sequence's first four tokens only it was 29%, whether or not tangents and gradients were in float32.

Shape suffixes: N rows, I inputs, O outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from drdpo.kernels.linear_logprob import on_cuda, refuse_graph


@contextmanager
def linear_by(by: Callable[..., Tensor]) -> Iterator[None]:
    """Within it, nn.functional.linear is by(the linear before, x, weight, bias)."""
    linear = nn.functional.linear
    nn.functional.linear = partial(by, linear)
    try:
        yield
    finally:
        nn.functional.linear = linear


def product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T [N, O] in the dtype of the weight, without a graph."""
    return x_NI.to(weight_OI.dtype) @ weight_OI.T


def value_product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T [N, O] in the dtype of x, without a graph; if the weight has less, to float32's precision.

    On CUDA, where a float32 product has no tensor cores, x is the sum of two numbers of the weight's dtype: to 2^-17 in
    bfloat16. The weight is never widened there.
    """
    if x_NI.dtype == weight_OI.dtype:
        return x_NI @ weight_OI.T
    if not on_cuda(x_NI):
        return x_NI @ weight_OI.to(x_NI.dtype).T
    high_NI = x_NI.to(weight_OI.dtype)
    low_NI = (x_NI - high_NI).to(weight_OI.dtype)
    out_NO = torch.mm(high_NI, weight_OI.T, out_dtype=torch.float32)
    return torch.addmm(out_NO, low_NI, weight_OI.T, out_dtype=torch.float32)


def weight_gradient(dtype: torch.dtype, first: tuple[Tensor, Tensor], *others: tuple[Tensor, Tensor]) -> Tensor:
    """[O, I] the sum of grad^T x over pairs (grad [N, O], x [N, I]), of what a weight's dtype keeps of both."""
    grad_NO, x_NI = first
    total_OI = grad_NO.to(dtype).T @ x_NI.to(dtype)
    for grad_NO, x_NI in others:
        # Not addmm_, which counters of arithmetic do not know.
        torch.addmm(total_OI, grad_NO.to(dtype).T, x_NI.to(dtype), out=total_OI)
    return total_OI


class _ValueLinear(Function):
    """x W^T + b by value_product; gradients by products in the weight's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        x_NI = x.flatten(0, -2)
        ctx.save_for_backward(x_NI.to(weight_OI.dtype) if ctx.needs_input_grad[1] else None, weight_OI)
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        out_NO = value_product(x_NI, weight_OI)
        return (out_NO if bias_O is None else out_NO.add_(bias_O)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        refuse_graph("linear maps with values in float32 are differentiable once only")
        narrow_NI, weight_OI = ctx.saved_tensors
        grad_NO = grad.flatten(0, -2)
        x, weight, bias = ctx.needs_input_grad
        return (
            product(grad_NO, weight_OI.T).to(grad.dtype).view(*grad.shape[:-1], -1) if x else None,
            weight_gradient(weight_OI.dtype, (grad_NO, narrow_NI)) if weight else None,
            grad_NO.sum(dim=0).to(ctx.bias_dtype) if bias else None,
        )


def values_in_float32() -> Any:
    """Within it, linear maps of float32 values [..., N, I] by weights of less precision give float32 results [..., N, O]."""

    def by(linear: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        if x.dtype == weight_OI.dtype:
            return linear(x, weight_OI, bias_O)
        return _ValueLinear.apply(x, weight_OI, bias_O)

    return linear_by(by)


def widen(layers: Sequence[nn.Module]) -> None:
    """Let decoder layers run under values_in_float32."""
    for layer in layers:
        layer.forward = values_in_float32()(layer.forward)  # as a decorator, it is entered anew at every call


def note_gradient_norm(engine: Any, parameters: list[nn.Parameter], max_norm: float) -> None:
    """Let a DeepSpeed engine without ZeRO, which clips but keeps no norm, keep it: a gradient that is not finite would
    otherwise go unnoticed."""

    def clip() -> None:
        engine._global_grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))

    engine.clip_fp32_gradients = clip

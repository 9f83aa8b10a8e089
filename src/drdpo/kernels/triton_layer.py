# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of drdpo.kernels.tangent: norm, gate and rotary positions on values and tangents, each part in one launch.

They compute in float32 and keep nothing in memory between their inputs and outputs. drdpo.kernels.tangent imports this
module only where a GPU, or Triton's interpreter, will run the kernels.

Shape suffixes: N tokens, D width, I inner width, E width of a head, P programs; within a kernel R rows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from drdpo.kernels.triton_logprob import processors


@triton.jit
def _norm_kernel(
    x_ptr, y_ptr, a_ptr, b_ptr, weight_ptr, out_ptr, part_ptr, rows, epsilon,
    PART: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One part of the norm of some rows, y being dx, or b for the part "backward"; of the weight's gradient the sum over
    this program's."""
    column_D = tl.arange(0, BLOCK_D)
    inside_D = column_D < WIDTH
    weight_D = tl.load(weight_ptr + column_D, mask=inside_D, other=0.0).to(tl.float32)[None, :]
    part_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row_R = block * BLOCK_R + tl.arange(0, BLOCK_R)
        place_RD = row_R[:, None].to(tl.int64) * WIDTH + column_D[None, :]
        inside_RD = (row_R[:, None] < rows) & inside_D[None, :]
        x_RD = tl.load(x_ptr + place_RD, mask=inside_RD, other=0.0).to(tl.float32)
        r_R1 = 1 / tl.sqrt(tl.sum(x_RD * x_RD, axis=1) / WIDTH + epsilon)[:, None]
        n_RD = x_RD * r_R1
        if PART == "forward":
            out_RD = n_RD.to(x_ptr.dtype.element_ty).to(tl.float32) * weight_D
        if PART == "tangent":
            dx_RD = tl.load(y_ptr + place_RD, mask=inside_RD, other=0.0).to(tl.float32)
            across_RD = dx_RD - n_RD * (tl.sum(n_RD * dx_RD, axis=1) / WIDTH)[:, None]
            out_RD = (r_R1 * across_RD).to(x_ptr.dtype.element_ty).to(tl.float32) * weight_D
        if PART == "backward":
            b_RD = tl.load(y_ptr + place_RD, mask=inside_RD, other=0.0).to(tl.float32) * weight_D
            out_RD = r_R1 * (b_RD - n_RD * (tl.sum(n_RD * b_RD, axis=1) / WIDTH)[:, None])
        if PART == "second" or PART == "second_and_weight":
            dx_RD = tl.load(y_ptr + place_RD, mask=inside_RD, other=0.0).to(tl.float32)
            a_RD = tl.load(a_ptr + place_RD, mask=inside_RD, other=0.0).to(tl.float32)
            b_RD = tl.load(b_ptr + place_RD, mask=inside_RD, other=0.0).to(tl.float32)
            p_R1 = (tl.sum(n_RD * dx_RD, axis=1) / WIDTH)[:, None]
            if PART == "second_and_weight":
                part_D += tl.sum(a_RD * n_RD + b_RD * (r_R1 * (dx_RD - n_RD * p_R1)), axis=0)
            a_RD, b_RD = a_RD * weight_D, b_RD * weight_D
            q_R1 = (tl.sum(n_RD * b_RD, axis=1) / WIDTH)[:, None]
            u_R1 = (tl.sum(b_RD * dx_RD, axis=1) / WIDTH)[:, None]
            straight_RD = a_RD - n_RD * (tl.sum(n_RD * a_RD, axis=1) / WIDTH)[:, None]
            curved_RD = p_R1 * b_RD + q_R1 * dx_RD + n_RD * (u_R1 - 3 * p_R1 * q_R1)
            out_RD = r_R1 * (straight_RD - r_R1 * curved_RD)
        tl.store(out_ptr + place_RD, out_RD.to(out_ptr.dtype.element_ty), mask=inside_RD)
    if PART == "second_and_weight":
        tl.store(part_ptr + tl.program_id(0) * WIDTH + column_D, part_D, mask=inside_D)


def rms_norm(given: Sequence[Tensor], outs: Sequence[Tensor], part: str, weight_D: Tensor, epsilon: float) -> Tensor | None:
    """A part of drdpo.kernels.tangent's RMS norm: "forward", "tangent", "backward" (of b), "second", or
    "second_and_weight", which returns the weight's gradient [D] in float32. Given are x and what else the part reads of dx,
    a, b, in this order."""
    rows, width = given[0].shape
    block = triton.next_power_of_2(width)
    together = max(1, 2048 // block)
    programs = triton.cdiv(rows, together)
    part_PD = outs[0]
    if part == "second_and_weight":
        programs = min(programs, 2 * processors(given[0].device))
        part_PD = torch.empty(programs, width, dtype=torch.float32, device=given[0].device)
    _norm_kernel[(programs,)](
        *_filled(given, 4), weight_D, outs[0], part_PD, rows, epsilon,
        PART=part, WIDTH=width, BLOCK_R=together, BLOCK_D=block, num_warps=8 if block >= 2048 else 4,
    )  # fmt: skip
    return part_PD.sum(dim=0) if part == "second_and_weight" else None


def _filled(given: Sequence[Tensor], count: int) -> list[Tensor]:
    """Arguments, and the first in the place of those that a part does not read."""
    parts = [tensor.contiguous() for tensor in given]
    return parts + parts[:1] * (count - len(parts))


@triton.jit
def _gate_kernel(
    g_ptr, u_ptr, y_ptr, du_ptr, a_ptr, b_ptr, out_ptr, up_ptr, size, PART: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One part of the gate, y being dg, or b for the part "backward"."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    g = tl.load(g_ptr + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + place, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    slope = s + silu * (1 - s)
    if PART == "forward":
        out = silu * u
    if PART == "tangent" or PART == "second":
        dg = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
        du = tl.load(du_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if PART == "tangent":
        out = slope * dg * u + silu * du
    if PART == "backward":
        b = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
        out, for_up = slope * u * b, silu * b
    if PART == "second":
        b = tl.load(b_ptr + place, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + place, mask=inside, other=0.0).to(tl.float32)
        bend = (1 - s) * (2 * s + silu * (1 - 2 * s))
        out = (bend * b * dg + a * slope) * u + slope * b * du
        for_up = silu * a + slope * b * dg
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)
    if PART == "backward" or PART == "second":
        tl.store(up_ptr + place, for_up.to(up_ptr.dtype.element_ty), mask=inside)


def silu_gate(given: Sequence[Tensor], outs: Sequence[Tensor], part: str) -> None:
    """A part of drdpo.kernels.tangent's SiLU gate. Given are g, u and what else the part reads of dg, du, a, b, in this
    order; `outs` gets the output, or the gradients for gate and up."""
    size = outs[0].numel()
    _gate_kernel[(triton.cdiv(size, 1024),)](*_filled(given, 6), outs[0], outs[-1], size, PART=part, BLOCK=1024)


@triton.jit
def _rotate_kernel(x_ptr, cos_ptr, sin_ptr, out_ptr, size, rows, per_row, sign, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """x cos + turned sin, or with the sign -1 turned back."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, column = place < size, place % WIDTH
    angle = (place // per_row) % rows * WIDTH + column
    first = column < WIDTH // 2
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + tl.where(first, place + WIDTH // 2, place - WIDTH // 2), mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    out = x * cos + tl.where(first, -other, other) * sign * sin
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


def rotate(x: Tensor, cos_N1E: Tensor, sin_N1E: Tensor, back: bool, out: Tensor) -> None:
    """As drdpo.kernels.tangent.rotate, into `out`."""
    rows, heads, width = x.shape[-3:]
    _rotate_kernel[(triton.cdiv(x.numel(), 1024),)](
        x.contiguous(), cos_N1E.contiguous(), sin_N1E.contiguous(), out, x.numel(), rows, heads * width,
        -1.0 if back else 1.0, WIDTH=width, BLOCK=1024,
    )  # fmt: skip

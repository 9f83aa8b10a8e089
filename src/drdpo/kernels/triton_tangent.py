# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of drdpo.kernels.tangent: attention over a packed row on values and tangents.

Attention multiplies tiles of queries by tiles of keys and keeps their logits on the chip. Every gradient has one program
that sums it in a fixed order, so a run can be repeated to the bit: a block of queries loops over the keys that it sees, a
block of keys over the queries that see it. In a packed row these are the queries from the key on, up to the end of its
piece, or of its group if the key is the prefix's.

Precision. Logits and slopes are float32 and never in memory. Tensor cores multiply bfloat16, so a wider number is split into
the nearest bfloat16 and what is left, and a product of two numbers into three: high high + low high + high low. That keeps
16 bits of a factor where TF32 keeps 11 and bfloat16 has 8.

drdpo.kernels.tangent imports this module only where a GPU, or Triton's interpreter, will run the kernels.

Shape suffixes: N tokens, H query heads, K key-value heads, E width of a head; within a kernel M queries, J keys, X
and Y either, C columns of a chunk, E padded to a power of two.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drdpo.distributed import send
from drdpo.kernels.packed_attention import PrefixGroup
from drdpo.kernels.triton_logprob import INTERPRETED

# Attention.


@triton.jit
def _columns(pointer, row_X, head, HEADS, start, WIDTH: tl.constexpr, COUNT: tl.constexpr, WIDEN: tl.constexpr):
    """[X, COUNT] columns from `start` on of rows of a head of a tensor [N, HEADS, WIDTH]; zero beyond the width.

    All rows must be the tensor's: a mask for them would cost registers. Where a block is longer than what is left of its
    piece, the last row stands for the missing ones: it is computed, and written, several times.
    """
    column_C = start + tl.arange(0, COUNT)
    place_XC = (row_X[:, None] * HEADS + head) * WIDTH + column_C[None, :]
    tile_XC = tl.load(pointer + place_XC, mask=(column_C[None, :] < WIDTH) & (HEADS > 0), other=0.0)
    return tile_XC.to(tl.float32) if WIDEN else tile_XC


@triton.jit
def _store(pointer, tile_XE, row_X, head, HEADS, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr):
    column_E = tl.arange(0, BLOCK_E)
    place_XE = (row_X[:, None] * HEADS + head) * WIDTH + column_E[None, :]
    tl.store(pointer + place_XE, tile_XE.to(pointer.dtype.element_ty), mask=column_E[None, :] < WIDTH)


@triton.jit
def _products(
    left_ptr, dleft_ptr, turn_ptr, dturn_ptr, row_X, head_X, heads_X, plane_X,
    right_ptr, dright_ptr, swing_ptr, dswing_ptr, row_Y, head_Y, heads_Y, plane_Y,
    SLOPE: tl.constexpr, CROSS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """[X, Y] Q K^T; if SLOPE its tangent; if CROSS b V^T; if both a V^T + b dV^T, which is as much for a.

    Left are Q, dQ, b, a and right K, dK, V, dV, or the reverse, which gives the transposed: the sums are symmetric. Their
    columns come in chunks, as whole tiles would not fit the registers, and high and low parts in turn.
    """
    logit_XY = tl.zeros((BLOCK_X, BLOCK_Y), dtype=tl.float32)
    slope_XY = tl.zeros((BLOCK_X, BLOCK_Y), dtype=tl.float32)
    cross_XY = tl.zeros((BLOCK_X, BLOCK_Y), dtype=tl.float32)
    total_XY = tl.zeros((BLOCK_X, BLOCK_Y), dtype=tl.float32)
    chunks: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    for step in range(0, PARTS * chunks):
        part, start = step // chunks, (step % chunks) * CHUNK
        low_X = tl.multiple_of(tl.where(part == 1, plane_X, 0), 16)
        low_Y = tl.multiple_of(tl.where(part == 2, plane_Y, 0), 16)
        left_XC = _columns(left_ptr + low_X, row_X, head_X, heads_X, start, WIDTH, CHUNK, WIDEN)
        right_YC = _columns(right_ptr + low_Y, row_Y, head_Y, heads_Y, start, WIDTH, CHUNK, WIDEN)
        logit_XY = tl.dot(left_XC, tl.trans(right_YC), logit_XY)
        if SLOPE:
            dleft_XC = _columns(dleft_ptr + low_X, row_X, head_X, heads_X, start, WIDTH, CHUNK, WIDEN)
            slope_XY = tl.dot(dleft_XC, tl.trans(right_YC), slope_XY)
            dright_YC = _columns(dright_ptr + low_Y, row_Y, head_Y, heads_Y, start, WIDTH, CHUNK, WIDEN)
            slope_XY = tl.dot(left_XC, tl.trans(dright_YC), slope_XY)
        if CROSS:
            turn_XC = _columns(turn_ptr + low_X, row_X, head_X, heads_X, start, WIDTH, CHUNK, WIDEN)
            swing_YC = _columns(swing_ptr + low_Y, row_Y, head_Y, heads_Y, start, WIDTH, CHUNK, WIDEN)
            cross_XY = tl.dot(turn_XC, tl.trans(swing_YC), cross_XY)
            if SLOPE:
                dturn_XC = _columns(dturn_ptr + low_X, row_X, head_X, heads_X, start, WIDTH, CHUNK, WIDEN)
                total_XY = tl.dot(dturn_XC, tl.trans(swing_YC), total_XY)
                dswing_YC = _columns(dswing_ptr + low_Y, row_Y, head_Y, heads_Y, start, WIDTH, CHUNK, WIDEN)
                total_XY = tl.dot(turn_XC, tl.trans(dswing_YC), total_XY)
    return logit_XY, slope_XY, cross_XY, total_XY


@triton.jit
def _add_product(
    sum_XE, factor_XY, pointer, row_Y, head, HEADS, plane,
    WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The sum plus the product of a factor with rows of a tensor."""
    high_YE = _columns(pointer, row_Y, head, HEADS, 0, WIDTH, BLOCK_E, WIDEN)
    high_XY = factor_XY.to(tl.bfloat16)
    rest_XY = factor_XY - high_XY.to(tl.float32)
    sum_XE = tl.dot(high_XY.to(high_YE.dtype), high_YE, sum_XE)
    if PARTS == 3:
        sum_XE = tl.dot(rest_XY.to(tl.bfloat16).to(high_YE.dtype), high_YE, sum_XE)
        low_YE = _columns(pointer + plane, row_Y, head, HEADS, 0, WIDTH, BLOCK_E, WIDEN)
        sum_XE = tl.dot(high_XY.to(low_YE.dtype), low_YE, sum_XE)
    return sum_XE


@triton.jit
def _block_of_queries(table_ptr, BLOCK_M: tl.constexpr):
    """Its rows, their places among the keys that they see, the number of these, and for _key_rows how they lie."""
    entry = table_ptr + tl.program_id(0) * 6
    first, end = tl.load(entry), tl.load(entry + 1)
    own, prefix, before = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    row_M = tl.minimum(first + tl.arange(0, BLOCK_M), end - 1)
    return row_M, before + row_M - own, before + tl.minimum(first + BLOCK_M, end) - own, end, own, prefix, before


@triton.jit
def _key_rows(start, end, own, prefix, before, BLOCK_J: tl.constexpr):
    """Places of keys among those that a piece sees, a prefix of `before` and then its own, and their rows."""
    place_J = start + tl.arange(0, BLOCK_J)
    return place_J, tl.where(place_J < before, prefix + place_J, tl.minimum(own - before + place_J, end - 1))


@triton.jit
def _attention_forward_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, table_ptr, tokens, heads, shared, scale, plane_q, plane_k,
    WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, CHUNK: tl.constexpr,
    PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """O and the log-sum-exp of a block of queries of one head; `shared` query heads have a key-value head in common."""
    head = tl.program_id(1)
    kv_head, kv_heads = head // shared, heads // shared
    row_M, place_M, seen, end, own, prefix, before = _block_of_queries(table_ptr, BLOCK_M)
    most_M = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    out_ME = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
    for start in range(0, seen, BLOCK_J):
        place_J, row_J = _key_rows(start, end, own, prefix, before, BLOCK_J)
        logit_MJ, _, _, _ = _products(
            query_ptr, query_ptr, query_ptr, query_ptr, row_M, head, heads, plane_q,
            key_ptr, key_ptr, key_ptr, key_ptr, row_J, kv_head, kv_heads, plane_k,
            False, False, WIDTH, CHUNK, PARTS, BLOCK_M, BLOCK_J, WIDEN,
        )  # fmt: skip
        logit_MJ = tl.where(place_J[None, :] <= place_M[:, None], logit_MJ * scale, float("-inf"))
        higher_M = tl.maximum(most_M, tl.max(logit_MJ, axis=1))
        less_M = tl.exp(most_M - higher_M)
        weight_MJ = tl.exp(logit_MJ - higher_M[:, None])
        total_M = total_M * less_M + tl.sum(weight_MJ, axis=1)
        out_ME = _add_product(
            out_ME * less_M[:, None], weight_MJ, value_ptr, row_J, kv_head, kv_heads, plane_k,
            WIDTH, BLOCK_E, PARTS, WIDEN,
        )  # fmt: skip
        most_M = higher_M
    _store(out_ptr, out_ME / total_M[:, None], row_M, head, heads, WIDTH, BLOCK_E)
    tl.store(lse_ptr + head * tokens + row_M, most_M + tl.log(total_M))


@triton.jit
def _attention_tangent_kernel(
    query_ptr, key_ptr, value_ptr, dquery_ptr, dkey_ptr, dvalue_ptr, out_ptr, lse_ptr, moved_ptr, mean_ptr,
    table_ptr, tokens, heads, shared, scale, plane_q, plane_k,
    WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, CHUNK: tl.constexpr,
    PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dO and t of a block of queries of one head.

    From the slopes a number near t is subtracted, their mean over the first keys: where these have most of the weight and a
    large tangent, P * dS would lose in rounding what is left of it.
    """
    head = tl.program_id(1)
    kv_head, kv_heads = head // shared, heads // shared
    row_M, place_M, seen, end, own, prefix, before = _block_of_queries(table_ptr, BLOCK_M)
    sums_M = head * tokens + row_M
    lse_M = tl.load(lse_ptr + sums_M)
    near_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    rest_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    moved_ME = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
    for start in range(0, seen, BLOCK_J):
        place_J, row_J = _key_rows(start, end, own, prefix, before, BLOCK_J)
        logit_MJ, slope_MJ, _, _ = _products(
            query_ptr, dquery_ptr, query_ptr, query_ptr, row_M, head, heads, plane_q,
            key_ptr, dkey_ptr, key_ptr, key_ptr, row_J, kv_head, kv_heads, plane_k,
            True, False, WIDTH, CHUNK, PARTS, BLOCK_M, BLOCK_J, WIDEN,
        )  # fmt: skip
        weight_MJ = tl.where(place_J[None, :] <= place_M[:, None], tl.exp(logit_MJ * scale - lse_M[:, None]), 0.0)
        slope_MJ *= scale
        if start == 0:
            near_M = tl.sum(weight_MJ * slope_MJ, axis=1) / tl.maximum(tl.sum(weight_MJ, axis=1), 1e-20)
        turned_MJ = weight_MJ * (slope_MJ - near_M[:, None])
        rest_M += tl.sum(turned_MJ, axis=1)
        moved_ME = _add_product(
            moved_ME, turned_MJ, value_ptr, row_J, kv_head, kv_heads, plane_k, WIDTH, BLOCK_E, PARTS, WIDEN
        )  # fmt: skip
        moved_ME = _add_product(
            moved_ME, weight_MJ, dvalue_ptr, row_J, kv_head, kv_heads, plane_k, WIDTH, BLOCK_E, PARTS, WIDEN
        )  # fmt: skip
    out_ME = _columns(out_ptr, row_M, head, heads, 0, WIDTH, BLOCK_E, True)
    _store(moved_ptr, moved_ME - rest_M[:, None] * out_ME, row_M, head, heads, WIDTH, BLOCK_E)
    tl.store(mean_ptr + sums_M, near_M + rest_M)


@triton.jit
def _row_sums_kernel(
    out_ptr, moved_ptr, a_ptr, b_ptr, bo_ptr, ao_ptr, tokens, heads,
    SECOND: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """[H, N] b . O and, if SECOND, a . O + b . dO."""
    row_M, head = tl.minimum(tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tokens - 1), tl.program_id(1)
    sums_M = head * tokens + row_M
    out_ME = _columns(out_ptr, row_M, head, heads, 0, WIDTH, BLOCK_E, True)
    b_ME = _columns(b_ptr, row_M, head, heads, 0, WIDTH, BLOCK_E, True)
    tl.store(bo_ptr + sums_M, tl.sum(b_ME * out_ME, axis=1))
    if SECOND:
        a_ME = _columns(a_ptr, row_M, head, heads, 0, WIDTH, BLOCK_E, True)
        moved_ME = _columns(moved_ptr, row_M, head, heads, 0, WIDTH, BLOCK_E, True)
        tl.store(ao_ptr + sums_M, tl.sum(a_ME * out_ME + b_ME * moved_ME, axis=1))


@triton.jit
def _query_gradient_kernel(
    query_ptr, key_ptr, value_ptr, dquery_ptr, dkey_ptr, dvalue_ptr, a_ptr, b_ptr, lse_ptr, mean_ptr, bo_ptr, ao_ptr,
    grad_ptr, table_ptr, tokens, heads, shared, scale, plane_q, plane_k,
    SECOND: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr,
    CHUNK: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The gradient for a block of queries of one head."""
    head = tl.program_id(1)
    entry = table_ptr + tl.program_id(0) * 6
    kv_head, kv_heads = head // shared, heads // shared
    row_M, place_M, seen, end, own, prefix, before = _block_of_queries(table_ptr, BLOCK_M)
    sums_M = head * tokens + row_M
    lse_M = tl.load(lse_ptr + sums_M)
    bo_M = tl.load(bo_ptr + sums_M)
    if SECOND:
        mean_M = tl.load(mean_ptr + sums_M)
        ao_M = tl.load(ao_ptr + sums_M)
    grad_ME = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
    for start in range(0, seen, BLOCK_J):
        place_J, row_J = _key_rows(start, end, own, prefix, before, BLOCK_J)
        again_M = tl.minimum(tl.load(entry, volatile=True) + tl.arange(0, BLOCK_M), end - 1)
        logit_MJ, slope_MJ, cross_MJ, total_MJ = _products(
            query_ptr, dquery_ptr, b_ptr, a_ptr, again_M, head, heads, plane_q,
            key_ptr, dkey_ptr, value_ptr, dvalue_ptr, row_J, kv_head, kv_heads, plane_k,
            SECOND, True, WIDTH, CHUNK, PARTS, BLOCK_M, BLOCK_J, WIDEN,
        )  # fmt: skip
        weight_MJ = tl.where(place_J[None, :] <= place_M[:, None], tl.exp(logit_MJ * scale - lse_M[:, None]), 0.0)
        cross_MJ -= bo_M[:, None]
        if SECOND:
            total_MJ += cross_MJ * (slope_MJ * scale - mean_M[:, None]) - ao_M[:, None]
            grad_ME = _add_product(
                grad_ME, weight_MJ * total_MJ, key_ptr, row_J, kv_head, kv_heads, plane_k,
                WIDTH, BLOCK_E, PARTS, WIDEN,
            )  # fmt: skip
        turned_ptr = dkey_ptr if SECOND else key_ptr
        grad_ME = _add_product(
            grad_ME, weight_MJ * cross_MJ, turned_ptr, row_J, kv_head, kv_heads, plane_k,
            WIDTH, BLOCK_E, PARTS, WIDEN,
        )  # fmt: skip
    _store(grad_ptr, grad_ME * scale, row_M, head, heads, WIDTH, BLOCK_E)


@triton.jit
def _key_gradient_kernel(
    query_ptr, key_ptr, value_ptr, dquery_ptr, dkey_ptr, dvalue_ptr, a_ptr, b_ptr, lse_ptr, mean_ptr, bo_ptr, ao_ptr,
    for_key_ptr, for_value_ptr, table_ptr, tokens, heads, shared, scale, plane_q, plane_k,
    SECOND: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr,
    CHUNK: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The gradients for a block of keys and values of one head, summed over its query heads and the rows that see it."""
    entry, kv_head = table_ptr + tl.program_id(0) * 6, tl.program_id(1)
    first, end, last = tl.load(entry), tl.load(entry + 1), tl.load(entry + 5)
    kv_heads = heads // shared
    row_J = tl.minimum(first + tl.arange(0, BLOCK_J), end - 1)
    for_key_JE = tl.zeros((BLOCK_J, BLOCK_E), dtype=tl.float32)
    for_value_JE = tl.zeros((BLOCK_J, BLOCK_E), dtype=tl.float32)
    blocks = tl.cdiv(last - first, BLOCK_M)
    for step in range(0, shared * blocks):
        head = kv_head * shared + step // blocks
        again_J = tl.minimum(tl.load(entry, volatile=True) + tl.arange(0, BLOCK_J), end - 1)
        place_M = first + (step % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_M = tl.minimum(place_M, last - 1)
        sums_M = head * tokens + row_M
        logit_JM, slope_JM, cross_JM, total_JM = _products(
            key_ptr, dkey_ptr, value_ptr, dvalue_ptr, again_J, kv_head, kv_heads, plane_k,
            query_ptr, dquery_ptr, b_ptr, a_ptr, row_M, head, heads, plane_q,
            SECOND, True, WIDTH, CHUNK, PARTS, BLOCK_J, BLOCK_M, WIDEN,
        )  # fmt: skip
        lse_M = tl.load(lse_ptr + sums_M)
        bo_M = tl.load(bo_ptr + sums_M)
        sees_JM = (row_J[:, None] <= row_M[None, :]) & (place_M[None, :] < last)
        weight_JM = tl.where(sees_JM, tl.exp(logit_JM * scale - lse_M[None, :]), 0.0)
        cross_JM -= bo_M[None, :]
        if SECOND:
            mean_M = tl.load(mean_ptr + sums_M)
            ao_M = tl.load(ao_ptr + sums_M)
            slope_JM = slope_JM * scale - mean_M[None, :]
            total_JM = weight_JM * (total_JM + cross_JM * slope_JM - ao_M[None, :])
            for_value_JE = _add_product(
                for_value_JE, weight_JM * slope_JM, b_ptr, row_M, head, heads, plane_q,
                WIDTH, BLOCK_E, PARTS, WIDEN,
            )  # fmt: skip
            for_key_JE = _add_product(
                for_key_JE, total_JM, query_ptr, row_M, head, heads, plane_q, WIDTH, BLOCK_E, PARTS, WIDEN
            )  # fmt: skip
        straight_ptr = a_ptr if SECOND else b_ptr
        for_value_JE = _add_product(
            for_value_JE, weight_JM, straight_ptr, row_M, head, heads, plane_q, WIDTH, BLOCK_E, PARTS, WIDEN
        )  # fmt: skip
        turned_ptr = dquery_ptr if SECOND else query_ptr
        for_key_JE = _add_product(
            for_key_JE, weight_JM * cross_JM, turned_ptr, row_M, head, heads, plane_q,
            WIDTH, BLOCK_E, PARTS, WIDEN,
        )  # fmt: skip
    _store(for_key_ptr, for_key_JE * scale, row_J, kv_head, kv_heads, WIDTH, BLOCK_E)
    _store(for_value_ptr, for_value_JE, row_J, kv_head, kv_heads, WIDTH, BLOCK_E)


@triton.jit
def _split_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr, size0, size1, size2, size3, BLOCK: tl.constexpr
):
    """Up to four tensors, each into its nearest bfloat16 numbers and, behind them, what is left."""
    number = tl.program_id(1)
    x_ptr, out_ptr, size = x0_ptr, out0_ptr, size0
    if number == 1:
        x_ptr, out_ptr, size = x1_ptr, out1_ptr, size1
    if number == 2:
        x_ptr, out_ptr, size = x2_ptr, out2_ptr, size2
    if number == 3:
        x_ptr, out_ptr, size = x3_ptr, out3_ptr, size3
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < size, other=0.0).to(tl.float32)
    high = x.to(tl.bfloat16)
    tl.store(out_ptr + place, high, mask=place < size)
    tl.store(out_ptr + size + place, (x - high.to(tl.float32)).to(tl.bfloat16), mask=place < size)


class _Row:
    """What the attention kernels need to know of a call: the row's groups; queries, keys, values, their tangents, gradients,
    [N, H or K, E], in the order of the kernels' arguments; and the scale c."""

    def __init__(self, groups: Sequence[PrefixGroup], tensors: Sequence[Tensor], scale: float) -> None:
        query_NHE, key_NKE = tensors[:2]
        self.tokens, self.heads, self.width = query_NHE.shape
        if query_NHE.numel() >= 1 << 31:
            raise ValueError(f"a packed row of {self.tokens:,} tokens is too long for the attention of WDPO: pack less")
        self.groups, self.device, self.kv_heads = groups, query_NHE.device, key_NKE.shape[1]
        narrow = query_NHE.dtype == torch.bfloat16
        self.parts = 1 if narrow else 3
        tensors = [tensor.contiguous() for tensor in tensors]
        self.tensors = tensors if narrow else _split(tensors)
        self._numbers = (self.heads, self.heads // self.kv_heads, scale, query_NHE.numel(), key_NKE.numel())

    def launch(self, kernel: Any, pointers: Sequence[Tensor], by_keys: bool = False, **options: Any) -> None:
        """Run a kernel for every block of queries, or of keys, of every head."""
        found = tiles(by_keys, self.width, _generation(self.device))
        blocks = _blocks(self.groups, found["BLOCK_J" if by_keys else "BLOCK_M"])
        table = send(torch.tensor(blocks, dtype=torch.int32), self.device)
        kernel[(len(blocks), self.kv_heads if by_keys else self.heads)](
            *pointers, table, self.tokens, *self._numbers, WIDTH=self.width,
            BLOCK_E=triton.next_power_of_2(self.width), PARTS=self.parts,
            WIDEN=INTERPRETED, **found, **options,
        )  # fmt: skip


def tiles(keys: bool, width: int, generation: int) -> dict[str, int]:
    """Tiles with which tests/kernels/test_triton_compiled.py finds no registers in memory, of _key_gradient_kernel or the
    others, for a head's width and a GPU's major compute capability: Hopper (9) and Blackwell (10) multiply from shared
    memory, others from registers."""
    if not keys:
        found = (64, 32 if generation in (9, 10) else 16, 8 if generation == 10 else 4, 2)
    elif generation == 9:
        found = (32 if width <= 64 else 16, 64, 4, 2)
    elif generation == 10:
        # Wider heads by the older instructions: with Blackwell's own, Triton 3.7 compiles a trap, whatever the tiles.
        found = (32, 64, 8, 2) if width <= 64 else (64, 32, 8, 2)
    else:
        found = (16, 64, 4, 1)
    return dict(zip(("BLOCK_M", "BLOCK_J", "num_warps", "num_stages"), found, strict=True)) | {"CHUNK": 32}


@lru_cache
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


def _blocks(groups: Sequence[PrefixGroup], size: int) -> list[list[int]]:
    """[B, 6] of every block of a piece: first row, end and start of its piece, start and length of the prefix that it sees,
    end of the rows that see it."""
    blocks, start = [], 0
    for group in groups:
        base, end = start, start + group.tokens
        for number, length in enumerate(group.lengths):
            is_prefix = number == 0 and group.prefix > 0
            stop, before = start + length, 0 if is_prefix else group.prefix
            seen_until = end if is_prefix else stop
            blocks += [[first, stop, start, base, before, seen_until] for first in range(start, stop, size)]
            start = stop
    return blocks


def _split(tensors: Sequence[Tensor]) -> list[Tensor]:
    """[2, ...] bfloat16 of every tensor, see _split_kernel."""
    outs = [torch.empty(2, *tensor.shape, dtype=torch.bfloat16, device=tensor.device) for tensor in tensors]
    for first in range(0, len(tensors), 4):
        some, theirs = list(tensors[first : first + 4]), outs[first : first + 4]
        sizes = [tensor.numel() for tensor in some]
        fill = 4 - len(some)
        _split_kernel[(triton.cdiv(max(sizes), 2048), len(some))](
            *some, *some[:1] * fill, *theirs, *theirs[:1] * fill, *sizes, *sizes[:1] * fill, BLOCK=2048
        )
    return outs


def attention_forward(
    heads: Sequence[Tensor], groups: Sequence[PrefixGroup], scale: float, out_NHE: Tensor, lse_HN: Tensor
) -> None:
    """As drdpo.kernels.tangent.attention_forward, into out_NHE and lse_HN."""
    row = _Row(groups, heads, scale)
    row.launch(_attention_forward_kernel, [*row.tensors, out_NHE, lse_HN])


def attention_tangent(
    heads: Sequence[Tensor], moved: Sequence[Tensor], groups: Sequence[PrefixGroup], scale: float,
    out_NHE: Tensor, lse_HN: Tensor, moved_NHE: Tensor, mean_HN: Tensor,
) -> None:  # fmt: skip
    """As drdpo.kernels.tangent.attention_tangent, into moved_NHE and mean_HN."""
    row = _Row(groups, [*heads, *moved], scale)
    row.launch(_attention_tangent_kernel, [*row.tensors, out_NHE.contiguous(), lse_HN, moved_NHE, mean_HN])


def attention_gradient(
    heads: Sequence[Tensor], groups: Sequence[PrefixGroup], scale: float, out_NHE: Tensor, lse_HN: Tensor, b_NHE: Tensor,
    along: tuple[Sequence[Tensor], Tensor, Tensor, Tensor] | None, into: Sequence[Tensor],
) -> None:  # fmt: skip
    """As drdpo.kernels.tangent.attention_gradient, into `into`."""
    moved, moved_NHE, mean_HN, a_NHE = along or ((), out_NHE, lse_HN, b_NHE)
    second, out_NHE, moved_NHE = along is not None, out_NHE.contiguous(), moved_NHE.contiguous()
    a_NHE, b_NHE = a_NHE.contiguous(), b_NHE.contiguous()
    row = _Row(groups, [*heads, *moved, *([a_NHE] if second else []), b_NHE], scale)
    tensors = row.tensors if second else [*row.tensors[:3] * 2, *row.tensors[3:] * 2]
    bo_HN, ao_HN = torch.empty_like(lse_HN), torch.empty_like(lse_HN) if second else lse_HN
    _row_sums_kernel[(triton.cdiv(row.tokens, 32), row.heads)](
        out_NHE, moved_NHE, a_NHE, b_NHE, bo_HN, ao_HN, row.tokens, row.heads,
        SECOND=second, WIDTH=row.width, BLOCK_E=triton.next_power_of_2(row.width), BLOCK_M=32,
    )  # fmt: skip
    pointers = [*tensors, lse_HN, mean_HN, bo_HN, ao_HN]
    row.launch(_query_gradient_kernel, [*pointers, into[0]], SECOND=second)
    row.launch(_key_gradient_kernel, [*pointers, *into[1:]], by_keys=True, SECOND=second)

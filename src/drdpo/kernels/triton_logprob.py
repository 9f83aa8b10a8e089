# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of linear_logprob: log-sum-exp and logit gradients from tiles of logits that stay on the chip.

Both multiply hidden states by the head tile by tile, in the input's dtype with float32 sums. No logit is rounded to
bfloat16, and only the gradient's are written to memory. drdpo.kernels.linear_logprob imports this module only if a GPU, or
Triton's interpreter (TRITON_INTERPRET=1, for tests), will run the kernels.

Shape suffixes: N tokens, D width, V vocabulary, K columns of a block of it, S splits of V.
"""

import os
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton decides this when a kernel is defined, that is when this module is imported."""

_PROCESSORS = 132
"""Streaming multiprocessors (SMs) of an H100, assumed if there is no GPU to ask, as under the interpreter."""


@lru_cache
def processors(device: torch.device) -> int:
    """SMs of a device. Each has registers for one program of the log-sum-exp at a time."""
    if not torch.cuda.is_available() or device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=1 << 12)
def splits_of(token_blocks: int, blocks: int, processors: int) -> int:
    """Number of parts into which the log-sum-exp cuts the vocabulary, so that even few tokens fill all waves of a GPU: the
    smallest that minimises the time, counted in blocks that a processor processes in sequence.

    Each block of tokens needs one program per part, which processes its blocks of the vocabulary in sequence.
    """

    def steps(parts: int) -> int:
        return triton.cdiv(token_blocks * parts, processors) * triton.cdiv(blocks, parts)

    return min(range(1, min(blocks, processors) + 1), key=lambda parts: (steps(parts), parts))


def _tiles(dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes; three tiles of BLOCK_D must fit the shared memory of an SM."""
    if dtype in (torch.bfloat16, torch.float16):
        return {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}


@triton.jit
def _tile_of_logits(
    hidden_ptr, weight_ptr, row_N, column_V, tokens, width, vocabulary, hidden_stride, weight_stride,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_V] float32 logits; zero outside the matrices."""
    sum_NV = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        depth_D = start + tl.arange(0, BLOCK_D)
        hidden_ND = tl.load(
            hidden_ptr + row_N[:, None].to(tl.int64) * hidden_stride + depth_D[None, :],
            mask=(row_N[:, None] < tokens) & (depth_D[None, :] < width), other=0.0,
        )  # fmt: skip
        weight_VD = tl.load(
            weight_ptr + column_V[:, None].to(tl.int64) * weight_stride + depth_D[None, :],
            mask=(column_V[:, None] < vocabulary) & (depth_D[None, :] < width), other=0.0,
        )  # fmt: skip
        if WIDEN:
            hidden_ND = hidden_ND.to(tl.float32)
            weight_VD = weight_VD.to(tl.float32)
        sum_NV = tl.dot(hidden_ND, tl.trans(weight_VD), sum_NV, input_precision=PRECISION)
    return sum_NV


@triton.jit
def _logsumexp_kernel(
    hidden_ptr, weight_ptr, target_ptr, max_ptr, sum_ptr, picked_ptr, tokens, width, vocabulary, share,
    hidden_stride, weight_stride,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Online log-sum-exp over this program's share of the vocabulary, and the target's logit if it lies there."""
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    target_N = tl.load(target_ptr + row_N, mask=row_N < tokens, other=-1)
    most_N = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total_N = tl.zeros((BLOCK_N,), dtype=tl.float32)
    picked_N = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, vocabulary), BLOCK_V):
        column_V = start + tl.arange(0, BLOCK_V)
        logit_NV = _tile_of_logits(
            hidden_ptr, weight_ptr, row_N, column_V, tokens, width, vocabulary, hidden_stride, weight_stride,
            BLOCK_N, BLOCK_V, BLOCK_D, PRECISION, WIDEN,
        )  # fmt: skip
        picked_N += tl.sum(tl.where(column_V[None, :] == target_N[:, None], logit_NV, 0.0), axis=1)
        logit_NV = tl.where(column_V[None, :] < vocabulary, logit_NV, float("-inf"))
        higher_N = tl.maximum(most_N, tl.max(logit_NV, axis=1))
        total_N = total_N * tl.exp(most_N - higher_N) + tl.sum(tl.exp(logit_NV - higher_N[:, None]), axis=1)
        most_N = higher_N
    place_N = split.to(tl.int64) * tokens + row_N
    tl.store(max_ptr + place_N, most_N, mask=row_N < tokens)
    tl.store(sum_ptr + place_N, total_N, mask=row_N < tokens)
    tl.store(picked_ptr + place_N, picked_N, mask=row_N < tokens)


@triton.jit
def _logit_gradient_kernel(
    hidden_ptr, weight_ptr, target_ptr, lse_ptr, grad_ptr, out_ptr, tokens, width, vocabulary,
    hidden_stride, weight_stride, out_stride,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """g (onehot_t - softmax) of one tile, from recomputed logits and the stored log-sum-exp."""
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_V = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    target_N = tl.load(target_ptr + row_N, mask=row_N < tokens, other=-1)
    lse_N = tl.load(lse_ptr + row_N, mask=row_N < tokens, other=0.0)
    grad_N = tl.load(grad_ptr + row_N, mask=row_N < tokens, other=0.0)
    logit_NV = _tile_of_logits(
        hidden_ptr, weight_ptr, row_N, column_V, tokens, width, vocabulary, hidden_stride, weight_stride,
        BLOCK_N, BLOCK_V, BLOCK_D, PRECISION, WIDEN,
    )  # fmt: skip
    onehot_NV = tl.where(column_V[None, :] == target_N[:, None], 1.0, 0.0)
    gradient_NV = grad_N[:, None] * (onehot_NV - tl.exp(logit_NV - lse_N[:, None]))
    tl.store(
        out_ptr + row_N[:, None].to(tl.int64) * out_stride + column_V[None, :], gradient_NV.to(out_ptr.dtype.element_ty),
        mask=(row_N[:, None] < tokens) & (column_V[None, :] < vocabulary),
    )  # fmt: skip


def logprob_and_lse(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets [N] and log-sum-exp of the logits [N], float32, without a logit in memory.

    Args:
        hidden_ND, weight_VD: of one dtype, bfloat16, float16 or float32, rows contiguous.
        targets_N: [N] int64.
    """
    (tokens, width), vocabulary = hidden_ND.shape, len(weight_VD)
    tiles = _tiles(hidden_ND.dtype)
    token_blocks = triton.cdiv(tokens, tiles["BLOCK_N"])
    blocks = triton.cdiv(vocabulary, tiles["BLOCK_V"])
    splits = splits_of(token_blocks, blocks, processors(hidden_ND.device))
    share = triton.cdiv(blocks, splits) * tiles["BLOCK_V"]
    splits = triton.cdiv(vocabulary, share)
    most_SN, sum_SN, picked_SN = (
        torch.empty(splits, tokens, dtype=torch.float32, device=hidden_ND.device) for _ in range(3)
    )
    _logsumexp_kernel[(token_blocks, splits)](
        hidden_ND, weight_VD, targets_N, most_SN, sum_SN, picked_SN, tokens, width, vocabulary, share,
        hidden_ND.stride(0), weight_VD.stride(0), **_products(hidden_ND.dtype), **tiles,
    )  # fmt: skip
    lse_N = torch.logsumexp(most_SN + sum_SN.log(), dim=0)
    return picked_SN.sum(dim=0) - lse_N, lse_N


def logit_gradient(hidden_ND: Tensor, weight_KD: Tensor, targets_N: Tensor, lse_N: Tensor, grad_N: Tensor) -> Tensor:
    """[N, K] g (onehot_t - softmax) of a block of the vocabulary, in the input's dtype, for the upstream gradient g [N] in
    float32; targets_N are columns of the block, or lie outside it. The rest as in logprob_and_lse."""
    (tokens, width), columns = hidden_ND.shape, len(weight_KD)
    tiles = _tiles(hidden_ND.dtype)
    out_NK = torch.empty(tokens, columns, dtype=hidden_ND.dtype, device=hidden_ND.device)
    grid = (triton.cdiv(tokens, tiles["BLOCK_N"]), triton.cdiv(columns, tiles["BLOCK_V"]))
    _logit_gradient_kernel[grid](
        hidden_ND, weight_KD, targets_N, lse_N, grad_N, out_NK, tokens, width, columns,
        hidden_ND.stride(0), weight_KD.stride(0), out_NK.stride(0), **_products(hidden_ND.dtype), **tiles,
    )  # fmt: skip
    return out_NK


def _products(dtype: torch.dtype) -> dict[str, str | bool]:
    """How tiles are multiplied: float32 in full precision (TF32 would keep ten bits), narrower types in their own units.

    Triton's interpreter reads a bfloat16 as the integer with the same bits, so under it tiles are widened first.
    """
    return {"PRECISION": "ieee" if dtype == torch.float32 else "tf32", "WIDEN": INTERPRETED and dtype == torch.bfloat16}

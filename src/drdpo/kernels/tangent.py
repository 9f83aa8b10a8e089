"""A decoder layer's norm, gate, rotary positions and attention on a value and its tangent, in parts, for WDPO.

x is a value, dx = d/dh x(h) at h = 0 its tangent; a and b are the gradients for an output and for its tangent. Each step has
four parts, which autograd does not see:

    forward   the output
    tangent   its tangent
    backward  the first-order gradient for x; of b it is the gradient for dx
    second    the gradient for x of both: a first-order part of a, and what b does through the curvature

    RMS norm    n = x r,  r = (mean x^2 + epsilon)^(-1/2);  out w n,  tangent w r (dx - n mean(n dx))
    SiLU gate   out silu(g) u,  tangent silu'(g) dg u + silu(g) du
    attention   S = c Q K^T,  P = softmax(S),  dS = c (dQ K^T + Q dK^T),  t = rowsum(P * dS),  dP = P * (dS - t),
                out O = P V,  tangent dO = dP V + P dV,  over a packed row as in drdpo.kernels.packed_attention

Attention keeps O, dO, the log-sum-exp of S and t. With them a backward pass computes P once and sums over no row of it: with
X = b V^T, rowsum(P * X) = b . O, and the rows of P * (a V^T + b dV^T + (X - b . O) * (dS - t)) sum to a . O + b . dO, as
those of P * (X - b . O) and of dP sum to zero.

On CUDA, except for float64, each part is a Triton kernel or a few (triton_tangent, triton_layer). On a CPU attention goes by
blocks of queries, so that memory grows linearly with the row; norm and gate go by chunks of rows, to stay in its cache.
Sums are in float32 (float64 for float64 inputs).

Shape suffixes: N tokens of the row, D width, I inner width, C rows of a chunk, H query heads, K key-value heads, R = H / K
queries per key, E width of a head, A queries of a block, Q = R A of them by key, T keys that they attend to.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from drdpo.kernels.linear_logprob import in_pieces, triton_kernels, wide
from drdpo.kernels.packed_attention import PrefixGroup

_BLOCK_ELEMENTS = {True: 1 << 20, False: 1 << 26}
"""Attention weights of a block, of which four copies are alive: on a CPU, where they should fit its cache, and on a GPU."""
_BLOCK_QUERIES = {True: 64, False: 1 << 10}
"""Queries of a block at most: a block's early queries waste the work on its later keys, which are masked."""
Part = Literal["forward", "tangent", "backward", "second"]

_CHUNK_ELEMENTS = 1 << 19
"""Elements of a chunk on a CPU: 2 MiB in float32, of which several copies are alive."""


WIDEST = 128
"""Width of a head up to which attention has a Triton kernel; it must be a multiple of 16."""


def _kernels(module: str, tensor: Tensor, width: int = 16) -> Any:
    """A module of Triton kernels if they can run here and know the width of a head."""
    return None if width > WIDEST or width % 16 else triton_kernels(tensor, module)


def _like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _by_rows(
    formula: Callable[..., Sequence[Tensor]], given: Sequence[Tensor], outs: Sequence[Tensor], kernel: str, *constants: Any
) -> Tensor | None:
    """outs = formula(*given), in float32 and by chunks of rows; on CUDA by a kernel, with what it returns."""
    if (kernels := _kernels("triton_layer", given[0])) is not None:
        return getattr(kernels, kernel)(given, outs, *constants)
    rows, width = given[0].shape
    size = max(1, _CHUNK_ELEMENTS // width) if in_pieces(given[0]) else rows
    for start in range(0, rows, max(1, size)):
        chunk = slice(start, min(start + size, rows))
        for out, part in zip(outs, formula(*(wide(tensor[chunk]) for tensor in given)), strict=True):
            out[chunk] = part
    return None


# RMS norm (arXiv 1910.07467), over blocks of x's last axis as wide as the norm's weight: the model's width, or a head's.


def _scaled(x_CD: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """n and r [C, 1]."""
    r_C1 = torch.rsqrt(x_CD.square().mean(dim=1, keepdim=True) + epsilon)
    return x_CD * r_C1, r_C1


def _across(n_CD: Tensor, y_CD: Tensor) -> Tensor:
    """y less its part along n: dn = r times this, for y = dx; the Jacobian r (I - n n^T / D) is symmetric."""
    return y_CD - n_CD * (n_CD * y_CD).mean(dim=1, keepdim=True)


def rms_norm(part: Part, norm: Any, x: Tensor, other: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The part "forward", "tangent" of other = dx, or "backward" of other = b, in this dtype or that of x.

    The norm is a module of transformers, with its weight w and its epsilon under the root.
    """
    weight_D, epsilon = norm.weight, norm.variance_epsilon

    def formula(x_CD: Tensor, *others_CD: Tensor) -> list[Tensor]:
        n_CD, r_C1 = _scaled(x_CD, epsilon)
        if part == "backward":
            return [r_C1 * _across(n_CD, others_CD[0] * wide(weight_D))]
        out_CD = r_C1 * _across(n_CD, others_CD[0]) if others_CD else n_CD
        return [out_CD.to(x.dtype) * weight_D]  # rounded before, as in transformers

    given = [tensor.view(-1, len(weight_D)) for tensor in (x, other) if tensor is not None]
    out_ND = _like(given[0], dtype)
    _by_rows(formula, given, [out_ND], "rms_norm", part, weight_D, epsilon)
    return out_ND.view(x.shape)


def rms_norm_second(
    norm: Any, x: Tensor, dx: Tensor, a: Tensor, b: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients for x and, if asked for, [D] for the weight.

    With a, b times w, p = mean(n dx), q = mean(n b), u = mean(b dx), as dr/dx = -r^2 n / D and dn/dx is the Jacobian:

        x:  r (a - n mean(n a)) - r^2 (p b + q dx + n (u - 3 p q))
    """
    weight_D, epsilon = norm.weight, norm.variance_epsilon
    grad_weight_D = torch.zeros_like(wide(weight_D)) if wants_weight else None

    def formula(x_CD: Tensor, dx_CD: Tensor, a_CD: Tensor, b_CD: Tensor) -> list[Tensor]:
        n_CD, r_C1 = _scaled(x_CD, epsilon)
        p_C1 = (n_CD * dx_CD).mean(dim=1, keepdim=True)
        if grad_weight_D is not None:
            grad_weight_D.add_((a_CD * n_CD + b_CD * (r_C1 * (dx_CD - n_CD * p_C1))).sum(dim=0))
        a_CD, b_CD = a_CD * wide(weight_D), b_CD * wide(weight_D)
        q_C1, u_C1 = (n_CD * b_CD).mean(dim=1, keepdim=True), (b_CD * dx_CD).mean(dim=1, keepdim=True)
        curved_CD = p_C1 * b_CD + q_C1 * dx_CD + n_CD * (u_C1 - 3 * p_C1 * q_C1)
        return [r_C1 * (_across(n_CD, a_CD) - r_C1 * curved_CD)]

    given = [tensor.view(-1, len(weight_D)) for tensor in (x, dx, a, b)]
    out_ND = _like(given[0])
    part = "second_and_weight" if wants_weight else "second"
    found_D = _by_rows(formula, given, [out_ND], "rms_norm", part, weight_D, epsilon)
    grad_weight_D = grad_weight_D if found_D is None else found_D
    return out_ND.view(x.shape), None if grad_weight_D is None else grad_weight_D.to(weight_D.dtype)


# SiLU gate (SwiGLU, arXiv 2002.05202), silu(g) = g sigmoid(g).


def silu_gate(part: Part, gate_NI: Tensor, up_NI: Tensor, *others_NI: Tensor) -> list[Tensor]:
    """The output [N, I] of the part "forward" or "tangent" (others: dg, du); the gradients for gate and up of "backward" (b)
    or "second" (dg, du, a, b). In the dtype of the last argument, as tangents and gradients may be less precise than values.

    Second: g: a u silu' + b (silu'' dg u + silu' du);  u: a silu + b silu' dg,  where, with s = sigmoid(g),
    silu' = s + silu (1 - s) and silu'' = (1 - s) (2 s + silu (1 - 2 s)).
    """

    def formula(g: Tensor, u: Tensor, *others: Tensor) -> list[Tensor]:
        s = torch.sigmoid(g)
        if part == "forward":
            return [s.mul_(g).mul_(u)]
        silu, rest = g * s, 1 - s
        slope = s.addcmul_(silu, rest)
        if part == "backward":
            return [slope.mul_(u).mul_(others[0]), silu.mul_(others[0])]
        dg, du, *upstream = others
        if part == "tangent":
            return [slope.mul_(dg).mul_(u).addcmul_(silu, du)]
        a, b = upstream
        # 2 s = 2 - 2 (1 - s) and 1 - 2 s = 2 (1 - s) - 1
        bend = (2 - 2 * rest).addcmul_(silu, 2 * rest - 1).mul_(rest).mul_(b).mul_(dg)
        for_gate = bend.addcmul_(a, slope).mul_(u).addcmul_(slope * b, du)
        return [for_gate, silu.mul_(a).addcmul_(slope.mul_(b), dg)]

    given = [gate_NI, up_NI, *others_NI]
    outs = [_like(given[-1]) for _ in range(2 if part in ("backward", "second") else 1)]
    _by_rows(formula, given, outs, "silu_gate", part)
    return outs


# Rotary positions.


def rotate(x: Tensor, cos_N1E: Tensor, sin_N1E: Tensor, back: bool = False) -> Tensor:
    """Rotary positions (arXiv 2104.09864) of x [..., N, H, E], halves turned against each other as in transformers' Llama.

    Linear, so a tangent is turned alike, and a gradient is turned back, by the opposite angle. Both halves of
    cos and sin are equal.
    """
    if (kernels := _kernels("triton_layer", x)) is not None:
        out = _like(x, cos_N1E.dtype)
        kernels.rotate(x, cos_N1E, sin_N1E, back, out)
        return out
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([second, -first] if back else [-second, first], dim=-1)
    return x * cos_N1E + turned * sin_N1E


# Attention.


class Heads(NamedTuple):
    """Rotated queries, keys and values of a packed row, their tangents, or gradients for either; of one dtype."""

    query_NHE: Tensor
    key_NKE: Tensor
    """H is a multiple of K."""
    value_NKE: Tensor


class _Segment(NamedTuple):
    """A prefix or a suffix: its own tokens, and the prefix that they see too."""

    prefix: slice
    own: slice

    def keys(self, tensor_NKE: Tensor) -> Tensor:
        """[K, T, E] in float32: the prefix, then its own."""
        parts = [tensor_NKE[part] for part in self if part.stop > part.start]
        return wide(torch.cat(parts)).transpose(0, 1).contiguous()

    def add_keys(self, total_NKE: Tensor, part_KTE: Tensor) -> None:
        """Add gradients [K, T, E] to the row's."""
        prefix, part_TKE = self.prefix.stop - self.prefix.start, part_KTE.transpose(0, 1)
        total_NKE[self.prefix] += part_TKE[:prefix]
        total_NKE[self.own] += part_TKE[prefix:]

    def blocks(self, heads: int, small: bool) -> Iterator[tuple[slice, int]]:
        """Adjacent queries, and the number of keys that the last of them sees."""
        prefix, end = self.prefix.stop - self.prefix.start, self.own.stop
        size = max(16, _BLOCK_ELEMENTS[small] // (heads * (prefix + end - self.own.start)))
        size = min(size, _BLOCK_QUERIES[small])
        for first in range(self.own.start, end, size):
            last = min(first + size, end)
            yield slice(first, last), prefix + last - self.own.start


def _segments(groups: Sequence[PrefixGroup]) -> Iterator[_Segment]:
    start = 0
    for group in groups:
        prefix = slice(start, start)
        for number, length in enumerate(group.lengths):
            yield _Segment(prefix, slice(start, start + length))
            if number == 0 and group.prefix:
                prefix = slice(start, start + length)
            start += length


def _by_key(tensor_AHE: Tensor, keys: int) -> Tensor:
    """[A, H, E] -> [K, R A, E] in float32: the queries of a key-value head together."""
    rows, heads, width = tensor_AHE.shape
    return wide(tensor_AHE).view(rows, keys, heads // keys, width).permute(1, 2, 0, 3).reshape(keys, -1, width)


def _by_query(tensor_KQE: Tensor, rows: int) -> Tensor:
    """[K, R A, E] -> [A, H, E]"""
    keys, queries, width = tensor_KQE.shape
    return tensor_KQE.view(keys, queries // rows, rows, width).permute(2, 0, 1, 3).reshape(rows, -1, width)


def _column(tensor_HN: Tensor, queries: slice, keys: int) -> Tensor:
    """[H, N] -> [K, R A, 1] of a block."""
    return tensor_HN[:, queries].reshape(keys, -1, 1)


def _seen(tensor_KQT: Tensor, rows: int, fill: float) -> Tensor:
    """In place, `fill` where a key lies ahead of a query, as only the block's own keys, the last ones, can."""
    keys, queries, seen = tensor_KQT.shape
    ahead_AA = torch.ones(rows, rows, dtype=torch.bool, device=tensor_KQT.device).triu_(1)
    tensor_KQT.view(keys, queries // rows, rows, seen)[..., seen - rows :].masked_fill_(ahead_AA, fill)
    return tensor_KQT


def _weights(query_KQE: Tensor, key_KTE: Tensor, scale: float, lse_KQ1: Tensor, rows: int) -> Tensor:
    """[K, Q, T] P by the log-sum-exp."""
    return _seen(_less(scale, lse_KQ1, (query_KQE, key_KTE)).exp_(), rows, 0.0)


def _less(scale: float, less_KQ1: Tensor, *products: tuple[Tensor, Tensor]) -> Tensor:
    """[K, Q, T] scale (the sum of the products left right^T) - less."""
    total = -less_KQ1
    for left_KQE, right_KTE in products:
        total = torch.baddbmm(total, left_KQE, right_KTE.transpose(1, 2), alpha=scale)
    return total


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """[K, Q, 1]"""
    return (left * right).sum(dim=2, keepdim=True)


def attention_forward(heads: Heads, groups: Sequence[PrefixGroup], scale: float) -> tuple[Tensor, Tensor]:
    """Attention of a packed row of N tokens; the scale is c.

    Returns:
        [N, H, E] O, and [H, N] the log-sum-exp of S in float32.
    """
    out_NHE = _like(heads.query_NHE)
    lse_HN = wide(heads.query_NHE).new_empty(out_NHE.shape[1::-1])
    if (kernels := _kernels("triton_tangent", out_NHE, out_NHE.shape[2])) is not None:
        kernels.attention_forward(heads, groups, scale, out_NHE, lse_HN)
        return out_NHE, lse_HN
    kv_heads = heads.key_NKE.shape[1]
    for segment in _segments(groups):
        key_KTE, value_KTE = segment.keys(heads.key_NKE), segment.keys(heads.value_NKE)
        for queries, seen in segment.blocks(len(lse_HN), in_pieces(out_NHE)):
            rows = queries.stop - queries.start
            logits_KQT = torch.bmm(_by_key(heads.query_NHE[queries], kv_heads) * scale, key_KTE[:, :seen].transpose(1, 2))
            most_KQ1 = _seen(logits_KQT, rows, float("-inf")).amax(dim=2, keepdim=True)
            weights_KQT = logits_KQT.sub_(most_KQ1).exp_()
            total_KQ1 = weights_KQT.sum(dim=2, keepdim=True)
            out_NHE[queries] = _by_query(torch.bmm(weights_KQT, value_KTE[:, :seen]).div_(total_KQ1), rows)
            lse_HN[:, queries] = total_KQ1.log_().add_(most_KQ1).view(-1, rows)
    return out_NHE, lse_HN


def attention_tangent(
    heads: Heads, moved: Heads, groups: Sequence[PrefixGroup], scale: float, out_NHE: Tensor, lse_HN: Tensor
) -> tuple[Tensor, Tensor]:
    """The tangent of attention, from the tangents of heads and what attention_forward returned.

    Returns:
        [N, H, E] dO, and [H, N] t in float32.
    """
    moved_NHE, mean_HN = _like(out_NHE), torch.empty_like(lse_HN)
    if (kernels := _kernels("triton_tangent", out_NHE, out_NHE.shape[2])) is not None:
        kernels.attention_tangent(heads, moved, groups, scale, out_NHE, lse_HN, moved_NHE, mean_HN)
        return moved_NHE, mean_HN
    kv_heads = heads.key_NKE.shape[1]
    for segment in _segments(groups):
        key_KTE, value_KTE, dkey_KTE, dvalue_KTE = (segment.keys(part) for part in (*heads[1:], *moved[1:]))
        for queries, seen in segment.blocks(len(lse_HN), in_pieces(out_NHE)):
            rows = queries.stop - queries.start
            query_KQE, dquery_KQE = (_by_key(part.query_NHE[queries], kv_heads) for part in (heads, moved))
            weights_KQT = _weights(query_KQE, key_KTE[:, :seen], scale, _column(lse_HN, queries, kv_heads), rows)
            slope_KQT = torch.bmm(dquery_KQE * scale, key_KTE[:, :seen].transpose(1, 2))
            slope_KQT.baddbmm_(query_KQE, dkey_KTE[:, :seen].transpose(1, 2), alpha=scale).mul_(weights_KQT)
            mean_KQ1 = slope_KQT.sum(dim=2, keepdim=True)
            moved_KQE = torch.bmm(slope_KQT, value_KTE[:, :seen]).baddbmm_(weights_KQT, dvalue_KTE[:, :seen])
            moved_KQE.addcmul_(mean_KQ1, _by_key(out_NHE[queries], kv_heads), value=-1)
            moved_NHE[queries] = _by_query(moved_KQE, rows)
            mean_HN[:, queries] = mean_KQ1.view(-1, rows)
    return moved_NHE, mean_HN


def attention_gradient(
    heads: Heads,
    groups: Sequence[PrefixGroup],
    scale: float,
    out_NHE: Tensor,
    lse_HN: Tensor,
    b_NHE: Tensor,
    along: tuple[Heads, Tensor, Tensor, Tensor] | None = None,
) -> Heads:
    """First-order gradients for heads from b, of O: P^T b for V; c P * (X - b . O) for Q K^T.

    Or with `along`, the tangents of heads, what attention_tangent returned, and a, of O, while b is of dO: the gradients of
    both, see the module; G_dS = c P * (X - b . O) turns dQ and dK.
    """
    if (kernels := _kernels("triton_tangent", out_NHE, out_NHE.shape[2])) is not None:
        into = Heads(*(_like(part) for part in heads))
        kernels.attention_gradient(heads, groups, scale, out_NHE, lse_HN, b_NHE, along, into)
        return into
    kv_heads = heads.key_NKE.shape[1]
    # A key's gradient is a sum over segments.
    grads = Heads(_like(heads.query_NHE), *(torch.zeros_like(wide(part)) for part in heads[1:]))
    for segment in _segments(groups):
        seen_by_all = [segment.keys(part) for part in (*heads[1:], *(along[0][1:] if along else ()))]
        for_key_KTE, for_value_KTE = (torch.zeros_like(part) for part in seen_by_all[:2])
        for queries, seen in segment.blocks(len(lse_HN), in_pieces(out_NHE)):
            rows = queries.stop - queries.start
            keys, values, *moved_keys = (part[:, :seen] for part in seen_by_all)
            query_KQE, out_KQE, b_KQE = (_by_key(part[queries], kv_heads) for part in (heads.query_NHE, out_NHE, b_NHE))
            weights_KQT = _weights(query_KQE, keys, scale, _column(lse_HN, queries, kv_heads), rows)
            cross_KQT = _less(1.0, _dot(b_KQE, out_KQE), (b_KQE, values))
            if along is None:
                turned_KQE = query_KQE
                for_value_KTE[:, :seen].baddbmm_(weights_KQT.transpose(1, 2), b_KQE)
                grad_KQE = torch.bmm(cross_KQT.mul_(weights_KQT), keys)
            else:
                dkeys, dvalues = moved_keys
                turned_KQE, moved_KQE, a_KQE = (
                    _by_key(part[queries], kv_heads) for part in (along[0].query_NHE, along[1], along[3])
                )
                for_value_KTE[:, :seen].baddbmm_(weights_KQT.transpose(1, 2), a_KQE)
                mean_KQ1 = _column(along[2], queries, kv_heads)
                slope_KQT = _less(scale, mean_KQ1, (turned_KQE, keys), (query_KQE, dkeys))
                less_KQ1 = _dot(a_KQE, out_KQE) + _dot(b_KQE, moved_KQE)
                total_KQT = _less(1.0, less_KQ1, (a_KQE, values), (b_KQE, dvalues))
                total_KQT.addcmul_(cross_KQT, slope_KQT).mul_(weights_KQT)
                for_value_KTE[:, :seen].baddbmm_(slope_KQT.mul_(weights_KQT).transpose(1, 2), b_KQE)
                grad_KQE = torch.bmm(total_KQT, keys).baddbmm_(cross_KQT.mul_(weights_KQT), dkeys)
                for_key_KTE[:, :seen].baddbmm_(total_KQT.transpose(1, 2), query_KQE, alpha=scale)
            grads.query_NHE[queries] = _by_query(grad_KQE.mul_(scale), rows)
            for_key_KTE[:, :seen].baddbmm_(cross_KQT.transpose(1, 2), turned_KQE, alpha=scale)
        segment.add_keys(grads.key_NKE, for_key_KTE)
        segment.add_keys(grads.value_NKE, for_value_KTE)
    return Heads(*(grad.to(out_NHE.dtype) for grad in grads))

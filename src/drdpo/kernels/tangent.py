"""A decoder layer's norm, gate and attention on a value and its tangent, with first-order backward passes, for WDPO.

A pair (x, dx) is stacked: pair_2X[0] is x, pair_2X[1] is dx = d/dh x(h) at h = 0. Both outputs can be differentiated once,
for inputs and parameters, which is all that the tangent solver needs. Linear maps take the stack as it is.

    RMS norm    n = x r,  r = (mean x^2 + epsilon)^(-1/2);  out w n,  tangent w r (dx - n mean(n dx))
    SiLU gate   out silu(g) u,  tangent silu'(g) dg u + silu(g) du
    attention   S = c Q K^T,  P = softmax(S),  dS = c (dQ K^T + Q dK^T),  dP = P * (dS - rowsum(P * dS)),
                out O = P V,  tangent dO = dP V + P dV,  over a packed row as in drdpo.kernels.packed_attention

Only inputs are kept for the backward passes, which recompute the rest: attention by blocks of queries, so memory grows
linearly with the row; norm and gate by chunks of rows on a CPU, so that they stay in its cache. Sums are in float32 (float64
for float64 inputs).

Shape suffixes: N tokens of the row, D width, I inner width, C rows of a chunk, H query heads, K key-value heads, R = H / K
queries per key, E width of a head, A queries of a block, Q = R A of them by key, T keys that they attend to.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from drdpo.kernels.linear_logprob import in_pieces, on_cuda, refuse_graph, wide
from drdpo.kernels.packed_attention import PrefixGroup

_BLOCK_ELEMENTS = {True: 1 << 20, False: 1 << 26}
"""Attention weights of a block, of which six copies are alive: on a CPU, where they should fit its cache, and on a GPU."""
_BLOCK_QUERIES = {True: 64, False: 1 << 10}
"""Queries of a block at most: a block's early queries waste the work on its later keys, which are masked."""
_CHUNK_ELEMENTS = 1 << 19
"""Elements of a chunk on a CPU: 2 MiB in float32, of which several copies are alive."""

# Norm and gate.


def _chunks(pair_2ND: Tensor) -> Iterator[slice]:
    rows, width = pair_2ND.shape[1:]
    size = max(1, _CHUNK_ELEMENTS // width) if in_pieces(pair_2ND) else rows
    for start in range(0, rows, max(1, size)):
        yield slice(start, min(start + size, rows))


def rms_norm(pair_2ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """RMS norm (arXiv 1910.07467) and its tangent.

    Args:
        pair_2ND: [2, N, D] value and tangent.
        weight_D: [D] w.
        epsilon: under the root.

    Returns:
        [2, N, D] in the input's dtype.
    """
    return _RMSNorm.apply(pair_2ND, weight_D, epsilon)


def silu_gate(gate_2NI: Tensor, up_2NI: Tensor) -> Tensor:
    """SiLU gate (SwiGLU, arXiv 2002.05202), silu(g) = g sigmoid(g), and its tangent.

    Args:
        gate_2NI: [2, N, I] g and its tangent.
        up_2NI: [2, N, I] u and its tangent.

    Returns:
        [2, N, I] in the input's dtype.
    """
    return _SiluGate.apply(gate_2NI, up_2NI)


def _normalised(pair_2CD: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n, r [C, 1], dx and mean(n dx) [C, 1] of some rows."""
    x_CD, dx_CD = wide(pair_2CD)
    scale_C1 = torch.rsqrt(x_CD.square().mean(dim=1, keepdim=True) + epsilon)
    n_CD = x_CD * scale_C1
    return n_CD, scale_C1, dx_CD, (n_CD * dx_CD).mean(dim=1, keepdim=True)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, pair_2ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(pair_2ND, weight_D)
        ctx.epsilon = epsilon
        out_2ND = torch.empty_like(pair_2ND)
        for rows in _chunks(pair_2ND):
            n_CD, scale_C1, dx_CD, along_C1 = _normalised(pair_2ND[:, rows], epsilon)
            # Round before applying the weight, as transformers does.
            out_2ND[0, rows] = n_CD.to(pair_2ND.dtype) * weight_D
            out_2ND[1, rows] = (scale_C1 * (dx_CD - n_CD * along_C1)).to(pair_2ND.dtype) * weight_D
        return out_2ND

    @staticmethod
    def backward(ctx: Any, grad_2ND: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """With a, b the gradients for n and its tangent, p = mean(n dx), q = mean(n b), u = mean(b dx):

            dx: r (b - n q);   x: r (a - n mean(n a)) - r^2 (p b + q dx + n (u - 3 p q)),

        as the Jacobian r (I - n n^T / D) is symmetric, dr/dx = -r^2 n / D and dn/dx is the Jacobian itself.
        """
        refuse_graph()
        pair_2ND, weight_D = ctx.saved_tensors
        grad_pair_2ND = torch.empty_like(pair_2ND)
        wants_weight = ctx.needs_input_grad[1]
        grad_weight_D = torch.zeros_like(wide(weight_D)) if wants_weight else None
        for rows in _chunks(pair_2ND):
            n_CD, r_C1, dx_CD, p_C1 = _normalised(pair_2ND[:, rows], ctx.epsilon)
            grad_2CD = wide(grad_2ND[:, rows])
            if grad_weight_D is not None:
                grad_weight_D += (grad_2CD[0] * n_CD + grad_2CD[1] * (r_C1 * (dx_CD - n_CD * p_C1))).sum(dim=0)
            a_CD, b_CD = grad_2CD * wide(weight_D)
            q_C1, u_C1 = (n_CD * b_CD).mean(dim=1, keepdim=True), (b_CD * dx_CD).mean(dim=1, keepdim=True)
            grad_pair_2ND[1, rows] = (r_C1 * (b_CD - n_CD * q_C1)).to(pair_2ND.dtype)
            curved_CD = p_C1 * b_CD + q_C1 * dx_CD + n_CD * (u_C1 - 3 * p_C1 * q_C1)
            straight_CD = a_CD - n_CD * (n_CD * a_CD).mean(dim=1, keepdim=True)
            grad_pair_2ND[0, rows] = (r_C1 * (straight_CD - r_C1 * curved_CD)).to(pair_2ND.dtype)
        return grad_pair_2ND, None if grad_weight_D is None else grad_weight_D.to(weight_D.dtype), None


class _SiluGate(Function):
    @staticmethod
    def forward(ctx: Any, gate_2NI: Tensor, up_2NI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_2NI, up_2NI)
        out_2NI = torch.empty_like(gate_2NI)
        for rows in _chunks(gate_2NI):
            (g_CI, dg_CI), (u_CI, du_CI) = wide(gate_2NI[:, rows]), wide(up_2NI[:, rows])
            s_CI = torch.sigmoid(g_CI)
            silu_CI = g_CI * s_CI
            out_2NI[0, rows] = (silu_CI * u_CI).to(gate_2NI.dtype)
            slope_CI = torch.addcmul(s_CI, silu_CI, 1 - s_CI)
            out_2NI[1, rows] = (slope_CI.mul_(dg_CI).mul_(u_CI).addcmul_(silu_CI, du_CI)).to(gate_2NI.dtype)
        return out_2NI

    @staticmethod
    def backward(ctx: Any, grad_2NI: Tensor) -> tuple[Tensor, Tensor]:
        """With a, b the gradients for the product and its tangent:

        g: a u silu' + b (silu'' dg u + silu' du);  dg: b u silu';  u: a silu + b silu' dg;  du: b silu,
        where silu' = s (1 + g (1 - s)) and silu'' = s (1 - s) (2 + g (1 - 2 s)).
        """
        refuse_graph()
        gate_2NI, up_2NI = ctx.saved_tensors
        grad_gate_2NI, grad_up_2NI = torch.empty_like(gate_2NI), torch.empty_like(up_2NI)
        for rows in _chunks(gate_2NI):
            (g_CI, dg_CI), (u_CI, du_CI), (a_CI, b_CI) = (wide(part[:, rows]) for part in (gate_2NI, up_2NI, grad_2NI))
            s_CI = torch.sigmoid(g_CI)
            silu_CI, rest_CI = g_CI * s_CI, 1 - s_CI
            slope_CI = torch.addcmul(s_CI, silu_CI, rest_CI)
            grad_up_2NI[1, rows] = (b_CI * silu_CI).to(gate_2NI.dtype)
            b_slope_CI = b_CI * slope_CI
            grad_up_2NI[0, rows] = (a_CI * silu_CI).addcmul_(b_slope_CI, dg_CI).to(gate_2NI.dtype)
            grad_gate_2NI[1, rows] = (b_slope_CI * u_CI).to(gate_2NI.dtype)
            # s (1 - s) (2 + g (1 - 2 s)) = (1 - s) (2 s + silu (1 - 2 s))
            bend_CI = torch.addcmul(2 * s_CI, silu_CI, rest_CI - s_CI).mul_(rest_CI).mul_(b_CI).mul_(dg_CI)
            bend_CI.addcmul_(a_CI, slope_CI).mul_(u_CI).addcmul_(b_slope_CI, du_CI)
            grad_gate_2NI[0, rows] = bend_CI.to(gate_2NI.dtype)
        return grad_gate_2NI, grad_up_2NI


# Attention.


def tangent_attention(
    query_2NHE: Tensor, key_2NKE: Tensor, value_2NKE: Tensor, groups: Sequence[PrefixGroup], scale: float
) -> Tensor:
    """Attention of a packed row and its tangent.

    Args:
        query_2NHE: [2, N, H, E] rotated queries and their tangents.
        key_2NKE, value_2NKE: [2, N, K, E], H a multiple of K.
        groups: of the row, N tokens in all.
        scale: c.

    Returns:
        [2, N, H, E]
    """
    return _Attention.apply(query_2NHE, key_2NKE, value_2NKE, tuple(groups), scale)


class _Block(NamedTuple):
    """Adjacent queries and the keys that they attend to: a prefix, then `own` up to the last query."""

    queries: slice
    prefix: slice
    own: slice

    def keys(self, tensor_2NKE: Tensor) -> Tensor:
        """[2, K, T, E]"""
        parts = [tensor_2NKE[:, part] for part in (self.prefix, self.own) if part.stop > part.start]
        return torch.cat(parts, dim=1).transpose(1, 2).contiguous()

    def add_keys(self, total_2NKE: Tensor, part_2KTE: Tensor) -> None:
        """Add gradients [2, K, T, E] to the row's."""
        prefix, part_2TKE = self.prefix.stop - self.prefix.start, part_2KTE.transpose(1, 2)
        total_2NKE[:, self.prefix] += part_2TKE[:, :prefix]
        total_2NKE[:, self.own] += part_2TKE[:, prefix:]


def _blocks(groups: Sequence[PrefixGroup], query_2NHE: Tensor) -> Iterator[_Block]:
    start, heads, small = 0, query_2NHE.shape[2], in_pieces(query_2NHE)
    for group in groups:
        shared, none = slice(start, start + group.prefix), slice(start, start)
        segments = [(none, shared)] if group.prefix else []
        start = shared.stop
        for length in group.suffixes:
            segments.append((shared, slice(start, start + length)))
            start += length
        for prefix, own in segments:
            seen = own.stop - own.start + prefix.stop - prefix.start
            size = min(max(16, _BLOCK_ELEMENTS[small] // (heads * seen)), _BLOCK_QUERIES[small])
            for first in range(own.start, own.stop, size):
                last = min(first + size, own.stop)
                yield _Block(slice(first, last), prefix, slice(own.start, last))


def _by_key(tensor_2AHE: Tensor, keys: int) -> Tensor:
    """[2, A, H, E] -> [2, K, R A, E]: the queries of a key-value head together."""
    two, rows, heads, width = tensor_2AHE.shape
    return tensor_2AHE.view(two, rows, keys, heads // keys, width).permute(0, 2, 3, 1, 4).reshape(two, keys, -1, width)


def _by_query(tensor_2KQE: Tensor, rows: int) -> Tensor:
    """[2, K, R A, E] -> [2, A, H, E]"""
    two, keys, queries, width = tensor_2KQE.shape
    shape = (two, keys, queries // rows, rows, width)
    return tensor_2KQE.view(shape).permute(0, 3, 1, 2, 4).reshape(two, rows, -1, width)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Batched product with a float32 result. If logits and slopes are rounded to bfloat16, subtracting the weighted mean
    loses most of their digits: on SmolLM2-135M at 64 tokens the error of the penalty's gradient is 57% instead of 10%."""
    if on_cuda(left) and left.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(left, right, out_dtype=torch.float32)
    return wide(left) @ wide(right)


def _weights(query_2KQE: Tensor, key_2KTE: Tensor, rows: int, scale: float) -> tuple[Tensor, Tensor]:
    """P and dS - rowsum(P * dS), [K, R A, T]."""
    logits_KQT = _wide_product(query_2KQE[0], key_2KTE[0].transpose(1, 2)).mul_(scale)
    heads, queries, seen = logits_KQT.shape
    # Only the block's own keys, the last ones, can lie ahead of a query.
    ahead_AA = torch.ones(rows, rows, dtype=torch.bool, device=logits_KQT.device).triu_(1)
    logits_KQT.view(heads, queries // rows, rows, seen)[..., seen - rows :].masked_fill_(ahead_AA, float("-inf"))
    weights_KQT = torch.softmax(logits_KQT, dim=2)
    # One product of inner width 2 E: dQ K^T + Q dK^T.
    turned_KQ, keys_KT = torch.cat([query_2KQE[1], query_2KQE[0]], dim=2), torch.cat([key_2KTE[0], key_2KTE[1]], dim=2)
    slope_KQT = _wide_product(turned_KQ, keys_KT.transpose(1, 2)).mul_(scale)
    slope_KQT -= (weights_KQT * slope_KQT).sum(dim=2, keepdim=True)
    return weights_KQT, slope_KQT


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, query_2NHE: Tensor, key_2NKE: Tensor, value_2NKE: Tensor, groups: tuple[PrefixGroup, ...], scale: float
    ) -> Tensor:
        ctx.save_for_backward(query_2NHE, key_2NKE, value_2NKE)
        ctx.groups, ctx.scale = groups, scale
        out_2NHE = torch.empty_like(query_2NHE)
        kv_heads = key_2NKE.shape[2]
        for block in _blocks(groups, query_2NHE):
            query_2KQE = _by_key(query_2NHE[:, block.queries], kv_heads)
            rows = block.queries.stop - block.queries.start
            weights_KQT, slope_KQT = _weights(query_2KQE, block.keys(key_2NKE), rows, scale)
            value_2KTE = block.keys(value_2NKE)
            turned_KQT = slope_KQT.mul_(weights_KQT).to(value_2KTE.dtype)
            both_KQE = weights_KQT.to(value_2KTE.dtype) @ torch.cat([value_2KTE[0], value_2KTE[1]], dim=2)
            plain_KQE, moved_KQE = both_KQE.chunk(2, dim=2)
            out = torch.stack([plain_KQE, moved_KQE + turned_KQT @ value_2KTE[0]])
            out_2NHE[:, block.queries] = _by_query(out, rows)
        return out_2NHE

    @staticmethod
    def backward(ctx: Any, grad_2NHE: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """With a, b the gradients for O and dO, and X = b V^T:

            for dS: P * (X - rowsum(P * X))
            for P:  a V^T + b dV^T + X * (dS - rowsum(P * dS)) - dS rowsum(P * X)
            for S:  P * (that - rowsum(P * that))

        The last two terms of the second line are computed as (X - rowsum(P * X)) * (dS - rowsum(P * dS)), which differs by a
        constant per row; the third line removes it.
        """
        refuse_graph()
        query_2NHE, key_2NKE, value_2NKE = ctx.saved_tensors
        kv_heads, scale, dtype = key_2NKE.shape[2], ctx.scale, query_2NHE.dtype
        grad_query_2NHE = torch.empty_like(query_2NHE)
        grad_key_2NKE, grad_value_2NKE = torch.zeros_like(wide(key_2NKE)), torch.zeros_like(wide(value_2NKE))
        for block in _blocks(ctx.groups, query_2NHE):
            rows = block.queries.stop - block.queries.start
            query_2KQE, grad_2KQE = (_by_key(part[:, block.queries], kv_heads) for part in (query_2NHE, grad_2NHE))
            key_2KTE, value_2KTE = block.keys(key_2NKE), block.keys(value_2NKE)
            weights_KQT, slope_KQT = _weights(query_2KQE, key_2KTE, rows, scale)
            cross_KQT = _wide_product(grad_2KQE[1], value_2KTE[0].transpose(1, 2))
            mean_KQ1 = (weights_KQT * cross_KQT).sum(dim=2, keepdim=True)
            both_KQ, values_KT = torch.cat([grad_2KQE[0], grad_2KQE[1]], dim=2), torch.cat([*value_2KTE], dim=2)
            total_KQT = _wide_product(both_KQ, values_KT.transpose(1, 2))
            cross_KQT -= mean_KQ1
            total_KQT.addcmul_(cross_KQT, slope_KQT)
            total_KQT -= (weights_KQT * total_KQT).sum(dim=2, keepdim=True)
            for_logits_KQT = total_KQT.mul_(weights_KQT).mul_(scale).to(dtype)
            for_slope_KQT = cross_KQT.mul_(weights_KQT).mul_(scale).to(dtype)
            turned_KQT, weights_KQT = slope_KQT.mul_(weights_KQT).to(dtype), weights_KQT.to(dtype)
            along = for_slope_KQT @ torch.cat([*key_2KTE], dim=2)
            grad_query_2KQE = torch.stack(
                [for_logits_KQT @ key_2KTE[0] + along.chunk(2, dim=2)[1], along.chunk(2, dim=2)[0]]
            )
            grad_query_2NHE[:, block.queries] = _by_query(grad_query_2KQE, rows)
            # Columns: Q, dQ.
            columns = for_slope_KQT.transpose(1, 2) @ torch.cat([*query_2KQE], dim=2)
            straight, turned = columns.chunk(2, dim=2)
            block.add_keys(grad_key_2NKE, torch.stack([for_logits_KQT.transpose(1, 2) @ query_2KQE[0] + turned, straight]))
            columns = weights_KQT.transpose(1, 2) @ both_KQ
            straight, moved = columns.chunk(2, dim=2)
            block.add_keys(grad_value_2NKE, torch.stack([straight + turned_KQT.transpose(1, 2) @ grad_2KQE[1], moved]))
        return grad_query_2NHE, grad_key_2NKE.to(dtype), grad_value_2NKE.to(dtype), None, None

"""Packed attention by torch's flash attention for sequences of any lengths: one call a layer, on CUDA in 16 bits.

A segment of queries, a prefix or a suffix, attends to its own keys behind those of its prefix. Flash attention aligns a
causal mask at the bottom right where there are more keys than queries, which is just that. Shapes as in
drdpo.kernels.shared_prefix, M keys in all: a prefix's stand there once for itself and once before every suffix.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from drdpo.kernels.shared_prefix import PrefixGroup, PrefixPlan, fused_attention


class Segments(NamedTuple):
    """A row as flash attention is told of it: its pieces are the prefixes and suffixes in their order."""

    lengths: list[int]
    """Of the pieces, each of which is a segment of queries."""
    pieces: list[list[int]]
    """Of every segment: which pieces are its keys."""
    starts_q: Tensor
    """int32, cumulative lengths of the segments' queries, from 0."""
    starts_k: Tensor
    """int32, the same of their keys."""
    longest_q: int
    longest_k: int


def segments_of(groups: list[PrefixGroup], device: torch.device) -> Segments:
    """The segments of a row whose groups these are, for tensors on a device."""
    pieces, lengths = _segments(groups)
    keys = [sum(lengths[piece] for piece in segment) for segment in pieces]
    starts_q, starts_k = (
        torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device) for sizes in (lengths, keys)
    )
    return Segments(lengths, pieces, starts_q, starts_k, max(lengths), max(keys))


def varlen_attention(
    query_1HNE: Tensor, key_1KNE: Tensor, value_1KNE: Tensor, plan: PrefixPlan, scale: float | None
) -> Tensor:
    """As drdpo.kernels.shared_prefix.shared_prefix_attention."""
    from torch.nn.attention.varlen import varlen_attn

    known = plan.segments

    def lined_up(tensor_1KNE: Tensor) -> Tensor:
        # Split and joined, not indexed: the gradient is then a sum in a fixed order.
        parts = tensor_1KNE[0].transpose(0, 1).split(known.lengths)
        return torch.cat([parts[piece] for segment in known.pieces for piece in segment])

    out_NHE = varlen_attn(
        query_1HNE[0].transpose(0, 1).contiguous(), lined_up(key_1KNE), lined_up(value_1KNE), known.starts_q,
        known.starts_k, known.longest_q, known.longest_k, scale=scale, window_size=(-1, 0),
        enable_gqa=query_1HNE.shape[1] != key_1KNE.shape[1],
    )  # fmt: skip
    assert isinstance(out_NHE, Tensor)
    return out_NHE.transpose(0, 1)[None]


def _parts(group: PrefixGroup) -> list[int]:
    return [group.prefix, *group.suffixes] if group.prefix else list(group.suffixes)


def _segments(groups: list[PrefixGroup]) -> tuple[list[list[int]], list[int]]:
    """For every segment of queries, in the order of the row: which pieces of the row are its keys, and its length."""
    pieces: list[list[int]] = []
    queries: list[int] = []
    for group in groups:
        first = len(queries)
        prefix = [first] if group.prefix else []
        pieces += [prefix] if prefix else []
        start = first + len(prefix)
        pieces += [[*prefix, start + number] for number in range(len(group.suffixes))]
        queries += _parts(group)
    return pieces, queries


def check_varlen(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> str | None:
    """Why this machine's flash attention cannot be used, found by comparing a small row with the other kernels; or None."""
    generator = torch.Generator().manual_seed(0)
    groups = [PrefixGroup(5, (7, 3)), PrefixGroup(0, (4,)), PrefixGroup(33, (1, 40))]
    tokens = sum(group.tokens for group in groups)
    query, key, value = (
        torch.randn(1, count, tokens, width, generator=generator).to(device, dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    upstream = torch.randn(1, heads, tokens, width, generator=generator).to(device, dtype)
    plan, found = PrefixPlan(groups, device, dtype), []
    try:
        for attend in (varlen_attention, fused_attention):
            out = attend(query, key, value, plan, None)
            found.append([out, *torch.autograd.grad(out, (query, key, value), upstream)])
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        return " ".join(str(error).split())[:200]
    for ours, theirs in zip(*found, strict=True):
        if not float((ours - theirs).detach().norm()) <= 0.03 * float(theirs.detach().norm()):
            return "its numbers are not those of the other kernels"
    return None

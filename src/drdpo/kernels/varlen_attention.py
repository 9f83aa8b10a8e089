"""Packed attention by torch's flash attention for sequences of any lengths: one call a layer, on CUDA in 16 bits.

A segment of queries, a prefix or a suffix, attends to its own keys behind those of its prefix. Flash attention aligns a
causal mask at the bottom right where there are more keys than queries, which is just that. Shapes as in
drdpo.kernels.shared_prefix, M keys in all: a prefix's stand there once for itself and once before every suffix.
"""

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from drdpo.distributed import send
from drdpo.kernels.hand_written import refuse_graph
from drdpo.kernels.shared_prefix import PrefixGroup, PrefixPlan, shared_prefix_attention


class Segments(NamedTuple):
    """A row as flash attention is told of it: a segment of queries for every prefix and suffix, in their order."""

    starts_q: Tensor
    """int32, cumulative lengths of the segments' queries, from 0."""
    starts_k: Tensor
    """int32, the same of their keys."""
    longest_q: int
    longest_k: int
    copied: tuple[Tensor, Tensor, Tensor] | None
    """[M] the token of the row that each of the M keys is; [M] the keys, token by token of the row; [N] where among these a
    token's begin. None where there is no prefix: the keys are the row's."""


def segments_of(groups: list[PrefixGroup], device: torch.device) -> Segments:
    """The segments of a row whose groups these are, for tensors on a device."""
    queries: list[int] = []
    keys: list[int] = []
    rows: list[int] = []
    copies: list[list[int]] = []
    for group in groups:
        base = start = len(copies)
        copies += [[] for _ in range(group.tokens)]
        for length in group.lengths:
            prefix = range(base, base + group.prefix) if start > base else ()
            seen = [*prefix, *range(start, start + length)]
            start += length
            for row in seen:
                copies[row].append(len(rows))
                rows.append(row)
            queries.append(length)
            keys.append(len(seen))
    starts_q, starts_k = (
        send(torch.tensor([0, *accumulate(sizes)], dtype=torch.int32), device) for sizes in (queries, keys)
    )
    copied = None
    if len(rows) > len(copies):
        by_token = [key for token in copies for key in token]
        first = [0, *accumulate(map(len, copies))][:-1]
        copied = (send(torch.tensor(rows), device), send(torch.tensor(by_token), device), send(torch.tensor(first), device))
    return Segments(starts_q, starts_k, max(queries), max(keys), copied)


class _LinedUp(Function):
    """Every segment's keys [M, K, E], one after the other, of those of the row [N, K, E]; a token's gradient is the sum of
    its copies', in float32 and in their order."""

    @staticmethod
    def forward(ctx: Any, row_NKE: Tensor, rows_M: Tensor, copies_M: Tensor, first_N: Tensor) -> Tensor:
        ctx.save_for_backward(copies_M, first_N)
        return row_NKE.index_select(0, rows_M)

    @staticmethod
    def backward(ctx: Any, grad_MKE: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_graph("flash attention is differentiable once only")
        copies_M, first_N = ctx.saved_tensors
        # A bag is the sum of the rows that its indices name: one launch, where index_add has no fixed order.
        grad_N = torch.nn.functional.embedding_bag(copies_M, grad_MKE.flatten(1), first_N, mode="sum")
        return grad_N.view(-1, *grad_MKE.shape[1:]), None, None, None


def varlen_attention(
    query_1HNE: Tensor, key_1KNE: Tensor, value_1KNE: Tensor, plan: PrefixPlan, scale: float | None
) -> Tensor:
    """As drdpo.kernels.shared_prefix.shared_prefix_attention."""
    from torch.nn.attention.varlen import varlen_attn

    known = plan.segments
    # Squeezed, not indexed: the gradient of an index is a copy.
    query_NHE, key_MKE, value_MKE = (part.squeeze(0).transpose(0, 1) for part in (query_1HNE, key_1KNE, value_1KNE))
    if known.copied is not None:
        key_MKE, value_MKE = (_LinedUp.apply(part, *known.copied) for part in (key_MKE, value_MKE))
    out_NHE = varlen_attn(
        query_NHE.contiguous(), key_MKE.contiguous(), value_MKE.contiguous(), known.starts_q, known.starts_k,
        known.longest_q, known.longest_k, scale=scale, window_size=(-1, 0),
        enable_gqa=query_1HNE.shape[1] != key_1KNE.shape[1],
    )  # fmt: skip
    assert isinstance(out_NHE, Tensor)
    return out_NHE.transpose(0, 1)[None]


def refusal(settings: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a transformers model cannot attend by varlen_attention, or None.

    Args:
        settings: its config.
        device, dtype: of its weights.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return "flash attention takes 16-bit numbers only"
    settings = settings.get_text_config()
    heads = getattr(settings, "num_attention_heads", None)
    if not heads:
        return "the model's config.json gives no number of attention heads"
    kv_heads = getattr(settings, "num_key_value_heads", None) or heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    return check_varlen(device, dtype, heads, kv_heads, width)


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
        for attend in (varlen_attention, shared_prefix_attention):
            out = attend(query, key, value, plan, None)
            found.append([out, *torch.autograd.grad(out, (query, key, value), upstream)])
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        return " ".join(str(error).split())[:200]
    for ours, theirs in zip(*found, strict=True):
        if not float((ours - theirs).detach().norm()) <= 0.03 * float(theirs.detach().norm()):
            return "its numbers are not those of the other kernels"
    return None

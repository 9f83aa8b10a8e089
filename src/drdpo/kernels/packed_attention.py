"""Causal attention over a packed row in which sequences share prefixes, so that a shared prefix is computed once.

A row contains groups without padding: a prefix, then the suffixes of all sequences that begin with it. A suffix attends to
the prefix and to itself. This is exact: each sequence gets what it would get alone, up to rounding. Only one layer's keys
and values are alive at a time; a cache of the prefix would keep those of all layers.

Two implementations of one contract:

    shared_prefix_attention  any device and dtype: torch's fused attention, one call for every prefix and suffix
    varlen_attention         CUDA, 16 bits: torch's flash attention for sequences of any length, one call a layer

In the second, a segment of queries, a prefix or a suffix, attends to its own keys preceded by those of its prefix. If there
are more keys than queries, flash attention aligns its causal mask at the bottom right, which is exactly that.

Shape suffixes: H query heads, K key-value heads, N tokens of the row, E width of a head, A tokens of one piece, T the tokens
that they attend to, M keys of all segments: a prefix's keys occur once for itself and once before every suffix.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import scaled_dot_product_attention

from drdpo.distributed import send
from drdpo.errors import one_line
from drdpo.kernels.linear_logprob import on_cuda, refuse_graph

SHARED_PREFIX = "shared_prefix"
"""Name of this attention in transformers."""

# Rows, groups and what the kernels need to know of them.


@dataclass(frozen=True)
class PrefixGroup:
    """Lengths of a shared prefix (0: none) and of the suffixes that follow it."""

    prefix: int
    suffixes: tuple[int, ...]

    @property
    def lengths(self) -> list[int]:
        """Lengths of the pieces: the prefix, if any, then the suffixes."""
        return [self.prefix, *self.suffixes] if self.prefix else list(self.suffixes)

    @property
    def tokens(self) -> int:
        """Tokens of the group in a row."""
        return self.prefix + sum(self.suffixes)


class PrefixPlan:
    """The groups of one row, in order, and masks and segments for the kernels: made at their first use, shared by all
    layers. The dtype is that of queries and keys; `flash` chooses varlen_attention."""

    def __init__(self, groups: Sequence[PrefixGroup], device: torch.device, dtype: torch.dtype, flash: bool = False) -> None:
        self.groups = list(groups)
        self.lengths = [length for group in self.groups for length in group.lengths]
        """Lengths of the row's pieces, prefixes and suffixes in order."""
        self.longest = max(group.prefix + max(group.suffixes, default=0) for group in self.groups)
        """Tokens of the longest sequence."""
        self.dtype, self.flash = dtype, flash
        self._device = device
        self._masked = [group for group in self.groups if group.prefix]
        self._longest_prefix = max((group.prefix for group in self._masked), default=0)

    @cached_property
    def segments(self) -> "Segments":
        """The row's segments for varlen_attention."""
        return segments_of(self.groups, self._device)

    @cached_property
    def _mask(self) -> Tensor:
        """The mask of the longest prefix and suffix; the masks of the others are corners of it."""
        longest = max((length for group in self._masked for length in group.suffixes), default=0)
        row_A = torch.arange(longest, device=self._device)[:, None]
        column = torch.arange(self._longest_prefix + longest, device=self._device)[None]
        hidden = column > row_A + self._longest_prefix
        return torch.zeros(hidden.shape, dtype=self.dtype, device=self._device).masked_fill(hidden, float("-inf"))

    def mask(self, prefix: int, suffix: int) -> Tensor:
        """[suffix, prefix + suffix] additive: row i sees the prefix and the first i + 1 tokens of its suffix."""
        skipped = self._longest_prefix - prefix
        # A copy: CUDA's kernels need a mask that begins at a multiple of 16 bytes.
        return self._mask[:suffix, skipped : skipped + prefix + suffix].contiguous()


class PackedRow:
    """Token ids and positions of groups of sequences in one row, and the place of each sequence's tokens in it.

    Of a group (shared, sequences) all sequences begin with the same `shared` token ids, and each is longer than that.
    """

    def __init__(self, groups: Sequence[tuple[int, Sequence[Sequence[int]]]]) -> None:
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.groups: list[PrefixGroup] = []
        self._places: list[tuple[int, int, int]] = []
        for shared, sequences in groups:
            prefix_start = len(self.token_ids)
            self.token_ids += sequences[0][:shared]
            self.positions += range(shared)
            self.groups.append(PrefixGroup(shared, tuple(len(sequence) - shared for sequence in sequences)))
            for sequence in sequences:
                self._places.append((prefix_start, shared, len(self.token_ids)))
                self.token_ids += sequence[shared:]
                self.positions += range(shared, len(sequence))

    def index(self, sequence: int, position: int) -> int:
        """Place in the row of a position of a sequence; sequences are numbered over all groups."""
        prefix_start, shared, own_start = self._places[sequence]
        return prefix_start + position if position < shared else own_start + position - shared

    def answers(self) -> tuple[list[int], list[int], list[int]]:
        """Of every token behind its sequence's shared ones: the place of the token before it, the token, the sequence."""
        states, targets, sequences = [], [], []
        lengths = [length for group in self.groups for length in group.suffixes]
        for sequence, ((_, shared, own_start), length) in enumerate(zip(self._places, lengths, strict=True)):
            states += [self.index(sequence, position - 1) for position in range(shared, shared + length)]
            targets += self.token_ids[own_start : own_start + length]
            sequences += [sequence] * length
        return states, targets, sequences


class Segments(NamedTuple):
    """A row in flash attention's terms: a segment of queries for every prefix and suffix, in order."""

    starts_q: Tensor
    """int32, cumulative number of queries before each segment, and the total."""
    starts_k: Tensor
    """int32, the same for keys."""
    longest_q: int
    longest_k: int
    copied: tuple[Tensor, Tensor, Tensor] | None
    """[M] the row's token that each key is; [M] the keys sorted by token; [N] where a token's keys begin among these. None
    without a prefix: then the keys are the row's."""


def segments_of(groups: list[PrefixGroup], device: torch.device) -> Segments:
    """The segments of a row of these groups, as tensors on a device."""
    queries: list[int] = []
    keys: list[int] = []
    rows: list[int] = []
    start = 0
    for group in groups:
        base = start
        for length in group.lengths:
            prefix = range(base, base + group.prefix) if start > base else ()
            rows += [*prefix, *range(start, start + length)]
            queries.append(length)
            keys.append(len(prefix) + length)
            start += length
    starts_q, starts_k = (
        send(torch.tensor([0, *accumulate(sizes)], dtype=torch.int32), device) for sizes in (queries, keys)
    )
    copied = None
    if len(rows) > start:
        counts, by_token = Counter(rows), sorted(range(len(rows)), key=rows.__getitem__)
        first = [0, *accumulate(counts[row] for row in range(start - 1))]
        copied = (send(torch.tensor(rows), device), send(torch.tensor(by_token), device), send(torch.tensor(first), device))
    return Segments(starts_q, starts_k, max(queries), max(keys), copied)


# One call for every prefix and suffix.


def shared_prefix_attention(
    query_1HNE: Tensor, key_1KNE: Tensor, value_1KNE: Tensor, plan: PrefixPlan, scale: float | None
) -> Tensor:
    """[1, H, N, E] attention of a packed row; H is a multiple of K, and a scale of None means 1 / sqrt(E)."""
    if plan.flash:
        return varlen_attention(query_1HNE, key_1KNE, value_1KNE, plan, scale)
    # Split, not sliced: the gradient of a slice is as long as the row, so their sum would be quadratic in the groups.
    queries, keys, values = (tensor.split(plan.lengths, dim=2) for tensor in (query_1HNE, key_1KNE, value_1KNE))
    parts, first = [], 0
    for group in plan.groups:
        for piece in range(first, first + len(group.lengths)):
            seen, known, mask_AT = keys[piece], values[piece], None
            if group.prefix and piece > first:
                seen, known = (torch.cat([part[first], part[piece]], dim=2) for part in (keys, values))
                mask_AT = plan.mask(group.prefix, queries[piece].shape[2])
            parts.append(_sdpa(queries[piece], seen, known, mask_AT, scale))
        first += len(group.lengths)
    return torch.cat(parts, dim=2)


def repeats_heads(grouped: bool, masked: bool, dtype: torch.dtype) -> bool:
    """Must key heads be repeated for CUDA's fused kernels? Only flash attention accepts fewer key heads than query heads,
    but neither a mask nor float32; torch would use its plain kernel, which is slow and needs quadratic memory."""
    return grouped and (masked or dtype not in (torch.bfloat16, torch.float16))


def _sdpa(query_1HAE: Tensor, keys_1KTE: Tensor, values_1KTE: Tensor, mask_AT: Tensor | None, scale: float | None) -> Tensor:
    """torch's fused attention, causal without a mask. cuDNN's is switched off: it compiles a plan for every new shape, and a
    packed row's lengths hardly ever recur."""
    heads, kv_heads = query_1HAE.shape[1], keys_1KTE.shape[1]
    if on_cuda(query_1HAE) and repeats_heads(heads != kv_heads, mask_AT is not None, query_1HAE.dtype):
        keys_1KTE, values_1KTE = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (keys_1KTE, values_1KTE))
        kv_heads = heads
    if query_1HAE.is_meta:
        return _MetaAttention.apply(query_1HAE, keys_1KTE, values_1KTE, mask_AT)
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return scaled_dot_product_attention(
            query_1HAE, keys_1KTE, values_1KTE, mask_AT, is_causal=mask_AT is None, scale=scale,
            enable_gqa=heads != kv_heads,
        )  # fmt: skip
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


class _MetaAttention(Function):
    """Fused attention on the meta device, where torch would use its plain kernel: keeps what a fused kernel keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, keys, values, mask, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, keys, values, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(keys), torch.empty_like(values), None


# All segments in one call.


class _LinedUp(Function):
    """The keys of all segments in sequence [M, K, E] from those of the row [N, K, E]; a token's gradient is the sum over its
    copies, in float32 and in order."""

    @staticmethod
    def forward(ctx: Any, row_NKE: Tensor, rows_M: Tensor, copies_M: Tensor, first_N: Tensor) -> Tensor:
        ctx.save_for_backward(copies_M, first_N)
        return row_NKE.index_select(0, rows_M)

    @staticmethod
    def backward(ctx: Any, grad_MKE: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_graph("flash attention is differentiable once only")
        copies_M, first_N = ctx.saved_tensors
        # A bag is the sum of the rows with its indices: one launch in a fixed order, which index_add does not have.
        grad_N = torch.nn.functional.embedding_bag(copies_M, grad_MKE.flatten(1), first_N, mode="sum")
        return grad_N.view(-1, *grad_MKE.shape[1:]), None, None, None


def varlen_attention(
    query_1HNE: Tensor, key_1KNE: Tensor, value_1KNE: Tensor, plan: PrefixPlan, scale: float | None
) -> Tensor:
    """As shared_prefix_attention, by flash attention; `refusal` says whether this machine and model allow it."""
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
    """Why a transformers model of this config, with weights on this device, cannot use varlen_attention, or None."""
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
    """Why this machine's flash attention cannot be used, or None; found by comparing both implementations on a small row."""
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
        return one_line(str(error), 200)
    for ours, theirs in zip(*found, strict=True):
        if not float((ours - theirs).detach().norm()) <= 0.03 * float(theirs.detach().norm()):
            return "its numbers differ from those of the other kernels"
    return None


# In a transformers model.


def _attention_of_transformers(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The interface that transformers' models call; `prefix_plan` is an argument of the model's call."""
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f"the model's attention uses {name}, which packing with shared prefixes does not support")
    if attention_mask is not None:
        raise ValueError("packed rows accept no attention mask")
    plan, window = options["prefix_plan"], options.get("sliding_window")
    # Within its window, a sequence is seen whole.
    if window and window < plan.longest:
        raise ValueError(
            f"the model's attention has a sliding window of {window}, less than a sequence of {plan.longest} tokens"
        )
    # They may come in float32, see drdpo.training.patches.
    dtype = query.dtype
    query, key, value = (part.to(plan.dtype) for part in (query, key, value))
    out = shared_prefix_attention(query, key, value, plan, options.get("scaling")).to(dtype)
    return out.transpose(1, 2).contiguous(), None


def register_shared_prefix() -> None:
    """Add SHARED_PREFIX to transformers' attentions. Not at import: checks before a launch do not wait for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(SHARED_PREFIX, _attention_of_transformers)


def hidden_states(backbone: nn.Module, row: PackedRow, flash: bool = False) -> Tensor:
    """[N, D] last hidden states of a packed row.

    Args:
        backbone: a transformers decoder without a head, whose layers all attend causally to everything before.
        flash: use varlen_attention; `refusal` must have returned None.

    Raises:
        ValueError: the model's attention has a sliding window shorter than a sequence, capped logits or sinks.
    """
    parameter = next(backbone.parameters())
    plan = PrefixPlan(row.groups, parameter.device, parameter.dtype, flash=flash)
    ids_1N, position_1N = (send(torch.tensor([values]), parameter.device) for values in (row.token_ids, row.positions))
    register_shared_prefix()
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation(SHARED_PREFIX)
    try:
        return backbone(input_ids=ids_1N, position_ids=position_1N, use_cache=False, prefix_plan=plan).last_hidden_state[0]
    finally:
        backbone.set_attn_implementation(before)

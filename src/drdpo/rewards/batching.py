"""Batches of token ids within a budget of tokens: padded on the right, or packed with the shared prefixes once."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


def pad_right(
    sequences: Sequence[Sequence[int]], pad_id: int, device: "torch.device"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Token ids [B, T] and their attention mask [B, T]; the mask alone tells padding from a token with the pad's id."""
    import torch

    longest = max(map(len, sequences))
    ids = [[*sequence, *[pad_id] * (longest - len(sequence))] for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class Group(NamedTuple):
    """Sequences that begin alike."""

    shared: int
    """So many first tokens are the same in all; each sequence is longer."""
    rows: tuple[int, ...]
    """Which sequences."""


def packed_batches(sequences: Sequence[Sequence[int]], keys: Sequence[Hashable], budget: int) -> list[list[Group]]:
    """Group sequences of one key (completions of one prompt) by what they begin with, and groups into batches.

    A group over the budget is cut into several, each with the prefix again. The batches depend on the sequences and their
    order only, so that a later run finds the same ones.

    Args:
        sequences: token ids, none empty.
        keys: what is the same for sequences that are likely to begin alike.
        budget: most tokens of a batch; there is no padding. A single longer sequence goes alone.

    Returns:
        Batches, the largest groups first, so that memory peaks at once; every sequence is in exactly one.
    """
    rows_of: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        rows_of.setdefault(key, []).append(row)
    groups = [group for rows in rows_of.values() for group in _cut(sequences, rows, budget)]
    sizes = [group.shared + sum(len(sequences[row]) - group.shared for row in group.rows) for group in groups]
    batches: list[list[Group]] = []
    room = 0
    for number in sorted(range(len(groups)), key=lambda number: (-sizes[number], number)):
        if not batches or sizes[number] > room:
            batches.append([])
            room = budget
        batches[-1].append(groups[number])
        room -= sizes[number]
    return batches


def _cut(sequences: Sequence[Sequence[int]], rows: list[int], budget: int) -> list[Group]:
    """The rows of one key, with their common prefix, in groups within the budget."""
    shared = common_prefix([sequences[row] for row in rows])
    parts: list[list[int]] = []
    room = 0
    for row in rows:
        if not parts or len(sequences[row]) - shared > room:
            parts.append([])
            room = budget - shared
        parts[-1].append(row)
        room -= len(sequences[row]) - shared
    # A sequence alone shares nothing: it is one causal piece.
    return [Group(shared if len(part) > 1 else 0, tuple(part)) for part in parts]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all sequences share; at least one token of each is left to itself."""
    # What the first and the last in lexicographic order share, all between them share.
    low, high = min(map(tuple, sequences)), max(map(tuple, sequences))
    longest = min(map(len, sequences)) - 1
    return next((place for place in range(longest) if low[place] != high[place]), longest)


class Span(NamedTuple):
    """Where a reward model reads a conversation."""

    gate: int
    """First token of the last gating pattern."""
    first: int
    """First token after that pattern, or the last token where the answer is empty."""
    last: int
    """The last token."""


def find_span(token_ids: Sequence[int], pattern: Sequence[int]) -> Span | None:
    """Where a reward model reads a conversation; None without the gating pattern."""
    gate = last_occurrence(token_ids, pattern)
    return None if gate is None else Span(gate, min(gate + len(pattern), len(token_ids) - 1), len(token_ids) - 1)


def last_occurrence(token_ids: Sequence[int], pattern: Sequence[int]) -> int | None:
    """Index of the first token of the last occurrence of `pattern`; None without one."""
    size = len(pattern)
    for start in range(len(token_ids) - size, -1, -1):
        if list(token_ids[start : start + size]) == list(pattern):
            return start
    return None

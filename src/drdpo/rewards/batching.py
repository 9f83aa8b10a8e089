"""Batches of token ids within a budget of tokens, padded on the right."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def batches_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group sequences of like length, longest first, so that little is padded and memory peaks at once.

    Args:
        lengths: tokens of each sequence.
        budget: most tokens of a batch, padding included. A single sequence over it makes a batch of its own.

    Returns:
        Indices into `lengths`, each exactly once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad_right(
    sequences: Sequence[Sequence[int]], pad_id: int, device: "torch.device"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Token ids [B, T] and their attention mask [B, T]; the mask alone tells padding from a token with the pad's id."""
    import torch

    longest = max(map(len, sequences))
    ids = [[*sequence, *[pad_id] * (longest - len(sequence))] for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def last_occurrence(token_ids: Sequence[int], pattern: Sequence[int]) -> int | None:
    """Index of the first token of the last occurrence of `pattern`; None without one."""
    size = len(pattern)
    for start in range(len(token_ids) - size, -1, -1):
        if list(token_ids[start : start + size]) == list(pattern):
            return start
    return None

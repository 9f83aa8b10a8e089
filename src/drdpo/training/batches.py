"""Which pairs make an optimizer step, on which rank, in which micro-batch; and their padded tensors.

Shape suffixes: S = 2B sequences (all chosen rows, then all rejected), T tokens, A answer tokens.
"""

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from drdpo.distributed import send
from drdpo.training.data import Pair


@dataclass(frozen=True)
class Batch:
    """One micro-batch in the padded two-row form."""

    indices_B: Tensor
    """[B] position of every pair in its split; joins the reference log-probs."""
    input_ids_ST: Tensor
    attention_mask_ST: Tensor
    answer_mask_ST: Tensor
    """[S, T] True where a token belongs to the answer."""
    states_A: Tensor
    """[A] where in the S T tokens the state is that predicts each answer token: at the token before it."""
    targets_A: Tensor
    sequence_A: Tensor
    """[A] the sequence that each answer token belongs to."""

    @property
    def prompt_mask_BT(self) -> Tensor:
        """[B, T] True where both sequences of a pair hold the prompt."""
        pairs = len(self.indices_B)
        return self.attention_mask_ST[:pairs].bool() & ~self.answer_mask_ST[:pairs]

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.attention_mask_ST.sum())

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(send(getattr(self, name), device) for name in self.__dataclass_fields__))


def step_indices(pairs: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The pairs of one optimizer step.

    Every epoch is a new permutation, a function of (seed, epoch) alone; its last pairs that fill no batch are left out
    of that epoch.

    Args:
        pairs: how many there are.
        batch_size: pairs per optimizer step.
        seed: of the shuffling.
        step: optimizer steps done before this one.

    Returns:
        batch_size indices.
    """
    epoch, position = divmod(step, pairs // batch_size)
    return list(_epoch_order(pairs, seed, epoch)[position * batch_size : (position + 1) * batch_size])


@lru_cache(maxsize=2)
def _epoch_order(pairs: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(pairs))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def micro_batches(
    indices: Sequence[int], lengths: Sequence[int], micro_batch: int, rank: int, world: int, by_length: bool
) -> list[list[int]]:
    """Deal the pairs of one optimizer step to ranks and micro-batches.

    Args:
        indices: the step's pairs; their number is a multiple of micro_batch * world.
        lengths: tokens of every pair of the split.
        micro_batch: pairs per rank and forward pass.
        rank, world: this rank and how many there are.
        by_length: put pairs of similar length together, which saves padding and leaves the step as a whole the same.

    Returns:
        This rank's micro-batches, as many as every other rank's.
    """
    if len(indices) % (micro_batch * world):
        raise ValueError(f"{len(indices)} pairs do not divide into micro-batches of {micro_batch} on {world} ranks")
    dealt = sorted(indices, key=lambda index: (lengths[index], index)) if by_length else list(indices)
    group = micro_batch * world
    return [dealt[start : start + group][rank::world] for start in range(0, len(dealt), group)]


def token_batches(indices: Sequence[int], tokens: Sequence[int], budget: int, rank: int, world: int) -> list[list[int]]:
    """Deal the pairs of one optimizer step to few rows of about as many tokens each, within a budget.

    Longest first, each to the row that holds least (Graham's LPT rule), so that no rank waits long for another.

    Args:
        indices: the step's pairs; their number is a multiple of world.
        tokens: that every pair of the split takes in a row.
        budget: tokens of a row at most.
        rank, world: this rank and how many there are.

    Returns:
        This rank's rows, as many as every other rank's; a function of the set of indices alone.

    Raises:
        ValueError: a pair is longer than the budget, or the ranks cannot have a row each.
    """
    order = sorted(indices, key=lambda index: (-tokens[index], index))
    if tokens[order[0]] > budget or len(order) % world:
        raise ValueError(
            f"{len(order)} pairs of up to {tokens[order[0]]} tokens do not fit rows of {budget} on {world} ranks"
        )
    number = world * max(1, -(-sum(tokens[index] for index in order) // (budget * world)))
    while True:
        rows: list[list[int]] = [[] for _ in range(number)]
        held = [(0, row) for row in range(number)]
        for index in order:
            load, row = held[0]
            rows[row].append(index)
            heapq.heapreplace(held, (load + tokens[index], row))
        if max(held)[0] <= budget:
            break
        number += world
    # The largest first: memory that is not enough shows at once.
    rows.sort(key=lambda row: (-sum(tokens[index] for index in row), row))
    return rows[rank::world]


def padded_shards(
    indices: Sequence[int], lengths: Sequence[int], micro_batch: int, rank: int, world: int
) -> list[list[int]]:
    """Pairs, length-sorted, as this rank's batches; -1 fills up so that all ranks have the same number."""
    order = sorted(indices, key=lambda index: (lengths[index], index))
    order += [-1] * (-len(order) % (micro_batch * world))
    return micro_batches(order, [*lengths, 0], micro_batch, rank, world, by_length=False)


def batch_pairs(pairs: Sequence[Pair], indices: Sequence[int]) -> list[Pair]:
    """The pairs of a batch; the shortest of all where an index is -1."""
    shortest = min(pairs, key=len) if -1 in indices else None
    return [pairs[index] if shortest is None or index >= 0 else shortest for index in indices]


def collate(pairs: Sequence[Pair], indices: Sequence[int], pad_token_id: int) -> Batch:
    """Pad pairs on the right into one Batch.

    Args:
        pairs: all pairs of the split.
        indices: those of the batch; -1 stands for none: the shortest pair takes its place, its result to be thrown away.
        pad_token_id: fills up; masked, so any id does.
    """
    taken = batch_pairs(pairs, indices)
    chosen = [(pair.prompt, pair.chosen) for pair in taken]
    rejected = [(pair.prompt, pair.rejected) for pair in taken]
    rows = chosen + rejected
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids_ST = torch.full((len(rows), width), pad_token_id)
    attention_mask_ST = torch.zeros((len(rows), width), dtype=torch.int64)
    answer_mask_ST = torch.zeros((len(rows), width), dtype=torch.bool)
    states, targets, sequences = [], [], []
    for row, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        states += [row * width + place - 1 for place in range(len(prompt), length)]
        targets += answer
        sequences += [row] * len(answer)
        input_ids_ST[row, :length] = torch.tensor(prompt + answer)
        attention_mask_ST[row, :length] = 1
        answer_mask_ST[row, len(prompt) : length] = True
    return Batch(
        torch.tensor(list(indices)), input_ids_ST, attention_mask_ST, answer_mask_ST,
        torch.tensor(states), torch.tensor(targets), torch.tensor(sequences),
    )  # fmt: skip

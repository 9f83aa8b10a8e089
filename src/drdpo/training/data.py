"""Preference pairs as token ids, and the micro-batches that they go through the model in.

In order: token ids of preferences (Pair); which pairs make an optimizer step, on which rank and in which micro-batch
(BatchPlan); and the two forms of a micro-batch, padded (Batch) or as one packed row (PackedBatch).

Shape suffixes: B pairs, S = 2B sequences (all chosen rows, then all rejected), T tokens of a padded row, N tokens of a
packed row, A answer tokens.
"""

import heapq
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from drdpo import chat, distributed
from drdpo.candidates import CandidateRow
from drdpo.distributed import send
from drdpo.errors import DataError
from drdpo.kernels.packed_attention import PackedRow, PrefixGroup
from drdpo.progress import progress
from drdpo.records import Message, Preference
from drdpo.training.losses import TOKENS
from drdpo.training.rows import Columns


@dataclass(frozen=True)
class Pair:
    """Token ids of one preference; an answer that was not cut ends in the template's end-of-turn token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    prompt_id: int | None = field(default=None, compare=False)
    """Of the record, for messages."""
    columns: Mapping[str, float] = field(default_factory=dict, compare=False)
    """What Method.reads names, and the number of the group in Method.group."""
    groups: Mapping[str, str] = field(default_factory=dict, compare=False)
    mixed: Mapping[str, tuple[float, float]] = field(default_factory=dict, compare=False)
    """See Columns."""

    def __len__(self) -> int:
        """Tokens of the longer sequence."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    def row_tokens(self) -> int:
        """Tokens that the pair takes in a packed row."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


# From preferences to token ids ------------------------------------------------------------------------------------------


REASONS = ("prompt too long", "template refuses", "empty answer", "equal answers", "answer cut", "text encoded")


def tokenise(
    preferences: list[Preference], tokenizer: chat.Tokenizer, max_len: int, columns: Sequence[Columns] | None = None
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs that can be trained on, and counts by REASONS: of pairs that are dropped, then of answers that stay.
    DataError if the chat template renders no pair.

    Sampled ids are used if the record has them and they spell the stored text in this tokenizer; otherwise the text is
    encoded. An answer is cut at max_len tokens in all and then has no end-of-turn token. `columns` are those of load_split.
    """
    pairs, counts = [], dict.fromkeys(REASONS, 0)
    shown = progress(preferences, desc="tokenise", unit="pair", disable=not distributed.is_main())
    for preference, found in zip(shown, columns or [Columns()] * len(preferences), strict=True):
        if not all(answer[0]["content"].strip() for answer in (preference.chosen, preference.rejected)):
            counts["empty answer"] += 1
            continue
        try:
            prompt = chat.prompt_token_ids(tokenizer, preference.prompt)
            room = max_len - len(prompt)
            if room < 1:
                counts["prompt too long"] += 1
                continue
            sides = ((preference.chosen, preference.chosen_token_ids), (preference.rejected, preference.rejected_token_ids))
            whole = [_answer(tokenizer, preference.prompt, *side) for side in sides]
        except ValueError as error:
            counts["template refuses"] += 1
            if counts["template refuses"] == len(preferences):
                raise DataError(f"the policy's chat template renders no pair; the last: {error}") from error
            continue
        answers = [ids[:room] for ids, _ in whole]
        for ids, encoded in whole:
            counts["text encoded"] += encoded
            counts["answer cut"] += len(ids) > room
        if answers[0] == answers[1]:
            counts["equal answers"] += 1
        else:
            lengths = {name: float(len(answer)) for name, answer in zip(TOKENS, answers, strict=True)}
            numbers = {name: lengths.get(name, number) for name, number in found.numbers.items()}
            pairs.append(Pair(prompt, answers[0], answers[1], preference.prompt_id, numbers, found.groups, found.mixed))
    return pairs, counts


def _answer(
    tokenizer: chat.Tokenizer, prompt: list[Message], answer: list[Message], sampled: list[int] | None
) -> tuple[list[int], bool]:
    """Ids of an answer, and whether its text had to be encoded."""
    text = answer[0]["content"].strip()
    if sampled is not None and max(sampled, default=0) < len(tokenizer) and chat.decode(tokenizer, sampled) == text:
        return list(sampled), False
    return chat.answer_token_ids(tokenizer, answer, prompt), True


# Which pairs go through the model together ------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchPlan:
    """Which pairs of a split make an optimizer step, on which rank and in which micro-batch, and their form, as a function
    of these values alone. All ranks have equally many micro-batches."""

    pairs: Sequence[Pair]
    batch_size: int
    """Pairs per optimizer step, over all ranks."""
    micro_batch: int
    """Pairs per rank and forward pass; times the number of ranks, it divides batch_size."""
    row_tokens: int | None
    """Instead of micro_batch: as many pairs per rank and forward pass as fit a packed row of this length."""
    by_length: bool
    """Put pairs of similar length together. Not if a micro-batch is a population, whose lengths must be mixed."""
    seed: int
    """Of the shuffling."""
    packing: bool
    """One packed row per micro-batch, each prompt once for its two answers, instead of two padded rows per pair."""
    pad_token_id: int
    rank: int
    world: int

    @cached_property
    def lengths(self) -> list[int]:
        """Of every pair: tokens in a packed row under row_tokens, else of the longer sequence."""
        return [len(pair) if self.row_tokens is None else pair.row_tokens() for pair in self.pairs]

    def of_step(self, step: int) -> list[list[int]]:
        """This rank's micro-batches, as indices of pairs, of the optimizer step after `step` finished ones."""
        return self.deal(step_indices(len(self.pairs), self.batch_size, self.seed, step))

    def of_first_epoch(self) -> list[list[int]]:
        """This rank's micro-batches of the first epoch's whole steps, then of its other pairs (-1 is padding)."""
        steps = range(len(self.pairs) // self.batch_size)
        used = {index for step in steps for index in step_indices(len(self.pairs), self.batch_size, self.seed, step)}
        left = [index for index in range(len(self.pairs)) if index not in used]
        return [rows for step in steps for rows in self.of_step(step)] + self.without_steps(left)

    def without_steps(self, indices: Sequence[int] | None = None) -> list[list[int]]:
        """This rank's share of the pairs, or of these, in batches of one size; -1 is padding."""
        indices, size = range(len(self.pairs)) if indices is None else indices, self.micro_batch
        if self.row_tokens is not None and indices:
            size = max(1, self.row_tokens // max(self.lengths[index] for index in indices))
            # Equal sizes need the least padding.
            batches = -(-len(indices) // (size * self.world))
            size = -(-len(indices) // (batches * self.world))
        return padded_shards(indices, self.lengths, size, self.rank, self.world)

    def deal(self, indices: Sequence[int]) -> list[list[int]]:
        """This rank's micro-batches of the pairs of one optimizer step."""
        if self.row_tokens is not None:
            return token_batches(indices, self.lengths, self.row_tokens, self.rank, self.world)
        return micro_batches(indices, self.lengths, self.micro_batch, self.rank, self.world, self.by_length)

    def batch(self, indices: Sequence[int]) -> "AnyBatch":
        """A micro-batch of these pairs, -1 being padding, on the CPU."""
        return form_batch(self.pairs, indices, self.packing, self.pad_token_id)


def step_indices(pairs: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The pairs of the optimizer step after `step` others: batch_size different indices of at least so many pairs.

    Every epoch is a new permutation, and a step that an epoch's last pairs do not fill takes the first ones of the next.
    """
    epoch, first = divmod(step * batch_size, pairs)
    taken = _epoch_order(pairs, batch_size, seed, epoch)[first : first + batch_size]
    if len(taken) < batch_size:
        taken += _epoch_order(pairs, batch_size, seed, epoch + 1)[: batch_size - len(taken)]
    return list(taken)


@lru_cache(maxsize=2)
def _epoch_order(pairs: int, batch_size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation. Its first pairs share a step with the last ones of the epoch before; pairs that this step has already
    come behind it, in their order."""
    # An epoch depends on the one before, back to one that begins with a step of its own.
    period = batch_size // math.gcd(pairs, batch_size)
    order: list[int] = []
    for number in range(epoch - epoch % period, epoch + 1):
        before = set(order[len(order) - number * pairs % batch_size :])
        order = list(range(pairs))
        random.Random(f"{seed}/{number}").shuffle(order)
        if before:
            free = dict.fromkeys([index for index in order if index not in before][: batch_size - len(before)])
            order = [*free, *(index for index in order if index not in free)]
    return tuple(order)


def micro_batches(
    indices: Sequence[int], lengths: Sequence[int], micro_batch: int, rank: int, world: int, by_length: bool
) -> list[list[int]]:
    """This rank's micro-batches, as many as every other rank's, of a step's pairs, a multiple of micro_batch * world;
    `by_length` puts those of similar length, in tokens of every pair of the split, together, which saves padding."""
    if len(indices) % (micro_batch * world):
        raise ValueError(f"{len(indices)} pairs do not divide into micro-batches of {micro_batch} on {world} ranks")
    dealt = sorted(indices, key=lambda index: (lengths[index], index)) if by_length else list(indices)
    group = micro_batch * world
    return [dealt[start : start + group][rank::world] for start in range(0, len(dealt), group)]


def token_batches(indices: Sequence[int], tokens: Sequence[int], budget: int, rank: int, world: int) -> list[list[int]]:
    """This rank's rows, as many as every other rank's, of a step's pairs, a multiple of world: few, of about as many tokens
    each, within a budget. A function of the set of indices alone; `tokens` are those of every pair of the split in a row.

    Longest first, each to the row that holds least (Graham's LPT rule), so that no rank waits long for another.
    """
    order = sorted(indices, key=lambda index: (-tokens[index], index))
    if tokens[order[0]] > budget or len(order) % world:
        raise ValueError(
            f"{len(order)} pairs, up to {tokens[order[0]]} tokens, do not fit rows of {budget} on {world} ranks"
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
    """Pairs, sorted by length, as this rank's batches; -1 pads so that all ranks have the same number."""
    order = sorted(indices, key=lambda index: (lengths[index], index))
    order += [-1] * (-len(order) % (micro_batch * world))
    return micro_batches(order, [*lengths, 0], micro_batch, rank, world, by_length=False)


# The two forms of a micro-batch -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _MicroBatch:
    indices_B: Tensor
    """[B] position of every pair in its split; joins the reference log-probs."""
    states_A: Tensor
    """[A] where the state is that predicts each answer token: at the token before it, in the S T tokens or in the row."""
    targets_A: Tensor
    sequence_A: Tensor
    """[A] the sequence that each answer token belongs to."""
    columns: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    """[B] float32 each, see Pair."""

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        tensors: dict[str, Any] = {name: send(part, device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **tensors, columns={name: send(column_B, device) for name, column_B in self.columns.items()})


@dataclass(frozen=True)
class Batch(_MicroBatch):
    """One micro-batch in the padded form: two rows a pair."""

    input_ids_ST: Tensor
    attention_mask_ST: Tensor
    answer_mask_ST: Tensor
    """[S, T] True where a token belongs to the answer."""

    @property
    def sequences(self) -> int:
        """S."""
        return len(self.input_ids_ST)

    @property
    def prompt_mask_BT(self) -> Tensor:
        """[B, T] True where both sequences of a pair have the prompt."""
        pairs = len(self.indices_B)
        return self.attention_mask_ST[:pairs].bool() & ~self.answer_mask_ST[:pairs]

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.attention_mask_ST.sum())


@dataclass(frozen=True)
class PackedBatch(_MicroBatch):
    """One micro-batch as one row without padding: every pair's prompt once, then its answers."""

    input_ids_1N: Tensor
    positions_1N: Tensor
    pair_N: Tensor
    """[N] the pair that each token belongs to."""
    groups: tuple[PrefixGroup, ...]

    @property
    def sequences(self) -> int:
        """S."""
        return sum(len(group.suffixes) for group in self.groups)

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return self.input_ids_1N.numel()


AnyBatch = Batch | PackedBatch


def form_batch(pairs: Sequence[Pair], indices: Sequence[int], packing: bool = True, pad_token_id: int = 0) -> AnyBatch:
    """A micro-batch of these pairs: see `pack` and `collate`."""
    return pack(pairs, indices) if packing else collate(pairs, indices, pad_token_id)


def batch_pairs(pairs: Sequence[Pair], indices: Sequence[int]) -> list[Pair]:
    """The pairs of a batch; where an index is -1, padding, the shortest of all, whose result is discarded."""
    shortest = min(pairs, key=len) if -1 in indices else None
    return [pairs[index] if shortest is None or index >= 0 else shortest for index in indices]


def columns_of(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """[B] float32 each: the columns of pairs, which all have the same."""
    return {name: torch.tensor([pair.columns[name] for pair in pairs]) for name in pairs[0].columns}


def collate(pairs: Sequence[Pair], indices: Sequence[int], pad_token_id: int) -> Batch:
    """Pad pairs on the right into one Batch, see batch_pairs; the padding is masked, so any pad_token_id works."""
    taken = batch_pairs(pairs, indices)
    rows = [(pair.prompt, pair.chosen) for pair in taken] + [(pair.prompt, pair.rejected) for pair in taken]
    ids_ST = pad_sequence([torch.tensor([*p, *answer]) for p, answer in rows], batch_first=True, padding_value=pad_token_id)
    prompt_S1, answer_S1 = torch.tensor([[len(part) for part in row] for row in rows]).T[:, :, None]
    place_T = torch.arange(ids_ST.shape[1])
    there_ST, answer_ST = place_T < prompt_S1 + answer_S1, place_T >= prompt_S1
    # Lists, not a mask's nonzero, whose length fake tensors (benchmarks/fake_cuda.py) cannot know.
    answers = [(row, len(prompt) + place, token) for row, (prompt, answer) in enumerate(rows)
               for place, token in enumerate(answer)]  # fmt: skip
    sequence_A, place_A, targets_A = torch.tensor(answers).T
    return Batch(
        torch.tensor(list(indices)), sequence_A * ids_ST.shape[1] + place_A - 1, targets_A, sequence_A,
        ids_ST, there_ST.long(), answer_ST & there_ST, columns=columns_of(taken),
    )  # fmt: skip


def pack(pairs: Sequence[Pair], indices: Sequence[int]) -> PackedBatch:
    """Pack pairs, see batch_pairs, into one row, each prompt once for its two answers."""
    taken = batch_pairs(pairs, indices)
    row = PackedRow([(len(pair.prompt), [pair.prompt + pair.chosen, pair.prompt + pair.rejected]) for pair in taken])
    batch = _packed(row, indices, [number for number, pair in enumerate(taken) for _ in range(pair.row_tokens())])
    # The row has a pair's answers side by side; a sequence's number is that of its pair, of rejected ones after all others.
    sequence_A = batch.sequence_A // 2 + batch.sequence_A % 2 * len(taken)
    return replace(batch, sequence_A=sequence_A, columns=columns_of(taken))


def _packed(row: PackedRow, indices: Sequence[int], pair_of: Sequence[int]) -> PackedBatch:
    states_A, targets_A, sequence_A = map(torch.tensor, row.answers())
    return PackedBatch(
        torch.tensor(list(indices)), states_A, targets_A, sequence_A, torch.tensor([row.token_ids]),
        torch.tensor([row.positions]), torch.tensor(list(pair_of)), tuple(row.groups),
    )  # fmt: skip


def pack_candidates(row: CandidateRow) -> PackedBatch:
    """A packed row of drdpo.candidates as a batch of the policy: any number of answers to a prompt, none chosen."""
    return _packed(row.packed, row.indices_S, [0] * len(row.packed.token_ids))

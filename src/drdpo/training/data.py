"""Preferences from a folder, a saved data set or the hub, as token ids of prompt, chosen and rejected answer."""

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from drdpo import chat, distributed
from drdpo.config import TrainConfig
from drdpo.distributed import send
from drdpo.errors import DataError
from drdpo.kernels.packed_attention import PackedRow, PrefixGroup
from drdpo.progress import progress
from drdpo.records import Message, Preference, read_rows


@dataclass(frozen=True)
class Pair:
    """Token ids of one preference; an answer that was not cut ends in the template's end-of-turn token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    prompt_id: int | None = field(default=None, compare=False)
    """Of the record; says which pair is meant."""

    def __len__(self) -> int:
        """Tokens of the longer sequence."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def load_preferences(dataset_path: str, split: str) -> list[Preference]:
    """Read one split of a preference data set.

    Args:
        dataset_path: a folder with <split>.jsonl, a folder of datasets.save_to_disk, or a hub id. Rows are our own
            records or TRL's form: prompt, chosen and rejected as message lists or texts, or chosen and rejected with
            the shared prompt inside.
        split: "train" or "test".

    Raises:
        DataError: no such data set or split, no rows, or a row without the fields; names file, row and field.
    """
    folder = Path(dataset_path)
    if folder.is_dir() and not (folder / "dataset_dict.json").is_file():
        source = str(folder / f"{split}.jsonl")
        rows = read_rows(Path(source))
    else:
        source = f"{dataset_path} [{split}]"
        rows = enumerate(_hub_rows(dataset_path, split), start=1)
    preferences = []
    for number, row in rows:
        try:
            preferences.append(Preference.from_trl(row, number))
        except ValueError as error:
            raise DataError(f"{source}, row {number}: {error}") from error
    if not preferences:
        raise DataError(f"{source}: the data set has no rows")
    return preferences


REASONS = ("prompt too long", "template refuses", "empty answer", "equal answers", "answer cut", "text encoded")


def tokenise(preferences: list[Preference], tokenizer: chat.Tokenizer, max_len: int) -> tuple[list[Pair], dict[str, int]]:
    """Turn preferences into token ids.

    Sampled ids are used where they are there and spell the stored text in this tokenizer; otherwise the text is encoded.
    An answer is cut at max_len tokens in all and then has no end-of-turn token.

    Args:
        preferences: of one split.
        tokenizer: of the policy.
        max_len: longest prompt + answer in tokens.

    Returns:
        The pairs that can be trained on, and counts of what was done: "prompt too long", "template
        refuses", "empty answer" and "equal answers" were left out, "answer cut" and "text encoded" were not.
    """
    pairs, counts = [], dict.fromkeys(REASONS, 0)
    for preference in progress(preferences, desc="tokenise", unit="pair", disable=not distributed.is_main()):
        try:
            prompt = chat.prompt_token_ids(tokenizer, preference.prompt)
        except (TemplateError, ValueError):
            counts["template refuses"] += 1
            continue
        room = max_len - len(prompt)
        if room < 1:
            counts["prompt too long"] += 1
            continue
        answers = []
        for message, sampled in (
            (preference.chosen, preference.chosen_token_ids),
            (preference.rejected, preference.rejected_token_ids),
        ):
            ids, encoded = _answer(tokenizer, message, sampled)
            counts["text encoded"] += encoded
            counts["answer cut"] += len(ids) > room
            answers.append(ids[:room])
        if not all(answers):
            counts["empty answer"] += 1
        elif answers[0] == answers[1]:
            counts["equal answers"] += 1
        else:
            pairs.append(Pair(prompt, answers[0], answers[1], preference.prompt_id))
    return pairs, counts


def _answer(tokenizer: chat.Tokenizer, answer: list[Message], sampled: list[int] | None) -> tuple[list[int], bool]:
    """Ids of an answer, and whether they had to be made from its text."""
    if sampled is None:
        return chat.answer_token_ids(tokenizer, answer), True
    known = all(token < len(tokenizer) for token in sampled)
    if known and chat.decode(tokenizer, sampled) == answer[0]["content"].strip():
        return list(sampled), False
    return chat.answer_token_ids(tokenizer, answer), True


def _hub_rows(dataset_path: str, split: str) -> Any:
    import datasets

    folder = Path(dataset_path)
    try:
        found = datasets.load_from_disk(dataset_path) if folder.is_dir() else datasets.load_dataset(dataset_path)
    except Exception as error:
        # The hub client raises errors of a dozen libraries; all of them mean that there is no data.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{dataset_path}: neither a folder of preferences nor a data set of the hub ({reason})") from error
    names = [split] if split == "train" else ["test", "validation", "eval"]
    for name in names:
        if name in found:
            return found[name]
    raise DataError(f"{dataset_path}: no split {' or '.join(names)} (it has {', '.join(found)})")


def row_tokens(pair: Pair, config: TrainConfig) -> int:
    """Tokens that a pair takes in a packed row."""
    prompts = 2 if config.method == "wdpo" and config.wdpo_prompt == "per_sequence" else 1
    return prompts * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def dealt_lengths(pairs: Sequence[Pair], config: TrainConfig) -> list[int]:
    """The length of every pair that dealing goes by: tokens in a row, or of the longer sequence."""
    return [len(pair) if config.micro_batch_tokens is None else row_tokens(pair, config) for pair in pairs]


# Which pairs make an optimizer step, on which rank, in which micro-batch; and their padded tensors.
#
# Shape suffixes: S = 2B sequences (all chosen rows, then all rejected), T tokens, A answer tokens.


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


# Which pairs go through the model together, on which rank, as the flags say.
#
# --micro_batch_size puts as many pairs into every forward pass, --micro_batch_tokens as many as a number of tokens
# allows.


def step_batches(
    indices: Sequence[int], lengths: Sequence[int], config: TrainConfig, rank: int, world: int
) -> list[list[int]]:
    """This rank's micro-batches of one optimizer step, as many as every other rank's.

    Args:
        indices: the step's pairs, over all ranks.
        lengths: of all pairs of the split, from drdpo.training.data.dealt_lengths.
        config: of the run.
        rank, world: this rank and how many there are.
    """
    if config.micro_batch_tokens is not None:
        return token_batches(indices, lengths, config.micro_batch_tokens, rank, world)
    # A population of one micro-batch must not hold pairs of one length only.
    return micro_batches(indices, lengths, config.micro_batch, rank, world, by_length=config.robust_scope == "step")


def evaluation_batches(
    indices: Sequence[int], lengths: Sequence[int], config: TrainConfig, rank: int, world: int
) -> list[list[int]]:
    """This rank's share of any pairs, in batches of one size; -1 fills up. Arguments as for step_batches."""
    size = config.micro_batch
    if config.micro_batch_tokens is not None and indices:
        size = max(1, config.micro_batch_tokens // max(lengths[index] for index in indices))
        # Of equal size: little is left to fill up.
        batches = -(-len(indices) // (size * world))
        size = -(-len(indices) // (batches * world))
    return padded_shards(indices, lengths, size, rank, world)


# Micro-batches as one packed row: every pair's prompt once, then its two answers, without padding.
#
# Shape suffixes: B pairs, S = 2B sequences (all chosen, then all rejected), N tokens of the row, A answer tokens.


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch in the packed form."""

    indices_B: Tensor
    """[B] position of every pair in its split; joins the reference log-probs."""
    input_ids_1N: Tensor
    positions_1N: Tensor
    pair_N: Tensor
    """[N] the pair that each token belongs to."""
    states_A: Tensor
    """[A] where in the row the state is that predicts each answer token: for an answer's first, the prompt's last."""
    targets_A: Tensor
    sequence_A: Tensor
    """[A] the sequence that each answer token belongs to."""
    groups: tuple[PrefixGroup, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return self.input_ids_1N.numel()

    def to(self, device: torch.device) -> "PackedBatch":
        tensors = {name: send(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def pack(pairs: Sequence[Pair], indices: Sequence[int], prompt_once: bool) -> PackedBatch:
    """Pack pairs into one row.

    Args:
        pairs: all pairs of the split.
        indices: those of the batch; -1 stands for none: the shortest pair takes its place, its result to be thrown away.
        prompt_once: False holds the prompt in front of each answer, for WDPO's penalty per sequence, which needs the
            gradients of the two prompts apart.
    """
    groups: list[tuple[int, list[list[int]]]] = []
    taken = batch_pairs(pairs, indices)
    for pair in taken:
        rows = [pair.prompt + pair.chosen, pair.prompt + pair.rejected]
        groups += [(len(pair.prompt), rows)] if prompt_once else [(0, [row]) for row in rows]
    row = PackedRow(groups)
    states, targets, sequences, pair_of = [], [], [], []
    for number, pair in enumerate(taken):
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            first = len(pair.prompt)
            states += [row.index(2 * number + side, position - 1) for position in range(first, first + len(answer))]
            targets += answer
            sequences += [number + side * len(indices)] * len(answer)
        copies = 1 if prompt_once else 2
        pair_of += [number] * (copies * len(pair.prompt) + len(pair.chosen) + len(pair.rejected))
    return PackedBatch(
        torch.tensor(list(indices)), torch.tensor([row.token_ids]), torch.tensor([row.positions]), torch.tensor(pair_of),
        torch.tensor(states), torch.tensor(targets), torch.tensor(sequences), tuple(row.groups),
    )  # fmt: skip


def form_batch(pairs: Sequence[Pair], indices: Sequence[int], config: TrainConfig, pad_token_id: int) -> Batch | PackedBatch:
    """A micro-batch in the form that the flags ask for.

    Args:
        pairs: all pairs of the split.
        indices: those of the batch; -1 stands for none.
        config: of the run.
        pad_token_id: for the padded form.
    """
    if not config.packing:
        return collate(pairs, indices, pad_token_id)
    return pack(pairs, indices, prompt_once=config.method != "wdpo" or config.wdpo_prompt == "once")

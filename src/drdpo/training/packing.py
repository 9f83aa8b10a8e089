"""Micro-batches as one packed row: every pair's prompt once, then its two answers, without padding.

Shape suffixes: B pairs, S = 2B sequences (all chosen, then all rejected), N tokens of the row, A answer tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drdpo.config import TrainConfig
from drdpo.distributed import send
from drdpo.kernels.shared_prefix import PackedRow, PrefixGroup
from drdpo.training.batches import Batch, batch_pairs, collate
from drdpo.training.data import Pair


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

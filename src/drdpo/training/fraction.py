"""--wdpo_fraction: which pairs of an optimizer step carry the penalty, and micro-batches of them alone.

Shape suffixes: B pairs, S = 2B sequences, N tokens of a row, A answer tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from drdpo.config import TrainConfig
from drdpo.kernels.shared_prefix import PrefixGroup
from drdpo.training.batches import Batch
from drdpo.training.packing import PackedBatch


def penalised_pairs(indices: Sequence[int], config: TrainConfig, step: int) -> frozenset[int] | None:
    """The pairs of an optimizer step that carry the penalty, drawn without replacement, all sets equally likely.

    Every pair is drawn with probability `config.penalised / P`, so the penalty times the inverse of that
    (`config.penalty_scale`) has the full penalty, and its gradient the full gradient, as its expectation.

    Args:
        indices: all P pairs of the step, over all ranks.
        config: wdpo_fraction, train_batch_size and seed.
        step: optimizer steps done before this one.

    Returns:
        A function of the set of indices, the seed and the step alone; None where all carry it.
    """
    if config.method != "wdpo" or config.penalised == len(indices):
        return None
    return frozenset(random.Random(f"{config.seed}/penalty/{step}").sample(sorted(indices), config.penalised))


def select(batch: Batch | PackedBatch, keep_B: Tensor) -> Batch | PackedBatch:
    """The micro-batch of some of its pairs, which is what forming it from them would give (less the other rows' padding).

    Args:
        batch: B pairs.
        keep_B: [B] bool.
    """
    if isinstance(batch, Batch):
        keep_S = torch.cat([keep_B, keep_B])
        masks = (batch.input_ids_ST[keep_S], batch.attention_mask_ST[keep_S], batch.answer_mask_ST[keep_S])
        width = int(masks[1].sum(dim=1).max())
        return Batch(batch.indices_B[keep_B], *(part[:, :width] for part in masks))
    keep_N = keep_B[batch.pair_N]
    keep_A = keep_B[batch.sequence_A % len(keep_B)]
    place_N, new_B = keep_N.cumsum(0) - 1, keep_B.cumsum(0) - 1
    side_A = batch.sequence_A[keep_A] // len(keep_B)
    pair_A = new_B[batch.sequence_A[keep_A] % len(keep_B)]
    return replace(
        batch,
        indices_B=batch.indices_B[keep_B],
        input_ids_1N=batch.input_ids_1N[:, keep_N],
        positions_1N=batch.positions_1N[:, keep_N],
        pair_N=new_B[batch.pair_N[keep_N]],
        states_A=place_N[batch.states_A[keep_A]],
        targets_A=batch.targets_A[keep_A],
        sequence_A=pair_A + side_A * int(keep_B.sum()),
        groups=_kept_groups(batch, keep_B),
    )


def _kept_groups(batch: PackedBatch, keep_B: Tensor) -> tuple[PrefixGroup, ...]:
    kept, start = [], 0
    pair_of, keep = batch.pair_N.tolist(), keep_B.tolist()
    for group in batch.groups:
        if keep[pair_of[start]]:
            kept.append(group)
        start += group.tokens
    return tuple(kept)

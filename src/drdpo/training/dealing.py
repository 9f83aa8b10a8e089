"""Which pairs go through the model together, on which rank, as the flags say.

--micro_batch_size puts as many pairs into every forward pass, --micro_batch_tokens as many as a number of tokens allows.
"""

from collections.abc import Sequence

from drdpo.config import TrainConfig
from drdpo.training.batches import micro_batches, padded_shards, token_batches


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

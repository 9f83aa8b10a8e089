"""This rank's share of a run's pairs, in micro-batches."""

from drdpo import distributed
from drdpo.training.batches import step_indices
from drdpo.training.data import dealt_lengths
from drdpo.training.dealing import evaluation_batches, step_batches
from drdpo.training.run import Run


def batches_of_step(run: Run, step: int) -> list[list[int]]:
    """This rank's micro-batches of one optimizer step."""
    indices = step_indices(len(run.train), run.config.train_batch_size, run.config.seed, step)
    return step_batches(indices, run.train_lengths, run.config, distributed.rank(), distributed.world_size())


def batches_of_first_epoch(run: Run) -> list[list[int]]:
    """This rank's micro-batches of the first epoch, then the pairs that fill no step of it."""
    size, ranks = run.config.train_batch_size, (distributed.rank(), distributed.world_size())
    used = {
        index for step in range(run.steps_per_epoch) for index in step_indices(len(run.train), size, run.config.seed, step)
    }
    left = [index for index in range(len(run.train)) if index not in used]
    batches = [indices for step in range(run.steps_per_epoch) for indices in batches_of_step(run, step)]
    return batches + evaluation_batches(left, run.train_lengths, run.config, *ranks)


def batches_of_test(run: Run) -> list[list[int]]:
    """This rank's micro-batches of the test pairs."""
    lengths = dealt_lengths(run.test, run.config)
    return evaluation_batches(range(len(run.test)), lengths, run.config, distributed.rank(), distributed.world_size())

"""Detects losses and gradients that are not finite, per micro-batch and without a device sync; errors name the pairs.

DeepSpeed silently skips a step whose gradients are not finite, and would skip all later ones too.

Shape suffixes: B pairs, M micro-batches of all ranks, P pairs of the step over all ranks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from drdpo import distributed
from drdpo.errors import DataError
from drdpo.training.data import Pair

SHOWN = 8
"""Pairs that a message names."""


class FiniteWatch:
    """Records, on the device, which micro-batches of a step have numbers that are not finite."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bad: list[Tensor] = []

    def next_batch(self) -> None:
        """Start the step's next micro-batch."""
        self._bad.append(torch.zeros((), dtype=torch.bool, device=self._device))

    def look(self, numbers: Tensor) -> None:
        """Record whether these are finite, e.g. the gradient of the embeddings, into which all others flow."""
        self._bad[-1] = self._bad[-1] | ~torch.isfinite(numbers.detach()).all()

    @property
    def bad_M(self) -> Tensor:
        """[M] bool, by micro-batch."""
        return torch.stack(self._bad)


def check_step(metrics: dict[str, float], watch: FiniteWatch, indices: Sequence[Tensor], pairs: Sequence[Pair]) -> None:
    """Stop at a step whose metrics are not finite; every rank must call.

    Args:
        metrics: of the step, the same on all ranks.
        watch: of the step.
        indices: [B] of each of this rank's micro-batches.
        pairs: of the training split.

    Raises:
        DataError: a metric is not finite; names the pairs of the micro-batches it came from.
    """
    wrong = _not_finite(metrics)
    if not wrong:
        return
    bad_M = distributed.gather(watch.bad_M.float()).bool().cpu()
    device = watch.bad_M.device
    indices_P = distributed.gather(torch.cat(list(indices)).to(device)).cpu()
    sizes_M = distributed.gather(torch.tensor([len(part) for part in indices], device=device)).cpu()
    if bad_M.any():
        whose = f"from the micro-batch of {_named(indices_P[bad_M.repeat_interleave(sizes_M)].tolist(), pairs)}"
    else:
        whose = f"from no micro-batch alone but the sum over the step's {len(indices_P)} pairs"
    raise DataError(
        f"step {int(metrics['step'])}: {wrong}, {whose}; nothing of this step is saved and earlier checkpoints are "
        "kept; look at these pairs, or lower --learning_rate or the method's strength"
    )


def check_evaluation(metrics: dict[str, float], step: int) -> None:
    """Raise DataError if metrics of the test pairs are not finite: the step before has broken the weights."""
    wrong = _not_finite(metrics)
    if wrong:
        raise DataError(
            f"after step {step}: {wrong}; nothing of this step is saved and earlier checkpoints are kept; lower "
            "--learning_rate or the method's strength"
        )


def _not_finite(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value))


def _named(indices: list[int], pairs: Sequence[Pair]) -> str:
    ids = [pairs[index].prompt_id for index in indices]
    label = "row" if None in ids else "prompt_id"
    words = [str(index + 1 if label == "row" else prompt_id) for prompt_id, index in zip(ids, indices, strict=True)]
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return f"{label} {', '.join(words[:SHOWN])}{more}"

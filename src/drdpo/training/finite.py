"""Losses and gradients that are not finite: noticed in every micro-batch without waiting for the device, told by pair.

DeepSpeed skips a step whose gradients are not finite without a word, and would go on skipping to the end.
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
    """Notes which micro-batches of a step hold values that are not finite, on their device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bad: list[Tensor] = []

    def next_batch(self) -> None:
        """What is looked at from now on belongs to the step's next micro-batch."""
        self._bad.append(torch.zeros((), dtype=torch.bool, device=self._device))

    def look(self, values: Tensor) -> None:
        """Note whether values, e.g. a gradient for the embeddings, which all others flow into, are finite."""
        self._bad[-1] = self._bad[-1] | ~torch.isfinite(values.detach()).all()

    @property
    def bad_M(self) -> Tensor:
        """[M] bool, by micro-batch."""
        return torch.stack(self._bad)


def check_step(metrics: dict[str, float], watch: FiniteWatch, indices: Sequence[Tensor], pairs: Sequence[Pair]) -> None:
    """Stop at a step whose figures are not finite; every rank must call.

    Args:
        metrics: of the step, the same on all ranks.
        watch: of the step.
        indices: [B] of each of this rank's micro-batches.
        pairs: of the training split.

    Raises:
        DataError: a figure is not finite; names the pairs of the micro-batches it came from.
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
    """Raise DataError where figures on the test pairs are not finite: then the step before has broken the weights."""
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
    label = "prompt_id" if all(known is not None for known in ids) else "row"
    words = [str(known if label == "prompt_id" else index + 1) for known, index in zip(ids, indices, strict=True)]
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return f"{label} {', '.join(words[:SHOWN])}{more}"

"""Before the first step policy and reference are one model: are their log-probs?"""

import torch
from torch import Tensor

from drdpo import distributed
from drdpo.config import TrainConfig
from drdpo.errors import DataError
from drdpo.training.objective import Objective
from drdpo.training.values import losses_of

TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 5e-2)}
"""Of the mean |log pi - log ref| of an answer: a share of the mean |log ref|, and nats beside it for the shortest answers.

The same micro-batches through the same code give the same bits. What may differ are compiled layers, a GPU's kernels, and
micro-batches dealt otherwise by an earlier start on another number of processes. On SmolLM2-135M other micro-batches change
a log-prob by 3e-8 of it in float32 and by 2e-4 in bfloat16 (four answers, CPU). The bfloat16 tolerance is fifty times that
by judgement, not by a measurement on a GPU; a reference nearer than that goes unseen."""


def check_first_step(parts: list[Objective], references: list[Tensor], config: TrainConfig) -> None:
    """Refuse reference log-probs that are not the untrained policy's own; every rank must call.

    The loss alone would not tell: at beta 0.01 a margin of 10 nats moves it by 0.05.

    Args:
        parts: what this rank's micro-batches contributed to the first step.
        references: [B, 2] reference log-probs of each.
        config: of the run.

    Raises:
        DataError: the loss is not that of a zero margin, or the log-probs are too far apart.
    """
    losses_P = distributed.gather(torch.cat([part.values.losses_B for part in parts]))
    apart_K = distributed.gather(torch.cat([part.values.log_ratios_S for part in parts])).double().abs()
    size_K = distributed.gather(torch.cat([reference_B2.flatten() for reference_B2 in references])).double().abs()
    share, nats = TOLERANCES[config.dtype]
    # ln 2, 1 / (4 beta^2) for ipo, or what a method's own losses are at a margin of zero.
    loss, expected = float(losses_P.double().mean()), float(losses_of(torch.zeros(1, dtype=torch.float64), config))
    loss_tolerance = (0.05 if config.dtype == "bfloat16" else 1e-3) * max(1.0, expected)
    apart, allowed = float(apart_K.mean()), share * float(size_K.mean()) + nats
    if not abs(loss - expected) <= loss_tolerance:
        reason = f"the first loss is {loss:.4f}, not {expected:.4f}"
    elif not apart <= allowed:
        reason = (
            f"before the first step the policy's log-probs are {apart:.4g} away from the reference's in the mean, where "
            f"rounding allows {allowed:.2g}"
        )
    else:
        return
    raise DataError(
        f"{reason}: the reference log-probs do not belong to {config.model_path}; delete "
        f"{config.save_path}/reference_train.safetensors, or give --resume=never"
    )

"""A method of your own in one file: CVaR of the hinge loss, trained by everything that trains the others.

The hinge loss max(0, 1 - beta h) is that of SLiC (2305.10425) on implicit rewards. CVaR is the mean over the hardest
share of the step's pairs (Levy et al., 2010.05893): the largest mean under any reweighting of at most 1 / share.

    bash experiments/own_method.sh --model_path=... --dataset_path=... --save_path=... --cvar_share=0.25

Shape suffixes: B pairs of a micro-batch, P pairs of the population.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drdpo.cli import flag, require
from drdpo.config.training import TrainConfig
from drdpo.errors import one_line_errors

if TYPE_CHECKING:
    from torch import Tensor

    from drdpo.training.losses import Method, Pairs


@dataclass(frozen=True)
class CvarConfig(TrainConfig):
    """Step 3 by CVaR of the hinge loss."""

    cvar_share: float = flag("share of the step's pairs, the hardest, that count", 0.25, above=0, at_most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kldpo_tau", "wdpo_rho", "drdpo_beta", "method"):
            require(getattr(self, name) is None, f"--{name} chooses another method than CVaR; omit it")
        for name in ("loss_type", "label_smoothing"):
            value, default = getattr(self, name), TrainConfig.__dataclass_fields__[name].default
            require(value == default, f"--{name}={value}: the loss is the hinge; omit it")


def cvar(config: CvarConfig) -> "Method":
    from drdpo.training.losses import Method

    def hinge(pairs: "Pairs") -> "Tensor":
        """[B] max(0, 1 - beta h)."""
        return (1 - config.beta * pairs.margins_B).clamp(min=0)

    def hardest(losses_B: "Tensor", population_P: "Tensor", pairs: "Pairs") -> "Tensor":
        """[B] 1 / share for the hardest pairs, 0 for the others; pairs as hard as the last of them share its weight."""
        count = math.ceil(config.cvar_share * len(population_P))
        last = population_P.topk(count).values[-1]
        return (losses_B >= last) / (population_P >= last).to(losses_B.dtype).mean()

    return Method("hinge CVaR", hinge, hardest, strength={"cvar_share": config.cvar_share})


if __name__ == "__main__":
    from train_alignment import main

    with one_line_errors():
        main(CvarConfig, cvar)

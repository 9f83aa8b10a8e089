"""Fit reward heads on human ratings."""

from drdpo.config import FitHeadsConfig
from drdpo.errors import one_line_errors
from drdpo.flags import parse


def main() -> None:
    config = parse(FitHeadsConfig, "Fit the heads of a multi-objective reward model on a frozen backbone.")
    from drdpo.rewards.fitting import fit_reward_heads

    fit_reward_heads(config)


if __name__ == "__main__":
    with one_line_errors():
        main()

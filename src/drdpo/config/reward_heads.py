"""Flags of src/fit_reward_heads.py."""

from dataclasses import dataclass

from drdpo.flags import flag


@dataclass(frozen=True)
class FitHeadsConfig:
    """Fit the reward heads of a multi-objective reward model on a frozen backbone."""

    backbone: str = flag("Hugging Face folder of a Llama-family model")
    ratings: str = flag("JSON lines {prompt, response, <objective>: rating, ...}; two rows of a prompt make a pair")
    validation: str = flag("held-out ratings of the same form")
    output_path: str = flag("folder for the fitted heads and their card")
    objectives: list[str] = flag("objectives to fit, NAME=COLUMN words", ["helpsteer-helpfulness=helpfulness"])
    max_len: int = flag("a longer row, in tokens, is left out and counted", 2048)
    seed: int = flag("seed of the validation folds and of the gate", 42)

"""Check a model folder: weights, tokens, positions, and what training can do with it."""

from drdpo.cli import run_step
from drdpo.config.evaluation import CheckModelConfig

if __name__ == "__main__":
    run_step(CheckModelConfig, __doc__, "drdpo.models:show_model")

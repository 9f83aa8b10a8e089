"""Step 1a: sample completions of every prompt; src/score_completions.py then scores them."""

from drdpo.cli import run_step
from drdpo.config.data import CompletionsConfig

if __name__ == "__main__":
    run_step(CompletionsConfig, __doc__, "drdpo.sampling.sample:sample_completions")

"""Step 1b: score the completions in <save_path>/sampled with a multi-objective reward model."""

from drdpo.cli import run_step
from drdpo.config.data import CompletionsConfig

if __name__ == "__main__":
    run_step(CompletionsConfig, __doc__, "drdpo.scoring.score:score_completions")

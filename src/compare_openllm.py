"""Step 4: set leaderboard results of several models side by side, and the published ones beside them."""

from drdpo.cli import run_step
from drdpo.config.evaluation import CompareOpenllmConfig

if __name__ == "__main__":
    run_step(CompareOpenllmConfig, __doc__, "drdpo.evaluation.leaderboard_scores:compare_openllm")

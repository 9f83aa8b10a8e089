"""Step 4b: evaluate a model on the Open LLM Leaderboard v2 tasks through lm-eval."""

from drdpo.cli import run_step
from drdpo.config.evaluation import LeaderboardConfig

if __name__ == "__main__":
    run_step(LeaderboardConfig, __doc__, "drdpo.evaluation.leaderboard:evaluate_openllm")

"""Step 4b: Open LLM Leaderboard v2."""

from drdpo.cli import parse
from drdpo.config import LeaderboardConfig
from drdpo.errors import one_line_errors


def main() -> None:
    config = parse(LeaderboardConfig, "Evaluate a model on the Open LLM Leaderboard v2 tasks through lm-eval.")
    from drdpo.evaluation.leaderboard import evaluate_openllm

    evaluate_openllm(config)


if __name__ == "__main__":
    with one_line_errors():
        main()

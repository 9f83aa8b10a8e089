"""Step 4: the report of an experiment."""

from drdpo.cli import parse
from drdpo.config import CompareOpenllmConfig
from drdpo.errors import one_line_errors


def main() -> None:
    config = parse(
        CompareOpenllmConfig, "Set leaderboard results of several models side by side, and the published ones beside them."
    )
    from drdpo.evaluation.compare_leaderboard import compare_openllm

    compare_openllm(config)


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Step 1b: score sampled completions."""

from drdpo.cli import parse
from drdpo.config import CompletionsConfig
from drdpo.errors import one_line_errors


def main() -> None:
    config = parse(CompletionsConfig, "Score the completions in <save_path>/sampled with a multi-objective reward model.")
    from drdpo.scoring.score import score_completions

    score_completions(config)


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Step 1a: sample completions."""

from drdpo.cli import parse
from drdpo.config import CompletionsConfig
from drdpo.errors import one_line_errors


def main() -> None:
    config = parse(CompletionsConfig, "Sample completions of every prompt; src/score_completions.py then scores them.")
    from drdpo.sampling.sample import sample_completions

    sample_completions(config)


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Step 4a: per-objective averages."""

from drdpo.cli import parse
from drdpo.config import EvaluateConfig
from drdpo.errors import one_line_errors


def main() -> None:
    config = parse(EvaluateConfig, "Average the objectives of runs; write scores.csv, report.md and a spider plot.")
    from drdpo.evaluation.compare import evaluate_armorm

    evaluate_armorm(config)


if __name__ == "__main__":
    with one_line_errors():
        main()

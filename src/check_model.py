"""What a model folder is, and what each step says of it."""

from drdpo.cli import parse
from drdpo.config.evaluation import CheckModelConfig
from drdpo.errors import one_line_errors


def main() -> None:
    config = parse(CheckModelConfig, "Check a model folder: weights, tokens, positions, and what training can do with it.")
    from drdpo.models import check_model, table

    print(table(check_model(config.path)))


if __name__ == "__main__":
    with one_line_errors():
        main()

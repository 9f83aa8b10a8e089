"""A look at the data, whichever step made it."""

from drdpo.cli import parse
from drdpo.config import InspectConfig
from drdpo.errors import one_line_errors


def main() -> None:
    config = parse(InspectConfig, "Print what a file or folder holds, with samples and dropped rows; draw histograms.")
    from drdpo.evaluation.inspection import inspect_data

    inspect_data(config)


if __name__ == "__main__":
    with one_line_errors():
        main()

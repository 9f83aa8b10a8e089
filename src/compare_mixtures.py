"""Step 4: the report of an experiment."""

from drdpo.cli import parse
from drdpo.config import CompareMixturesConfig
from drdpo.errors import one_line_errors


def main() -> None:
    config = parse(CompareMixturesConfig, "Set the gains of several training mixtures beside the published ones.")
    from drdpo.evaluation.mixtures import compare_mixtures

    compare_mixtures(config)


if __name__ == "__main__":
    with one_line_errors():
        main()

"""How far a run is, or how it ended."""

from drdpo.cli import parse
from drdpo.config import ShowRunConfig
from drdpo.errors import one_line_errors


def main() -> None:
    config = parse(
        ShowRunConfig, "Print state, progress, speed and last metrics of a folder's run; draw its training curves."
    )
    from drdpo.evaluation.show_run import show_run

    show_run(config)


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Flags of src/inspect_data.py and src/show_run.py."""

from dataclasses import dataclass

from drdpo.cli import check_bounds, flag, positional


@dataclass(frozen=True)
class InspectConfig:
    """Tables, samples and histograms of data, whichever step made it."""

    path: str = positional("folder or JSON-lines file of prompts, completions, preference pairs or rejected rows")
    samples: int = flag("rows of each file to print", 3, at_least=0)
    seed: int = flag("seed of the choice of these rows", 42, at_least=0, below=2**32)
    output_path: str | None = flag("PNG of the histograms (default: outputs/inspection/<path>.png)", None)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class ShowRunConfig:
    """State, progress and training curves of a run."""

    path: str = positional("folder of a training run, or the output folder of any other step")
    picture: bool = flag("draw the training curves as training.png in the folder", True)

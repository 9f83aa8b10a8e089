"""Flags of src/inspect_data.py and src/show_run.py."""

from dataclasses import dataclass

from drdpo.flags import flag, positional, require


@dataclass(frozen=True)
class InspectConfig:
    """Tables, samples and histograms of data, whichever step made it."""

    path: str = positional("folder or JSON-lines file of prompts, completions, preference pairs or rejected rows")
    samples: int = flag("rows of each file to print", 3)
    seed: int = flag("seed of the choice of these rows", 42)
    output_path: str | None = flag("PNG of the histograms (default: outputs/inspection/<path>.png)", None)

    def __post_init__(self) -> None:
        require(self.samples >= 0, f"--samples={self.samples} must not be negative")
        require(0 <= self.seed < 2**32, f"--seed={self.seed} must lie in [0, 2^32)")


@dataclass(frozen=True)
class ShowRunConfig:
    """State, progress and training curves of a run."""

    path: str = positional("folder of a training run, or the output folder of any other step")
    picture: bool = flag("draw the training curves as training.png in the folder", True)

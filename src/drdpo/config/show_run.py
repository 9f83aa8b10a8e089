"""Flags of src/show_run.py."""

from dataclasses import dataclass

from drdpo.flags import flag, positional


@dataclass(frozen=True)
class ShowRunConfig:
    """How far a run is, or how it ended."""

    path: str = positional(
        "folder of a training run, or of any other step: completions, preferences, an evaluation, a model"
    )
    picture: bool = flag("draw the training curves as training.png in the folder; false writes nothing", True)

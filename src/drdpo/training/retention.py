"""--keep_checkpoints: which of the folders global_step_<n> stay."""

import sys
from collections.abc import Sequence
from pathlib import Path

from drdpo.config import TrainConfig
from drdpo.folder import remove_tree, whole_lines


def kept_steps(steps: Sequence[int], losses: dict[int, float], newest: int, named: Sequence[int]) -> set[int]:
    """Which checkpoints stay.

    Args:
        steps: of all checkpoints.
        losses: evaluation loss by step, as far as evaluated.
        newest: so many of the newest stay, at least one; 0 keeps all.
        named: stay as well.

    Returns:
        The newest, the named, and of those that were evaluated the one of least loss, the earlier one of equals.
    """
    if newest == 0:
        return set(steps)
    evaluated = [step for step in sorted(steps) if step in losses]
    best = [min(evaluated, key=lambda step: losses[step])] if evaluated else []
    return {*sorted(steps)[-newest:], *best, *(step for step in named if step in steps)}


def remove_old_checkpoints(folder: Path, config: TrainConfig) -> None:
    """Delete what --keep_checkpoints and --keep_steps do not keep. On rank 0, after a checkpoint is complete.

    Args:
        folder: save_path, with metrics.jsonl.
        config: of the run.
    """
    places = {int(path.name.removeprefix("global_step_")): path for path in folder.glob("global_step_*")
              if path.name.removeprefix("global_step_").isdigit()}  # fmt: skip
    kept = kept_steps(list(places), evaluation_losses(folder), config.keep_checkpoints, config.keep_steps)
    for step, path in places.items():
        if step not in kept:
            # Renamed first: a deletion that is cut short leaves nothing that looks like a checkpoint.
            gone = path.with_name(f".{path.name}.old")
            try:
                path.replace(gone)
            except OSError as error:
                print(f"warning: {path} could not be removed ({error.strerror})", file=sys.stderr)
            else:
                remove_tree(gone)


def evaluation_losses(folder: Path) -> dict[int, float]:
    """Evaluation loss by step, from metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = [line for _, line in whole_lines(path)] if path.is_file() else []
    return {int(line["step"]): float(line["eval_loss"]) for line in lines if "eval_loss" in line}

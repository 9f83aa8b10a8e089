"""What a folder's run is and how far: state, progress, speed, time to go, last figures, training curves."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from drdpo.config import ShowRunConfig
from drdpo.display import duration, one_line
from drdpo.errors import DataError
from drdpo.evaluation.dropped import manifest_counts, unfinished
from drdpo.evaluation.show_run_state import Owner, TrainingState, is_training, lock_owner, read_training
from drdpo.files import atomic_file
from drdpo.manifest import read_manifest

PICTURE = "training.png"

_STEPS = {
    "sample": ("sampled completions", "sampled/{split}.jsonl"),
    "score": ("scored completions", "{split}.jsonl"),
    "preferences": ("preference pairs", "train.jsonl test.jsonl"),
    "evaluate_armorm": ("a comparison of runs", "report.md scores.csv"),
    "compare_mixtures": ("a comparison of training mixtures", "report.md"),
    "evaluate_openllm": ("Open LLM Leaderboard results", "results.json table.md"),
    "compare_openllm": ("a comparison of leaderboard results", "report.md leaderboard.csv"),
    "inspect_data": ("pictures of a look at data", ""),
    "assets": ("a model or prompts that setup.sh put in place", ""),
}
"""{step of manifest.json: (what it is, files that it makes)}."""

_LAST = (
    "loss", "accuracy", "margin", "penalty", "effective_sample_size", "grad_norm", "lr", "eval_loss", "eval_accuracy",
    "eval_margin",
)  # fmt: skip

_SILENCE = 10
"""Times a step's length without a new line that are worth a note: a step with an evaluation and a save takes longer too."""


def show_run(config: ShowRunConfig) -> None:
    """Print what is known of a folder, and draw a training run's curves.

    Args:
        config: the flags.

    Raises:
        DataError: no such folder, or no step's.
    """
    folder = Path(config.path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    manifest = read_manifest(folder)
    if is_training(folder, manifest):
        state = read_training(folder)
        print("\n".join(training_lines(folder, state)))
        if state.rows and config.picture:
            from drdpo.evaluation.show_run_curves import draw_training

            with atomic_file(folder / PICTURE, "wb") as stream:
                draw_training(state, str(folder)).savefig(stream, format="png", dpi=150)
            print(f"picture        {folder / PICTURE}")
        manifest = {step: record for step, record in manifest.items() if step != "train"}
    elif is_training(folder.parent, {}) and folder.name.startswith("global_step_"):
        print(f"{folder}: a checkpoint of the training in {folder.parent}; show that folder for its curves")
    elif not manifest and not unfinished(folder):
        raise DataError(f"{folder}: no manifest.json, metrics.jsonl or part file; no step of the pipeline wrote this folder")
    if manifest or unfinished(folder):
        print("\n".join(other_lines(folder, manifest)))


def training_lines(folder: Path, state: TrainingState) -> list[str]:
    """One line a fact of a training run."""
    total = f" of {state.steps:,}" if state.steps else ""
    share = f" ({state.done / state.steps:.0%})" if state.steps else ""
    epoch = f", epoch {state.rows[-1]['epoch']:.2f}" if state.rows and "epoch" in state.rows[-1] else ""
    rows: dict[str, str | None] = {
        "state": _state(state),
        "method": state.method,
        "progress": f"step {state.done:,}{total}{share}{epoch}",
    }
    if state.rows:
        last = state.rows[-1]
        speeds = {"tokens_per_second": "tokens/s", "pairs_per_second": "pairs/s"}
        words = [f"{last[name]:,.3g} {unit}" for name, unit in speeds.items() if name in last]
        if state.step_seconds is not None:
            words.append(f"{duration(state.step_seconds)} a step")
        rows["speed"] = ", ".join(words)
        rows["time to go"] = _time_to_go(state)
        rows["last figures"] = ", ".join(f"{name} {last[name]:.4g}" for name in _LAST if name in last)
        rows["best eval"] = _best(state.rows)
    rows["state saved"] = f"after step {state.saved:,}" if state.saved is not None and not state.complete else None
    rows["checkpoints"] = ", ".join(state.checkpoints)
    lines = [f"{folder}: a training run"] + [
        f"{name.ljust(14)} {one_line(str(text))}" for name, text in rows.items() if text
    ]
    return lines + [f"note: {note}" for note in _notes(folder, state)]


def other_lines(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What a folder of another step is, and whether its files are there."""
    owner = lock_owner(folder)
    lines = [f"{folder}: being written by {_named(owner)}"] if owner else []
    for step in manifest:
        name, split = (step.rpartition("_")[::2]) if step.endswith(("_train", "_test")) else (step, "")
        what, files = _STEPS.get(name, ("results of " + one_line(step, 40), ""))
        # What is sampled lies in sampled/ with a manifest of its own, or is looked at from inside of it.
        names = [file.format(split=split) for file in files.split()]
        missing = [file for file in names if not (folder / file).is_file() and not (folder / Path(file).name).is_file()]
        state = f"not complete: {', '.join(missing)} is missing; give the step's command again" if missing else "complete"
        lines.append(f"{folder}: {what}{f' ({split})' if split else ''}, {state}")
    lines += [f"  {line}" for line in manifest_counts(folder)] if manifest else []
    return lines + [f"note: {line}" for line in unfinished(folder)]


def _state(state: TrainingState) -> str:
    if state.owner is not None:
        return f"running: {_named(state.owner)}"
    if state.complete:
        return "finished"
    if not state.rows:
        return "stopped before the first step; the same command starts it again"
    again = f"continues after step {state.saved:,}" if state.saved is not None else "begins anew, as no state was saved"
    return f"stopped at step {state.done:,}; the same command {again}"


def _named(owner: Owner) -> str:
    words = [f"process {owner.pid}" if owner.pid is not None else "a process"]
    words += [f"on {one_line(owner.host, 60)}"] if owner.host else []
    if owner.started:
        words.append(f"since {one_line(owner.started, 40)}")
        try:
            began = datetime.fromisoformat(owner.started)
            began = began if began.tzinfo else began.replace(tzinfo=UTC)
            words.append(f"({duration(max(0.0, (datetime.now(UTC) - began).total_seconds()))})")
        except ValueError:
            pass
    return " ".join(words)


def _time_to_go(state: TrainingState) -> str | None:
    if state.owner is None or state.steps is None or state.step_seconds is None or state.done >= state.steps:
        return None
    return f"{duration((state.steps - state.done) * state.step_seconds)}, evaluations and saving not counted"


def _best(rows: list[dict[str, float]]) -> str | None:
    evaluated = [row for row in rows if "eval_loss" in row]
    if not evaluated:
        return None
    best = min(evaluated, key=lambda row: row["eval_loss"])
    accuracy = f", eval_accuracy {best['eval_accuracy']:.3f}" if "eval_accuracy" in best else ""
    return f"eval_loss {best['eval_loss']:.4g}{accuracy} at step {int(best['step']):,}"


def _notes(folder: Path, state: TrainingState) -> list[str]:
    notes = []
    if state.torn:
        notes.append(
            f"{folder / 'metrics.jsonl'}: not whole after step {state.done}; a run that goes on writes that line again"
        )
    silent, step = state.idle_seconds, state.step_seconds
    if state.owner is not None and silent is not None and step is not None and silent > max(60.0, _SILENCE * step):
        notes.append(f"no step for {duration(silent)}, {silent / step:.0f} times a step's length; see {folder / 'logs'}")
    return notes

"""State, progress, speed, last metrics and training curves of an output folder, read while a run may be writing to it."""

from pathlib import Path
from typing import Any

import pandas as pd

from drdpo.config.evaluation import ShowRunConfig
from drdpo.errors import DataError, duration, one_line
from drdpo.folder import atomic_file, owner_of, read_manifest, section, whole_lines

PICTURE = "training.png"

_RECENT = 20
"""Steps over which the median speed is taken."""

_PANELS = {
    "loss": ("loss", "eval_loss"),
    "accuracy": ("accuracy", "eval_accuracy"),
    "margin": ("margin", "eval_margin"),
    "rewards": ("chosen_reward", "rejected_reward"),
    "WDPO's penalty": ("penalty",),
    "effective sample size": ("effective_sample_size",),
    "gradient norm": ("grad_norm",),
}
"""{title: metrics in one panel}; missing metrics are omitted."""


def show_run(config: ShowRunConfig) -> None:
    """Print the state of an output folder and draw the curves of a training run.

    Raises:
        DataError: no such folder, or it is not the output of a step.
    """
    folder = Path(config.path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    manifest = read_manifest(folder)
    metrics = folder / "metrics.jsonl"
    if not manifest and not metrics.is_file():
        raise DataError(f"{folder}: no manifest.json and no metrics.jsonl; pass the output folder of a step")
    print(f"{folder}: {_state(folder, manifest)}")
    if metrics.is_file():
        table = read_metrics(metrics)
        print("\n".join(f"{name:<12} {one_line(text)}" for name, text in _training(folder, manifest, table).items()))
        if config.picture and len(table):
            with atomic_file(folder / PICTURE, "wb") as stream:
                _curves(table, str(folder)).savefig(stream, format="png", dpi=120)
            print(f"{'picture':<12} {folder / PICTURE}")
    for step in manifest:
        if counts := section(manifest, step, "counts"):
            print(f"{one_line(step, 40):<12} {one_line(str(counts), 1000)}")


def read_metrics(path: Path) -> pd.DataFrame:
    """The complete lines of a metrics.jsonl, by step; the last line of a step that was logged twice."""
    rows = [line for _, line in whole_lines(path) if _is_count(line.get("step"))]
    table = pd.DataFrame(rows, columns=None if rows else ["step"])
    return table.apply(pd.to_numeric, errors="coerce").drop_duplicates("step", keep="last").set_index("step").sort_index()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**53


def _state(folder: Path, manifest: dict[str, Any]) -> str:
    owner = owner_of(folder)
    if owner is not None:
        return f"running: {one_line(owner)}"
    train = section(manifest, "train")
    if not train:
        return "output of " + ", ".join(one_line(step, 40) for step in manifest)
    if train.get("complete") is True:
        return "training, finished"
    names = [path.parent.name.removeprefix("step_") for path in folder.glob("resume/step_*/state.json")]
    saved = [int(name) for name in names if name.isdigit()]
    return "training, stopped; rerun the same command to " + (f"resume after step {max(saved)}" if saved else "start again")


def _training(folder: Path, manifest: dict[str, Any], table: pd.DataFrame) -> dict[str, str]:
    record, flags = section(manifest, "train"), section(manifest, "train", "made_by")
    steps, pairs = (value if _is_count(value) else None for value in (record.get("steps"), flags.get("train_batch_size")))
    facts = {"method": str(flags.get("method", "not recorded"))}
    if not len(table):
        return facts | {"progress": "no steps yet"}
    done, last = int(table.index[-1]), table.iloc[-1].dropna()
    facts["progress"] = f"step {done:,}" + (f" of {steps:,} ({done / steps:.0%})" if steps else "")
    if "pairs_per_second" in table and pairs and (speed := float(table["pairs_per_second"].tail(_RECENT).median())) > 0:
        seconds = pairs / speed
        facts["speed"] = f"{duration(seconds)} a step, {last.get('tokens_per_second', float('nan')):,.0f} tokens/s"
        if steps and done < steps:
            facts["time left"] = f"{duration(seconds * (steps - done))}, without evaluation and saving"
    facts["last metrics"] = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if "per_second" not in str(name))
    if "eval_loss" in table and table["eval_loss"].notna().any():
        best = int(table["eval_loss"].idxmin())
        facts["best eval"] = f"eval_loss {table['eval_loss'][best]:.4g} at step {best:,}"
    checkpoints = [path.name for path in folder.glob("global_step_*") if any(path.glob("*config.json"))]
    facts["checkpoints"] = ", ".join(sorted(checkpoints, key=lambda name: (len(name), name))) or "none"
    return facts


def _curves(table: pd.DataFrame, source: str) -> Any:
    from matplotlib.figure import Figure

    panels = {title: [name for name in names if name in table] for title, names in _PANELS.items()}
    for what in ("loss", "accuracy"):
        panels[f"{what}, shifted test pairs"] = [name for name in table if str(name).startswith(f"eval_{what}.")]
    panels = {title: names for title, names in panels.items() if names}
    canvas = Figure(figsize=(9, 2.6 * -(-len(panels) // 2)))
    canvas.suptitle(one_line(source, 90).replace("$", r"\$"), fontsize=10)
    for place, (title, names) in enumerate(panels.items()):
        axes = canvas.add_subplot(-(-len(panels) // 2), 2, place + 1)
        for name in names:
            axes.plot(table[name].dropna(), marker="o" if name.startswith("eval_") else ".", markersize=3, label=name)
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=8, frameon=False)
    canvas.tight_layout()
    return canvas

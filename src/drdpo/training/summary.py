"""What a finished run says of itself in a few lines."""

from pathlib import Path

from drdpo.config import TrainConfig
from drdpo.display import duration
from drdpo.folder import whole_lines


def summary(config: TrainConfig, folder: Path, steps: int) -> str:
    """A table of two columns from save_path/metrics.jsonl.

    Args:
        config: of the run.
        folder: save_path.
        steps: of the run.

    Returns:
        Steps, final loss, evaluation, margin, time in optimizer steps over all starts, pairs a second, rank 0's peak
        memory, the last checkpoint.
    """
    lines = [line for _, line in whole_lines(folder / "metrics.jsonl")]
    last = lines[-1]
    seconds = sum(config.train_batch_size / line["pairs_per_second"] for line in lines)
    rows = {
        "method": config.method,
        "steps": f"{steps:,} ({last['epoch']:.2f} epochs)",
        "loss": f"{last['loss']:.4f} (first {lines[0]['loss']:.4f})",
        "accuracy": f"{last['accuracy']:.3f}",
        "margin": f"{last['margin']:.4g}",
        "eval loss": f"{last['eval_loss']:.4f}" if "eval_loss" in last else "",
        "eval accuracy": f"{last['eval_accuracy']:.3f}" if "eval_accuracy" in last else "",
        "eval margin": f"{last['eval_margin']:.4g}" if "eval_margin" in last else "",
        "time in steps": duration(seconds),
        "pairs per second": f"{config.train_batch_size * len(lines) / seconds:.3g}",
        "peak memory": f"{max(line['peak_memory_gib'] for line in lines):.2f} GiB",
        "checkpoint": str(folder / f"global_step_{steps}"),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows.items() if value)

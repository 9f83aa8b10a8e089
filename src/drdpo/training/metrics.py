"""What a step and an evaluation report: one line a step in metrics.jsonl, the same figures where --log sends them.

Shape suffixes: B pairs, P pairs of the step over all ranks, S = 2B sequences.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from drdpo import distributed
from drdpo.config import TrainConfig
from drdpo.errors import DataError
from drdpo.folder import atomic_file, whole_lines
from drdpo.training import losses
from drdpo.training.objective import Objective
from drdpo.training.tracking import Tracker, start_trackers
from drdpo.training.values import PairValues


def pair_table(values: PairValues, beta: float) -> Tensor:
    """[B, 4] per pair: plain loss, is the margin positive, chosen reward, rejected reward (beta times the log-ratio)."""
    pairs = len(values.losses_B)
    rewards_S = beta * values.log_ratios_S
    columns = (values.losses_B, (values.margins_B > 0).float(), rewards_S[:pairs], rewards_S[pairs:])
    return torch.stack([column.detach().float() for column in columns], dim=1)


def table_means(table_P4: Tensor) -> dict[str, float]:
    """Means of pair_table's columns, and the margin of the rewards."""
    loss, accuracy, chosen, rejected = table_P4.double().mean(dim=0).tolist()
    return {
        "loss": loss,
        "accuracy": accuracy,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": chosen - rejected,
    }


def step_metrics(parts: list[Objective], config: TrainConfig) -> dict[str, float]:
    """Figures of one optimizer step over all its micro-batches and ranks; every rank must call.

    `loss` is the plain, unweighted mean, which methods can be compared by; `objective` is what was minimised.
    """
    metrics = table_means(distributed.gather(torch.cat([pair_table(part.values, config.beta) for part in parts])))
    weighted = distributed.gather(torch.cat([part.weights_B * part.values.losses_B.detach() for part in parts]))
    metrics["objective"] = float(weighted.mean())
    if config.weighted:
        weights_P = distributed.gather(torch.cat([part.weights_B for part in parts]))
        metrics["effective_sample_size"] = float(losses.effective_sample_size(weights_P))
    if config.method == "wdpo":
        assert config.wdpo_rho is not None
        # Over the pairs that carry the penalty.
        penalties_P = distributed.gather(torch.cat([part.penalties_B for part in parts if part.penalties_B is not None]))
        metrics["penalty"] = penalty = float(penalties_P.mean())
        metrics["input_gradient_norm"] = float(penalties_P.sqrt().mean())
        errors = [part.errors_B for part in parts if part.errors_B is not None]
        if errors:
            metrics["solver_error"] = float(distributed.gather(torch.cat(errors)).mean())
        root = config.wdpo_penalty == "root"
        metrics["objective"] += config.wdpo_rho * (_mean_root(parts, config) if root else penalty)
    return metrics


def _mean_root(parts: list[Objective], config: TrainConfig) -> float:
    """sqrt(mean |grad l|^2) of the population; of --robust_scope=micro's, each its own root, the mean."""
    penalties = [part.penalties_B for part in parts if part.penalties_B is not None]
    if config.robust_scope == "step":
        return float(distributed.gather(torch.cat(penalties)).mean().sqrt())
    # The ranks' n-th micro-batches are one population; all have the same number of pairs, or TrainConfig refuses.
    local_NB = torch.stack(penalties)
    return float(distributed.gather(local_NB).view(-1, *local_NB.shape).mean(dim=(0, 2)).sqrt().mean())


def on_the_bar(metrics: dict[str, float]) -> dict[str, str]:
    """The figures of a step that the progress bar shows."""
    shown = {
        "loss": f"{metrics['loss']:.4f}",
        "acc": f"{metrics['accuracy']:.2f}",
        "tok_s": f"{metrics['tokens_per_second']:.0f}",
        "pairs_s": f"{metrics['pairs_per_second']:.2f}",
    }
    return {**shown, "mfu": f"{metrics['mfu']:.0%}"} if "mfu" in metrics else shown


def peak_memory_gib() -> float:
    """Most memory this process has held: allocated on the GPU, or resident on the CPU."""
    if distributed.use_cuda():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    # Linux's ru_maxrss keeps what the process held before it became this program: its parent's, after a fork.
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsLog:
    """Appends to save_path/metrics.jsonl and to what --log names; on rank 0 only, a no-op elsewhere."""

    def __init__(self, save_path: Path, done: int, config: TrainConfig) -> None:
        """Open the log of a run that has `done` steps behind it; lines beyond them are dropped.

        Raises:
            DataError: a line of these steps is missing.
            ProcessError: Weights & Biases cannot be started.
        """
        self._stream: TextIO | None = None
        self._trackers: list[Tracker] = []
        if not distributed.is_main():
            return
        path = save_path / "metrics.jsonl"
        # A line may be cut where the process was killed in the middle of it; its step is done again.
        lines = [line for _, line in whole_lines(path)] if path.is_file() else []
        kept = lines[:done]
        if [line.get("step") for line in kept] != list(range(1, done + 1)):
            raise DataError(
                f"{path} holds {len(kept)} whole lines, and the state that would be continued has {done} steps behind it; "
                "put the file back, or start anew with --resume=never"
            )
        with atomic_file(path) as stream:
            stream.writelines(json.dumps(line) + "\n" for line in kept)
        self._trackers = start_trackers(config, save_path, kept, len(lines))
        self._stream = path.open("a", encoding="utf-8")

    def write(self, metrics: dict[str, float]) -> None:
        """Add one step's line."""
        if self._stream is None:
            return
        self._stream.write(json.dumps(metrics, allow_nan=False) + "\n")
        self._stream.flush()
        for tracker in self._trackers:
            tracker.write(metrics)

    def flush(self) -> None:
        """Have all lines on the disk: a state that is saved later never has more steps behind it than there are lines."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file, and hand over what the trackers still hold."""
        if self._stream is not None:
            self._stream.close()
            for tracker in self._trackers:
                tracker.close()

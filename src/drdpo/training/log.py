"""Metrics of a run: computed per step, appended to metrics.jsonl, sent to the trackers of --log, summarized at the end.

Shape suffixes: B pairs, P pairs of the step over all ranks, S = 2B sequences.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import torch
from torch import Tensor

from drdpo import distributed
from drdpo.errors import DataError, duration
from drdpo.folder import atomic_file, whole_lines
from drdpo.training import losses
from drdpo.training.data import Batch
from drdpo.training.trackers import Tracker

if TYPE_CHECKING:
    from drdpo.training.data import AnyBatch
    from drdpo.training.losses import Pairs
    from drdpo.training.objective import Objective
    from drdpo.training.policy import Policy

PEAK_BF16 = {
    "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12,
    "A100": 312e12, "L40S": 362e12,
}  # fmt: skip
"""Dense bfloat16 FLOP/s by the first key that is in torch's name of the device. Source: NVIDIA's data sheets, line "BFLOAT16
Tensor Core", halved where they count sparsity."""

Metrics = dict[str, float]


def pair_table(losses_B: Tensor, pairs: "Pairs", beta: float) -> Tensor:
    """[B, 4] per pair: plain loss, is the margin positive, chosen reward, rejected reward (beta times the log-ratio)."""
    chosen_B, rejected_B = (beta * pairs.log_ratios_S).chunk(2)
    columns = (losses_B, (pairs.margins_B > 0).float(), chosen_B, rejected_B)
    return torch.stack([column.detach().float() for column in columns], dim=1)


def table_means(table_P4: Tensor) -> Metrics:
    """Means of pair_table's columns, and the margin of the rewards."""
    loss, accuracy, chosen, rejected = table_P4.double().mean(dim=0).tolist()
    return {
        "loss": loss,
        "accuracy": accuracy,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": chosen - rejected,
    }


def step_metrics(
    parts: list["Objective"],
    beta: float,
    weighted: bool,
    rho: float | None = None,
    root: Literal["step", "micro"] | None = None,
) -> Metrics:
    """Metrics of one optimizer step over all its micro-batches and ranks; every rank must call.

    `loss` is the plain, unweighted mean, which is comparable across methods; `objective` is what was minimized.

    Args:
        parts: contributions of this rank's micro-batches.
        beta: of the rewards.
        weighted: may pairs have unequal weights?
        rho: of WDPO's penalty, if there is one.
        root: for the root penalty, its population: all pairs of the step, or the ranks' n-th micro-batches.
    """
    metrics = table_means(distributed.gather(torch.cat([pair_table(part.losses_B, part.pairs, beta) for part in parts])))
    terms = distributed.gather(torch.cat([part.weights_B * part.losses_B.detach() for part in parts]))
    metrics["objective"] = float(terms.mean())
    if weighted:
        weights_P = distributed.gather(torch.cat([part.weights_B for part in parts]))
        metrics["effective_sample_size"] = float(losses.effective_sample_size(weights_P))
    if rho is None:
        return metrics
    # Of the micro-batches that have the penalty.
    penalties = [part.penalties_B for part in parts if part.penalties_B is not None]
    penalties_P = distributed.gather(torch.cat(penalties))
    metrics["penalty"] = float(penalties_P.mean())
    charged = [part.weights_B * part.penalties_B for part in parts if part.penalties_B is not None]
    metrics["input_gradient_norm"] = float(penalties_P.sqrt().mean())
    errors = [part.errors_B for part in parts if part.errors_B is not None]
    if errors:
        metrics["solver_error"] = float(distributed.gather(torch.cat(errors)).mean())
        conditions = [part.conditions_B for part in parts if part.conditions_B is not None]
        metrics["solver_condition"] = float(distributed.gather(torch.cat(conditions)).max())
    value = distributed.gather(torch.cat(charged)).mean()
    if root == "step":
        value = value.sqrt()
    elif root == "micro":
        # The mean of the populations' roots; all micro-batches have the same number of pairs, or the flags are refused.
        local_NB = torch.stack(charged)
        value = distributed.gather(local_NB).view(-1, *local_NB.shape).mean(dim=(0, 2)).sqrt().mean()
    metrics["objective"] += rho * float(value)
    return metrics


@dataclass(frozen=True)
class Shape:
    """What the arithmetic of a policy depends on."""

    parameters: int
    trained: int
    blocks: int
    """Parameters of the decoder blocks."""
    blocks_trained: int
    head: int
    """Parameters of the output head, V D."""
    head_trained: bool
    layers: int
    attention: int
    """Query heads times their width."""


def shape_of(policy: "Policy") -> Shape:
    """The shape of a policy whose parameters are whole or on the meta device."""

    def count(parameters: list[Tensor], trained: bool = False) -> int:
        return sum(parameter.numel() for parameter in parameters if parameter.requires_grad or not trained)

    model, head = policy.language_model, policy.head.weight
    settings, table = model.config.get_text_config(), model.get_input_embeddings().weight
    every: list[Tensor] = list(policy.parameters())
    blocks = [parameter for parameter in every if parameter is not head and parameter is not table]
    heads = getattr(settings, "num_attention_heads", 0)  # Mamba has none
    width = getattr(settings, "head_dim", None) or settings.hidden_size // max(heads, 1)
    return Shape(
        count(every), count(every, trained=True), count(blocks), count(blocks, trained=True), head.numel(),
        head.requires_grad, settings.num_hidden_layers, heads * width,
    )  # fmt: skip


def peak_flops(device: str, dtype: str) -> float | None:
    """FLOP/s of a device by torch's name of it; None if not known for certain."""
    if dtype != "bfloat16" or "MIG" in device:
        return None
    return next((peak for name, peak in PEAK_BF16.items() if re.search(rf"\b{name}\b", device)), None)


def dpo_flops(shape: Shape, batch: "AnyBatch") -> float:
    """Arithmetic that a DPO step needs for a micro-batch, forward and backward, without recomputation.

    6 per trained parameter of the blocks and token, 4 per frozen one; the same for the head and answer tokens only;
    attention 12 L H E per token and token it sees (2204.02311, appendix B, less what causality masks). WDPO's penalty is
    not counted: its MFU shows what it costs compared with DPO.
    """
    a_token = 6 * shape.blocks_trained + 4 * (shape.blocks - shape.blocks_trained)
    a_target = (6 if shape.head_trained else 4) * shape.head
    if isinstance(batch, Batch):
        lengths = batch.attention_mask_ST.sum(dim=1).tolist()
        seen = sum(length**2 / 2 for length in lengths)
    else:
        seen = sum(
            group.prefix**2 / 2 + sum(length * (group.prefix + length / 2) for length in group.suffixes)
            for group in batch.groups
        )
    return a_token * batch.tokens + a_target * len(batch.targets_A) + 12 * shape.layers * shape.attention * seen


def throughput(batches: list["AnyBatch"], shape: Shape, dtype: str, pairs: int, seconds: float) -> Metrics:
    """tokens_per_second, pairs_per_second and, if the device's peak is known, mfu of a step; every rank must call.

    Args:
        batches: this rank's micro-batches.
        shape: of the policy.
        dtype: of its forward pass.
        pairs: of the step, over all ranks.
        seconds: that the step took.
    """
    device = distributed.device()
    peak = peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    tokens = float(sum(batch.tokens for batch in batches))
    work = sum(dpo_flops(shape, batch) for batch in batches) if peak else 0.0
    # In units of 10^12: float32, which GPUs gather fastest, is exact enough for a metric.
    totals = distributed.gather(torch.tensor([tokens, work / 1e12], device=device)).view(-1, 2).double().sum(dim=0)
    metrics = {"tokens_per_second": float(totals[0]) / seconds, "pairs_per_second": pairs / seconds}
    if peak:
        metrics["mfu"] = float(totals[1]) * 1e12 / seconds / (peak * distributed.world_size())
    return metrics


def peak_memory_gib() -> float:
    """Most memory this process has held: allocated on the GPU, or resident on the CPU."""
    if distributed.use_cuda():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    # Not ru_maxrss, which includes the parent's memory after a fork.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 2**20


def on_the_bar(metrics: Metrics) -> dict[str, str]:
    """The metrics of a step that the progress bar shows."""
    shown = {
        "loss": f"{metrics['loss']:.4f}",
        "acc": f"{metrics['accuracy']:.2f}",
        "tok_s": f"{metrics['tokens_per_second']:.0f}",
        "pairs_s": f"{metrics['pairs_per_second']:.2f}",
    }
    return {**shown, "mfu": f"{metrics['mfu']:.0%}"} if "mfu" in metrics else shown


def summary(folder: Path, method: str, pairs: int) -> str:
    """Text summary of a finished run, from save_path/metrics.jsonl.

    Args:
        folder: save_path.
        method: its name.
        pairs: per optimizer step.
    """
    lines = [line for _, line in whole_lines(folder / "metrics.jsonl")]
    last, steps = lines[-1], len(lines)
    seconds = sum(pairs / line["pairs_per_second"] for line in lines)
    rows = {
        "method": method,
        "steps": f"{steps:,} ({last['epoch']:.2f} epochs)",
        "loss": f"{last['loss']:.4f} (first {lines[0]['loss']:.4f})",
        "accuracy": f"{last['accuracy']:.3f}",
        "margin": f"{last['margin']:.4g}",
        "eval loss": f"{last['eval_loss']:.4f}" if "eval_loss" in last else "",
        "eval accuracy": f"{last['eval_accuracy']:.3f}" if "eval_accuracy" in last else "",
        "eval margin": f"{last['eval_margin']:.4g}" if "eval_margin" in last else "",
        "time in steps": duration(seconds),
        "pairs per second": f"{pairs * steps / seconds:.3g}",
        "peak memory": f"{max(line['peak_memory_gib'] for line in lines):.2f} GiB",
        "checkpoint": str(folder / f"global_step_{steps}"),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows.items() if value)


class MetricsLog:
    """Appends to save_path/metrics.jsonl and to the trackers of --log; on rank 0 only, a no-op elsewhere."""

    def __init__(self, folder: Path, done: int, trackers: list[str], flags: dict[str, Any]) -> None:
        """Open the log of a run; lines of later steps are dropped. Every rank must call: if rank 0 fails, all end.

        Args:
            folder: save_path.
            done: finished steps.
            trackers: names in drdpo.training.trackers.
            flags: of the run, for the trackers.

        Raises:
            DataError: a line of these steps is missing.
        """
        self._stream: TextIO | None = None
        self._trackers: list[Tracker] = []
        distributed.on_main(lambda: self._open(folder, done, trackers, flags))

    def _open(self, folder: Path, done: int, trackers: list[str], flags: dict[str, Any]) -> None:
        path = folder / "metrics.jsonl"
        # A process that was killed while writing leaves a partial line; its step is repeated.
        lines = [line for _, line in whole_lines(path)] if path.is_file() else []
        kept = lines[:done]
        if [line.get("step") for line in kept] != list(range(1, done + 1)):
            raise DataError(
                f"{path} contains {len(kept)} whole lines, but the saved state has completed {done} steps; restore the "
                "file, or start over with --resume=never"
            )
        with atomic_file(path) as stream:
            stream.writelines(json.dumps(line) + "\n" for line in kept)
        self._trackers = [Tracker(name, folder, flags, kept, len(lines)) for name in trackers]
        self._stream = path.open("a", encoding="utf-8")

    def write(self, metrics: Metrics) -> None:
        """Add one step's line."""
        if self._stream is None:
            return
        self._stream.write(json.dumps(metrics, allow_nan=False) + "\n")
        self._stream.flush()
        for tracker in self._trackers:
            tracker.write(metrics)

    def flush(self) -> None:
        """Sync all lines to disk, so that a state saved later never has more steps than there are lines."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._stream is not None:
            self._stream.close()
            for tracker in self._trackers:
                tracker.close()

"""Metrics of a run: computed and checked per step, appended to metrics.jsonl, sent to the trackers of --log, summarized.

Shape suffixes: B pairs, P pairs of the step over all ranks, S = 2B sequences, K numbers of the first step's answers, M
micro-batches of all ranks.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from torch import Tensor

from drdpo import distributed
from drdpo.errors import DataError, duration
from drdpo.folder import atomic_file, whole_lines
from drdpo.training import losses
from drdpo.training.data import AnyBatch, Batch, Pair
from drdpo.training.losses import Method, Pairs
from drdpo.training.objective import Objective
from drdpo.training.policy import FiniteWatch, Policy
from drdpo.training.trackers import Tracker

PEAK_BF16 = {
    "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12,
    "A100": 312e12, "L40S": 362e12,
}  # fmt: skip
"""Dense bfloat16 FLOP/s by the first key that is in torch's name of the device. Source: NVIDIA's data sheets, line "BFLOAT16
Tensor Core", halved where they count sparsity."""

Metrics = dict[str, float]


def pair_table(losses_B: Tensor, pairs: Pairs, beta: float) -> Tensor:
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
    parts: list[Objective],
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


def shape_of(policy: Policy) -> Shape:
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


def dpo_flops(shape: Shape, batch: AnyBatch) -> float:
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


def throughput(batches: list[AnyBatch], shape: Shape, dtype: str, pairs: int, seconds: float) -> Metrics:
    """tokens_per_second, pairs_per_second and, if the device's peak is known, mfu of a step of so many pairs over all
    ranks, of which this rank had these micro-batches; every rank must call."""
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
    """Text summary of a finished run, from save_path/metrics.jsonl; `pairs` are those of an optimizer step."""
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
        """Open the log of a run in save_path after `done` steps; lines of later ones are dropped. Every rank must call: if
        rank 0 fails, all end.

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


# Before the first step policy and reference are one model: are their log-probs? -------------------------------------------

TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 5e-2)}
"""Of the mean |log pi - log ref| of an answer: a share of the mean |log ref|, and nats in addition for the shortest answers.

The same micro-batches through the same code give the same bits. What may differ are a GPU's kernels, and micro-batches of an
earlier start on another number of processes. On SmolLM2-135M other micro-batches change a log-prob by 3e-8 of it in float32
and by 2e-4 in bfloat16 (four answers, CPU). The bfloat16 tolerance is fifty times that by judgement, not by a measurement on
a GPU; a reference closer than that is not noticed."""


def check_first_step(
    parts: list[Objective], references: list[Tensor], method: Method, dtype: str, model_path: str, reference_file: str
) -> None:
    """Refuse reference log-probs that are not the untrained policy's own; every rank must call.

    The loss alone would not show it: at beta 0.01 a margin of 10 nats changes it by 0.05.

    Args:
        parts, references: of this rank's micro-batches of the first step; reference log-probs [B, 2] of each.
        method, dtype: of the run.
        model_path, reference_file: for the message.

    Raises:
        DataError: the loss is not that of a zero margin, or the log-probs are too far apart.
    """
    losses_P = distributed.gather(torch.cat([part.losses_B for part in parts]))
    # ln 2, 1 / (4 beta^2) for ipo, or what a method's own loss is at a margin of zero.
    expected_P = distributed.gather(torch.cat([_loss_at_zero(part.pairs, method) for part in parts]))
    difference_K = distributed.gather(torch.cat([part.pairs.log_ratios_S for part in parts])).double().abs()
    size_K = distributed.gather(torch.cat([reference_B2.flatten() for reference_B2 in references])).double().abs()
    share, nats = TOLERANCES[dtype]
    loss, expected = float(losses_P.double().mean()), float(expected_P.mean())
    loss_tolerance = (0.05 if dtype == "bfloat16" else 1e-3) * max(1.0, expected)
    difference, allowed = float(difference_K.mean()), share * float(size_K.mean()) + nats
    if not abs(loss - expected) <= loss_tolerance:
        reason = f"the first loss is {loss:.4f}, not {expected:.4f}"
    elif not difference <= allowed:
        reason = (
            f"before the first step the policy's log-probs are {difference:.4g} away from the reference's in the mean, more "
            f"than the {allowed:.2g} of rounding"
        )
    else:
        return
    raise DataError(
        f"{reason}: the reference log-probs do not belong to {model_path}; delete {reference_file}, or pass --resume=never"
    )


def _loss_at_zero(pairs: Pairs, method: Method) -> Tensor:
    """[B] losses if policy and reference were the same, float64."""
    margins_B, log_ratios_S = (torch.zeros_like(part, dtype=torch.float64) for part in (pairs.margins_B, pairs.log_ratios_S))
    return method.loss(pairs._replace(margins_B=margins_B, log_ratios_S=log_ratios_S)).double()


# Are the numbers of a step finite? DeepSpeed silently skips a step whose gradients are not, and would skip all later ones.

SHOWN = 8
"""Pairs that a message names."""


def check_step(metrics: dict[str, float], watch: FiniteWatch, indices: Sequence[Tensor], pairs: Sequence[Pair]) -> None:
    """Stop at a step whose metrics are not finite; every rank must call.

    Args:
        metrics, watch: of the step, the metrics the same on all ranks.
        indices: [B] of each of this rank's micro-batches.
        pairs: of the training split.

    Raises:
        DataError: a metric is not finite; names the pairs of the micro-batches it came from.
    """
    wrong = _not_finite(metrics)
    if not wrong:
        return
    bad_M = distributed.gather(watch.bad_M.float()).bool().cpu()
    device = watch.bad_M.device
    indices_P = distributed.gather(torch.cat(list(indices)).to(device)).cpu()
    sizes_M = distributed.gather(torch.tensor([len(part) for part in indices], device=device)).cpu()
    if bad_M.any():
        whose = f"from the micro-batch of {_named(indices_P[bad_M.repeat_interleave(sizes_M)].tolist(), pairs)}"
    else:
        whose = f"from no micro-batch alone but the sum over the step's {len(indices_P)} pairs"
    raise DataError(
        f"step {int(metrics['step'])}: {wrong}, {whose}; nothing of this step is saved and earlier checkpoints are "
        "kept; look at these pairs, or lower --learning_rate or the method's strength"
    )


def check_evaluation(metrics: dict[str, float], step: int) -> None:
    """Raise DataError if metrics of the test pairs are not finite: the step before has broken the weights."""
    wrong = _not_finite(metrics)
    if wrong:
        raise DataError(
            f"after step {step}: {wrong}; nothing of this step is saved and earlier checkpoints are kept; lower "
            "--learning_rate or the method's strength"
        )


def _not_finite(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value))


def _named(indices: list[int], pairs: Sequence[Pair]) -> str:
    ids = [pairs[index].prompt_id for index in indices]
    label = "row" if None in ids else "prompt_id"
    words = [str(index + 1 if label == "row" else prompt_id) for prompt_id, index in zip(ids, indices, strict=True)]
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return f"{label} {', '.join(words[:SHOWN])}{more}"

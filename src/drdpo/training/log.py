"""Metrics of a run: computed and checked per step, appended to metrics.jsonl, summarized, and sent to the trackers of --log
(TensorBoard, Weights & Biases, Trackio), of which one that fails never ends a run.

Shape suffixes: B pairs, P pairs of the step over all ranks, S = 2B sequences, M micro-batches of all ranks.
"""

import importlib.util
import json
import math
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from drdpo import distributed
from drdpo.errors import DataError, UsageError, duration, one_line
from drdpo.folder import atomic_file, read_json_object, whole_lines, write_json
from drdpo.training import losses
from drdpo.training.data import AnyBatch, Batch, Pair
from drdpo.training.losses import Method, Pairs
from drdpo.training.objective import Objective
from drdpo.training.policy import FiniteWatch, Policy

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
    names, means = ("loss", "accuracy", "chosen_reward", "rejected_reward"), table_P4.double().mean(dim=0).tolist()
    return {**dict(zip(names, means, strict=True)), "margin": means[2] - means[3]}


def _gathered(numbers: Iterable[Tensor | None]) -> Tensor:
    """[P, ..] of all ranks, from those of this rank's micro-batches, where they have any."""
    return distributed.gather(torch.cat([part_B for part_B in numbers if part_B is not None]))


def step_metrics(
    parts: list[Objective], beta: float, weighted: bool, rho: float | None = None, root: str | None = None
) -> Metrics:
    """Metrics of one optimizer step, from what each rank's micro-batches contributed; every rank must call.

    `loss` is the plain, unweighted mean, which is comparable across methods; `objective` is what was minimized. `root`: the
    population of a root penalty, "step", all pairs, or "micro", the ranks' n-th micro-batches.
    """
    metrics = table_means(_gathered(pair_table(part.losses_B, part.pairs, beta) for part in parts))
    metrics["objective"] = float(_gathered(part.weights_B * part.losses_B.detach() for part in parts).mean())
    if weighted:
        metrics["effective_sample_size"] = float(losses.effective_sample_size(_gathered(part.weights_B for part in parts)))
    if rho is None:
        return metrics
    # Of the micro-batches that have the penalty.
    penalties_P = _gathered(part.penalties_B for part in parts)
    metrics |= {"penalty": float(penalties_P.mean()), "input_gradient_norm": float(penalties_P.sqrt().mean())}
    if any(part.errors_B is not None for part in parts):
        metrics["solver_error"] = float(_gathered(part.errors_B for part in parts).mean())
        metrics["solver_condition"] = float(_gathered(part.conditions_B for part in parts).max())
    charged = [part.weights_B * part.penalties_B for part in parts if part.penalties_B is not None]
    charged_P = _gathered(charged)
    if root == "micro":
        # The mean of the populations' roots; all micro-batches have the same number of pairs, or the flags are refused.
        value = charged_P.view(-1, len(charged), len(charged[0])).mean(dim=(0, 2)).sqrt().mean()
    else:
        value = charged_P.mean().sqrt() if root else charged_P.mean()
    metrics["objective"] += rho * float(value)
    return metrics


class Shape(NamedTuple):
    """Parameters of a policy, and the arithmetic of a DPO step, forward and backward, without recomputation.

    It is 6 per trained parameter of the blocks and token, 4 per frozen one; the same for the head and answer tokens only;
    12 L H E, query heads times their width in L layers, per token and token it sees (2204.02311, appendix B, less what
    causality masks). WDPO's penalty is not counted: its MFU shows what it costs compared with DPO.
    """

    parameters: int
    trained: int
    of_token: int
    of_target: int
    of_seen: int


def shape_of(policy: Policy) -> Shape:
    """The shape of a policy whose parameters are whole or on the meta device."""

    def work(parameters: list[Tensor]) -> int:
        return sum((6 if parameter.requires_grad else 4) * parameter.numel() for parameter in parameters)

    model, head = policy.language_model, policy.head.weight
    settings, table = model.config.get_text_config(), model.get_input_embeddings().weight
    every: list[Tensor] = list(policy.parameters())
    total, trained = (sum(each.numel() for each in every if each.requires_grad or frozen) for frozen in (True, False))
    heads = getattr(settings, "num_attention_heads", 0)  # Mamba has none
    width = getattr(settings, "head_dim", None) or settings.hidden_size // max(heads, 1)
    blocks = work([parameter for parameter in every if parameter is not head and parameter is not table])
    return Shape(total, trained, blocks, work([head]), 12 * settings.num_hidden_layers * heads * width)


def peak_flops(device: str, dtype: str) -> float | None:
    """FLOP/s of a device by torch's name of it; None if not known for certain."""
    if dtype != "bfloat16" or "MIG" in device:
        return None
    return next((peak for name, peak in PEAK_BF16.items() if re.search(rf"\b{name}\b", device)), None)


def dpo_flops(shape: Shape, batch: AnyBatch) -> float:
    """Arithmetic that a DPO step needs for a micro-batch."""
    if isinstance(batch, Batch):
        seen = sum(length**2 / 2 for length in batch.attention_mask_ST.sum(dim=1).tolist())
    else:
        seen = sum(
            group.prefix**2 / 2 + sum(length * (group.prefix + length / 2) for length in group.suffixes)
            for group in batch.groups
        )
    return shape.of_token * batch.tokens + shape.of_target * len(batch.targets_A) + shape.of_seen * seen


def throughput(batches: list[AnyBatch], shape: Shape, dtype: str, pairs: int, seconds: float) -> Metrics:
    """tokens_per_second, pairs_per_second and, if the device's peak is known, mfu of a step of so many pairs over all
    ranks, of which this rank had these micro-batches; and peak_memory_gib, the most that this process has held, allocated on
    the GPU or resident on the CPU. Every rank must call."""
    device = distributed.device()
    peak = peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    tokens = float(sum(batch.tokens for batch in batches))
    work = sum(dpo_flops(shape, batch) for batch in batches) if peak else 0.0
    # In units of 10^12: float32, which GPUs gather fastest, is exact enough for a metric.
    totals = distributed.gather(torch.tensor([tokens, work / 1e12], device=device)).view(-1, 2).double().sum(dim=0)
    metrics = {"tokens_per_second": float(totals[0]) / seconds, "pairs_per_second": pairs / seconds}
    if peak:
        metrics["mfu"] = float(totals[1]) * 1e12 / seconds / (peak * distributed.world_size())
    if device.type == "cuda":
        return metrics | {"peak_memory_gib": float(torch.cuda.max_memory_allocated()) / 2**30}
    # Not ru_maxrss, which includes the parent's memory after a fork.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return metrics | {"peak_memory_gib": int(line.split()[1]) / 2**20}


def on_the_bar(metrics: Metrics) -> dict[str, str]:
    """The metrics of a step that the progress bar shows."""
    shown = {"loss": ("loss", ".4f"), "acc": ("accuracy", ".2f"), "tok_s": ("tokens_per_second", ".0f"),
             "pairs_s": ("pairs_per_second", ".2f"), "mfu": ("mfu", ".0%")}  # fmt: skip
    return {name: f"{metrics[key]:{form}}" for name, (key, form) in shown.items() if key in metrics}


def summary(folder: Path, method: str, pairs: int) -> str:
    """Text summary of a finished run, from save_path/metrics.jsonl; `pairs` are those of an optimizer step."""
    lines = [line for _, line in whole_lines(folder / "metrics.jsonl")]
    last, steps = lines[-1], len(lines)
    seconds = sum(pairs / line["pairs_per_second"] for line in lines)
    forms = {f"{kind}{name}": form for kind in ("", "eval_") for name, form in _FORMS.items() if f"{kind}{name}" in last}
    rows = {
        "method": method,
        "steps": f"{steps:,} ({last['epoch']:.2f} epochs)",
        **{name.replace("_", " "): f"{last[name]:{form}}" for name, form in forms.items()},
        "time in steps": duration(seconds),
        "pairs per second": f"{pairs * steps / seconds:.3g}",
        "peak memory": f"{max(line['peak_memory_gib'] for line in lines):.2f} GiB",
        "checkpoint": str(folder / f"global_step_{steps}"),
    }
    rows["loss"] += f" (first {lines[0]['loss']:.4f})"
    return "\n".join(f"{name.ljust(max(map(len, rows)))}  {value}" for name, value in rows.items())


_FORMS = {"loss": ".4f", "accuracy": ".3f", "margin": ".4g"}


class MetricsLog:
    """Appends to save_path/metrics.jsonl and to the trackers of --log, on rank 0 only."""

    def __init__(self, folder: Path, done: int, trackers: list[str], flags: dict[str, Any]) -> None:
        """Open the log of a run in save_path after `done` steps; lines of later ones are dropped, and DataError is raised if
        one of these is missing. Every rank must call: if rank 0 fails, all end."""
        self._stream: TextIO
        self._trackers: list[Tracker] = []
        self._closing = ExitStack()
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
        self._stream = self._closing.enter_context(path.open("a", encoding="utf-8"))
        for name in trackers:
            self._trackers.append(Tracker(name, folder, flags, kept, len(lines)))
            self._closing.callback(self._trackers[-1].close)

    def write(self, metrics: Metrics) -> None:
        """Add one step's line."""
        self._stream.write(json.dumps(metrics, allow_nan=False) + "\n")
        self._stream.flush()
        for tracker in self._trackers:
            tracker.write(metrics)

    def flush(self) -> None:
        """Sync all lines to disk, so that a state saved later never has more steps than there are lines."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file and the trackers; a no-op on other ranks."""
        self._closing.close()


# Before the first step policy and reference are one model: are their log-probs? -------------------------------------------

TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 5e-2)}
"""Largest mean |log pi - log ref| of an answer: a share of the mean |log ref|, and nats in addition for the shortest
answers. A GPU's kernels may differ, and an earlier start's micro-batches: on SmolLM2-135M others change a log-prob by 3e-8
of it in float32 and by 2e-4 in bfloat16 (four answers, CPU). That bfloat16 may have fifty times as much is a judgement, not
a measurement on a GPU; a reference that is closer than that to the policy's own is not noticed."""


def check_first_step(
    parts: list[Objective], references: list[Tensor], method: Method, dtype: str, model_path: str, reference_file: str
) -> None:
    """Raise DataError if reference log-probs, [B, 2] of each of this rank's micro-batches of the first step, are not the
    untrained policy's: by the loss, and by the log-probs themselves, as at beta 0.01 a margin of 10 nats changes the
    loss by 0.05. Every rank must call."""
    # ln 2, 1 / (4 beta^2) for ipo, or what a method's own loss is at a margin of zero.
    log_ratios = [torch.zeros_like(part.pairs.log_ratios_S, dtype=torch.float64) for part in parts]
    zeros = [part.pairs._replace(margins_B=z.chunk(2)[0], log_ratios_S=z) for part, z in zip(parts, log_ratios, strict=True)]
    at_zero = _gathered(method.loss(pairs).double() for pairs in zeros)
    loss, expected = float(_gathered(part.losses_B for part in parts).double().mean()), float(at_zero.mean())
    loss_tolerance = (0.05 if dtype == "bfloat16" else 1e-3) * max(1.0, expected)
    share, nats = TOLERANCES[dtype]
    difference = float(_gathered(part.pairs.log_ratios_S for part in parts).double().abs().mean())
    allowed = share * float(_gathered(reference_B2.flatten() for reference_B2 in references).double().abs().mean()) + nats
    if not abs(loss - expected) <= loss_tolerance:
        reason = f"the first loss is {loss:.4f}, not {expected:.4f}"
    elif not difference <= allowed:
        reason = f"the policy's first log-probs are {difference:.4g} away from the reference's, more than {allowed:.2g}"
    else:
        return
    raise DataError(
        f"{reason}: the reference log-probs do not belong to {model_path}; delete {reference_file}, or pass --resume=never"
    )


# Are the numbers of a step finite? DeepSpeed silently skips a step whose gradients are not, and would skip all later ones.

SHOWN = 8
"""Pairs that a message names."""


def check_step(metrics: dict[str, float], watch: FiniteWatch, indices: Sequence[Tensor], pairs: Sequence[Pair]) -> None:
    """Raise DataError if a metric of a step, the same on all ranks, is not finite, naming the pairs of the micro-batches
    that it came from; `indices` [B] are the places of this rank's micro-batches among the pairs. Every rank must call."""
    if not (wrong := _not_finite(metrics)):
        return
    bad_M = distributed.gather(watch.bad_M.float()).bool().cpu()
    device = watch.bad_M.device
    indices_P = distributed.gather(torch.cat(list(indices)).to(device)).cpu()
    sizes_M = distributed.gather(torch.tensor([len(part) for part in indices], device=device)).cpu()
    if bad_M.any():
        bad = indices_P[bad_M.repeat_interleave(sizes_M)].tolist()
        ids = [pairs[index].prompt_id for index in bad]
        label, shown = ("row", [index + 1 for index in bad]) if None in ids else ("prompt_id", ids)
        more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
        whose = f"from the micro-batch of {label} {', '.join(map(str, shown[:SHOWN]))}{more}"
    else:
        whose = f"from no micro-batch alone but the sum over the step's {len(indices_P)} pairs"
    raise DataError(
        f"step {int(metrics['step'])}: {wrong}, {whose}; nothing of this step is saved and earlier checkpoints are "
        "kept; look at these pairs, or lower --learning_rate or the method's strength"
    )


def check_evaluation(metrics: dict[str, float], step: int) -> None:
    """Raise DataError if metrics of the test pairs are not finite: the step before has broken the weights."""
    if wrong := _not_finite(metrics):
        raise DataError(
            f"after step {step}: {wrong}; nothing of this step is saved and earlier checkpoints are kept; lower "
            "--learning_rate or the method's strength"
        )


def _not_finite(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value))


DASHBOARD = "dashboard.json"
"""{id, project} of the folder's run on wandb and Trackio. Never a key."""
PINS = {"wandb": "wandb==0.31.0", "trackio": "trackio==0.43.0"}
"""The versions that were tested. They are optional, so requirements/ does not list them."""
_OFFLINE = ("offline", "dryrun")


class Tracker:
    """One tracker of a run, which has every step once: a resumed run continues there."""

    def __init__(self, name: str, folder: Path, flags: dict[str, Any], kept: list[dict[str, float]], logged: int) -> None:
        """`kept`: metrics.jsonl's lines of the finished steps; `logged`: steps that an earlier start has sent."""
        self._name, self._lost, self._next = name, False, len(kept) + 1
        self._log: Callable[[dict[str, float], int], Any]
        self._finish: Callable[[], Any]
        self._keep_running(lambda: getattr(self, f"_{name}")(folder, flags, logged))
        for metrics in kept:
            self.write(metrics)

    def write(self, metrics: dict[str, float]) -> None:
        """Log a line of metrics.jsonl, as train/loss and eval/loss, unless an earlier start has."""
        step = int(metrics["step"])
        named = {f"train/{name}".replace("train/eval_", "eval/"): value for name, value in metrics.items() if name != "step"}
        if step >= self._next:
            self._keep_running(lambda: self._log(named, step))

    def close(self) -> None:
        """End the tracker's run."""
        self._keep_running(lambda: self._finish())

    def _tensorboard(self, folder: Path, flags: dict[str, Any], logged: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=self._next)

        def log(named: dict[str, float], step: int) -> None:
            for name, value in named.items():
                writer.add_scalar(name, value, step)
            writer.flush()  # or a kill would lose steps that the saved state counts as finished

        self._log, self._finish = log, writer.close

    def _wandb(self, folder: Path, flags: dict[str, Any], logged: int) -> None:
        import wandb

        known, resumed = _identity(folder)
        # Neither source nor output of the program leaves this machine; no prompt, no endless wait.
        limits = {"login_timeout": 1, "init_timeout": 120, "finish_timeout": 300}
        settings = wandb.Settings(console="off", disable_git=True, save_code=False, silent=True, **limits)
        name = os.environ.get("WANDB_NAME") or folder.resolve().name
        run = wandb.init(**known, name=name, resume="allow", dir=str(folder), config=flags, settings=settings)
        # The server knows its last step. Offline there is none.
        self._next = logged + 1 if _mode() in _OFFLINE and resumed else int(run.step)
        # A run that ends by an exception is shown as failed.
        self._finish = lambda: run.finish(exit_code=int(sys.exc_info()[0] is not None))
        self._log = lambda named, step: run.log(named, step=step)

    def _trackio(self, folder: Path, flags: dict[str, Any], logged: int) -> None:
        import trackio

        known, resumed = _identity(folder)
        name, quiet = f"{folder.resolve().name}-{known['id']}", {"auto_log_gpu": False, "auto_log_cpu": False}
        run = trackio.init(known["project"], name, resume="allow", config=flags, **quiet)
        self._next = logged + 1 if resumed else 1
        self._log, self._finish = lambda named, step: run.log(named, step=step), trackio.finish

    def _keep_running(self, send: Callable[[], Any]) -> None:
        try:
            if not self._lost:
                send()
        except Exception as error:  # Of the trackers' own kinds, which differ from version to version.
            self._lost = True
            print(f"warning: {self._name} failed ({one_line(str(error), 200)}); continuing without it", file=sys.stderr)


def check_trackers(trackers: list[str]) -> None:
    """Raise UsageError for a tracker of --log that could not work: not installed, or wandb without a key or disabled."""
    asked = [name for name in PINS if name in trackers] if distributed.is_main() else []
    for name in asked:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--log={name}: not installed; run: python -m pip install {PINS[name]}, or omit it")
    if "wandb" in asked and _mode() == "disabled":
        raise UsageError("--log=wandb with WANDB_MODE=disabled would record nothing; unset it, or remove wandb from --log")
    if "wandb" in asked and _mode() not in _OFFLINE:
        import wandb

        if not wandb.login(prompt=False, verify=False):  # it would ask and wait
            raise UsageError("--log=wandb has no key: run `wandb login` or set WANDB_API_KEY; or set WANDB_MODE=offline")


def _mode() -> str:
    return os.environ.get("WANDB_MODE", "").strip().lower()


def _identity(folder: Path) -> tuple[dict[str, str], bool]:
    """{id, project} of the folder's run, and whether an earlier start made them; new ones are written at once."""
    path = folder / DASHBOARD
    if path.is_file():
        return {name: str(read_json_object(path)[name]) for name in ("id", "project")}, True
    made = {"id": os.getenv("WANDB_RUN_ID") or secrets.token_hex(4), "project": os.getenv("WANDB_PROJECT") or "drdpo"}
    write_json(path, made)
    return made, False

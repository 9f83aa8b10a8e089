"""Ten minutes on a GPU: correctness and cost of the code for GPUs, the most important parts first.

    PYTHONPATH=src python benchmarks/gpu_lease.py         on a bare GPU machine: torch, triton, transformers, msgspec, pytest
    PYTHONPATH=src python benchmarks/gpu_lease.py --tiny  the same parts on a CPU, to check that the script runs

Weights are random, of true shapes; nothing is downloaded. The parts:

    tests        pytest -m gpu tests/kernels
    new_shapes   cost of the first and second attention call of a new length, with and without cuDNN's kernels
    head         the output head: linear_logprob, its matrix products alone, torch's log_softmax; errors
    dpo          a micro-batch of 1, 4 and 16 pairs by attention kernel and recomputation: seconds for new and for repeated
                 lengths, MFU, memory against the prediction, kernels against gpu_counts.json
    repeats      whether two backward passes are bit-equal, with default and with deterministic kernels
    wdpo         the same as dpo for WDPO
    scoring      ArmoRM's backbone over packed rows

If a part fails, the failure is recorded and the next part runs; parts that would start after --seconds are recorded as such.
The file is written after each part: benchmarks/results/gpu_<device>.json, or --output.
"""

import argparse
import gc
import inspect
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import linear_logprob
import torch
from processes import memory_now, peak_gib, seconds_of
from shapes import pairs_of, settings_of
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModel, AutoModelForCausalLM

from drdpo.config.training import TrainConfig
from drdpo.machine import ask_driver
from drdpo.training.data import Pair, form_batch
from drdpo.training.losses import method_of
from drdpo.training.objective import objective

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


class Lease:
    """Where and how long to measure, and what was found.

    Args:
        tiny: on a CPU, at sizes of a second.
        seconds: in all.
        output: the file of results; None writes none.
    """

    def __init__(self, tiny: bool, seconds: float, output: Path | None) -> None:
        self.tiny, self.output = tiny, output
        self.device = torch.device("cpu" if tiny else "cuda")
        self.end = time.perf_counter() + seconds
        self.found: Row = {
            "device": "cpu" if tiny else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": None if tiny else torch.backends.cudnn.version(),
            "cuda_driver": None if tiny else ask_driver()[1],
        }

    def record(self, part: str, run: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Run one part, or one row of it ("part/row"), and write what it found or why it failed."""
        started = time.perf_counter()
        if started > self.end:
            found: Any = "no time left"
        else:
            try:
                found = run(*arguments, **options)
            except Exception as error:
                found = {"failed": f"{type(error).__name__}: {error}"[:600], "where": traceback.format_exc()[-1500:]}
        name, _, row = part.partition("/")
        if row:
            self.found.setdefault(name, {})[row] = found
        elif found is not None:
            self.found[name] = found
        print(f"{part} [{time.perf_counter() - started:.1f} s] {json.dumps(found, default=str)[:700]}", flush=True)
        if self.output is not None:
            self.output.write_text(json.dumps(self.found, indent=1, default=str) + "\n", encoding="utf-8")
        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()

    def seconds(self, run: Callable[[], Any], rounds: int = 5) -> float:
        """Median seconds of a call, after one that does not count; fewer rounds where time is short."""
        times = [seconds_of(run)]
        while len(times) <= 1 or (len(times) <= rounds and time.perf_counter() < self.end):
            times.append(seconds_of(run))
        return statistics.median(times[1:])


def gib(run: Callable[[], Any]) -> float:
    """Peak memory of a call beyond what was allocated before it."""
    before = memory_now()
    seconds_of(run)
    return peak_gib() - before


@contextmanager
def cudnn_attention(on: bool) -> Iterator[None]:
    """Let torch choose cuDNN's attention, or not."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def new_shapes(lease: Lease, cudnn: bool) -> Row:
    """Milliseconds of the first and second call, forward and backward, of lengths and strides that were never seen."""
    heads, kv_heads, width, count, base = (4, 2, 16, 3, 64) if lease.tiny else (32, 8, 64, 24, 3000)
    times: dict[str, list[float]] = {"first ms": [], "second ms": []}
    with cudnn_attention(cudnn):
        for number in range(count):
            whole = [torch.randn(1, base + number, h, width, device=lease.device, dtype=torch.bfloat16).transpose(1, 2)
                     for h in (heads, kv_heads, kv_heads)]  # fmt: skip
            end = 50 + number if lease.tiny else 350 + 7 * number
            query, key, value = (part[:, :, base // 30 : end].detach().requires_grad_() for part in whole)

            def run(query: Tensor = query, key: Tensor = key, value: Tensor = value) -> None:
                scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).sum().backward()

            for name in times:
                times[name].append(1e3 * seconds_of(run))
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def head(lease: Lease, tokens: int) -> Row:
    """Seconds, memory and errors of the output head for this many answer tokens, as by linear_logprob.py."""
    case = f"{'300x32' if lease.tiny else '128256x2048'}x{tokens}"
    ways = ["matmuls", "drdpo"] + ["plain"] * (tokens <= 2048)
    return {way: linear_logprob.measure(Namespace(way=way, case=case, dtype="bfloat16")) for way in ways}


class Step:
    """Micro-batches of a policy with random weights, forward and backward, without an engine: a gradient leaves as soon as
    it is there, as under ZeRO.

    Args:
        lease: where.
        shape: of shapes.py.
        pairs: that memory is predicted for.
        flags: of the trainer.
    """

    def __init__(self, lease: Lease, shape: str, pairs: list[Pair], **flags: Any) -> None:
        from drdpo.training.memory import dry_run, resolve_attention, shapes
        from drdpo.training.policy import ALL_LAYERS, Policy, set_recomputation, widen_values

        with tempfile.TemporaryDirectory() as folder:
            settings_of(shape).save_pretrained(folder)
            config = TrainConfig(folder, "-", "-", **{"dtype": "bfloat16", "gradient_checkpointing": "false", **flags})
            self.config = config = resolve_attention(config)
            largest = form_batch(pairs, range(len(pairs)), config.packing)
            self.predicted = sum(dry_run(shapes(config), largest, method_of(config))) / 2**30
        settings = settings_of(shape, attn_implementation=config.attention)
        torch.manual_seed(0)
        with lease.device:
            model = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, config.dtype))
        set_recomputation(model, ALL_LAYERS if config.recompute else 0)
        self.policy = Policy(model, config.second_derivative).train()
        self.policy.flash_attention = config.packed_flash
        if config.wide_values:
            widen_values(self.policy)
        self._lease = lease
        self.keep: list[Tensor] | None = None
        for parameter in self.policy.parameters():
            parameter.register_post_accumulate_grad_hook(self._leave)

    def _leave(self, parameter: Tensor) -> None:
        if self.keep is not None and parameter.grad is not None:
            self.keep.append(parameter.grad)
        parameter.grad = None

    def batch(self, pairs: list[Pair]) -> Any:
        return form_batch(pairs, list(range(len(pairs))), self.config.packing).to(self._lease.device)

    def run(self, batch: Any) -> None:
        reference_B2 = torch.zeros(len(batch.indices_B), 2, device=self._lease.device)
        objective(self.policy, batch, reference_B2, method_of(self.config), None).total.backward()


def micro_batch(
    lease: Lease, count: int, prompt: int = 200, answer: int = 300, spread: float = 0.5, rounds: int = 4,
    profile: bool = False, **flags: Any,
) -> Row:  # fmt: skip
    """Seconds, DPO's arithmetic a second and memory of one micro-batch at Llama-3.2-1B's shape."""
    from drdpo.training.log import dpo_flops, shape_of

    if lease.tiny:
        count, prompt, answer = min(count, 2), 6, 9
    draws = [pairs_of(count, prompt, answer, spread, draw) for draw in range(rounds + 1)]
    step = Step(lease, "tiny" if lease.tiny else "Llama-3.2-1B", draws[0], **flags)
    batches = [step.batch(pairs) for pairs in draws]
    times = [seconds_of(lambda batch=batch: step.run(batch)) for batch in batches][1:]
    again = lease.seconds(lambda: step.run(batches[1]), rounds=2)
    measured = gib(lambda: step.run(batches[0]))
    kernels = _profiled(lambda: step.run(batches[0])) if profile and not lease.tiny else {}
    new, work = statistics.median(times), statistics.mean(dpo_flops(shape_of(step.policy), batch) for batch in batches[1:])
    return {
        "attention": step.config.attention_kernel, "tokens": batches[0].tokens,
        "s, new lengths": new, "s, same lengths": again,
        "DPO TFLOP/s, new": work / new / 1e12, "DPO TFLOP/s, same": work / again / 1e12, "GiB": measured,
        "predicted GiB": step.predicted, **kernels,
    }  # fmt: skip


def _profiled(run: Callable[[], Any]) -> Row:
    """Kernels of a call: how many, and the dearest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    with recording(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    events = [event for event in seen.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    dearest = sorted(events, key=lambda event: -event.self_device_time_total)[:15]
    return {
        "kernels": sum(event.count for event in events),
        "dearest": [[event.key[:90], event.count, event.self_device_time_total / 1e3] for event in dearest],
    }


def repeats(lease: Lease, deterministic: bool, **flags: Any) -> Row:
    """Are the gradients of two equal micro-batches equal to the bit?"""
    size = (2, 6, 9) if lease.tiny else (4, 200, 300)
    pairs = pairs_of(*size, 0.5)
    step = Step(lease, "tiny" if lease.tiny else "Llama-3.2-1B", pairs, **flags)
    batch = step.batch(pairs)
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = []
        for _ in range(2):
            step.keep = []
            step.run(batch)
            found.append(step.keep)
        step.keep = None
        seconds = lease.seconds(lambda: step.run(batch), rounds=3)
    finally:
        torch.use_deterministic_algorithms(False)
    equal = [torch.equal(first, second) for first, second in zip(*found, strict=True)]
    return {"attention": step.config.attention_kernel, "gradients": len(equal), "equal": sum(equal), "s": seconds}


def scoring(lease: Lease, flash: bool) -> Row:
    """Seconds of a batch of packed conversations, lengths never seen, through a backbone of ArmoRM's shape."""
    from drdpo.kernels.packed_attention import PackedRow, hidden_states

    settings = settings_of("tiny" if lease.tiny else "Llama-3.1-8B", attn_implementation="sdpa")
    with lease.device:
        backbone = AutoModel.from_config(settings, dtype=torch.bfloat16).eval()
    drawn = random.Random(1)

    def length() -> int:
        return 5 if lease.tiny else drawn.randint(40, 500)

    times, tokens = [], 0
    for _ in range(2 if lease.tiny else 5):
        shared = [length() for _ in range(2 if lease.tiny else 12)]
        row = PackedRow([(prefix, [[1] * (prefix + length()) for _ in range(2)]) for prefix in shared])
        with torch.inference_mode():
            times.append(seconds_of(lambda row=row: hidden_states(backbone, row, flash=flash)))
        tokens = len(row.token_ids)
    return {"s a batch": statistics.median(times[1:]), "tokens of the last": tokens}


def gpu_tests(lease: Lease) -> Any:
    """The last lines of the kernels' own tests."""
    if lease.tiny:
        return "need a GPU"
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels"]
    left = max(30.0, min(240.0, lease.end - time.perf_counter()))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=left)
    return done.stdout.splitlines()[-25:]


def give_varlen_grouped_heads() -> None:
    """torch before 2.13, which a bare machine may have, has no enable_gqa in varlen_attn: repeat the heads there."""
    from torch.nn.attention import varlen

    given = varlen.varlen_attn
    if "enable_gqa" in inspect.signature(given).parameters:
        return

    def repeated(query: Tensor, key: Tensor, value: Tensor, *rest: Any, enable_gqa: bool = False, **options: Any) -> Any:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        return given(query, key, value, *rest, **options)

    varlen.varlen_attn = repeated


def measure(lease: Lease) -> None:
    """All parts, in their order."""
    lease.record("tests", gpu_tests, lease)
    for cudnn in (True, False):
        lease.record(f"new_shapes/{'as torch chooses' if cudnn else 'without cuDNN'}", new_shapes, lease, cudnn)
    for tokens in (33,) if lease.tiny else (653, 2048, 8192):
        lease.record(f"head/{tokens} tokens", head, lease, tokens)
    long: dict[str, Any] = {"count": 1, "prompt": 1024, "answer": 1024, "spread": 0.0, "rounds": 2}
    kernel = "auto" if lease.tiny else "flash"
    for row, given in {
        "4 pairs": {"count": 4}, "16 pairs": {"count": 16, "profile": True}, "1 pair": {"count": 1, "profile": True},
        "4 pairs, sdpa": {"count": 4, "attn": "sdpa"}, "16 pairs, sdpa": {"count": 16, "attn": "sdpa", "profile": True},
        "16 pairs, recomputed": {"count": 16, "gradient_checkpointing": "true"},
        "4 pairs, float32": {"count": 4, "dtype": "float32"},
    }.items():  # fmt: skip
        lease.record(f"dpo/{row}", micro_batch, lease, **given)
    for attn in dict.fromkeys((kernel, "sdpa")):
        for deterministic in (False, True):
            row = f"{attn}, {'deterministic' if deterministic else 'as it is'}"
            lease.record(f"repeats/{row}", repeats, lease, deterministic, attn=attn)
    for row, given in {
        "1 pair": {"count": 1, "profile": True}, "4 pairs": {"count": 4}, "1 pair of 2 x 2048": long,
    }.items():  # fmt: skip
        lease.record(f"wdpo/{row}", micro_batch, lease, wdpo_rho=0.01, **given)
    for flash in (False,) if lease.tiny else (False, True):
        lease.record(f"scoring/{'flash' if flash else 'sdpa'}", scoring, lease, flash)


def main() -> None:
    """Parse, measure, say where the results are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to know that the script runs")
    parser.add_argument("--seconds", type=float, default=520, help="after which no part begins")
    parser.add_argument("--output", type=Path, help="file of results")
    arguments = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products; read at the process's first one
    if arguments.tiny:
        os.environ["DS_ACCELERATOR"] = "cpu"  # resolve_attention asks whether there is a GPU
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --tiny runs the same parts on a CPU")
    output = arguments.output
    if output is None and not arguments.tiny:
        name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")
        output = Path(__file__).parent / "results" / f"gpu_{name}.json"
    give_varlen_grouped_heads()
    lease = Lease(arguments.tiny, arguments.seconds, output)
    measure(lease)
    failed = json.dumps(lease.found, default=str).count('"failed"')
    print(f"{failed} parts failed; results in {output}" if output else f"{failed} parts failed")


if __name__ == "__main__":
    main()

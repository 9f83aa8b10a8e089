"""Ten minutes on a GPU: correctness and cost of the code for GPUs, the most important parts first.

    PYTHONPATH=src python benchmarks/gpu_lease.py            on a bare GPU machine: torch, triton, transformers, pytest
    PYTHONPATH=src python benchmarks/gpu_lease.py --tiny     the same parts on a CPU, to check that the script runs

Weights are random, of true shapes; nothing is downloaded. The parts:

    new_shapes   cost of the first and second attention call of a new length, with and without cuDNN's kernels
    head         the output head: linear_logprob, cuBLAS's product alone, torch's log_softmax; by splits; its error
    dpo          a micro-batch of 1, 4 and 16 pairs by attention kernel and recomputation: seconds for new and for repeated
                 lengths, MFU, memory against the prediction, kernels against gpu_counts.json
    repeats      whether two backward passes are bit-equal, with default and with deterministic kernels
    wdpo         the same as dpo for WDPO's solvers, with float32 products in full precision and in TF32
    scoring      ArmoRM's backbone over packed rows
    tests        pytest -m gpu tests/kernels

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from drdpo.config.training import TrainConfig
from drdpo.training.data import Pair, form_batch
from drdpo.training.losses import method_of
from drdpo.training.objective import objective

ROOT = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
}  # fmt: skip
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
            "driver": None if tiny else _driver(),
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

    def sync(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], rounds: int = 5) -> float:
        """Median seconds of a call, after one that does not count; fewer rounds where time is short."""
        run()
        self.sync()
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            run()
            self.sync()
            times.append(time.perf_counter() - started)
            if time.perf_counter() > self.end:
                break
        return statistics.median(times)

    def gib(self, run: Callable[[], Any]) -> float | None:
        """Peak memory of a call beyond what was allocated before it."""
        if self.tiny:
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.sync()
        return (torch.cuda.max_memory_allocated() - before) / 2**30


def _driver() -> str:
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return done.stdout.strip()


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
            for name in times:
                started = time.perf_counter()
                scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).sum().backward()
                lease.sync()
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def head(lease: Lease, tokens: int) -> Row:
    """Seconds, memory and errors of the output head for this many answer tokens."""
    from drdpo.kernels import linear_logprob

    width, vocabulary = (32, 300) if lease.tiny else (2048, 128256)
    weight = (torch.randn(vocabulary, width, device=lease.device) / width**0.5).bfloat16().requires_grad_()
    hidden = torch.randn(tokens, width, device=lease.device).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=lease.device)
    upstream = torch.randn(tokens, device=lease.device)

    def forward() -> Tensor:
        with torch.no_grad():
            return linear_logprob(hidden, weight, targets)

    def ours() -> Any:
        return torch.autograd.grad(linear_logprob(hidden, weight, targets), (hidden, weight), upstream)

    def torchs() -> Any:
        token = (hidden @ weight.T).float().log_softmax(1).gather(1, targets[:, None]).squeeze(1)
        return torch.autograd.grad(token, (hidden, weight), upstream)

    found = {"FLOP of a product": 2.0 * tokens * width * vocabulary}
    found["cuBLAS product s"] = lease.seconds(lambda: hidden.detach() @ weight.detach().T)
    found["ours forward s"] = lease.seconds(forward)
    found["ours both s"], found["ours both GiB"] = lease.seconds(ours), lease.gib(ours)
    if not lease.tiny:
        found |= _by_splits(lease, forward)
    if tokens <= 2048:
        found["log_softmax both s"], found["log_softmax both GiB"] = lease.seconds(torchs), lease.gib(torchs)
    some = slice(64)
    exact = torch.log_softmax(hidden[some].double() @ weight.double().T, 1).gather(1, targets[some, None]).squeeze(1)
    found["largest error of 64 log-probs"] = float((forward()[some].double() - exact).detach().abs().max())
    return found


def _by_splits(lease: Lease, forward: Callable[[], Any]) -> Row:
    from drdpo.kernels import triton_logprob

    found, chosen = {}, triton_logprob.splits_of
    try:
        for splits in (8, 16, 32, 64):
            triton_logprob.splits_of = lambda *_, splits=splits: splits
            found[f"ours forward, {splits} splits s"] = lease.seconds(forward)
    finally:
        triton_logprob.splits_of = chosen
    return found


def settings_of(shape: str, attention: str) -> LlamaConfig:
    """transformers' settings of a model of SHAPES."""
    settings = LlamaConfig(
        rope_theta=500_000.0, max_position_embeddings=131_072, attn_implementation=attention, **SHAPES[shape]
    )
    settings.architectures = ["LlamaForCausalLM"]
    return settings


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New parameters are on a device, of a dtype; their values are those of seed 0."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def pairs_of(count: int, prompt: int, answer: int, spread: float, draw: int = 0) -> list[Pair]:
    """Pairs whose prompt and answers are drawn within a share `spread` of these lengths; draw 0 is gpu_counts.py's."""
    drawn = random.Random(draw)

    def ids(of: int) -> list[int]:
        return [10 + number % 400 for number in range(max(2, int(of * drawn.uniform(1 - spread, 1 + spread))))]

    return [Pair(ids(prompt), ids(answer), ids(answer), number) for number in range(count)]


class Step:
    """Micro-batches of a policy with random weights, forward and backward, without an engine: a gradient leaves as soon as
    it is there, as under ZeRO.

    Args:
        lease: where.
        shape: of SHAPES.
        pairs: that memory is predicted for.
        flags: of the trainer.
    """

    def __init__(self, lease: Lease, shape: str, pairs: list[Pair], **flags: Any) -> None:
        from drdpo.training.memory import dry_run, resolve_attention, shapes
        from drdpo.training.policy import Policy, widen_values

        with tempfile.TemporaryDirectory() as folder:
            settings_of(shape, "eager").save_pretrained(folder)
            config = TrainConfig(folder, "-", "-", **{"dtype": "bfloat16", "gradient_checkpointing": "false", **flags})
            self.config = config = resolve_attention(config)
            largest = form_batch(pairs, range(len(pairs)), config.packing)
            self.predicted = sum(dry_run(shapes(config), largest, method_of(config))) / 2**30
        with made_on(lease.device, getattr(torch, config.dtype)):
            model = LlamaForCausalLM(settings_of(shape, config.attention))
        if config.recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
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
    tf32: bool = False, profile: bool = False, **flags: Any,
) -> Row:  # fmt: skip
    """Seconds, DPO's arithmetic a second and memory of one micro-batch at Llama-3.2-1B's shape."""
    from drdpo.training.log import dpo_flops, shape_of

    if lease.tiny:
        count, prompt, answer = min(count, 2), 6, 9
    draws = [pairs_of(count, prompt, answer, spread, draw) for draw in range(rounds + 1)]
    step = Step(lease, "tiny" if lease.tiny else "1B", draws[0], **flags)
    batches = [step.batch(pairs) for pairs in draws]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        step.run(batches[0])
        lease.sync()
        times = []
        for batch in batches[1:]:
            started = time.perf_counter()
            step.run(batch)
            lease.sync()
            times.append(time.perf_counter() - started)
        again = lease.seconds(lambda: step.run(batches[1]), rounds=2)
        measured = lease.gib(lambda: step.run(batches[0]))
        kernels = _profiled(lambda: step.run(batches[0])) if profile and not lease.tiny else {}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
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
    step = Step(lease, "tiny" if lease.tiny else "1B", pairs, **flags)
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

    with made_on(lease.device, torch.bfloat16):
        backbone = LlamaModel(settings_of("tiny" if lease.tiny else "8B", "sdpa")).eval()
    drawn = random.Random(1)

    def length() -> int:
        return 5 if lease.tiny else drawn.randint(40, 500)

    times, tokens = [], 0
    for _ in range(2 if lease.tiny else 5):
        shared = [length() for _ in range(2 if lease.tiny else 12)]
        row = PackedRow([(prefix, [[1] * (prefix + length()) for _ in range(2)]) for prefix in shared])
        started = time.perf_counter()
        with torch.inference_mode():
            hidden_states(backbone, row, flash=flash)
        lease.sync()
        times.append(time.perf_counter() - started)
        tokens = len(row.token_ids)
    return {"s a batch": statistics.median(times[1:]), "tokens of the last": tokens}


def gpu_tests(lease: Lease) -> Any:
    """The last lines of the kernels' own tests."""
    if lease.tiny:
        return "need a GPU"
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels"]
    left = max(30.0, lease.end - time.perf_counter())
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
        "1 pair": {"count": 1, "profile": True}, "1 pair, TF32": {"count": 1, "tf32": True}, "4 pairs": {"count": 4},
        "4 pairs, TF32": {"count": 4, "tf32": True},
        "1 pair of 2 x 2048": long, "1 pair of 2 x 2048, TF32": {**long, "tf32": True},
    }.items():  # fmt: skip
        lease.record(f"wdpo/{row}", micro_batch, lease, wdpo_rho=0.01, **given)
    for flash in (False,) if lease.tiny else (False, True):
        lease.record(f"scoring/{'flash' if flash else 'sdpa'}", scoring, lease, flash)
    lease.record("tests", gpu_tests, lease)


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

"""Log-probs of target tokens from hidden states: time, peak memory and error of linear_logprob and its alternatives.

    plain      hidden @ head.T in the input's dtype, log_softmax in float32, gather
    compile    torch.compile of the same
    trl        TRL's chunked function (trl.kernels.chunked_logprob), which its DPOTrainer uses
    liger      Liger's fused linear cross entropy, one loss per token (CUDA only)
    cce        Apple's cut-cross-entropy; on a CPU its torch.compile form, since its kernels are for GPUs
    matmuls    only the matrix products of a method without stored logits: one forward, three backward
    drdpo      drdpo.kernels.linear_logprob: torch on a CPU, Triton on CUDA

Inputs are bfloat16; forward and backward pass, gradients for hidden states and head. Each method runs in its own process, in
turn, for several rounds; `x drdpo` is the median over rounds of its time divided by ours in the same round. Memory is the
peak beyond the inputs. Errors are those of the log-probs, and of the head's gradient relative to its norm, against float64
on the first tokens. liger and cce are measured if installed (pip install liger-kernel cut-cross-entropy).

    PYTHONPATH=src python benchmarks/linear_logprob.py [--cases 49152x576x1024 128256x2048x512]
        [--output=benchmarks/results/linear_logprob]
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

WAYS = ("plain", "compile", "trl", "liger", "cce", "matmuls", "drdpo")
COLORS = {"plain": "#999999", "compile": "#CC79A7", "trl": "#56B4E9", "liger": "#009E73", "cce": "#E69F00",
          "matmuls": "#333333", "drdpo": "#D55E00"}  # fmt: skip


def plain(hidden_ND, weight_VD, targets_N):
    return (hidden_ND @ weight_VD.T).float().log_softmax(1).gather(1, targets_N[:, None]).squeeze(1)


def way_of(name: str):
    """A function of hidden states, head and targets."""
    import torch

    if name == "plain":
        return plain
    if name == "compile":
        return torch.compile(plain)
    if name == "trl":
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Chunked

        return lambda hidden, weight, targets: Chunked.apply(hidden, weight, None, targets, 1.0, 8192, None, 1.0, ())[0]
    if name == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
        return lambda hidden, weight, targets: -loss(weight, hidden, targets)
    if name == "cce":
        from cut_cross_entropy import linear_cross_entropy

        kind = "cce" if torch.cuda.is_available() else "torch_compile"
        return lambda hidden, weight, targets: -linear_cross_entropy(hidden, weight, targets, impl=kind, reduction="none")
    from drdpo.kernels import linear_logprob

    return linear_logprob


def matmuls(hidden_ND, weight_VD) -> tuple[float, float]:
    """Seconds of the forward's product, and of all four, a block of the vocabulary at a time."""
    forward = backward = 0.0
    hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    width = 2048 if hidden_ND.device.type == "cpu" else 16384
    for start in range(0, len(weight_VD), width):
        block_KD = weight_VD[start : start + width]
        synchronise()
        began = time.perf_counter()
        logits_NK = hidden_ND @ block_KD.T
        synchronise()
        forward += time.perf_counter() - began
        began = time.perf_counter()
        _ = hidden_ND @ block_KD.T, logits_NK @ block_KD, logits_NK.T @ hidden_ND
        synchronise()
        backward += time.perf_counter() - began
    return forward, forward + backward


def measure(way: str, vocabulary: int, width: int, tokens: int, threads: int, name: str) -> dict:
    """One way in this process."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, name)
    hidden_ND = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    weight_VD = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype).requires_grad_()
    targets_N = torch.randint(vocabulary, (tokens,), device=device)
    upstream_N = torch.randn(tokens, device=device)
    if way == "matmuls":
        matmuls(hidden_ND, weight_VD)
        forward, both = matmuls(hidden_ND, weight_VD)
        return {"forward": forward, "both": both, "peak_gib": 0.0}
    function = way_of(way)
    few = slice(0, 16)
    function(hidden_ND[few], weight_VD, targets_N[few]).backward(upstream_N[few])  # compiles, and makes the gradients
    weight_VD.grad = hidden_ND.grad = None
    seconds = []
    for _ in range(3):  # the first one compiles for these shapes
        weight_VD.grad = hidden_ND.grad = None
        before = memory_now()
        began = time.perf_counter()
        logprob_N = function(hidden_ND, weight_VD, targets_N)
        synchronise()
        middle = time.perf_counter()
        logprob_N.backward(upstream_N)
        synchronise()
        seconds.append((middle - began, time.perf_counter() - began))
        peak = peak_gib() - before
        del logprob_N
    forward, both = (min(part) for part in zip(*seconds[1:], strict=True))
    return {"forward": forward, "both": both, "peak_gib": peak} | errors(
        function, hidden_ND.detach()[:64], weight_VD.detach(), targets_N[:64], upstream_N[:64]
    )


def errors(function, hidden_ND, weight_VD, targets_N, upstream_N) -> dict:
    """Against float64, on a few tokens."""
    import torch

    ours, exact = (
        [tensor.to(dtype).clone().requires_grad_() for tensor in (hidden_ND, weight_VD)]
        for dtype in (hidden_ND.dtype, torch.float64)
    )
    logprob_N = function(*ours, targets_N)
    logprob_N.backward(upstream_N)
    exact_N = (exact[0] @ exact[1].T).log_softmax(1).gather(1, targets_N[:, None]).squeeze(1)
    exact_N.backward(upstream_N.double())
    apart = ours[1].grad.double() - exact[1].grad
    return {
        "error": float((logprob_N.detach().double() - exact_N.detach()).abs().max()),
        "gradient_error": float(apart.norm() / exact[1].grad.norm()),
    }


def synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 2**20


def memory_now() -> float:
    """GiB allocated now, on the GPU or by the process; resets the peak that peak_gib returns."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_gib() -> float:
    """Most memory since memory_now, of the GPU or of the process."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else _status("VmHWM")


def run(way: str, case: str, arguments: argparse.Namespace) -> dict:
    """`measure` in a process of its own."""
    words = [sys.executable, __file__, f"--way={way}", "--cases", case, f"--threads={arguments.threads}",
             f"--dtype={arguments.dtype}"]  # fmt: skip
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: str, ways: list[str], arguments: argparse.Namespace) -> dict:
    """All ways at one size."""
    rounds = [{way: run(way, case, arguments) for way in ways} for _ in range(arguments.rounds)]
    measured = {}
    for way in ways:
        measured[way] = {
            "forward_seconds": statistics.median(r[way]["forward"] for r in rounds),
            "both_seconds": statistics.median(r[way]["both"] for r in rounds),
            "forward_times_drdpo": statistics.median(r[way]["forward"] / r["drdpo"]["forward"] for r in rounds),
            "both_times_drdpo": statistics.median(r[way]["both"] / r["drdpo"]["both"] for r in rounds),
            "peak_gib": max(r[way]["peak_gib"] for r in rounds),
            **{name: rounds[0][way].get(name) for name in ("error", "gradient_error")},
        }
    return {"case": case, "ways": measured}


def table(cases: list[dict]) -> str:
    """A line per case and way."""
    lines = ["{:<18} {:<8} {:>9} {:>9} {:>8} {:>8} {:>9} {:>9}".format(
        "V x D x N", "way", "forward s", "both s", "x drdpo", "peak MiB", "error", "grad err")]  # fmt: skip
    for case in cases:
        for way, f in case["ways"].items():
            error, gradient = (f"{f[name]:.1e}" if f[name] is not None else "-" for name in ("error", "gradient_error"))
            lines.append(
                f"{case['case']:<18} {way:<8} {f['forward_seconds']:>9.3f} {f['both_seconds']:>9.3f} "
                f"{f['both_times_drdpo']:>8.2f} {1024 * f['peak_gib']:>8.0f} {error:>9} {gradient:>9}"
            )
    return "\n".join(lines)


def draw(facts: dict, path: Path) -> None:
    """Bars of time and memory relative to ours, by case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 2.4 * len(facts["cases"]), 4.4), layout="constrained")
    ways = list(facts["cases"][0]["ways"])
    for panel, (key, scale, title) in enumerate(
        [("both_seconds", 1.0, "seconds, forward and backward"), ("peak_gib", 1024.0, "peak MiB over the inputs")]
    ):
        axes = figure.add_subplot(1, 2, panel + 1)
        for shift, way in enumerate(ways):
            heights = [case["ways"][way][key] * scale for case in facts["cases"]]
            places = [number + 0.8 / len(ways) * (shift - (len(ways) - 1) / 2) for number in range(len(heights))]
            bars = axes.bar(places, heights, 0.75 / len(ways), color=COLORS[way], label=way)
            axes.bar_label(bars, fmt="%.1f" if panel == 0 else "%.0f", fontsize=7, rotation=90, padding=2)
        names = [
            "\n".join(f"{of} {size}" for of, size in zip("VDN", case["case"].split("x"), strict=True))
            for case in facts["cases"]
        ]
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.margins(y=0.1)
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"log-probs of targets, {facts['dtype']}, {facts['device']}", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["49152x576x2048", "49152x576x8192", "49152x576x16384", "128256x2048x512", "128256x4096x512"],
        help="V x D x N",
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0 is torch's own choice")
    parser.add_argument("--output", default=None, help="write OUTPUT.json and OUTPUT.png")
    parser.add_argument("--way", default=None, choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        sizes = map(int, arguments.cases[0].split("x"))
        print(json.dumps(measure(arguments.way, *sizes, arguments.threads, arguments.dtype)))
        return
    import torch

    from drdpo.machine import resolve_dtype

    arguments.dtype = resolve_dtype(arguments.dtype).dtype
    packages = {"trl": "trl", "liger": "liger_kernel", "cce": "cut_cross_entropy"}
    ways = [way for way in WAYS if way not in packages or importlib.util.find_spec(packages[way])]
    if not torch.cuda.is_available():
        ways = [way for way in ways if way != "liger"]
    cases = [compare(case, ways, arguments) for case in arguments.cases]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, {platform.machine()}"
    facts = {"device": device, "dtype": arguments.dtype, "rounds": arguments.rounds, "cases": cases}
    print(table(cases))
    if arguments.output:
        path = Path(arguments.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
        draw(facts, path.with_suffix(".png"))


if __name__ == "__main__":
    main()

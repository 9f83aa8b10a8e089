"""Log-probs of target tokens from hidden states: time, peak memory and error of linear_logprob and its alternatives.

    plain      hidden @ head.T in the input's dtype, log_softmax in float32, gather
    compile    torch.compile of the same
    trl        TRL's chunked function (trl.kernels.chunked_logprob), which its DPOTrainer uses
    liger      Liger's fused linear cross entropy, one loss per token (CUDA only)
    cce        Apple's cut-cross-entropy; on a CPU its torch.compile form, since its kernels are for GPUs
    matmuls    only the matrix products of a method without stored logits: one forward, three backward
    drdpo      drdpo.kernels.linear_logprob: torch on a CPU, Triton on CUDA

Inputs are bfloat16; forward and backward pass, gradients for hidden states and head. Each method runs in its own process
(processes.py); `times_drdpo` is its time divided by ours. Memory is the peak beyond the inputs. Errors are those of the
log-probs, and of the head's gradient relative to its norm, against float64 on the first tokens. liger and cce are measured
if installed (pip install liger-kernel cut-cross-entropy).

    PYTHONPATH=src python benchmarks/linear_logprob.py [--cases 49152x576x1024 128256x2048x512]
        [--output=benchmarks/results/linear_logprob]
"""

import importlib.util
from argparse import Namespace
from pathlib import Path

import processes
from processes import Facts, median, on_gpu, seconds_of

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
    for block_KD in weight_VD.split(16384 if on_gpu() else 2048):
        logits_NK = hidden_ND @ block_KD.T
        forward += seconds_of(lambda block_KD=block_KD: hidden_ND @ block_KD.T)
        backward += seconds_of(
            lambda block_KD=block_KD, logits_NK=logits_NK: (
                hidden_ND @ block_KD.T, logits_NK @ block_KD, logits_NK.T @ hidden_ND
            )
        )  # fmt: skip
    return forward, forward + backward


def measure(arguments: Namespace) -> dict:
    """One way in this process."""
    import torch

    torch.manual_seed(0)
    device, dtype = "cuda" if on_gpu() else "cpu", getattr(torch, arguments.dtype)
    vocabulary, width, tokens = map(int, arguments.case.split("x"))
    hidden_ND = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    weight_VD = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype).requires_grad_()
    targets_N = torch.randint(vocabulary, (tokens,), device=device)
    upstream_N = torch.randn(tokens, device=device)
    if arguments.way == "matmuls":
        matmuls(hidden_ND, weight_VD)
        forward, both = matmuls(hidden_ND, weight_VD)
        return {"forward": forward, "both": both, "peak_gib": 0.0}
    function = way_of(arguments.way)
    few = slice(0, 16)
    function(hidden_ND[few], weight_VD, targets_N[few]).backward(upstream_N[few])  # compiles, and makes the gradients
    seconds, found = [], []
    for _ in range(3):  # the first one compiles for these shapes
        weight_VD.grad = hidden_ND.grad = None
        before = processes.memory_now()
        forward = seconds_of(lambda: found.append(function(hidden_ND, weight_VD, targets_N)))
        backward = seconds_of(lambda: found.pop().backward(upstream_N))
        seconds.append((forward, forward + backward))
        peak = processes.peak_gib() - before
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


def compare(case: str, ways: list[str], arguments: Namespace) -> dict:
    """All ways at one size."""
    rounds = processes.run_rounds(arguments, ways, case=case)
    measured = {}
    for way in ways:
        measured[way] = {
            "forward_seconds": median(rounds, lambda r, way=way: r[way]["forward"]),
            "both_seconds": median(rounds, lambda r, way=way: r[way]["both"]),
            "forward_times_drdpo": median(rounds, lambda r, way=way: r[way]["forward"] / r["drdpo"]["forward"]),
            "both_times_drdpo": median(rounds, lambda r, way=way: r[way]["both"] / r["drdpo"]["both"]),
            "peak_gib": max(r[way]["peak_gib"] for r in rounds),
            **{name: rounds[0][way].get(name) for name in ("error", "gradient_error")},
        }
    return {"case": case, "ways": measured}


def draw(facts: Facts, path: Path) -> None:
    """Time and memory, by case."""
    ways = list(facts["cases"][0]["ways"])
    panels = [
        (title, form, {way: [scale * case["ways"][way][key] for case in facts["cases"]] for way in ways})
        for key, scale, form, title in (
            ("both_seconds", 1.0, "%.1f", "seconds, forward and backward"),
            ("peak_gib", 1024.0, "%.0f", "peak MiB over the inputs"),
        )
    ]
    names = [
        "\n".join(f"{of} {size}" for of, size in zip("VDN", case["case"].split("x"), strict=True)) for case in facts["cases"]
    ]
    processes.draw_bars(path, f"log-probs of targets, {facts['dtype']}, {facts['device']}", names, COLORS, panels)


def main() -> None:
    parser = processes.parser_of(__doc__)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["49152x576x2048", "49152x576x8192", "49152x576x16384", "128256x2048x512", "128256x4096x512"],
        help="V x D x N",
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    arguments = processes.parse(parser, measure)
    packages = {"trl": "trl", "liger": "liger_kernel", "cce": "cut_cross_entropy"}
    ways = [way for way in WAYS if way not in packages or importlib.util.find_spec(packages[way])]
    if not on_gpu():
        ways = [way for way in ways if way != "liger"]
    cases = [compare(case, ways, arguments) for case in arguments.cases]
    rows = [{"V x D x N": case["case"], "way": way, **found} for case in cases for way, found in case["ways"].items()]
    processes.show(rows)
    facts = {"device": processes.device_name(), "dtype": arguments.dtype, "rounds": arguments.rounds, "cases": cases}
    processes.write(arguments, facts, draw)


if __name__ == "__main__":
    main()

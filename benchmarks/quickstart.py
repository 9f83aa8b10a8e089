"""Checks the quickstart's claim: the gain of each method in the mixture that it was trained on, with its interval, by seed.

Runs quickstart.sh once per seed and writes gains, seconds by step and the largest training's peak memory into the results,
next to those of the other kind of CPU. The exit status is 1 if an interval does not lie above zero. `--cpu=avx2` limits
torch's libraries to the instructions of a CPU with AVX2 only, on which --dtype=auto is float32; a real one is slower.
Seconds exclude setup; other work on the cores increases them, so the load at the start is recorded.

    PYTHONPATH=src python benchmarks/quickstart.py [--seeds 42 43 44] [--cpu=avx2]
        [--output=benchmarks/results/quickstart.json]
    PYTHONPATH=src python benchmarks/quickstart.py --estimate=true    how long the quickstart should take here
"""

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quickstart.json"
PRODUCTS = 0.5
"""Share of the time that scales with the speed of matrix products: a guess; imports, attention and Python are the rest."""
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def speed(dtype: str) -> float:
    """GFLOP/s of this machine in products of the policy's shapes, all threads: the best of half a second."""
    import torch

    rows_NI, weight_OI = (torch.ones(size, dtype=getattr(torch, dtype)) for size in ((512, 576), (1536, 576)))
    best, end = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        torch.nn.functional.linear(rows_NI, weight_OI)
        best = min(best, time.perf_counter() - start)
    return 2 * 512 * 576 * 1536 / best / 1e9


def dtype_here() -> str:
    """What --dtype=auto is on this machine."""
    from drdpo.machine import resolve_dtype

    return resolve_dtype("auto").dtype


def gpus() -> bool:
    """Does a GPU do the work here?"""
    from drdpo.distributed import use_cuda

    return use_cuda()


def estimate(results: dict) -> str:
    """A line for a user: the seconds measured on a CPU, scaled in part by this machine's speed in matrix products."""
    if gpus():
        return "How long it takes on a GPU has not been measured."
    dtype = dtype_here()
    known = [entry for entry in results.values() if entry["dtype"] == dtype]
    if not known:
        return f"How long it takes in {dtype} has not been measured."
    here, entry = speed(dtype), known[0]
    minutes = entry["seconds"] * (1 - PRODUCTS + PRODUCTS * entry["gflops"] / here) / 60
    return (
        f"Estimate for this machine, with the default flags: {minutes:.0f} minutes. It took {entry['seconds'] / 60:.0f} on "
        f"{entry['machine']} with products at {entry['gflops']:.0f} GFLOP/s ({dtype}); here they run at {here:.0f} GFLOP/s."
    )


def noise_in(lines: list[str]) -> list[str]:
    """Library warnings, and progress bars drawn over each other, in the output of a run that is no terminal's."""
    return [line for line in lines if "\r" in line or "warning" in line.lower() or "deprecated" in line.lower()]


def run(seed: int, folder: Path, environment: dict[str, str], flags: list[str]) -> dict:
    """One quickstart: {"gains_sd": {method: {value, low, high}}, "seconds": {step: }, "peak_gib": , "load_before": }."""
    load = os.getloadavg()[0]
    if folder.exists():
        sys.exit(f"error: {folder} exists, so its steps would be skipped; remove it or pass another --output_path")
    command = ["bash", str(ROOT / "quickstart.sh"), f"--seed={seed}", f"--output_path={folder}", *flags]
    output = []
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    for line in io.TextIOWrapper(process.stdout, encoding="utf-8", newline="\n"):  # a redrawn bar keeps its carriage returns
        print(line, end="", flush=True)
        output.append(line)
    if process.wait():
        sys.exit(f"error: quickstart.sh ended with status {process.returncode}")
    if noise := noise_in(output):
        sys.exit(f"error: the quickstart prints what no user should read: {noise[0].strip()}")
    lines = [line.split("\t") for line in (folder / "times.tsv").read_text(encoding="utf-8").splitlines()]
    starts = [int(seconds) for seconds, _ in lines]
    metrics = [json.loads(line) for path in folder.glob("*/metrics.jsonl") for line in path.read_text("utf-8").splitlines()]
    record = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["evaluate_armorm"]["trained_mixture"]
    return {
        **record,
        "flags": (folder / "flags").read_text(encoding="utf-8").replace(f"--seed={seed} ", "").strip(),
        # The first line is the setup's.
        "seconds": {name: after - at for (_, name), at, after in zip(lines[1:], starts[1:], starts[2:], strict=False)},
        "peak_gib": round(max(step["peak_memory_gib"] for step in metrics), 2),
        "load_before": round(load, 2),
    }


def main() -> None:
    """Run the seeds, print every interval, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--cpu", choices=("native", "avx2"), default="native")
    parser.add_argument("--output_path", type=Path, default=ROOT / "outputs" / "quickstart_check", help="folder of the runs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--estimate", default="false", choices=("true", "false"))
    parser.add_argument("--flags", nargs="*", default=[], help="further flags of quickstart.sh, without their dashes")
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.is_file() else {}
    if arguments.estimate == "true":
        print(estimate(results))
        return
    environment = AVX2 if arguments.cpu == "avx2" else {}
    os.environ.update(environment)  # before torch is imported, for dtype_here and speed
    flags = [f"--{word}" for word in arguments.flags]
    runs = {
        seed: run(seed, arguments.output_path / f"{arguments.cpu}_{seed}", environment, flags) for seed in arguments.seeds
    }
    # Runs of other seeds stay where they had the same flags.
    flags_of = next(iter(runs.values()))["flags"]
    before = results.get(arguments.cpu, {}).get("seeds", {})
    kept = {seed: found for seed, found in before.items() if found["flags"] == flags_of}
    seeds = dict(sorted({**kept, **{str(seed): found for seed, found in runs.items()}}.items()))
    results[arguments.cpu] = {
        "machine": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {platform.machine()}", "dtype": dtype_here(),
        "gflops": round(speed(dtype_here()), 1),
        "seconds": round(sum(sum(found["seconds"].values()) for found in seeds.values()) / len(seeds)), "seeds": seeds,
    }  # fmt: skip
    arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    failed = []
    for seed, found in runs.items():
        for method, gain in found["gains_sd"].items():
            print(f"{arguments.cpu} seed {seed} {method}: {gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]")
            failed += [f"{method}, seed {seed}"] if not gain["low"] > 0 else []
    sys.exit(f"error: no gain for sure: {'; '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()

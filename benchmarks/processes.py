"""What the benchmarks of time and memory share: a process a measurement, its memory, and results with their picture.

Peak memory is a property of a process, so each way is measured in its own, in turn, for several rounds: a drift of the
machine's speed affects all alike. Ratios are taken within a round; their median is reported.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Facts = dict[str, Any]


def parser_of(description: str) -> argparse.ArgumentParser:
    """With the flags of all."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    results = str(ROOT / "benchmarks" / "results" / Path(sys.argv[0]).stem)
    parser.add_argument("--output", default=results, help="write OUTPUT.json and OUTPUT.png; by default the committed ones")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], Any]) -> argparse.Namespace:
    """The command line, its --dtype as on this machine. A process of `run` measures, prints what it found, and ends here."""
    arguments = parser.parse_args()
    if arguments.measure:
        import numpy as np
        import torch

        for dtype in (np.float32, np.float64):
            np.finfo(dtype)  # NumPy warns when it first measures a float type after the next line, which the trainer has too
        torch.set_flush_denormal(True)
        print(json.dumps(measure(argparse.Namespace(**json.loads(arguments.measure)))))
        sys.exit()
    from drdpo.machine import resolve_dtype

    several = isinstance(arguments.dtype, list)
    found = [resolve_dtype(dtype).dtype for dtype in (arguments.dtype if several else [arguments.dtype])]
    arguments.dtype = found if several else found[0]
    return arguments


def run(arguments: argparse.Namespace, environment: dict[str, str] | None = None, **changes: Any) -> Any:
    """What the script's `measure` finds for these arguments with changes, in a process of its own."""
    words = [sys.executable, sys.argv[0], "--measure", json.dumps(vars(arguments) | changes)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | (environment or {}))
    return json.loads(done.stdout.splitlines()[-1])


def run_rounds(arguments: argparse.Namespace, ways: Sequence[str], **changes: Any) -> list[dict[str, Any]]:
    """[{way: what it found}] of every round."""
    return [{way: run(arguments, way=way, **changes) for way in ways} for _ in range(arguments.rounds)]


def median(rounds: list[dict[str, Any]], of_round: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(map(of_round, rounds))


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def seconds_of(action: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Of a call, to the end of what it started on the GPU."""
    import torch

    started = clock()
    action()
    if on_gpu():
        torch.cuda.synchronize()
    return clock() - started


def memory_now() -> float:
    """GiB allocated now, by torch on the GPU or else by the process; resets the peak that peak_gib returns."""
    import torch

    gc.collect()
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_gib() -> float:
    """Most memory so far, or since memory_now."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if on_gpu() else _status("VmHWM")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 2**20


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if on_gpu() else f"{os.cpu_count()} cores, {platform.machine()}"


def show(rows: list[Facts]) -> None:
    """Print a table of the figures."""
    from tabulate import tabulate

    print(tabulate(rows, "keys", floatfmt=".4g"), flush=True)


def write(arguments: argparse.Namespace, facts: Facts, draw: Callable[[Facts, Path], None]) -> None:
    """The results and their picture."""
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    draw(facts, path.with_suffix(".png"))


def draw_bars(
    path: Path, title: str, cases: list[str], colors: dict[str, str], panels: list[tuple[str, str, dict[str, list[float]]]]
) -> None:
    """Bars in groups.

    Args:
        path, title: of the picture.
        cases: names of the groups.
        colors: of the ways.
        panels: title, format of the numbers, and {way: its bar in every group}.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 + 1.5 * len(cases), 4.4), layout="constrained")
    for number, (name, form, heights) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for shift, way in enumerate(heights):
            places = [place + 0.8 / len(heights) * (shift - (len(heights) - 1) / 2) for place in range(len(cases))]
            bars = axes.bar(places, heights[way], 0.75 / len(heights), color=colors[way], label=way)
            axes.bar_label(bars, fmt=form, fontsize=7, rotation=90, padding=2)
        axes.set_xticks(range(len(cases)), cases, fontsize=8)
        axes.margins(y=0.1)
        axes.set_title(name, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)

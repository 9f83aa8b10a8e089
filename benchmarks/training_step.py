"""Time and peak memory of an optimizer step, by method, side by side in one run.

Every method runs in a process of its own (peak memory is a property of the process), in turn, several rounds, so that a
drift of the machine's speed falls on all alike. Times are ratios to DPO of the same round.

    PYTHONPATH=src python benchmarks/training_step.py --model_path=models/SmolLM2-135M
        [--tokens=256] [--rounds=3] [--output=...json]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]

METHODS = {
    "dpo": {},
    "dpo, padded": {"packing": False},
    "kldpo": {"kldpo_tau": 0.05},
    "wdpo": {"wdpo_rho": 0.01},
    "wdpo, prompt once": {"wdpo_rho": 0.01, "wdpo_prompt": "once"},
    "wdpo, padded": {"wdpo_rho": 0.01, "packing": False},
}


def measure(flags: dict, model_path: str, tokens: int, steps: int) -> dict[str, float]:
    """Seconds per step (median) and peak memory in GiB of one method, in this process."""
    from drdpo.config import TrainConfig
    from drdpo.training import engine as deepspeed_engine
    from drdpo.training.data import Pair, form_batch
    from drdpo.training.log import peak_memory_gib
    from drdpo.training.loop import train_step
    from drdpo.training.losses import method_of
    from drdpo.training.policy import load_policy, widen_first_tokens

    deepspeed_engine.initialise()
    config = TrainConfig(
        model_path=model_path, dataset_path="-", save_path="-", train_batch_size=2, micro_batch_size=1,
        **flags,
    )  # fmt: skip
    policy = load_policy(
        model_path, getattr(torch, config.dtype), config.attention, config.recompute, config.second_derivative
    )
    if config.wide_first_tokens:
        widen_first_tokens(policy)
    engine = deepspeed_engine.start_engine(policy, config, steps=steps + 1)
    before = peak_memory_gib()
    torch.manual_seed(0)
    text = torch.randint(3, 40000, (3, tokens // 2)).tolist()
    batches = [
        (
            form_batch([Pair(*text)], [0], config.packing, config.prompt_once).to(engine.device),
            torch.zeros(1, 2, device=engine.device),
        )
    ] * 2
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        train_step(engine, batches, config, method_of(config))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[1:]), "peak_gib": peak_memory_gib(), "before_gib": before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", default=str(ROOT / "models" / "SmolLM2-135M"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--tokens", type=int, default=256, help="of each sequence, half of them answer")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=None, help="JSON file for the figures")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="as the trainer's default; off here")
    parser.add_argument("--method", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method:
        flags = {
            **METHODS[arguments.method],
            "gradient_checkpointing": arguments.gradient_checkpointing,
            "dtype": arguments.dtype,
        }
        print(json.dumps(measure(flags, arguments.model_path, arguments.tokens, arguments.steps)))
        return
    from drdpo.machine import resolve_dtype

    arguments.dtype = resolve_dtype(arguments.dtype).dtype
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(arguments.rounds):
        rounds.append({})
        for method in METHODS:
            words = [sys.executable, __file__, f"--method={method}", f"--model_path={arguments.model_path}",
                     f"--dtype={arguments.dtype}",
                     f"--tokens={arguments.tokens}", f"--steps={arguments.steps}",
                     *(["--gradient_checkpointing"] if arguments.gradient_checkpointing else [])]  # fmt: skip
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            rounds[-1][method] = json.loads(done.stdout.splitlines()[-1])
    table = {
        method: {
            "seconds": statistics.median(r[method]["seconds"] for r in rounds),
            "time_ratio_to_dpo": statistics.median(r[method]["seconds"] / r["dpo"]["seconds"] for r in rounds),
            "peak_gib": max(r[method]["peak_gib"] for r in rounds),
        }
        for method in METHODS
    }
    checkpointing = "with" if arguments.gradient_checkpointing else "without"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, {platform.machine()}"
    print(
        f"{device}; two pairs a step, 2 x {arguments.tokens} tokens each, one at a time, {arguments.dtype}, {checkpointing} "
        "checkpointing"
    )
    print(f"{'method':<18} {'s/step':>8} {'x DPO':>7} {'peak GiB':>9}")
    for method, row in table.items():
        print(f"{method:<18} {row['seconds']:>8.2f} {row['time_ratio_to_dpo']:>7.2f} {row['peak_gib']:>9.2f}")
    if arguments.output:
        facts = {
            "device": device,
            "model": Path(arguments.model_path).name,
            "dtype": arguments.dtype,
            "tokens": arguments.tokens,
            "gradient_checkpointing": arguments.gradient_checkpointing,
            "table": table,
        }
        Path(arguments.output).write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()

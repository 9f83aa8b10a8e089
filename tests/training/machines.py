"""Runs on stand-in machines, each a rank_server.py: what the tests of resuming, preemption and several hosts share."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from drdpo.records import Preference, write_records

WORDS = "the cat sat on a mat while it rained over hills and rivers of stone near old towns".split()
FIGURES = (
    "step", "epoch", "loss", "accuracy", "chosen_reward", "rejected_reward", "margin", "objective", "lr", "grad_norm",
    "penalty", "effective_sample_size", "eval_loss", "eval_accuracy", "eval_margin",
)  # fmt: skip
"""What two equal runs agree on; speed and memory are not among it."""
STEPS = 4


def write_pairs(folder: Path) -> Path:
    """Ten training and three test pairs of short random texts."""
    numbers = random.Random(0)

    def said(role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(numbers.choice(WORDS) for _ in range(numbers.randint(3, 12)))}]

    for split, rows in (("train", 10), ("test", 3)):
        pairs = [Preference(row, said("user"), said("assistant"), said("assistant"), 1.0, 0.0) for row in range(rows)]
        write_records(folder / f"{split}.jsonl", pairs)
    return folder


class Machine:
    """A host of ranks, in a network namespace of its own where one is named."""

    def __init__(self, root: Path, namespace: str | None = None, interface: str = "lo") -> None:
        environment = {
            **os.environ, "PYTHONPATH": str(root / "src"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": interface,
        }  # fmt: skip
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DRDPO_STOP_FILE"):
            environment.pop(name, None)
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        command = [*inside, sys.executable, str(Path(__file__).parent / "rank_server.py")]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.ready = False

    def start(self, **task: Any) -> None:
        if not self.ready:
            assert self.server.stdout.readline().strip() == "ready"
            self.ready = True
        self.server.stdin.write(json.dumps(task) + "\n")
        self.server.stdin.flush()

    def statuses(self) -> list[int]:
        line = self.server.stdout.readline()
        assert line, "the stand-in machine died"
        return json.loads(line)

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(machine: Machine, flags: dict, log: Path, faults: list[dict] | None = None, world: int = 2) -> list[int]:
    """Exit statuses of a run whose ranks are all on one machine."""
    machine.start(
        ranks=list(range(world)), world=world, address="127.0.0.1", port=free_port(), flags=flags, log=str(log),
        faults=faults or [],
    )  # fmt: skip
    return machine.statuses()


def fault(at: str, call: int, rank: int = 0, when: str = "after", signal: str = "SIGKILL") -> dict:
    """See rank_server.py; `at` is short for a function of the training room."""
    module, _, function = at.partition(":")
    return {"at": f"drdpo.training.{module}:{function}", "call": call, "rank": rank, "when": when, "signal": signal}


def flags_of(model: Path, data: Path, save: Path, **flags: Any) -> dict:
    """Two epochs of two steps of two micro-batches a rank, evaluated and saved after each."""
    return {
        "model_path": str(model), "dataset_path": str(data), "save_path": str(save), "train_batch_size": 4,
        "micro_batch_size": 1, "learning_rate": 1e-3, "beta": 0.1, "max_epochs": 2, "eval_steps": 2, "save_steps": 1,
        "dtype": "float32", "gradient_checkpointing": False, "comm_timeout": 60, **flags,
    }  # fmt: skip


def metrics_of(save: Path) -> list[dict]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in FIGURES if name in line} for line in lines]


def check_equal(found: Path, expected: Path) -> None:
    """Two finished runs agree bit by bit in parameters, and in every line of metrics."""
    assert json.loads((found / "manifest.json").read_text())["train"]["complete"]
    ours, theirs = (load_file(save / f"global_step_{STEPS}" / "model.safetensors") for save in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert [line["step"] for line in metrics_of(found)] == list(range(1, STEPS + 1))
    assert metrics_of(found) == metrics_of(expected)


def said(log: Path, rank: int = 0) -> str:
    return Path(f"{log}.{rank}").read_text()

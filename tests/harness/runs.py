"""Training runs in forks: what the tests of resuming, preemption and several hosts share."""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from drdpo.records import Completion, Preference, to_row, write_rows
from harness import ROOT
from harness.forks import Fork, Forks, statuses, without_ranks

WORDS = "the cat sat on a mat while it rained over hills and rivers of stone near old towns".split()
FIGURES = (
    "step", "epoch", "loss", "accuracy", "chosen_reward", "rejected_reward", "margin", "objective", "lr", "grad_norm",
    "penalty", "effective_sample_size", "eval_loss", "eval_accuracy", "eval_margin",
)  # fmt: skip
"""What two equal runs agree on; speed and memory are not among it."""
STEPS = 4


def write_pairs(folder: Path) -> Path:
    """Ten training and three test pairs of short random texts, with groups, weights and scores by two objectives."""
    numbers = random.Random(0)

    def said(role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(numbers.choice(WORDS) for _ in range(numbers.randint(3, 12)))}]

    for split, rows in (("train", 10), ("test", 3)):
        pairs = [Preference(row, said("user"), said("assistant"), said("assistant"), 1.0, 0.0) for row in range(rows)]
        facts = [{"domain": "odd" if row % 2 else "even", "trust": 0.5 + row % 3,
                  "chosen_scores": {"x": 1.0, "y": float(row % 2)}, "rejected_scores": {"x": 0.0, "y": 0.5}}
                 for row in range(rows)]  # fmt: skip
        write_rows(folder / f"{split}.jsonl", [to_row(pair) | fact for pair, fact in zip(pairs, facts, strict=True)])
    return folder


def write_candidates(folder: Path, tokenizer: Any, counts: Sequence[int] = (3, 2, 4), **changed: Any) -> Path:
    """test.jsonl with so many scored completions of each prompt, by objectives x and y; `changed`: of its second row."""
    numbers = random.Random(1)
    completions = []
    for prompt_id, count in enumerate(counts, start=7):
        prompt = [{"role": "user", "content": " ".join(numbers.choices(WORDS, k=4))}]
        for sample_id in range(count):
            ids = tokenizer(" ".join(numbers.choices(WORDS, k=numbers.randint(1, 6))), add_special_tokens=False)["input_ids"]
            stop = bool(sample_id % 2)
            answer = [{"role": "assistant", "content": tokenizer.decode(ids)}]
            ids += [tokenizer.eos_token_id] * stop
            scores = {"x": numbers.random(), "y": numbers.gauss(3, 2)}
            reason = "stop" if stop else "length"
            completions.append(to_row(Completion(prompt_id, sample_id, prompt, answer, ids, reason, scores)))
    completions[1] |= changed
    write_rows(folder / "test.jsonl", completions)
    return folder


def start_run(forks: Forks, flags: dict, log: Path, world: int = 2, **options: Any) -> list[Fork]:
    """Start train_alignment.py on ranks of one machine; see Forks.start_ranks for the options."""
    return forks.start_ranks(
        [sys.executable, ROOT / "src" / "train_alignment.py", *words_of(flags)], world, log=log, **options
    )


def run_ranks(forks: Forks, flags: dict, log: Path, faults: Sequence[dict] = (), world: int = 2) -> list[int]:
    """Exit statuses of a run whose ranks are all on one machine."""
    return statuses(start_run(forks, flags, log, world, faults=faults))


def train(forks: Forks, flags: dict, **variables: str) -> "subprocess.CompletedProcess[str]":
    """train_alignment.py on one process."""
    environment = without_ranks() | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | variables
    return forks.run([sys.executable, ROOT / "src" / "train_alignment.py", *words_of(flags)], environment)


def refuse(done: "subprocess.CompletedProcess[str]", status: int, *words: str) -> None:
    """It ended with this status and one line of an error, which has these words."""
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    for word in words:
        assert word in line, line


def words_of(flags: dict) -> list[str]:
    """A command line of these flags."""
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in flags.items()]


def fault(at: str, call: int, rank: int = 0, when: str = "after", signal: str = "SIGKILL") -> dict:
    """See faults.py; `at` is short for a function of drdpo.training."""
    module, _, function = at.partition(":")
    return {"at": f"drdpo.training.{module}:{function}", "call": call, "rank": rank, "when": when, "signal": signal}


def flags_of(model: Path, data: Path, save: Path, **flags: Any) -> dict:
    """Four steps of two micro-batches a rank, evaluated after two and saved after each; of ten pairs, the third
    takes the last two of the first epoch."""
    return {
        "model_path": str(model), "dataset_path": str(data), "save_path": str(save), "train_batch_size": 4,
        "micro_batch_size": 1, "learning_rate": 1e-3, "beta": 0.1, "max_steps": 4, "eval_steps": 2, "save_steps": 1,
        "dtype": "float32", "gradient_checkpointing": False, **flags,
    }  # fmt: skip


def metrics_of(save: Path) -> list[dict]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name in FIGURES or name.startswith("eval_")} for line in lines]


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

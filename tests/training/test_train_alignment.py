"""train_alignment.sh for real: torchrun, checkpoints that load, the first loss, resume equals uninterrupted."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness.forks import Forks
from safetensors.torch import load_file

from drdpo.records import Preference, write_records

pytestmark = pytest.mark.slow

FLAGS = [
    "--train_batch_size=4",
    "--micro_batch_size=1",
    "--learning_rate=1e-3",
    "--beta=0.1",
    "--max_epochs=2",
    "--eval_steps=2",
]
WORDS = "the cat sat on a mat while it rained over hills and rivers of stone near old towns".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    numbers = random.Random(0)

    def text() -> str:
        return " ".join(numbers.choice(WORDS) for _ in range(numbers.randint(3, 12)))

    def said(role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text()}]

    folder = tmp_path_factory.mktemp("preference data")
    for split, rows in (("train", 10), ("test", 3)):
        pairs = [Preference(row, said("user"), said("assistant"), said("assistant"), 1.0, 0.0) for row in range(rows)]
        write_records(folder / f"{split}.jsonl", pairs)
    return folder


def train(root: Path, model: Path, data: Path, save: Path, *flags: str, processes: int = 1, cwd: Path | None = None):
    environment = {**os.environ, "DRDPO_PROCESSES": str(processes), "OMP_NUM_THREADS": "1", "DRDPO_ENV": sys.prefix}
    command = [
        "bash",
        str(root / "train_alignment.sh"),
        f"--model_path={model}",
        f"--dataset_path={data}",
        f"--save_path={save}",
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, cwd=cwd)


def metrics_of(save: Path) -> list[dict]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(root, tiny_policy, data, tmp_path_factory):
    """Two epochs of two steps by WDPO on two processes, from another directory, in a folder with a space."""
    folder = tmp_path_factory.mktemp("runs")
    done = train(root, tiny_policy, data, folder / "a run", *FLAGS, "--dtype=float32", "--wdpo_rho=0.01", "--save_steps=2",
                 processes=2, cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder / "a run"


def test_the_folder_holds_what_the_contract_names(run):
    names = {path.name for path in run.iterdir()}
    assert {
        "global_step_2",
        "global_step_4",
        "metrics.jsonl",
        "tensorboard",
        "config.json",
        "manifest.json",
        "resume",
    } <= names
    assert json.loads((run / "config.json").read_text())["wdpo_rho"] == 0.01
    manifest = json.loads((run / "manifest.json").read_text())["train"]
    assert manifest["complete"]
    assert (manifest["made_by"]["dtype"], manifest["dtype_reason"]) == ("float32", "asked for by --dtype")
    assert manifest["counts"]["train"]["out"] == 10
    assert "deepspeed" in manifest["versions"]


def test_metrics_have_a_line_a_step_and_start_at_ln_2(run):
    metrics = metrics_of(run)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[0]["penalty"] > 0
    for name in ("epoch", "accuracy", "chosen_reward", "rejected_reward", "margin", "lr", "grad_norm", "tokens_per_second",
                 "peak_memory_gib"):  # fmt: skip
        assert all(math.isfinite(line[name]) for line in metrics), name
    assert [line["step"] for line in metrics if "eval_loss" in line] == [2, 4]


def test_checkpoint_loads_and_generates_and_keeps_the_tokenizer(run, tiny_policy):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "global_step_4"
    assert not list(folder.glob("*.bin"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    base = AutoTokenizer.from_pretrained(tiny_policy)
    text = "Hello 12345, <|im_end|> x"
    assert tokenizer(text)["input_ids"] == base(text)["input_ids"]
    assert tokenizer.chat_template == base.chat_template
    ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert ids.shape[1] > 3


def two_ranks(forks: Forks, root: Path, model: Path, data: Path, save: Path, *flags: str) -> str:
    """What the first of two ranks says, started as by DeepSpeed's launcher, which adds a flag."""
    command = [sys.executable, root / "src/train_alignment.py", "--local_rank=0", f"--model_path={model}",
               f"--dataset_path={data}", f"--save_path={save}", *flags]  # fmt: skip
    done = forks.ranks(command, 2)
    assert [rank.returncode for rank in done] == [0, 0], done
    return done[0].stdout


def test_a_finished_run_is_not_repeated(run, root, forks, tiny_policy, data):
    before = (run / "metrics.jsonl").stat().st_mtime_ns
    said = two_ranks(forks, root, tiny_policy, data, run, *FLAGS, "--dtype=float32", "--wdpo_rho=0.01", "--save_steps=2")
    assert "is complete" in said
    assert (run / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_stopped_run_ends_with_75_and_resumes_to_equal_the_uninterrupted(run, root, forks, tiny_policy, data, tmp_path):
    again, flags = tmp_path / "again", [*FLAGS, "--dtype=float32", "--wdpo_rho=0.01", "--save_steps=1"]
    environment = {**os.environ, "DRDPO_PROCESSES": "2", "OMP_NUM_THREADS": "1", "DRDPO_ENV": sys.prefix}
    command = ["bash", str(root / "train_alignment.sh"), f"--model_path={tiny_policy}", f"--dataset_path={data}",
               f"--save_path={again}", *flags]  # fmt: skip
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list((again / "resume").glob("step_*/state.json")):
        assert started.poll() is None and time.monotonic() < deadline, "no state was saved before the run ended"
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    out, err = started.communicate(timeout=300)
    assert (started.returncode, "stopped by SIGTERM after step" in out) == (75, True), out + err
    assert "Traceback" not in err
    assert "continuing after step" in two_ranks(forks, root, tiny_policy, data, again, *flags)
    ours, theirs = (load_file(folder / "global_step_4" / "model.safetensors") for folder in (again, run))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    timing = {"tokens_per_second", "pairs_per_second", "peak_memory_gib"}
    for mine, other in zip(metrics_of(again), metrics_of(run), strict=True):
        assert {k: v for k, v in mine.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}


def test_other_flags_in_the_same_folder_are_refused(run, root, tiny_policy, data):
    done = train(root, tiny_policy, data, run, *FLAGS, "--dtype=float32", "--wdpo_rho=0.02", processes=2)
    assert done.returncode == 2
    assert "wdpo_rho (0.01 -> 0.02)" in done.stderr

"""train_alignment.sh for real: torchrun, checkpoints that load, the first loss."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from harness.runs import flags_of, words_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(root, tiny_policy, data, tmp_path_factory):
    """Four steps by WDPO on two processes, from another directory, in a folder with a space."""
    folder = tmp_path_factory.mktemp("runs")
    words = words_of(flags_of(tiny_policy, data, folder / "a run", wdpo_rho=0.01, save_steps=2))
    variables = {**os.environ, "DRDPO_PROCESSES": "2", "OMP_NUM_THREADS": "1", "DRDPO_ENV": sys.prefix}
    command = ["bash", str(root / "train_alignment.sh"), *words]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=folder, timeout=600)
    assert done.returncode == 0 and "accelerator" not in done.stdout + done.stderr, done.stdout[-2000:] + done.stderr[-4000:]
    return folder / "a run"


def test_the_folder_holds_what_the_contract_names(run):
    assert {"global_step_2", "global_step_4", "metrics.jsonl", "tensorboard", "config.json", "manifest.json", "resume"} <= {
        path.name for path in run.iterdir()
    }
    assert json.loads((run / "config.json").read_text())["wdpo_rho"] == 0.01
    manifest = json.loads((run / "manifest.json").read_text())["train"]
    assert manifest["complete"] and manifest["made_by"]["dtype"] == "float32"
    assert manifest["counts"]["train"]["out"] == 10
    assert "deepspeed" in manifest["versions"]


def test_metrics_have_a_line_a_step_and_start_at_ln_2(run):
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[0]["penalty"] > 0
    for name in ("epoch", "accuracy", "chosen_reward", "rejected_reward", "margin", "lr", "grad_norm", "tokens_per_second",
                 "peak_memory_gib"):  # fmt: skip
        assert all(math.isfinite(line[name]) for line in metrics), name
    assert [line["step"] for line in metrics if "eval_loss" in line] == [2, 4]


def test_checkpoint_loads_and_generates_and_keeps_the_tokenizer(run, tiny_policy):
    folder = run / "global_step_4"
    assert not list(folder.glob("*.bin"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    base = AutoTokenizer.from_pretrained(tiny_policy)
    text = "Hello 12345, <|im_end|> x"
    assert tokenizer(text)["input_ids"] == base(text)["input_ids"]
    assert tokenizer.chat_template == base.chat_template
    card = (folder / "README.md").read_text()
    assert "aligned by **WDPO (wdpo_rho=0.01)**" in card and "step 4 of 4" in card and "| eval loss |" in card
    ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert ids.shape[1] > 3

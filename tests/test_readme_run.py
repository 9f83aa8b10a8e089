"""The README's own commands of steps 1 to 4, run for real with a small random policy, smaller by added flags only."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import readme
from harness.forks import Forks

pytestmark = pytest.mark.slow

SMALLER = {
    # What auto is for longer answers.
    "generate_completions.sh": ["--max_prompts=4", "--max_new_tokens=8", "--engine=vllm"],
    "generate.sh": ["--max_prompts=4", "--max_new_tokens=8", "--engine=transformers"],
    "train_alignment.sh": ["--train_batch_size=2", "--micro_batch_size=1", "--max_steps=1", "--max_len=128"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("the readme")


@pytest.fixture(scope="module")
def run(root: Path, vllm_policy: Path, folder: Path, forks: Forks, tmp_path_factory):
    """Run the README's command that has these words, from another folder, with the small policy for Llama's. A script that
    has started from nothing once is `quick` after that: in a fork, without DeepSpeed's launcher."""
    text = (root / "README.md").read_text(encoding="utf-8")
    forked = forks.environment(tmp_path_factory.mktemp("an environment") / "of forks")

    def command(*start: str, quick: bool = False, **replace: str) -> subprocess.CompletedProcess[str]:
        (words,) = [words for words in readme.commands(text) if set(start) <= set(words)]
        program, script, *flags = words
        flags = [word.replace("models/Llama1b", str(vllm_policy)) for word in flags]
        for old, new in replace.items():
            flags = [word.replace(old, new) for word in flags]
        prefix = str(forked) if quick else sys.prefix
        environment = {**os.environ, "DRDPO_ENV": prefix, "PATH": f"{prefix}/bin:{os.environ['PATH']}"}
        done = subprocess.run(
            [program, str(root / script), *flags, *SMALLER.get(script, [])],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    return command


@pytest.fixture(scope="module")
def pairs(run, folder) -> Path:
    done = run("generate_completions.sh", "--best_of_n=2")
    assert "into vllm ..." in done.stdout, done.stderr
    run("src/generate_preferences.py", "--ArmoRM=1.0")
    return folder / "datasets" / "helpsteer2_preferences"


@pytest.fixture(scope="module")
def checkpoints(run, folder, pairs) -> dict[str, Path]:
    methods = ("dpo", "kldpo", "wdpo", "drdpo")
    for method in methods:
        run("train_alignment.sh", f"--save_path=outputs/llama1b_{method}", quick=method != "wdpo")
    return {method: folder / "outputs" / f"llama1b_{method}" / "global_step_1" for method in methods}


def test_steps_1_and_2_leave_scored_completions_and_pairs(run, pairs, folder):
    rows = [json.loads(line) for line in (folder / "datasets/helpsteer2_completions/train.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(len(row["token_ids"]) <= 8 and len(row["scores"]) == 6 for row in rows)
    assert len((pairs / "train.jsonl").read_text().splitlines()) >= 2
    done = run("src/inspect_data.py")
    assert "train.jsonl: " in done.stdout and " preference pairs" in done.stdout


def test_every_method_starts_at_ln_2_and_its_checkpoint_loads(checkpoints):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for method, checkpoint in checkpoints.items():
        first = json.loads((checkpoint.parent / "metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(math.log(2), abs=2e-3), method
        model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
        prompt = tokenizer("Hello", return_tensors="pt")
        assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_step_4_samples_from_the_checkpoint_and_compares(checkpoints, run, folder):
    done, checkpoint = run("generate.sh", global_step_316="global_step_1"), checkpoints["wdpo"]
    assert "helpsteer_helpfulness" in done.stdout
    assert len((checkpoint / "test.jsonl").read_text().splitlines()) == 40, "4 prompts, 10 completions each"
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "llama", "the model's own file stays"
    assert (checkpoint / "scores.csv").is_file()
    run("generate.sh", quick=True, global_step_316="global_step_1", llama1b_wdpo="llama1b_dpo")
    assert "wdpo" in run("src/evaluate_armorm.py", global_step_316="global_step_1").stdout
    report = {file.name for file in (folder / "outputs/comparison").iterdir()}
    assert {"scores.csv", "report.md", "spider.png", "spider.svg"} <= report
    again = run("generate.sh", quick=True, global_step_316="global_step_1")
    assert "skipped" in again.stdout, "results beside the model do not make it another model"

"""One short run of every method on the same pairs of the bundled model: metrics, shifted test pairs, and time per step.

Samples, scores and pairs once (coherence and correctness mixed), adds two columns to the rows (`prompts`, long or short, and
`trust`, the margin of the scores over its mean), then trains LoRA adapters by one method after another, with one seed. A
micro-batch is the whole step, so no method needs a forward pass to collect the population. Results go to --output after
every run; rerunning skips finished ones of equal settings. On a quiet machine of two cores it should take about a quarter of
an hour, with OMP_NUM_THREADS=2.

    PYTHONPATH=src python benchmarks/methods.py [--folder=outputs/methods] [--output=benchmarks/results/methods.json]
        [--prompts=16] [--steps=4]
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "SmolLM2-135M"
METHODS = {
    "DPO": [],
    "DPO per token": ["--loss_type=sigmoid_norm", "--beta=2"],
    "IPO": ["--loss_type=ipo"],
    "IPO per token": ["--loss_type=ipo_norm", "--beta=2"],
    "cDPO": ["--label_smoothing=0.1"],
    "rDPO": ["--loss_type=robust", "--label_smoothing=0.1"],
    "KLDPO": ["--kldpo_tau=1"],
    "WDPO": ["--wdpo_rho=0.002", "--wdpo_prompt=once"],
    "Dr. DPO": ["--drdpo_beta=1"],
    "TV-DRO": ["--method=tv:0.1"],
    "chi-square DRO": ["--method=chi2:0.25"],
    "CVaR": ["--method=cvar:0.5"],
    "group DRO": ["--method=group:0.5", "--group_column=prompts"],
    "ROPO": ["--method=ropo:14"],
    "Hölder-DPO": ["--method=holder:2"],
    "robust label": ["--method=robust_label:0.1"],
    "DPO-PRO": ["--method=dpo_pro:0.1"],
    "DPO, weights": ["--weight_column=trust"],
}
OTHER = "complexity=helpsteer_complexity:1"


def make_pairs(folder: Path, prompts: int) -> Path:
    """Preference pairs of the bundled model's answers, with the two columns."""
    pairs = folder / "pairs"
    if (pairs / "train.jsonl").is_file():
        return pairs
    sampling = [
        f"--save_path={folder / 'base'}", f"--model_path={MODEL}", f"--dataset={ROOT / 'datasets' / 'embedded_prompts'}",
        f"--reward_model={ROOT / 'models' / 'ArmoRM-SmolLM2'}", "--best_of_n=6", "--temperature=1.2", "--max_new_tokens=24",
        "--prompt_max_len=64", f"--max_prompts={prompts}",
    ]  # fmt: skip
    mixing = [
        f"--completions={folder / 'base'}", f"--output_path={folder / 'preferences'}", "--selection=all_pairs",
        "--max_pairs_per_prompt=2", "--min_margin=1", "--helpsteer_coherence=0.5", "--helpsteer_correctness=0.5",
    ]  # fmt: skip
    subprocess.run(["bash", str(ROOT / "generate_completions.sh"), *sampling], check=True)
    subprocess.run([sys.executable, str(ROOT / "src" / "generate_preferences.py"), *mixing], check=True)
    aside = folder / "pairs being made"
    aside.mkdir(exist_ok=True)
    half = None
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (folder / "preferences" / f"{split}.jsonl").read_text("utf-8").splitlines()]
        lengths = [len(row["prompt"][-1]["content"]) for row in rows]
        half = statistics.median(lengths) if half is None else half
        margins = [row["chosen_score"] - row["rejected_score"] for row in rows]
        with (aside / f"{split}.jsonl").open("w", encoding="utf-8") as stream:
            for row, length, margin in zip(rows, lengths, margins, strict=True):
                facts = {"prompts": "short" if length <= half else "long", "trust": margin / statistics.mean(margins)}
                stream.write(json.dumps(row | facts) + "\n")
    aside.rename(pairs)
    return pairs


def run(name: str, folder: Path, pairs: Path, steps: int) -> dict:
    """Metrics of one run, without its folder, which it leaves to be deleted."""
    save = folder / name
    save.mkdir(exist_ok=True)
    for path in folder.glob("reference_*.safetensors"):  # the same for all: not read if it does not fit
        shutil.copy(path, save)
    common = [
        f"--model_path={MODEL}", f"--dataset_path={pairs}", f"--save_path={save}", "--lora_rank=16", "--learning_rate=2e-3",
        "--train_batch_size=8", "--micro_batch_size=8", f"--max_steps={steps}", "--max_len=256", "--warmup_ratio=0",
        "--gradient_checkpointing=false", "--save_resume=false", "--log=none", "--eval_columns=prompts",
        f"--eval_mixture={OTHER}", "--lora_merge=false", "--seed=42", "--max_test_pairs=16",
    ]  # fmt: skip
    own = METHODS[name] if any(word.startswith("--beta") for word in METHODS[name]) else [*METHODS[name], "--beta=0.1"]
    load, start = os.getloadavg()[0], time.perf_counter()
    subprocess.run(["bash", str(ROOT / "train_alignment.sh"), *common, *own], check=True)
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for path in save.glob("reference_*.safetensors"):
        shutil.copy(path, folder)
    shutil.rmtree(save)
    last = lines[-1]
    groups = [value for key, value in last.items() if key.startswith("eval_accuracy.prompts.")]
    return {
        "flags": METHODS[name], "first_loss": lines[0]["loss"], "loss": last["loss"], "eval_loss": last["eval_loss"],
        "eval_accuracy": last["eval_accuracy"], "eval_margin": last["eval_margin"], "worst_group_accuracy": min(groups),
        "other_accuracy": last["eval_accuracy.complexity"], "other_loss": last["eval_loss.complexity"],
        "effective_share": statistics.mean(line.get("effective_sample_size", 8) for line in lines) / 8,
        # The first step includes what is done once.
        "seconds_per_step": statistics.median(8 / line["pairs_per_second"] for line in lines[1:]),
        "seconds": time.perf_counter() - start, "load_before": round(load, 2),
    }  # fmt: skip


def main() -> None:
    """Run what is missing, and write every result as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "methods")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "methods.json")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    settings = {"prompts": arguments.prompts, "steps": arguments.steps}
    found = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.is_file() else {}
    if found.get("settings") != settings:
        found = {"settings": settings, "runs": {}}
    folder = arguments.folder.resolve() / "-".join(map(str, settings.values()))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"DS_ACCELERATOR": "cpu", "DRDPO_PROCESSES": "1"}
    pairs = make_pairs(folder, arguments.prompts)
    found["machine"] = f"{os.cpu_count()} cores, {platform.machine()}"
    for name, flags in METHODS.items():
        if found["runs"].get(name, {}).get("flags") == flags:
            continue
        found["runs"][name] = run(name, folder, pairs, arguments.steps)
        ordered = {each: found["runs"][each] for each in METHODS if each in found["runs"]}
        text = json.dumps({**found, "runs": ordered}, indent=1, ensure_ascii=False)
        arguments.output.with_suffix(".part").write_text(text + "\n", encoding="utf-8")
        arguments.output.with_suffix(".part").replace(arguments.output)


if __name__ == "__main__":
    main()

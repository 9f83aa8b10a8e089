"""The few lines that a finished run says of itself, by hand."""

import json

from drdpo.config import TrainConfig
from drdpo.training.summary import summary


def test_a_run_of_two_starts_by_hand(tmp_path):
    lines = [
        {"step": 1, "epoch": 0.5, "loss": 0.6931, "accuracy": 0.0, "margin": 0.0, "pairs_per_second": 4.0,
         "peak_memory_gib": 3.0},
        {"step": 2, "epoch": 1.0, "loss": 0.5, "accuracy": 0.75, "margin": 0.25, "pairs_per_second": 2.0,
         "peak_memory_gib": 2.5, "eval_loss": 0.6, "eval_accuracy": 0.5, "eval_margin": 0.125},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = summary(TrainConfig("m", "d", str(tmp_path), train_batch_size=8, kldpo_tau=0.05), tmp_path, 2)
    said = {name.strip(): value for name, value in (line.split("  ", 1) for line in text.splitlines())}
    said = {name: value.strip() for name, value in said.items()}
    # 8 / 4 + 8 / 2 seconds for 16 pairs.
    assert said == {
        "method": "kldpo", "steps": "2 (1.00 epochs)", "loss": "0.5000 (first 0.6931)", "accuracy": "0.750",
        "margin": "0.25",
        "eval loss": "0.6000", "eval accuracy": "0.500", "eval margin": "0.125", "time in steps": "6.0 s",
        "pairs per second": "2.67", "peak memory": "3.00 GiB", "checkpoint": str(tmp_path / "global_step_2"),
    }  # fmt: skip


def test_a_run_without_evaluation_has_no_empty_lines(tmp_path):
    line = {"step": 1, "epoch": 1, "loss": 0.5, "accuracy": 1, "margin": 0, "pairs_per_second": 1, "peak_memory_gib": 1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    text = summary(TrainConfig("m", "d", str(tmp_path)), tmp_path, 1)
    assert [line for line in text.splitlines() if line.startswith("eval") or not line.split("  ", 1)[1].strip()] == []

"""Metrics by hand-computed numbers; TensorBoard and wandb resume without a double or missing point, and never prompt."""

import json

import pytest
import torch

from drdpo.config.training import TrainConfig
from drdpo.training.data import Pair, collate, pack
from drdpo.training.log import (
    Shape,
    dpo_flops,
    peak_flops,
    shape_of,
    step_metrics,
    summary,
    throughput,
)
from drdpo.training.losses import Pairs
from drdpo.training.memory import shapes
from drdpo.training.objective import Objective


def test_the_summary_of_two_starts_by_hand(tmp_path):
    lines = [
        {"step": 1, "epoch": 0.5, "loss": 0.6931, "accuracy": 0.0, "margin": 0.0, "pairs_per_second": 4.0,
         "peak_memory_gib": 3.0},
        {"step": 2, "epoch": 1.0, "loss": 0.5, "accuracy": 0.75, "margin": 0.25, "pairs_per_second": 2.0,
         "peak_memory_gib": 2.5, "eval_loss": 0.6, "eval_accuracy": 0.5, "eval_margin": 0.125},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = summary(tmp_path, "KLDPO", 8)
    said = {name.strip(): value for name, value in (line.split("  ", 1) for line in text.splitlines())}
    said = {name: value.strip() for name, value in said.items()}
    # 8 / 4 + 8 / 2 seconds for 16 pairs.
    assert said == {
        "method": "KLDPO", "steps": "2 (1.00 epochs)", "loss": "0.5000 (first 0.6931)", "accuracy": "0.750",
        "margin": "0.25",
        "eval loss": "0.6000", "eval accuracy": "0.500", "eval margin": "0.125", "time in steps": "6.0 s",
        "pairs per second": "2.67", "peak memory": "3.00 GiB", "checkpoint": str(tmp_path / "global_step_2"),
    }  # fmt: skip


def test_the_summary_without_evaluation_has_no_empty_lines(tmp_path):
    line = {"step": 1, "epoch": 1, "loss": 0.5, "accuracy": 1, "margin": 0, "pairs_per_second": 1, "peak_memory_gib": 1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    text = summary(tmp_path, "dpo", 128)
    assert [line for line in text.splitlines() if line.startswith("eval") or not line.split("  ", 1)[1].strip()] == []


def part(penalties: list[float], losses: list[float]) -> Objective:
    count = len(penalties)
    pairs = Pairs(torch.ones(count), torch.ones(2 * count), {})
    return Objective(torch.zeros(()), torch.tensor(losses), pairs, torch.ones(count), torch.tensor(penalties))


@pytest.mark.parametrize(
    ("root", "penalty_term"),
    # Squared norms 1 and 7 in one micro-batch, 20 and 30 in the next: means 4 and 25, of all 14.5.
    [("micro", (2 + 5) / 2), ("step", 14.5**0.5), (None, 14.5)],
)
def test_the_objective_is_what_was_minimised(root, penalty_term):
    parts = [part([1.0, 7.0], [1.0, 2.0]), part([20.0, 30.0], [3.0, 6.0])]
    metrics = step_metrics(parts, beta=0.01, weighted=False, rho=0.1, root=root)
    assert metrics["loss"] == pytest.approx(3.0)
    assert metrics["penalty"] == pytest.approx(14.5)
    assert metrics["objective"] == pytest.approx(3.0 + 0.1 * penalty_term)


def test_the_ranks_nth_micro_batches_are_one_population(monkeypatch):
    """Two ranks: another rank's squared norms 3 and 5 stand beside 1 and 7, and 20 and 26 beside 20 and 30."""
    others = {(4,): torch.tensor([3.0, 5.0, 20.0, 26.0]), (2, 2): torch.tensor([[3.0, 5.0], [20.0, 26.0]])}

    def gather(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, others.get(tuple(values.shape), values) if values.max() > 6 else values])

    monkeypatch.setattr("drdpo.distributed.gather", gather)
    parts = [part([1.0, 7.0], [0.0, 0.0]), part([20.0, 30.0], [0.0, 0.0])]
    metrics = step_metrics(parts, beta=0.01, weighted=False, rho=0.1, root="micro")
    assert metrics["objective"] == pytest.approx(0.1 * (4**0.5 + 24**0.5) / 2)


def test_peaks_of_devices():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "bfloat16") == 312e12
    assert peak_flops("NVIDIA H200", "bfloat16") == 989e12
    for device, dtype in (
        ("NVIDIA H100 80GB HBM3", "float32"), ("NVIDIA RTX A1000", "bfloat16"), ("NVIDIA GH200 480GB", "bfloat16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"), ("Tesla V100-SXM2-16GB", "bfloat16"),
    ):  # fmt: skip
        assert peak_flops(device, dtype) is None, device


ONE = [Pair([5] * 4, [5] * 2, [5])]


def test_flops_by_hand(tiny_policy):
    batch = pack(ONE, [0])
    shape = Shape(0, 0, 6 * 100, 6 * 50, 12 * 2 * 8)
    # Seven tokens, three of them answers; the prompt sees 8 token pairs, the answers 2 * (4 + 1) and 1 * (4 + 0.5).
    assert dpo_flops(shape, batch) == 6 * 100 * 7 + 6 * 50 * 3 + 12 * 2 * 8 * (8 + 10 + 4.5)
    frozen = shape._replace(of_token=6 * 10 + 4 * 100, of_target=4 * 50)
    assert dpo_flops(frozen, batch) == (60 + 400) * 7 + 4 * 50 * 3 + 12 * 2 * 8 * 22.5
    # Two padded rows of six and five tokens.
    assert dpo_flops(shape, collate(ONE, [0], 0)) == 6 * 100 * 11 + 6 * 50 * 3 + 12 * 2 * 8 * (18 + 12.5)
    found = shape_of(shapes(TrainConfig(str(tiny_policy), "-", "-", dtype="float32")))
    # Embeddings and tied head; two layers and the final norm.
    head, blocks = 49_152 * 32, 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert found == (head + blocks, head + blocks, 6 * blocks, 6 * head, 12 * 2 * 32)


def test_throughput_without_a_known_peak_has_no_mfu():
    shape = Shape(0, 0, 600, 300, 192)
    found = throughput([pack(ONE, [0])] * 2, shape, "float32", pairs=4, seconds=2.0)
    assert found.pop("peak_memory_gib") > 0 and found == {"tokens_per_second": 7, "pairs_per_second": 2}

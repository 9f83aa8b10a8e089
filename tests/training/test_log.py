"""Metrics by hand-computed numbers, and figures that end a run: another first step than the reference's, or not finite."""

import json
import math

import pytest
import torch
from harness.policies import config_of

from drdpo.errors import DataError
from drdpo.training import log
from drdpo.training.data import Pair, collate, pack
from drdpo.training.losses import Pairs, method_of
from drdpo.training.memory import shapes
from drdpo.training.objective import Objective
from drdpo.training.policy import FiniteWatch


def test_the_summary_of_two_starts_by_hand(tmp_path):
    lines = [
        {"step": 1, "epoch": 0.5, "loss": 0.6931, "accuracy": 0.0, "margin": 0.0, "pairs_per_second": 4.0,
         "peak_memory_gib": 3.0},
        {"step": 2, "epoch": 1.0, "loss": 0.5, "accuracy": 0.75, "margin": 0.25, "pairs_per_second": 2.0,
         "peak_memory_gib": 2.5, "eval_loss": 0.6, "eval_accuracy": 0.5, "eval_margin": 0.125},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def said() -> dict[str, str]:
        parts = (line.split("  ", 1) for line in log.summary(tmp_path, "KLDPO", 8).splitlines())
        return {name.strip(): value.strip() for name, value in parts}

    # 8 / 4 + 8 / 2 seconds for 16 pairs.
    assert said() == {
        "method": "KLDPO", "steps": "2 (1.00 epochs)", "loss": "0.5000 (first 0.6931)", "accuracy": "0.750",
        "margin": "0.25",
        "eval loss": "0.6000", "eval accuracy": "0.500", "eval margin": "0.125", "time in steps": "6.0 s",
        "pairs per second": "2.67", "peak memory": "3.00 GiB", "checkpoint": str(tmp_path / "global_step_2"),
    }  # fmt: skip
    # Without evaluation there are no empty lines.
    lines[1] = {name: value for name, value in lines[1].items() if not name.startswith("eval")}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[1]) + "\n")
    assert all(said().values()) and not any(name.startswith("eval") for name in said())


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
    metrics = log.step_metrics(parts, beta=0.01, weighted=False, rho=0.1, root=root)
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
    metrics = log.step_metrics(parts, beta=0.01, weighted=False, rho=0.1, root="micro")
    assert metrics["objective"] == pytest.approx(0.1 * (4**0.5 + 24**0.5) / 2)


def test_peaks_of_devices():
    half = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-40GB": 312e12,
            "NVIDIA H200": 989e12, "NVIDIA RTX A1000": None, "NVIDIA GH200 480GB": None,
            "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None, "Tesla V100-SXM2-16GB": None}  # fmt: skip
    assert {name: log.peak_flops(name, "bfloat16") for name in half} == half
    assert log.peak_flops("NVIDIA H100 80GB HBM3", "float32") is None


ONE = [Pair([5] * 4, [5] * 2, [5])]


def test_flops_by_hand(tiny_policy):
    batch = pack(ONE, [0])
    shape = log.Shape(0, 0, 6 * 100, 6 * 50, 12 * 2 * 8)
    # Seven tokens, three of them answers; the prompt sees 8 token pairs, the answers 2 * (4 + 1) and 1 * (4 + 0.5).
    assert log.dpo_flops(shape, batch) == 6 * 100 * 7 + 6 * 50 * 3 + 12 * 2 * 8 * (8 + 10 + 4.5)
    frozen = shape._replace(of_token=6 * 10 + 4 * 100, of_target=4 * 50)
    assert log.dpo_flops(frozen, batch) == (60 + 400) * 7 + 4 * 50 * 3 + 12 * 2 * 8 * 22.5
    # Two padded rows of six and five tokens.
    assert log.dpo_flops(shape, collate(ONE, [0], 0)) == 6 * 100 * 11 + 6 * 50 * 3 + 12 * 2 * 8 * (18 + 12.5)
    found = log.shape_of(shapes(config_of(model_path=str(tiny_policy))))
    # Embeddings and tied head; two layers and the final norm.
    head, blocks = 49_152 * 32, 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert found == (head + blocks, head + blocks, 6 * blocks, 6 * head, 12 * 2 * 32)


def test_throughput_without_a_known_peak_has_no_mfu():
    shape = log.Shape(0, 0, 600, 300, 192)
    found = log.throughput([pack(ONE, [0])] * 2, shape, "float32", pairs=4, seconds=2.0)
    assert found.pop("peak_memory_gib") > 0 and found == {"tokens_per_second": 7, "pairs_per_second": 2}


# The first step; test_bad_pairs.py has it in a run.

REFERENCE_B2 = torch.tensor([[-100.0, -300.0]])  # 200 nats in the mean


def check(apart: list[float], **flags) -> None:
    config = config_of(model_path="a model", **{"beta": 0.01, **flags})
    apart_S = torch.tensor(apart)
    margins_B = apart_S[:1] - apart_S[1:]
    losses_B = torch.nn.functional.softplus(-config.beta * margins_B)
    if config.loss_type == "ipo":
        losses_B = (margins_B - 1 / (2 * config.beta)).square()
    part = Objective(losses_B.mean(), losses_B, Pairs(margins_B, apart_S, {}), torch.ones(1))
    stored = "out/reference_train.safetensors"
    log.check_first_step([part], [REFERENCE_B2], method_of(config), config.dtype, config.model_path, stored)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_policys_own_log_probs_pass(dtype):
    check([0.0, 0.0], dtype=dtype)
    check([0.0, 0.0], dtype=dtype, loss_type="ipo")
    # Allowed are 1e-4 of 200 nats and 1e-3, in bfloat16 1e-2 of 200 nats and 0.05.
    check([0.02, 0.0] if dtype == "float32" else [2.0, -2.0], dtype=dtype)


@pytest.mark.parametrize(("dtype", "nats"), [("float32", 0.022), ("bfloat16", 2.1)])
def test_equal_shifts_that_no_loss_shows_are_refused(dtype, nats):
    for shift in (nats, -nats):
        with pytest.raises(DataError, match=rf"log-probs are {nats} away.*a model; delete out/reference_train.safetensors"):
            check([shift, shift], dtype=dtype)


def test_a_loss_of_another_margin_is_refused():
    with pytest.raises(DataError, match=f"the first loss is {math.log(1 + math.exp(-0.5)):.4f}, not 0.6931"):
        check([0.5, -0.5], beta=0.5)


def test_metrics_that_are_not_finite_end_the_run_and_name_the_pairs():
    pairs = [Pair([1], [2], [3], prompt_id) for prompt_id in (40, 41, 42, 43)]
    indices = [torch.tensor([2, 0]), torch.tensor([1, 3])]
    watch = FiniteWatch(torch.device("cpu"))
    for gradient in (1.0, float("nan")):
        watch.next_batch()
        watch.look(torch.tensor([gradient, 2.0]))
        watch.look(torch.tensor(0.5))
    log.check_step({"step": 3, "loss": 0.7, "grad_norm": 2.0}, watch, indices, pairs)
    with pytest.raises(DataError, match=r"step 3: grad_norm is inf, from the micro-batch of prompt_id 41, 43; nothing"):
        log.check_step({"step": 3, "loss": 0.7, "grad_norm": float("inf")}, watch, indices, pairs)
    nameless = [Pair([1], [2], [3]) for _ in pairs]
    with pytest.raises(DataError, match="micro-batch of row 2, 4;"):
        log.check_step({"step": 3, "loss": float("nan")}, watch, indices, nameless)
    good = FiniteWatch(torch.device("cpu"))
    good.next_batch()
    with pytest.raises(DataError, match="from no micro-batch alone but the sum over the step's 4 pairs"):
        log.check_step({"step": 3, "grad_norm": float("inf")}, good, [torch.cat(indices)], pairs)
    log.check_evaluation({"eval_loss": 0.5}, 7)
    with pytest.raises(DataError, match="after step 7: eval_loss is nan"):
        log.check_evaluation({"eval_loss": float("nan")}, 7)

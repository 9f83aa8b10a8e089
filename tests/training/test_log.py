"""Metrics by hand-computed numbers; TensorBoard and wandb resume without a double or missing point, and never prompt."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from drdpo.config import TrainConfig
from drdpo.errors import UsageError
from drdpo.training.data import Pair, collate, pack
from drdpo.training.log import (
    MetricsLog,
    Shape,
    check_trackers,
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

STAND_IN = '''
import json, os, pathlib
class Settings(dict):
    def __init__(self, **settings): self.update(settings)
class _Run:
    def __init__(self, file, step): self.file, self.step = file, step
    def log(self, figures, step): self.file.open("a").write(json.dumps({"step": step, **figures}) + "\\n")
    def finish(self, exit_code): self.file.open("a").write(json.dumps({"exit": exit_code}) + "\\n")
def login(prompt, verify): return not prompt and "WANDB_API_KEY" in os.environ
def init(**arguments):
    """A server that knows of each run the steps it was sent."""
    file = pathlib.Path(os.environ["SERVER"]) / (arguments["project"] + "_" + arguments["id"])
    sent = [json.loads(line) for line in file.open()] if file.is_file() else []
    return _Run(file, max((row["step"] for row in sent if "step" in row), default=-1) + 1)
'''


def write(folder, trackers, done, until):
    metrics = MetricsLog(folder, done, trackers, {})
    try:
        for step in range(done + 1, until + 1):
            metrics.write({"step": step, "loss": 1 / step, "eval_loss": 2 / step})
    finally:
        metrics.close()


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No wandb variable is set."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield tmp_path
    sys.modules.pop("wandb", None)


@pytest.fixture
def wandb(bare, monkeypatch):
    (bare / "site" / "wandb").mkdir(parents=True)
    (bare / "site" / "wandb" / "__init__.py").write_text(STAND_IN)
    (bare / "server").mkdir()
    monkeypatch.syspath_prepend(str(bare / "site"))
    monkeypatch.setenv("SERVER", str(bare / "server"))
    return bare


def test_log_is_a_list_of_known_names():
    def trackers(log: str) -> list[str]:
        return TrainConfig("m", "d", "s", log=log).trackers

    assert trackers("wandb, tensorboard,wandb") == ["wandb", "tensorboard"]
    assert trackers("none") == []
    with pytest.raises(UsageError, match="'mlflow' is not"):
        trackers("tensorboard,mlflow")
    with pytest.raises(UsageError, match="none excludes"):
        trackers("none,wandb")


def test_wandb_is_refused_without_package(bare, monkeypatch):
    monkeypatch.setattr("drdpo.training.log.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install wandb=="):
        check_trackers(["wandb"])
    check_trackers(["tensorboard"])


def test_wandb_is_refused_without_a_key_and_taken_with_one(wandb, monkeypatch):
    with pytest.raises(UsageError, match=r"wandb login.*WANDB_MODE=offline"):
        check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    check_trackers(["wandb"])
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(UsageError, match="record nothing"):
        check_trackers(["wandb"])


def test_an_older_wandb_is_refused(wandb, monkeypatch):
    import wandb as stand_in

    monkeypatch.setattr(stand_in, "login", lambda key=None: True)
    with pytest.raises(UsageError, match="needs a newer wandb"):
        check_trackers(["wandb"])


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_resumed_run_continues_the_same_wandb_run(wandb, tmp_path, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-key")
    folder = tmp_path / "a run"
    folder.mkdir()
    write(folder, ["wandb"], 0, 5)
    write(folder, ["wandb"], 3, 7)  # the state was saved after step 3: 4 and 5 are done again
    (sent,) = (wandb / "server").iterdir()
    rows = [json.loads(line) for line in sent.read_text().splitlines()]
    assert [row["step"] for row in rows if "step" in row] == [1, 2, 3, 4, 5, 6, 7]
    assert rows[0] == {"step": 1, "train/loss": 1.0, "eval/loss": 2.0}
    assert [row["exit"] for row in rows if "exit" in row] == [0, 0]
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == list(range(1, 8))
    assert all("secret" not in path.read_text() for path in folder.rglob("*") if path.is_file())


def test_a_run_outlives_wandb(wandb, tmp_path, monkeypatch, capsys):
    """As when wandb's own process is killed: every call of it raises from then on."""
    monkeypatch.setenv("WANDB_API_KEY", "k")
    metrics = MetricsLog(tmp_path, 0, ["wandb"], {})
    metrics.write({"step": 1, "loss": 1.0})
    run = metrics._trackers[0]._run

    def gone(*_, **__):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(run, "log", gone)
    monkeypatch.setattr(run, "finish", gone)
    for step in (2, 3):
        metrics.write({"step": step, "loss": 1 / step})
    metrics.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: wandb logging failed") and "reset by peer" in warning


def test_what_the_server_lacks_is_sent_at_a_resume(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder, [], 0, 3)
    write(folder, ["wandb"], 3, 4)
    (sent,) = (wandb / "server").iterdir()
    assert [row["step"] for row in map(json.loads, sent.open()) if "step" in row] == [1, 2, 3, 4]


def test_tensorboard_has_every_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, ["tensorboard"], 0, 5)
    write(tmp_path, ["tensorboard"], 3, 7)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == list(range(1, 8))
    assert [event.value for event in scalars] == pytest.approx([1 / step for step in range(1, 8)])
    assert [event.step for event in events.Scalars("eval/loss")] == list(range(1, 8))


def test_none_writes_metrics_alone(tmp_path):
    write(tmp_path, [], 0, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


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
    batch = pack(ONE, [0], prompt_once=True)
    shape = Shape(0, 0, blocks=100, blocks_trained=100, head=50, head_trained=True, layers=2, attention=8)
    # Seven tokens, three of them answers; the prompt sees 8 token pairs, the answers 2 * (4 + 1) and 1 * (4 + 0.5).
    assert dpo_flops(shape, batch) == 6 * 100 * 7 + 6 * 50 * 3 + 12 * 2 * 8 * (8 + 10 + 4.5)
    frozen = replace(shape, blocks=110, blocks_trained=10, head_trained=False)
    assert dpo_flops(frozen, batch) == (60 + 400) * 7 + 4 * 50 * 3 + 12 * 2 * 8 * 22.5
    # Two padded rows of six and five tokens.
    assert dpo_flops(shape, collate(ONE, [0], 0)) == 6 * 100 * 11 + 6 * 50 * 3 + 12 * 2 * 8 * (18 + 12.5)
    found = shape_of(shapes(TrainConfig(str(tiny_policy), "-", "-", dtype="float32")))
    # Embeddings and tied head; two layers and the final norm.
    head, blocks = 49_152 * 32, 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert (found.parameters, found.blocks, found.head) == (head + blocks, blocks, head)
    assert (found.layers, found.attention) == (2, 32)


def test_throughput_without_a_known_peak_has_no_mfu():
    shape = Shape(0, 0, 100, 100, 50, True, 2, 8)
    found = throughput([pack(ONE, [0], True)] * 2, shape, "float32", pairs=4, seconds=2.0)
    assert found == {"tokens_per_second": 7, "pairs_per_second": 2}

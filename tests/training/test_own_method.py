"""docs/own.md's method in one file: its numbers by hand, its gradient, its refusals, and a real run of it."""

import json
import os
import subprocess
from dataclasses import dataclass

import pytest
import torch
from harness import ROOT
from harness.policies import REFERENCE_M2, policy_of
from own_method import CvarConfig

from drdpo.config import TrainConfig
from drdpo.errors import UsageError
from drdpo.training.data import collate, form_batch
from drdpo.training.objective import objective, survey
from drdpo.training.policy import pair_values

PATHS = {"model_path": "-", "dataset_path": "-", "save_path": "-"}


def config_of(**flags) -> CvarConfig:
    return CvarConfig(**PATHS, **{"beta": 0.5, "dtype": "float32", "packing": False} | flags)


def test_losses_and_weights_by_hand():
    config = config_of(cvar_share=0.5)
    # 1 - 0.5 h
    assert config.own_losses(torch.tensor([0.0, 1.0, 4.0, -2.0])).tolist() == [1.0, 0.5, 0.0, 2.0]
    population = torch.tensor([3.0, 1.0, 2.0, 0.0])
    assert config.own_weights(population, population).tolist() == [2, 0, 2, 0]
    assert config.own_weights(population[:1], population).tolist() == [2], "a micro-batch asks for its own pairs' weights"
    same = torch.ones(4)
    assert config.own_weights(same, same).tolist() == [1, 1, 1, 1], "ties share: at the start it is the plain mean"
    assert config_of(cvar_share=1.0).own_weights(population, population).tolist() == [1, 1, 1, 1]


def gradients_of(policy, total: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(total, [p for p in policy.parameters() if p.requires_grad])
    return torch.cat([gradient.flatten() for gradient in found])


def test_its_step_is_the_mean_over_the_hardest_pairs(tiny_policy, pairs):
    config = config_of(cvar_share=0.5)
    policy = policy_of(tiny_policy, config)
    whole = objective(policy, collate(pairs, range(4), 0), REFERENCE_M2, config, None)
    margins = pair_values(policy, collate(pairs, range(4), 0), REFERENCE_M2, config).margins_B
    hardest = torch.sort(torch.relu(1 - 0.5 * margins), descending=True).values[:2]
    assert (gradients_of(policy, whole.total) - gradients_of(policy, hardest.mean())).abs().max() < 1e-6
    assert sorted(whole.weights_B.tolist()) == [0, 0, 2, 2]
    # Two micro-batches, weights from the whole step.
    halves = [(collate(pairs, rows, 0), REFERENCE_M2[list(rows)]) for rows in (range(2), range(2, 4))]
    population = survey(policy, halves, config)
    split = torch.cat([objective(policy, *half, config, population).weights_B for half in halves])
    assert split.tolist() == whole.weights_B.tolist()


@dataclass(frozen=True)
class SmoothConfig(TrainConfig):
    """A loss of one's own under WDPO's penalty."""

    def own_losses(self, margins_B: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(1 + (1 - self.beta * margins_B).square())


def test_wdpo_penalises_a_loss_of_ones_own_in_both_solvers(tiny_policy, pairs):
    found = {}
    for solver in ("exact", "tangent"):
        config = SmoothConfig(**PATHS, beta=0.5, dtype="float32", wdpo_rho=0.1, wdpo_solver=solver, micro_batch_size=4)
        policy = policy_of(tiny_policy, config)
        part = objective(policy, form_batch(pairs, range(4), config, 0), REFERENCE_M2, config, None)
        found[solver] = (gradients_of(policy, part.total), part.penalties_B)
        assert part.values.losses_B.tolist() == config.own_losses(part.values.margins_B).tolist()
    torch.testing.assert_close(found["tangent"][1], found["exact"][1], rtol=1e-5, atol=1e-12)
    assert (found["tangent"][0] - found["exact"][0]).norm() < 1e-5 * found["exact"][0].norm()


def test_the_names_that_manifests_get():
    assert config_of().own_name == {"method": "cvar"}
    assert TrainConfig(**PATHS).own_name == {}
    assert TrainConfig(**PATHS).own_losses(torch.zeros(1)) is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [({"cvar_share": 0.0}, "cvar_share"), ({"kldpo_tau": 0.1}, "kldpo_tau"), ({"loss_type": "ipo"}, "hinge")],
)
def test_refusals(flags, words):
    with pytest.raises(UsageError, match=words):
        config_of(**flags)


@pytest.mark.slow
def test_it_trains_by_its_wrapper(tiny_policy, forks, data, tmp_path):
    environment = {**os.environ, "DRDPO_PROCESSES": "1", "DRDPO_ENV": str(forks.environment(tmp_path / "an environment"))}
    command = ["bash", str(ROOT / "experiments" / "own_method.sh"), f"--model_path={tiny_policy}",
               f"--dataset_path={data}", f"--save_path={tmp_path / 'a run'}", "--cvar_share=0.25",
               "--train_batch_size=4", "--micro_batch_size=2", "--max_steps=4", "--dtype=float32", "--beta=0.1",
               "--learning_rate=1e-2", "--warmup_ratio=0.25"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "a run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == 1.0 and lines[0]["effective_sample_size"] == 4.0
    # docs/troubleshooting.md: the warm-up's first rate is 0, so the second step begins where the first did.
    assert lines[0]["lr"] == 0 and lines[1]["lr"] > 0
    assert lines[1]["loss"] == 1.0 and lines[2]["loss"] != 1.0
    assert lines[-1]["effective_sample_size"] == 1.0, "one pair of four is the hardest"
    assert lines[-1]["objective"] > lines[-1]["loss"], "the hardest pair's loss is above the mean"
    assert (tmp_path / "a run" / "global_step_4" / "model.safetensors").is_file()
    manifest = json.loads((tmp_path / "a run" / "manifest.json").read_text())["train"]["made_by"]
    assert manifest["method"] == "cvar" and manifest["cvar_share"] == 0.25

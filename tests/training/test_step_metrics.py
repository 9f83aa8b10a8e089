"""The figures of a step by hand numbers."""

import pytest
import torch

from drdpo.config import TrainConfig
from drdpo.training.metrics import step_metrics
from drdpo.training.objective import Objective
from drdpo.training.values import PairValues


def part(penalties: list[float], losses: list[float]) -> Objective:
    pairs = len(penalties)
    values = PairValues(torch.tensor(losses), torch.ones(pairs), torch.ones(2 * pairs), torch.zeros(0))
    return Objective(torch.zeros(()), values, torch.ones(pairs), torch.tensor(penalties))


@pytest.mark.parametrize(
    ("flags", "penalty_term"),
    [
        # Squared norms 1 and 7 in one micro-batch, 20 and 30 in the next: means 4 and 25, of all 14.5.
        ({"wdpo_penalty": "root", "robust_scope": "micro"}, (2 + 5) / 2),
        ({"wdpo_penalty": "root"}, 14.5**0.5),
        ({}, 14.5),
    ],
)
def test_the_objective_is_what_was_minimised(flags, penalty_term):
    config = TrainConfig("-", "-", "-", wdpo_rho=0.1, train_batch_size=4, micro_batch_size=2, **flags)
    metrics = step_metrics([part([1.0, 7.0], [1.0, 2.0]), part([20.0, 30.0], [3.0, 6.0])], config)
    assert metrics["loss"] == pytest.approx(3.0)
    assert metrics["penalty"] == pytest.approx(14.5)
    assert metrics["objective"] == pytest.approx(3.0 + 0.1 * penalty_term)


def test_the_ranks_nth_micro_batches_are_one_population(monkeypatch):
    """Two ranks: another rank's squared norms 3 and 5 stand beside 1 and 7, and 20 and 26 beside 20 and 30."""
    others = {(4,): torch.tensor([3.0, 5.0, 20.0, 26.0]), (2, 2): torch.tensor([[3.0, 5.0], [20.0, 26.0]])}

    def gather(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, others.get(tuple(values.shape), values) if values.max() > 6 else values])

    monkeypatch.setattr("drdpo.distributed.gather", gather)
    config = TrainConfig(
        "-", "-", "-", wdpo_rho=0.1, wdpo_penalty="root", robust_scope="micro", train_batch_size=8, micro_batch_size=2
    )
    metrics = step_metrics([part([1.0, 7.0], [0.0, 0.0]), part([20.0, 30.0], [0.0, 0.0])], config)
    assert metrics["objective"] == pytest.approx(0.1 * (4**0.5 + 24**0.5) / 2)

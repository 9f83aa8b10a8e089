"""Transform, gate and statistics on numbers whose answer is known."""

import numpy as np
import pytest
import torch

from drdpo.rewards.armorm import GatingNetwork
from drdpo.rewards.heads import (
    GatePairs,
    choose_gate_steps,
    debiasing_transform,
    fit_gate,
    log_odds_scale,
    prompt_folds,
)
from drdpo.rewards.statistics import bootstrap_interval, pair_accuracy, pearson, ranks, spearman


def test_correlations_by_hand() -> None:
    assert ranks([10, 20, 20, 5]).tolist() == [2.0, 3.5, 3.5, 1.0]
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert spearman([1, 2, 3, 100], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
    assert pair_accuracy([3, 1, 1, 0], np.array([[0, 1], [1, 2], [3, 0], [0, 3]])) == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_bootstrap_resamples_groups() -> None:
    group_N = np.repeat(np.arange(50), 2)
    x_N = np.random.default_rng(0).normal(size=50).repeat(2)
    low, high = bootstrap_interval(lambda rows: float(x_N[rows].mean()), group_N, seed=1)
    # The two rows of a group are equal, so the interval is that of 50 independent values: 2 * 1.96 / sqrt(50) wide.
    assert high - low == pytest.approx(2 * 1.96 * x_N.std() / 50**0.5, rel=0.15)
    assert low < x_N.mean() < high


def test_folds_keep_a_prompt_together() -> None:
    prompt_N = np.repeat(np.arange(23), 2)
    fold_N = prompt_folds(prompt_N, 5, seed=42)
    assert (fold_N[0::2] == fold_N[1::2]).all()
    assert sorted(np.bincount(fold_N)) == [8, 8, 10, 10, 10]
    assert (fold_N == prompt_folds(prompt_N, 5, seed=42)).all()
    assert (fold_N != prompt_folds(prompt_N, 5, seed=43)).any()


def test_the_transform_takes_verbosity_out() -> None:
    g = np.random.default_rng(2)
    verbose_N = g.normal(size=500)
    rewards_NK = np.stack([g.normal(size=500) + verbose_N, g.normal(size=500) - verbose_N, verbose_N, 3 * verbose_N], axis=1)
    transform_KK = debiasing_transform(rewards_NK, 2)
    after_NK = rewards_NK @ transform_KK
    assert spearman(after_NK[:, 0], verbose_N) == pytest.approx(0.03, abs=0.005)
    assert spearman(after_NK[:, 3], verbose_N) <= 0.03
    np.testing.assert_array_equal(after_NK[:, 1], rewards_NK[:, 1])  # nothing to take out
    np.testing.assert_array_equal(after_NK[:, 2], 0)  # verbosity itself
    np.testing.assert_array_equal(transform_KK[[0, 1, 3]], np.eye(4)[[0, 1, 3]])
    np.testing.assert_array_equal(debiasing_transform(rewards_NK, None), np.eye(4))


def asking_pairs(count: int, seed: int) -> GatePairs:
    """The prompt's first feature says which of two objectives the better answer excels in."""
    g = torch.Generator().manual_seed(seed)
    prompt_PD = 5 * torch.randn(count, 6, generator=g)
    asks_second_P = prompt_PD[:, 0] > 0
    return GatePairs(prompt_PD, torch.where(torch.stack([~asks_second_P, asks_second_P], 1), 2.0, -2.5))


def new_gate() -> GatingNetwork:
    torch.manual_seed(1)
    return GatingNetwork(6, 2, hidden_dim=16, n_hidden=1, temperature=10.0)


def test_the_gate_learns_which_objective_a_prompt_asks_for() -> None:
    pairs, others, gate = asking_pairs(400, 0), asking_pairs(100, 1), new_gate()

    def accuracy() -> float:
        with torch.no_grad():
            return float(((gate(others.prompt_PD) * others.margin_PK).sum(-1) > 0).float().mean())

    losses = fit_gate(gate, pairs, steps=1500, stop=0)
    # Equal weights: every margin is (2 - 2.5) / 2. No scale helps such a score, so it is 1.
    assert losses == [pytest.approx(float(np.log1p(np.exp(0.25))))]
    assert accuracy() == 0
    losses = fit_gate(gate, pairs, steps=1500, stop=1500)
    assert len(losses) == 1501
    assert losses[-1] < losses[0] - 0.1
    assert accuracy() > 0.93
    assert gate.logit_scale.item() == 1.0
    with torch.no_grad():
        torch.testing.assert_close(gate(pairs.prompt_PD).sum(-1), torch.ones(400))


def test_margins_become_log_odds() -> None:
    # 3 of 4 pairs are ordered rightly by 0.1, one wrongly: sigmoid(0.1 s) = 3/4 gives s = 10 ln 3.
    assert log_odds_scale(torch.tensor([0.1, 0.1, 0.1, -0.1])) == pytest.approx(10 * np.log(3))
    assert log_odds_scale(torch.tensor([0.1, -0.1, -0.1])) == 1.0  # it prefers the worse answers
    assert log_odds_scale(torch.tensor([0.1, 0.2])) >= 1000.0  # nothing is wrong: no finite maximum
    pairs = GatePairs(torch.randn(4, 6), torch.tensor([[0.2, 0.0], [0.0, 0.2], [0.1, 0.1], [-0.3, 0.1]]))
    gate = new_gate()
    fit_gate(gate, pairs, steps=10, stop=0)  # equal weights halve the sum of two margins
    assert gate.logit_scale.item() == pytest.approx(10 * np.log(3))
    with torch.no_grad():
        torch.testing.assert_close(gate(pairs.prompt_PD), torch.full((4, 2), 5 * float(np.log(3))))


def test_the_gate_stops_where_held_out_prompts_say_so() -> None:
    fold_P = prompt_folds(np.arange(200), 5, 0)
    steps, loss, unfitted = choose_gate_steps(new_gate, asking_pairs(200, 0), fold_P, 100)
    assert steps == 100  # it still learns
    assert loss < unfitted
    g = torch.Generator().manual_seed(3)
    noise = GatePairs(5 * torch.randn(40, 6, generator=g), 20 * torch.randn(40, 2, generator=g).sign())
    assert choose_gate_steps(new_gate, noise, prompt_folds(np.arange(40), 5, 0), 200)[0] < 50
    margin_PK = torch.ones(200, 2)  # both objectives say the same: no weighting is better, so there is nothing to fit
    assert choose_gate_steps(new_gate, GatePairs(asking_pairs(200, 0).prompt_PD, margin_PK), fold_P, 20)[0] == 0

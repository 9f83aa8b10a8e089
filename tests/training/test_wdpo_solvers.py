"""WDPO's solvers on a tiny Llama: the first-order ones against the exact double backward, and what they refuse."""

import collections
import itertools

import pytest
import torch
from harness.policies import REFERENCE_M2, apart, policy_of, step
from harness.policies import wdpo_config as config_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from drdpo.training.data import Pair, form_batch
from drdpo.training.losses import method_of
from drdpo.training.memory import dry_run, shapes
from drdpo.training.objective import objective, penalty_scales


@pytest.mark.parametrize("solver", ["tangent", "exact"])
def test_float32_is_close_to_float64(solver, tiny_policy, pairs):
    gradients = [
        step(policy_of(tiny_policy, config, dtype=dtype), pairs, [[0, 1, 2, 3]], config)[1]
        for dtype, config in (
            (torch.float32, config_of(wdpo_solver=solver)),
            (torch.float64, config_of(wdpo_solver="exact")),
        )
    ]
    assert apart(*gradients) < 1e-5


@pytest.mark.parametrize("solver", ["exact", "tangent"])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_a_fraction_of_the_micro_batches_is_right_on_average(fraction, solver, tiny_policy, pairs):
    """The mean over all draws, written out, is the whole penalty; the draws of steps are about equally frequent."""
    config, whole = config_of(wdpo_solver=solver, wdpo_fraction=fraction), config_of(wdpo_solver=solver)
    policy = policy_of(tiny_policy, whole)
    split = [[0], [1], [2], [3]]
    value, gradient, _ = step(policy, pairs, split, whole)
    carrying = round(4 * fraction)
    draws = list(itertools.combinations(range(4), carrying))
    found = [step(policy, pairs, split, config, [4 / carrying * (k in draw) for k in range(4)]) for draw in draws]
    assert sum(total for total, _, _ in found) / len(draws) == pytest.approx(value, rel=1e-6)
    mean = torch.stack([one for _, one, _ in found]).mean(dim=0)
    assert apart(mean, gradient) < 1e-6
    assert max(apart(one, gradient) for _, one, _ in found) > 0.02, "one draw alone differs, or the mean says nothing"
    counts = collections.Counter(tuple(penalty_scales(4, fraction, 42, number)) for number in range(1200))
    assert set(counts) == {tuple(4 / carrying * (k in draw) for k in range(4)) for draw in draws}
    # The deviation of a binomial count is at most 15.
    assert all(abs(count - 1200 / len(draws)) < 75 for count in counts.values())
    assert [penalty_scales(4, fraction, 42, k) for k in range(20)] != [penalty_scales(4, fraction, 1, k) for k in range(20)]


def test_micro_batches_without_the_penalty_are_plain_dpo(tiny_policy, pairs):
    config = config_of(wdpo_solver="tangent", wdpo_fraction=0.5)
    policy = policy_of(tiny_policy, config)
    batch = form_batch(pairs, range(4), config.packing)
    part = objective(policy, batch, REFERENCE_M2, method_of(config), None, penalty_scale=0.0)
    assert part.penalties_B is None and part.total.item() == pytest.approx(part.losses_B.mean().item())
    assert penalty_scales(1, 0.5, 42, 0) == [1.0] == penalty_scales(1, 1.0, 42, 0)


def test_a_pair_without_gradient_has_no_penalty(tiny_policy, pairs):
    """A margin so large that the loss is flat: zero, not a division by zero."""
    config = config_of(wdpo_solver="tangent", beta=1e6)
    policy = policy_of(tiny_policy, config)
    far_M2 = torch.tensor([[-1e6, 0.0]], dtype=torch.float64)
    part = objective(policy, form_batch(pairs, [0], config.packing), far_M2, method_of(config), None)
    gradients = torch.autograd.grad(part.total, list(policy.parameters()))
    assert part.penalties_B.tolist() == [0.0]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert torch.isfinite(part.errors_B).all()


@pytest.mark.parametrize(("recompute", "work", "memory"), [("false", 2.5, 2.2), ("true", 3.0, 1.6)])
def test_the_penalty_costs_two_to_three_steps_of_dpo(recompute, work, memory, tmp_path):
    """Counted by shapes. By hand, in products of a forward pass over a pair of three equal parts, 1 + 4/3 + 4/3 + 2 + 4/3
    without recomputation, against 3 for DPO; attention, which is counted for the penalty alone, adds to it."""
    LlamaConfig(
        vocab_size=32, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    found = {}
    for rho in (None, 0.01):
        config = config_of(wdpo_rho=rho, model_path=str(tmp_path), gradient_checkpointing=recompute)
        batch = form_batch([Pair([5] * 32, [6] * 32, [7] * 32)], [0], config.packing)
        policy = shapes(config)
        with FlopCounterMode(display=False) as counted:
            peak = sum(dry_run(policy, batch, method_of(config)))
        found[rho] = counted.get_total_flops(), peak
    (dpo, dpo_peak), (ours, our_peak) = found.values()
    assert 2 < ours / dpo < work
    assert our_peak / dpo_peak < memory

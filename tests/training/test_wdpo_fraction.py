"""--wdpo_fraction: right on average over all draws, the same draw however the step is split, no pass for pairs not drawn."""

import itertools
import random

import pytest
import torch

from drdpo.config import TrainConfig
from drdpo.training import objective as objective_module
from drdpo.training.batches import collate, micro_batches
from drdpo.training.data import Pair
from drdpo.training.fraction import penalised_pairs, select
from drdpo.training.metrics import step_metrics
from drdpo.training.objective import objective
from drdpo.training.packing import form_batch, pack
from drdpo.training.policy import Policy, load_policy

REFERENCE_M2 = torch.tensor([[-20.0, -45.0], [-40.0, -9.0], [-15.0, -14.0], [-60.0, -30.0]], dtype=torch.float64)


def config_of(**flags) -> TrainConfig:
    defaults = {"beta": 0.5, "dtype": "float32", "wdpo_rho": 0.1, "train_batch_size": 4}
    return TrainConfig(model_path="-", dataset_path="-", save_path="-", **defaults | flags)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    numbers = random.Random(2)

    def ids(length: int) -> list[int]:
        return [numbers.randrange(3, 500) for _ in range(length)]

    return [
        Pair(ids(4), ids(3), ids(6)),
        Pair(ids(1), ids(5), ids(1)),
        Pair(ids(15), ids(2), ids(2)),
        Pair(ids(3), ids(7), ids(4)),
    ]


@pytest.fixture(scope="module")
def policies(tiny_policy) -> dict[str, Policy]:
    def load(**flags) -> Policy:
        config = config_of(**flags)
        policy = load_policy(str(tiny_policy), torch.float32, config.attention, False, config.second_derivative)
        return policy.double().train()

    kinds = ("exact", "tangent", "finite_difference")
    return {"padded": load(packing=False)} | {kind: load(wdpo_solver=kind) for kind in kinds}


def step(policy, pairs, config, penalised, split=((0, 1, 2, 3),)):
    parts = [
        objective(policy, form_batch(pairs, list(rows), config, 0), REFERENCE_M2[list(rows)], config, None, penalised)
        for rows in split
    ]
    total = sum(part.total * len(rows) for part, rows in zip(parts, split, strict=True)) / 4
    gradients = torch.autograd.grad(total, [p for p in policy.parameters() if p.requires_grad])
    return total.item(), torch.cat([gradient.flatten() for gradient in gradients]), parts


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("kind", ["exact", "tangent", "finite_difference", "padded"])
def test_the_mean_over_all_draws_is_the_whole_penalty(kind, fraction, policies, pairs):
    flags = {"packing": False} if kind == "padded" else {"wdpo_solver": kind}
    config, whole = config_of(wdpo_fraction=fraction, **flags), config_of(**flags)
    draws = list(itertools.combinations(range(4), round(4 * fraction)))
    found = [step(policies[kind], pairs, config, frozenset(draw)) for draw in draws]
    value, gradient, parts = step(policies[kind], pairs, whole, None)
    mean = torch.stack([gradient for _, gradient, _ in found]).mean(dim=0)
    assert sum(total for total, _, _ in found) / len(draws) == pytest.approx(value, rel=1e-6)
    assert ((mean - gradient).norm() / gradient.norm()).item() < (1e-2 if kind == "finite_difference" else 1e-6)
    figures = [step_metrics(parts, config) for _, _, parts in found]
    expected = step_metrics(parts, whole)
    for name in ("penalty", "input_gradient_norm", "objective", "loss"):
        mean = sum(one[name] for one in figures) / len(draws)
        assert mean == pytest.approx(expected[name], rel=1e-4), name
    apart = max(((gradient - other).norm() / gradient.norm()).item() for _, other, _ in found)
    assert apart > 0.05, "one draw alone must differ, or the mean says nothing"


def test_every_set_is_drawn_about_equally_often():
    config = config_of(wdpo_fraction=0.5)
    counts = {frozenset(draw): 0 for draw in itertools.combinations((11, 5, 7, 2), 2)}
    for number in range(1200):
        counts[penalised_pairs([5, 2, 11, 7], config, number)] += 1
    # 200 expected; the deviation of a binomial count is 13.
    assert all(140 < count < 260 for count in counts.values())


def test_the_draw_is_a_function_of_seed_and_step():
    config = config_of(wdpo_fraction=0.5, train_batch_size=16)
    indices = list(range(100, 116))
    draw = penalised_pairs(indices, config, 3)
    assert len(draw) == 8 and draw <= set(indices)
    assert draw == penalised_pairs(indices[::-1], config, 3)
    assert draw != penalised_pairs(indices, config, 4)
    assert draw != penalised_pairs(indices, config_of(wdpo_fraction=0.5, train_batch_size=16, seed=1), 3)


@pytest.mark.parametrize(("fraction", "count"), [(1.0, None), (0.5, 3), (0.01, 1), (0.9, 5), (0.95, None)])
def test_how_many_are_drawn(fraction, count):
    config = config_of(wdpo_fraction=fraction, train_batch_size=6)
    draw = penalised_pairs(range(6), config, 0)
    assert (draw and len(draw)) == count
    assert config.penalty_scale == 6 / (count or 6)
    assert penalised_pairs(range(6), config_of(wdpo_rho=None), 0) is None


@pytest.mark.parametrize("kind", ["exact", "tangent"])
def test_the_gradient_does_not_depend_on_the_split(kind, policies, pairs):
    config = config_of(wdpo_fraction=0.5, wdpo_solver=kind)
    draw = frozenset({3, 1})
    value, gradient, _ = step(policies[kind], pairs, config, draw)
    for split in (((3,), (0,), (1,), (2,)), ((2, 0), (3, 1)), ((3, 2), (1, 0))):
        ours, our_gradient, _ = step(policies[kind], pairs, config, draw, split)
        assert ours == pytest.approx(value, rel=1e-6)
        assert ((our_gradient - gradient).norm() / gradient.norm()).item() < 1e-6
    # Ranks deal the same pairs; the draw knows nothing of them.
    dealt = [micro_batches(range(4), [len(pair) for pair in pairs], 1, rank, 2, by_length=True) for rank in range(2)]
    assert sorted(row for rank in dealt for rows in rank for row in rows) == [0, 1, 2, 3]


def test_figures_stand_in_the_order_of_the_batch(policies, pairs):
    config = config_of(wdpo_fraction=0.5, wdpo_solver="tangent")
    whole = step(policies["tangent"], pairs, config_of(wdpo_solver="tangent"), None)[2][0]
    part = step(policies["tangent"], pairs, config, frozenset({1, 2}))[2][0]
    for name in ("losses_B", "margins_B", "log_ratios_S"):
        torch.testing.assert_close(getattr(part.values, name), getattr(whole.values, name), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(part.penalties_B, whole.penalties_B * torch.tensor([0.0, 2.0, 2.0, 0.0]), rtol=1e-5, atol=0)
    assert (part.errors_B > 0).tolist() == [False, True, True, False]


def test_pairs_that_are_not_drawn_cost_no_penalty_pass(policies, pairs, monkeypatch):
    tokens = []
    original = objective_module.input_gradient
    monkeypatch.setattr(
        objective_module,
        "input_gradient",
        lambda policy, batch, *rest: (tokens.append(batch.tokens), original(policy, batch, *rest))[1],
    )
    config = config_of(wdpo_fraction=0.25, wdpo_solver="tangent")
    step(policies["tangent"], pairs, config, frozenset({1}))
    assert tokens == [pack(pairs, [1], prompt_once=False).tokens]
    step(policies["tangent"], pairs, config, frozenset({7}))
    assert len(tokens) == 1, "no pair of this micro-batch was drawn"


@pytest.mark.parametrize("prompt_once", [True, False])
def test_some_pairs_of_a_packed_row_are_the_row_of_these_pairs(prompt_once, pairs):
    order = [2, 0, 3, 1]
    batch = pack(pairs, order, prompt_once)
    for count in range(1, 5):
        for rows in itertools.combinations(range(4), count):
            keep_B = torch.tensor([row in rows for row in range(4)])
            few, expected = select(batch, keep_B), pack(pairs, [order[row] for row in rows], prompt_once)
            assert few.groups == expected.groups
            # Answer tokens of the chosen and rejected sides stand in the same order in both.
            for name in ("indices_B", "input_ids_1N", "positions_1N", "pair_N", "states_A", "targets_A", "sequence_A"):
                assert torch.equal(getattr(few, name), getattr(expected, name)), name


def test_some_pairs_of_padded_rows_are_the_rows_of_these_pairs(pairs):
    few = select(collate(pairs, [2, 0, 3, 1], 0), torch.tensor([False, True, False, True]))
    expected = collate(pairs, [0, 1], 0)
    for name in ("indices_B", "input_ids_ST", "attention_mask_ST", "answer_mask_ST"):
        assert torch.equal(getattr(few, name), getattr(expected, name)), name

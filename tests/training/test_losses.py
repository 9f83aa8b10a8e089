"""Losses and weights of all methods: numbers by hand, laws, gradients against float64 autograd of their definitions."""

import math
from functools import partial

import pytest
import torch
from harness.policies import config_of, worst_mean

from drdpo.training.losses import (
    Method,
    Pairs,
    chi2_weights,
    cvar_weights,
    drdpo_weights,
    effective_sample_size,
    gradient_penalty,
    group_state,
    group_step,
    group_weights,
    holder_losses,
    kl_weights,
    method_of,
    normalised_margins,
    pair_losses,
    robust_label_losses,
    ropo_losses,
    soft_label_losses,
    soft_labels,
    tv_weights,
)  # fmt: skip

LN2 = math.log(2)
POPULATIONS = {
    "spread": [0.3, 0.9, 0.5, 2.0, 0.1, 1.1, 0.95],
    "two": [0.2, 0.7],
    "ties": [0.5, 0.5, 0.1, 2.0, 2.0, 0.5],
    "nearly equal": [0.693147, 0.693148, 0.6931475, 0.693147],
}
WEIGHTS = {"tv": tv_weights, "cvar": cvar_weights, "chi2": chi2_weights}
STRENGTHS = {"tv": (0.1, 0.3, 0.9, 1.0), "cvar": (0.9, 0.5, 0.3, 0.01), "chi2": (0.01, 0.2, 1.0, 50.0)}


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def value(weights: torch.Tensor, losses: torch.Tensor) -> float:
    return (weights * losses).mean().item()


# DPO, KLDPO and Dr. DPO.


def test_dpos_losses_by_hand():
    kinds = ((0.0, "sigmoid"), (0.2, "sigmoid"), (0.2, "robust"), (0.0, "ipo"))
    first = [pair_losses(doubles(0.0), 0.1, smoothing, kind).item() for smoothing, kind in kinds]
    assert first == pytest.approx([LN2, LN2, LN2, 25.0], abs=1e-12)
    with pytest.raises(ValueError, match="hinge"):
        pair_losses(doubles(0.0), 0.1, kind="hinge")
    # beta h = ln 3: sigmoid 3/4, so -log is ln(4/3) and the flipped pair's is ln 4.
    margin = doubles(math.log(3) / 0.5)
    right, wrong = math.log(4 / 3), math.log(4)
    assert pair_losses(margin, 0.5).item() == pytest.approx(right)
    assert pair_losses(margin, 0.5, 0.25).item() == pytest.approx(0.75 * right + 0.25 * wrong)
    assert pair_losses(margin, 0.5, 0.25, "robust").item() == pytest.approx((0.75 * right - 0.25 * wrong) / 0.5)
    # IPO with beta 1/2 aims at a margin of 1.
    assert pair_losses(doubles(1.0, 3.0), 0.5, kind="ipo").tolist() == [0.0, 4.0]
    assert pair_losses(doubles(-1e5, 1e5), 1.0).tolist() == pytest.approx([1e5, 0.0]), "large margins stay finite"


def test_rdpo_is_unbiased_under_flips():
    # The mean over a flipped and an unflipped label with rate e is the clean loss.
    margin, e = doubles(0.7), 0.3
    noisy = (1 - e) * pair_losses(margin, 1.0, e, "robust") + e * pair_losses(-margin, 1.0, e, "robust")
    assert noisy.item() == pytest.approx(pair_losses(margin, 1.0).item())


def test_weights_of_kldpo_and_drdpo_by_hand():
    # Mean 2, tau 1 / ln 2: weights 2^(l - 2).
    losses = doubles(1.0, 2.0, 3.0)
    assert kl_weights(losses, losses, 1 / LN2).tolist() == pytest.approx([0.5, 1.0, 2.0])
    # Softmax over the three, times three: 3 * (1, 2, 4) / 7.
    assert kl_weights(losses, losses, 1 / LN2, normalize=True).tolist() == pytest.approx([3 / 7, 6 / 7, 12 / 7])
    # exp(-l / t) with t = 1 / ln 2: (1/2, 1/4), mean 3/8.
    assert drdpo_weights(losses[:2], losses[:2], 1 / LN2).tolist() == pytest.approx([4 / 3, 2 / 3])


@pytest.mark.parametrize("weights_of", [kl_weights, partial(kl_weights, normalize=True), drdpo_weights])
def test_laws_of_kldpo_and_drdpo(weights_of):
    losses, same = doubles(0.3, 0.9, 0.5, 2.0), doubles(LN2, LN2, LN2)
    assert torch.allclose(weights_of(losses, losses, 1e12), torch.ones(4, dtype=torch.float64)), "the largest tau is DPO"
    assert weights_of(same, same, 0.005).tolist() == [1.0, 1.0, 1.0]
    whole = weights_of(losses, losses, 0.5)
    assert torch.equal(whole, torch.cat([weights_of(part, losses, 0.5) for part in losses.split(1)])), "of the population"
    harder = losses.argsort(descending=weights_of is drdpo_weights)
    assert torch.equal(whole.argsort(), harder), "a harder pair has a larger weight, Dr. DPO's a smaller one"
    if weights_of is kl_weights:
        assert kl_weights(losses, losses, 0.5, cap=math.inf).mean() >= 1, "Jensen"
        assert kl_weights(losses, losses, 0.05).max() == 10, "capped"
    else:
        assert whole.mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("weights", "value"),
    [
        (lambda x: kl_weights(x, x, 0.4, normalize=True), lambda x: 0.4 * torch.log(torch.exp(x / 0.4).mean())),
        (lambda x: drdpo_weights(x, x, 0.4), lambda x: -0.4 * torch.log(torch.exp(-x / 0.4).mean())),
    ],
    ids=["kldpo", "drdpo"],
)
def test_weighted_gradient_is_that_of_the_robust_value(weights, value):
    losses = doubles(0.3, 0.9, 0.5, 2.0).requires_grad_()
    assert not weights(losses).requires_grad, "they are constants of the step"
    (ours,) = torch.autograd.grad((weights(losses) * losses).mean(), losses)
    (theirs,) = torch.autograd.grad(value(losses), losses)
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_effective_sample_size_by_hand():
    assert effective_sample_size(doubles(1, 1, 1, 1)).item() == 4
    assert effective_sample_size(doubles(1, 0, 0, 0)).item() == 1
    assert effective_sample_size(doubles(2, 1)).item() == pytest.approx(9 / 5)


def test_gradient_penalty_by_hand():
    # l_i = 2 sum(chosen) - sum(rejected): |grad|^2 is 4 per chosen and 1 per rejected entry, two entries a position.
    embeds_STD = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    sums_S = embeds_STD.sum(dim=(1, 2))
    losses_B = 2 * sums_S[:2] - sums_S[2:]
    assert gradient_penalty(losses_B, embeds_STD, False).tolist() == [30.0, 30.0]
    # With one prompt position counted once: (2 - 1)^2 there, 4 + 1 elsewhere.
    prompt_BT = torch.tensor([[True, False, False]] * 2)
    assert gradient_penalty(losses_B, embeds_STD, False, prompt_BT).tolist() == [2 * (1 + 5 + 5)] * 2
    # Pairs are apart: the gradient is the embedding itself, so the penalty is twice the pair's own energy.
    energy_S = embeds_STD.square().sum(dim=(1, 2)) / 2
    losses_B = energy_S[:2] + energy_S[2:]
    torch.testing.assert_close(gradient_penalty(losses_B, embeds_STD, False), 2 * losses_B.detach())


# Weights of --method.


def test_weights_by_hand():
    losses = doubles(1, 2, 3, 4, 5)
    # Of five pairs 0.3 are 1.5: the first all, the second half; the largest gets them.
    assert tv_weights(losses, losses, 0.3).tolist() == pytest.approx([0, 0.5, 1, 1, 2.5])
    # The hardest 30% are 1.5 pairs of weight 1 / 0.3.
    assert cvar_weights(losses, losses, 0.3).tolist() == pytest.approx([0, 0, 0, 0.5 / 0.3, 1 / 0.3])
    # Around the mean, as far as no weight is negative: 1 + sqrt(2 r) (l - mean) / sd, sd = sqrt 2.
    assert chi2_weights(losses, losses, 0.04).tolist() == pytest.approx([0.6, 0.8, 1, 1.2, 1.4])
    # Two pairs, mean w^2 = 1 + 2 r = 2 at the weights 0 and 2.
    assert chi2_weights(doubles(1, 7), doubles(1, 7), 0.5).tolist() == pytest.approx([0, 2])


@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize(("name", "nothing"), [("tv", 0.0), ("cvar", 1.0), ("chi2", 0.0)])
def test_radius_zero_is_dpo_exactly(name, nothing, population):
    losses = torch.tensor(POPULATIONS[population])
    assert WEIGHTS[name](losses, losses, nothing).tolist() == [1.0] * len(losses)


@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_average_one_grow_with_the_loss_and_the_strength_and_do_not_depend_on_the_split(name, population):
    losses = doubles(*POPULATIONS[population])
    last = losses.mean().item()
    for strength in STRENGTHS[name]:
        weights = WEIGHTS[name](losses, losses, strength)
        assert weights.mean().item() == pytest.approx(1) and weights.min() >= 0
        order = losses.argsort()
        assert (weights[order].diff() >= -1e-12).all(), "a harder pair has no smaller weight"
        for here in losses.unique():
            assert weights[losses == here].unique().numel() == 1, "equal losses share"
        shuffled = losses[torch.randperm(len(losses), generator=torch.Generator().manual_seed(1))]
        # Another forward pass may have rounded the losses differently, by less than they are apart.
        again = torch.cat([WEIGHTS[name](part + 1e-12, shuffled, strength) for part in losses.split(1)])
        assert torch.equal(again, weights)
        assert last - 1e-12 <= value(weights, losses) <= losses.max() + 1e-12
        last = value(weights, losses)
    # The largest loss alone, as the last strength is that large.
    assert last == pytest.approx(losses.max().item())


def test_equal_losses_have_equal_weights_whatever_rounding_does():
    same = torch.full((6,), LN2)
    for name, weights in WEIGHTS.items():
        for strength in STRENGTHS[name]:
            assert weights(same + 1e-7, same, strength).tolist() == [1.0] * 6, name


@pytest.mark.parametrize("population", ["spread", "two", "ties"])
def test_every_robust_value_lies_between_the_mean_and_the_largest_loss_and_dr_dpo_below(population):
    losses = doubles(*POPULATIONS[population])
    low = -0.4 * torch.log(torch.exp(-losses / 0.4).mean()).item()
    high = 0.4 * torch.log(torch.exp(losses / 0.4).mean()).item()
    mean, largest = losses.mean().item(), losses.max().item()
    assert value(drdpo_weights(losses, losses, 0.4), losses) <= low <= mean <= high
    assert mean <= value(kl_weights(losses, losses, 0.4, normalize=True), losses) <= largest


@pytest.mark.parametrize("strength", [0, 1, 2])
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_weighted_gradient_is_that_of_the_worst_value(name, strength):
    losses, strength = doubles(*POPULATIONS["spread"]).requires_grad_(), STRENGTHS[name][strength]
    weights = WEIGHTS[name](losses, losses, strength)
    assert not weights.requires_grad
    worst = worst_mean(name, losses, strength)
    assert value(weights, losses) == pytest.approx(worst.item(), rel=1e-9)
    (ours,) = torch.autograd.grad((weights * losses).mean(), losses)
    (theirs,) = torch.autograd.grad(worst, losses)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


# Losses

MARGINS = doubles(-30, -2, -0.1, 0, 0.4, 3, 30)


def test_losses_by_hand():
    # x = ln 3: p = 3/4.
    h, beta = doubles(math.log(3) / 0.5), 0.5
    assert ropo_losses(h, beta, 3.0).item() == pytest.approx(0.75 * (math.log(4 / 3) + 3 / 4))
    assert holder_losses(h, beta, 2.0).item() == pytest.approx(-3 * 9 / 16 + 2 * 27 / 64)
    assert robust_label_losses(h, beta, 0.25).item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert robust_label_losses(-h, beta, 0.25).item() == pytest.approx(math.log(4)), "wrong: the worst label is given"
    # q = 0.8, radius 1/4: p = 0.8 - sqrt(0.04) = 0.6.
    soft = soft_label_losses(h, doubles(0.8), beta, 0.25).item()
    assert soft == pytest.approx(0.6 * math.log(4 / 3) + 0.4 * math.log(4))
    assert soft_labels(doubles(2), doubles(2 - 3 * math.log(4)), 3.0).item() == pytest.approx(0.8)
    # 6 / 3 - 2 / 4
    log_ratios, lengths = doubles(6, 2), doubles(3, 4)
    assert normalised_margins(log_ratios, lengths).item() == 1.5


def test_without_a_radius_the_losses_are_dpos_exactly():
    plain = pair_losses(MARGINS, 0.5)
    assert torch.equal(robust_label_losses(MARGINS, 0.5, 0.0), plain)
    for radius in (0.0, 0.7):
        assert torch.equal(soft_label_losses(MARGINS, torch.ones_like(MARGINS), 0.5, radius), plain), "hard labels"
    soft = soft_label_losses(MARGINS, torch.full_like(MARGINS, 0.75), 0.5, 0.0)
    torch.testing.assert_close(soft, pair_losses(MARGINS, 0.5, smoothing=0.25))
    ones = torch.ones(2 * len(MARGINS), dtype=torch.float64)
    per_token = normalised_margins(torch.cat([MARGINS, 0 * MARGINS]), ones)
    assert torch.equal(pair_losses(per_token, 0.5), plain), "answers of one token"
    alpha = 1e-9
    torch.testing.assert_close(ropo_losses(MARGINS, 0.5, alpha), 4 * alpha * plain, rtol=1e-8, atol=0)


@pytest.mark.parametrize("q", [0.0, 0.01, 0.3, 0.5, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("radius", [0.0, 0.1, 1.0, 9.0])
def test_dpo_pro_is_the_worst_of_all_label_probabilities_in_the_ball(q, radius):
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    inside = grid[(grid - q).square() <= radius * q * (1 - q) + 1e-12]
    right, wrong = pair_losses(MARGINS, 0.5), pair_losses(-MARGINS, 0.5)
    worst = (inside[:, None] * right + (1 - inside)[:, None] * wrong).max(dim=0).values
    ours = soft_label_losses(MARGINS, torch.full_like(MARGINS, q), 0.5, radius)
    torch.testing.assert_close(ours, worst, atol=2e-4, rtol=0)


def test_slopes_are_those_of_the_formulas_and_those_of_flipped_labels_vanish():
    x = MARGINS.clone().requires_grad_()
    p = torch.sigmoid(x.detach())
    slopes = {
        "ropo": (ropo_losses(x, 1.0, 14.0), -4 * 14 / 225 * (1 - p) * (1 + 14 * p)),
        "holder": (holder_losses(x, 1.0, 2.0), -6 * p**2 * (1 - p) ** 2),
        "label": (robust_label_losses(x, 1.0, 0.2), torch.where(x < 0, p - 1, 0.8 * (p - 1) + 0.2 * p)),
        "soft": (soft_label_losses(x, torch.full_like(x, 0.8), 1.0, 0.25), p - 0.8 + 0.2 * x.detach().sign()),
    }
    for name, (losses, theirs) in slopes.items():
        (ours,) = torch.autograd.grad(losses.sum(), x)
        torch.testing.assert_close(ours[MARGINS != 0], theirs[MARGINS != 0], msg=name)
    assert abs(slopes["holder"][1][0]) < 1e-12, "redescending"
    assert abs(slopes["ropo"][1][1]) > abs(slopes["ropo"][1][0]), "ROPO's pull falls to a constant"


@pytest.mark.parametrize("method", ["ropo:14", "holder:2", "robust_label:0.3", "dpo_pro:0.2,2"])
def test_large_margins_stay_finite(method):
    scores = {"chosen_score": doubles(2, 1), "rejected_score": doubles(1, 1)}
    pairs = Pairs(doubles(-1e5, 1e5).requires_grad_(), torch.zeros(4), scores)
    losses = method_of(config_of(method=method)).loss(pairs)
    (slopes,) = torch.autograd.grad(losses.sum(), pairs.margins_B)
    assert torch.isfinite(losses).all() and torch.isfinite(slopes).all()


# Groups


def test_group_weights_by_hand():
    state = group_state(torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0]))
    assert state["weights"].tolist() == [0.5, 0, 0.5] and state["counts"].tolist() == [3, 0, 2]
    losses, groups = torch.tensor([1.0, 2.0, 3.0, 1.0]), torch.tensor([0.0, 2.0, 2.0, 0.0])
    # Mean losses 1 and 2.5, exponents 2 (1 + 3 / sqrt 3) and 2 (2.5 + 3 / sqrt 2).
    after = group_step(state, losses, groups, 2.0, 3.0)
    first, second = math.exp(2 * (1 + math.sqrt(3))), math.exp(2 * (2.5 + 3 / math.sqrt(2)))
    assert after["weights"].tolist() == pytest.approx([first / (first + second), 0, second / (first + second)])
    assert after["present"].tolist() == [2, 0, 2]
    weights = group_weights(groups, after["weights"], after["present"])
    expected = after["weights"][0] * 1 + after["weights"][2] * 2.5
    assert (weights * losses).mean().item() == pytest.approx(expected.item()), "the sum of q_g L_g"
    assert weights.mean().item() == pytest.approx(1)
    again = group_step(after, losses, groups, 2.0, 3.0)["weights"]
    assert again[2] > after["weights"][2] and again.sum().item() == pytest.approx(1)


def test_a_group_without_pairs_in_a_step_counts_as_loss_zero():
    state = group_state(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    after = group_step(state, torch.tensor([0.5]), torch.tensor([1.0]), 1.0, 0.0)
    assert after["weights"].tolist() == pytest.approx([1 / (1 + math.exp(0.5)), math.exp(0.5) / (1 + math.exp(0.5))])
    assert group_weights(torch.tensor([1.0]), after["weights"], after["present"])[0] == after["weights"][1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"begin": dict}, "begin and update"), ({"update": lambda state, losses, columns: state}, "begin and update"),
     ({"begin": dict, "update": lambda state, losses, columns: state}, "is for weights, with population=True"),
     ({"begin": dict, "update": lambda state, losses, columns: state, "weights": lambda losses, population, pairs: losses,
       "population": False}, "is for weights, with population=True"),
     ({"weight_column": "trust"}, "reads does not name trust")],
)  # fmt: skip
def test_what_a_method_keeps_cannot_be_lost(fields, message):
    """Without weights of a population, update would never be called."""
    with pytest.raises(ValueError, match=message):
        Method("mine", lambda pairs: pairs.margins_B, **fields)

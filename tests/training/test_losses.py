"""The losses: numbers by hand, the laws of the table in the paper, gradients against float64."""

import math

import pytest
import torch

from drdpo.training.losses import effective_sample_size, gradient_penalty, pair_losses
from drdpo.training.robust import drdpo_weights, kl_weights

LN2 = math.log(2)


def losses_of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "smoothing", "expected"),
    [("sigmoid", 0.0, LN2), ("sigmoid", 0.2, LN2), ("robust", 0.2, LN2), ("ipo", 0.0, 25.0)],
)
def test_loss_at_zero_margin(kind, smoothing, expected):
    assert pair_losses(losses_of(0.0), 0.1, smoothing, kind).item() == pytest.approx(expected, abs=1e-12)


def test_losses_by_hand():
    # beta h = ln 3: sigmoid 3/4, so -log is ln(4/3) and the flipped pair's is ln 4.
    margin = losses_of(math.log(3) / 0.5)
    right, wrong = math.log(4 / 3), math.log(4)
    assert pair_losses(margin, 0.5).item() == pytest.approx(right)
    assert pair_losses(margin, 0.5, 0.25).item() == pytest.approx(0.75 * right + 0.25 * wrong)
    assert pair_losses(margin, 0.5, 0.25, "robust").item() == pytest.approx((0.75 * right - 0.25 * wrong) / 0.5)
    # IPO with beta 1/2 aims at a margin of 1.
    assert pair_losses(losses_of(1.0, 3.0), 0.5, kind="ipo").tolist() == [0.0, 4.0]


def test_large_margins_stay_finite():
    losses = pair_losses(losses_of(-1e5, 1e5), 1.0)
    assert losses.tolist() == pytest.approx([1e5, 0.0])


def test_rdpo_is_unbiased_under_flips():
    # The mean over a flipped and an unflipped label with rate e is the clean loss.
    margin, e = losses_of(0.7), 0.3
    noisy = (1 - e) * pair_losses(margin, 1.0, e, "robust") + e * pair_losses(-margin, 1.0, e, "robust")
    assert noisy.item() == pytest.approx(pair_losses(margin, 1.0).item())


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="hinge"):
        pair_losses(losses_of(0.0), 0.1, kind="hinge")


def test_kldpo_weights_by_hand():
    # Mean 2, tau 1 / ln 2: weights 2^(l - 2).
    losses = losses_of(1.0, 2.0, 3.0)
    assert kl_weights(losses, losses, 1 / LN2).tolist() == pytest.approx([0.5, 1.0, 2.0])
    # Softmax over the three, times three: 3 * (1, 2, 4) / 7.
    assert kl_weights(losses, losses, 1 / LN2, normalize=True).tolist() == pytest.approx([3 / 7, 6 / 7, 12 / 7])


def test_kldpo_laws():
    losses = losses_of(0.3, 0.9, 0.5, 2.0)
    assert torch.allclose(kl_weights(losses, losses, 1e12), torch.ones(4, dtype=torch.float64))
    same = losses_of(LN2, LN2, LN2)
    assert kl_weights(same, same, 0.005).tolist() == [1.0, 1.0, 1.0]
    weights = kl_weights(losses, losses, 0.5, cap=math.inf)
    assert weights.mean() >= 1, "Jensen"
    assert weights.argsort().tolist() == losses.argsort().tolist(), "harder pair, larger weight"
    assert kl_weights(losses, losses, 0.05).max() == 10, "capped"
    assert kl_weights(losses, losses, 0.5, normalize=True).mean().item() == pytest.approx(1.0)


def test_kldpo_weight_depends_on_the_population_not_on_the_micro_batch():
    losses = losses_of(0.3, 0.9, 0.5, 2.0)
    for normalize in (False, True):
        whole = kl_weights(losses, losses, 0.5, normalize=normalize)
        split = torch.cat([kl_weights(part, losses, 0.5, normalize=normalize) for part in losses.split(1)])
        assert torch.equal(whole, split)


def test_drdpo_weights_by_hand_and_laws():
    # exp(-l / t) with t = 1 / ln 2: (1/2, 1/4), mean 3/8.
    losses = losses_of(1.0, 2.0)
    weights = drdpo_weights(losses, losses, 1 / LN2)
    assert weights.tolist() == pytest.approx([4 / 3, 2 / 3])
    assert weights[0] > weights[1], "harder pair, smaller weight"
    assert torch.allclose(drdpo_weights(losses, losses, 1e12), torch.ones(2, dtype=torch.float64))


def test_weights_are_constants_of_the_step():
    losses = losses_of(0.3, 0.9).requires_grad_()
    assert not kl_weights(losses, losses, 0.5).requires_grad
    assert not drdpo_weights(losses, losses, 0.5).requires_grad


@pytest.mark.parametrize(
    ("weights", "value"),
    [
        (lambda x: kl_weights(x, x, 0.4, normalize=True), lambda x: 0.4 * torch.log(torch.exp(x / 0.4).mean())),
        (lambda x: drdpo_weights(x, x, 0.4), lambda x: -0.4 * torch.log(torch.exp(-x / 0.4).mean())),
    ],
    ids=["kldpo", "drdpo"],
)
def test_weighted_gradient_is_that_of_the_robust_value(weights, value):
    losses = losses_of(0.3, 0.9, 0.5, 2.0).requires_grad_()
    (ours,) = torch.autograd.grad((weights(losses) * losses).mean(), losses)
    (theirs,) = torch.autograd.grad(value(losses), losses)
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_effective_sample_size_by_hand():
    assert effective_sample_size(losses_of(1, 1, 1, 1)).item() == 4
    assert effective_sample_size(losses_of(1, 0, 0, 0)).item() == 1
    assert effective_sample_size(losses_of(2, 1)).item() == pytest.approx(9 / 5)


def test_gradient_penalty_by_hand():
    # l_i = 2 sum(chosen) - sum(rejected): |grad|^2 is 4 per chosen and 1 per rejected entry, 3 * 2 entries each.
    embeds_STD = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    sums_S = embeds_STD.sum(dim=(1, 2))
    penalties_B = gradient_penalty(2 * sums_S[:2] - sums_S[2:], embeds_STD, create_graph=False)
    assert penalties_B.tolist() == [30.0, 30.0]


def test_gradient_penalty_with_the_prompt_counted_once_by_hand():
    # Gradients 2 and -1 per entry, two entries a position; one prompt position: (2 - 1)^2 there, 4 + 1 elsewhere.
    embeds_STD = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    sums_S = embeds_STD.sum(dim=(1, 2))
    prompt_BT = torch.tensor([[True, False, False]])
    penalties_B = gradient_penalty(2 * sums_S[:1] - sums_S[1:], embeds_STD, False, prompt_BT)
    assert penalties_B.tolist() == [2 * (1 + 5 + 5)]


def test_gradient_penalty_separates_pairs():
    embeds_STD = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    energy_S = embeds_STD.square().sum(dim=(1, 2)) / 2
    losses_B = energy_S[:2] + energy_S[2:]
    penalties_B = gradient_penalty(losses_B, embeds_STD, create_graph=False)
    # The gradient is the embedding itself, so the penalty is twice the pair's own energy.
    assert torch.allclose(penalties_B, 2 * losses_B.detach())

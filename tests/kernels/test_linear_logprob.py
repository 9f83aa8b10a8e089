"""linear_logprob and plain_logprob against log_softmax: values, gradients, second derivatives, dtypes, odd shapes."""

import math
import sys

import pytest
import torch

from drdpo.kernels import linear_logprob
from drdpo.kernels.linear_logprob import plain_logprob

MODULE = sys.modules["drdpo.kernels.linear_logprob"]  # drdpo.kernels has a function of that name
SHAPES = [(1, 3, 7), (5, 8, 33), (13, 6, 257)]


def plain(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(hidden_ND @ weight_VD.T, dim=1).gather(1, targets_N[:, None]).squeeze(1)


def case(tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64):
    torch.manual_seed(tokens)
    hidden_ND = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    return hidden_ND, weight_VD, torch.randint(vocabulary, (tokens,))


@pytest.fixture(params=[1 << 21, 60], ids=["one block", "many blocks"])
def block_elements(request, monkeypatch):
    monkeypatch.setitem(MODULE._BLOCK_ELEMENTS, True, request.param)
    monkeypatch.setattr(MODULE, "_NARROWEST", 1)


def test_two_tokens_by_hand():
    # Logits (0, ln 3): probabilities 1/4 and 3/4.
    hidden_ND = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    weight_VD = torch.tensor([[0.0, 5.0], [torch.tensor(3.0).log(), -2.0]])
    logprob_N = linear_logprob(hidden_ND, weight_VD, torch.tensor([0, 1]))
    assert torch.allclose(logprob_N.exp(), torch.tensor([0.25, 0.75]))


@pytest.mark.parametrize("on_cpu", [True, False])
def test_blocks_of_the_vocabulary_begin_at_multiples_of_128(on_cpu, monkeypatch):
    """An odd width has a GPU store two bytes at a time, and its products read rows that are not aligned."""
    monkeypatch.setattr(MODULE, "in_pieces", lambda tensor: on_cpu)
    for tokens in (1, 37, 653, 1000, 2482, 10_034, 40_000, 600_000):
        for size in (100, 256, 32_003, 49_152, 128_256, 151_936):
            found = list(MODULE.blocks(torch.empty(tokens, 0), torch.empty(size, 0)))
            assert [0, *(part.stop for part in found)] == [*(part.start for part in found), size]
            widths = [part.stop - part.start for part in found]
            assert all(width % 128 == 0 for width in widths[:-1])
            assert max(widths) * tokens <= MODULE._BLOCK_ELEMENTS[on_cpu] or max(widths) <= MODULE._NARROWEST


@pytest.mark.parametrize("kernel", [linear_logprob, plain_logprob])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_equal_the_plain_form(shape, kernel, block_elements):
    hidden_ND, weight_VD, targets_N = case(*shape)
    upstream_N = torch.randn(shape[0], dtype=torch.float64)
    ours_N = kernel(hidden_ND, weight_VD, targets_N)
    theirs_N = plain(hidden_ND, weight_VD, targets_N)
    assert torch.allclose(ours_N, theirs_N, atol=1e-12)
    ours = torch.autograd.grad(ours_N, (hidden_ND, weight_VD), upstream_N)
    theirs = torch.autograd.grad(theirs_N, (hidden_ND, weight_VD), upstream_N)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    frozen_N = kernel(hidden_ND, weight_VD.detach(), targets_N)
    assert torch.allclose(torch.autograd.grad(frozen_N, hidden_ND, upstream_N)[0], theirs[0], atol=1e-12), "a frozen head"


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_a_gradient_norm_through_recomputed_logits(shape):
    hidden_ND, weight_VD, targets_N = case(*shape)

    def penalty_gradient(logprob):
        # A nonlinear function of the log-probs, so that the upstream gradient carries a graph too; h itself is made
        # from a leaf, as a hidden state is.
        states_ND = torch.tanh(hidden_ND)
        loss = (logprob(states_ND, weight_VD, targets_N).sum() / 3).sigmoid()
        (inner_ND,) = torch.autograd.grad(loss, states_ND, create_graph=True)
        return torch.autograd.grad(inner_ND.square().sum() + loss, (hidden_ND, weight_VD))

    ours, theirs = penalty_gradient(plain_logprob), penalty_gradient(plain)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_a_certain_target_keeps_a_slope_that_bfloat16_would_round_away():
    # Probabilities 1 - e^-9 and e^-9: the slope is e^-9 (W_0 - W_1) = (9 e^-9, 0), where 1 - p in bfloat16 is 0.
    hidden_ND = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.tensor([[9.0, 1.0], [0.0, 1.0]], dtype=torch.bfloat16)
    linear_logprob(hidden_ND, weight_VD, torch.tensor([0])).backward()
    slope = hidden_ND.grad[0, 0].item()
    assert abs(slope - 9 * math.exp(-9) / (1 + math.exp(-9))) < 1e-5, slope


def test_a_second_derivative_is_refused():
    hidden_ND, weight_VD, targets_N = case(4, 3, 7)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_logprob(hidden_ND, weight_VD, targets_N).sum(), hidden_ND, create_graph=True)


def test_bfloat16_inputs_give_float32_close_to_float64(block_elements):
    hidden_ND, weight_VD, targets_N = case(13, 16, 257, torch.bfloat16)
    logprob_N = linear_logprob(hidden_ND, weight_VD, targets_N)
    assert logprob_N.dtype == torch.float32
    exact_N = plain(hidden_ND.double(), weight_VD.double(), targets_N)
    # bfloat16 logits of size up to 15 round by at most 2^-5 each.
    assert (logprob_N - exact_N).abs().max() < 0.1
    logprob_N.sum().backward()
    exact = torch.autograd.grad(exact_N.sum(), weight_VD)[0]
    assert torch.nn.functional.cosine_similarity(weight_VD.grad.double().flatten(), exact.double().flatten(), 0) > 0.999


def test_no_tokens_give_no_log_probs_and_shapes_that_do_not_fit_are_refused():
    hidden_ND, weight_VD, targets_N = case(2, 3, 7)
    assert linear_logprob(hidden_ND[:0], weight_VD, targets_N[:0]).shape == (0,)
    with pytest.raises(ValueError, match="must be"):
        linear_logprob(hidden_ND, weight_VD[:, :2], targets_N)
    with pytest.raises(ValueError, match="targets"):
        linear_logprob(hidden_ND, weight_VD, targets_N[:1])


def test_large_logits_keep_their_differences_in_bfloat16(block_elements):
    """All logits are shifted by 40, where bfloat16's steps are a quarter; their differences reach 8, where they are 1/32."""
    torch.manual_seed(0)
    hidden_ND, weight_VD, targets_N = torch.randn(50, 16) / 2, torch.randn(257, 16), torch.randint(257, (50,))
    hidden_ND[:, 0], weight_VD[:, 0] = 8, 5
    hidden_ND, weight_VD = hidden_ND.bfloat16().requires_grad_(), weight_VD.bfloat16()
    wide_ND = hidden_ND.detach().double().requires_grad_()
    exact_N = plain(wide_ND, weight_VD.double(), targets_N)
    rough_N = plain(hidden_ND, weight_VD, targets_N)
    ours_N = linear_logprob(hidden_ND, weight_VD, targets_N)
    assert (ours_N.double() - exact_N).abs().max() < 0.02 < (rough_N.double() - exact_N).abs().max()
    ours, exact = (torch.autograd.grad(x_N.sum(), h_ND)[0] for x_N, h_ND in ((ours_N, hidden_ND), (exact_N, wide_ND)))
    assert (ours.double() - exact).norm() / exact.norm() < 0.01

"""The tangent kernels against torch's own forward-mode derivative of the plain formulas: values and gradients in float64."""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from drdpo.kernels.linear_logprob import logprob_and_slope, tangent_logprob
from drdpo.kernels.packed_attention import PrefixGroup
from drdpo.kernels.tangent import rms_norm, silu_gate, tangent_attention

GROUPS = [PrefixGroup(4, (3, 6)), PrefixGroup(0, (5,)), PrefixGroup(0, (1,)), PrefixGroup(2, (1, 40))]


def pair(*shape: int) -> Tensor:
    return torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)


def agree(ours, plain, inputs: list[Tensor], parameters: list[Tensor]) -> None:
    """ours(*inputs, *parameters) is plain and its tangent, stacked, with the same gradients for a random upstream one."""
    value, moved = torch.func.jvp(
        lambda *values: plain(*values, *parameters), tuple(x[0] for x in inputs), tuple(x[1] for x in inputs)
    )
    expected = torch.stack([value, moved])
    found = ours(*inputs, *parameters)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    upstream = torch.randn_like(expected)
    leaves = [*inputs, *parameters]
    for one, other in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.fixture(params=["whole", "pieces"])
def pieces(request, monkeypatch) -> None:
    """Everything at once, and a few rows at a time."""
    torch.manual_seed(0)
    if request.param == "pieces":
        monkeypatch.setattr(sys.modules["drdpo.kernels.tangent"], "_CHUNK_ELEMENTS", 20)
        monkeypatch.setitem(sys.modules["drdpo.kernels.tangent"]._BLOCK_ELEMENTS, True, 1)
        monkeypatch.setitem(sys.modules["drdpo.kernels.linear_logprob"]._BLOCK_ELEMENTS, True, 60)
        monkeypatch.setattr(sys.modules["drdpo.kernels.linear_logprob"], "_NARROWEST", 1)


def test_rms_norm(pieces) -> None:
    def plain(x_ND: Tensor, weight_D: Tensor) -> Tensor:
        return weight_D * x_ND * torch.rsqrt(x_ND.square().mean(dim=1, keepdim=True) + 1e-2)

    weight_D = torch.randn(8, dtype=torch.float64, requires_grad=True)
    agree(lambda x, w: rms_norm(x, w, 1e-2), plain, [pair(7, 8)], [weight_D])


def test_silu_gate(pieces) -> None:
    agree(silu_gate, lambda gate, up: silu(gate) * up, [pair(5, 9), pair(5, 9)], [])


def visible(groups: list[PrefixGroup]) -> Tensor:
    """[N, N] the tokens that each token of a packed row sees: its group's prefix, and its own piece up to itself."""
    pieces, prefixes = [], []
    for group in groups:
        first = pieces[-1] + 1 if pieces else 0
        for number, length in enumerate(group.lengths, start=first):
            pieces += [number] * length
            prefixes += [first if group.prefix else number] * length
    piece_N, prefix_N = torch.tensor(pieces), torch.tensor(prefixes)
    return ((piece_N == piece_N[:, None]) | (piece_N == prefix_N[:, None])).tril()


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_attention(kv_heads: int, pieces) -> None:
    tokens, hidden_NN = sum(group.tokens for group in GROUPS), ~visible(GROUPS)

    def plain(query_NHE: Tensor, key_NKE: Tensor, value_NKE: Tensor) -> Tensor:
        key_NHE, value_NHE = (part.repeat_interleave(6 // kv_heads, dim=1) for part in (key_NKE, value_NKE))
        logits_HNN = 0.7 * torch.einsum("nhe,mhe->hnm", query_NHE, key_NHE)
        return torch.einsum("hnm,mhe->nhe", logits_HNN.masked_fill(hidden_NN, float("-inf")).softmax(dim=2), value_NHE)

    inputs = [pair(tokens, 6, 4), pair(tokens, kv_heads, 4), pair(tokens, kv_heads, 4)]
    agree(lambda q, k, v: tangent_attention(q, k, v, GROUPS, 0.7), plain, inputs, [])


def test_logprob(pieces) -> None:
    weight_VD = torch.randn(33, 6, dtype=torch.float64, requires_grad=True)
    targets_N = torch.randint(33, (7,))

    def plain(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        return torch.log_softmax(hidden_ND @ weight_VD.T, dim=1).gather(1, targets_N[:, None]).squeeze(1)

    def ours(pair_2ND: Tensor, weight_VD: Tensor) -> Tensor:
        known = logprob_and_slope(pair_2ND[0].detach(), weight_VD.detach(), targets_N)
        return torch.stack(tangent_logprob(pair_2ND, weight_VD, targets_N, known))

    agree(ours, plain, [pair(7, 6)], [weight_VD])


def test_slope_is_the_gradient_and_no_tokens_have_none(pieces) -> None:
    hidden_ND = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight_VD, targets_N = torch.randn(11, 6, dtype=torch.float64), torch.randint(11, (5,))
    plain_N = torch.log_softmax(hidden_ND @ weight_VD.T, dim=1).gather(1, targets_N[:, None]).squeeze(1)
    logprob_N, lse_N, slope_ND = logprob_and_slope(hidden_ND, weight_VD, targets_N)
    torch.testing.assert_close(lse_N, (hidden_ND @ weight_VD.T).logsumexp(dim=1))
    torch.testing.assert_close(logprob_N, plain_N)
    torch.testing.assert_close(slope_ND, torch.autograd.grad(plain_N.sum(), hidden_ND)[0])
    assert [part.shape for part in logprob_and_slope(hidden_ND[:0], weight_VD, targets_N[:0])] == [(0,), (0,), (0, 6)]


def test_a_second_derivative_is_refused() -> None:
    gate = pair(2, 3)
    with pytest.raises(RuntimeError, match="differentiable once only"):
        torch.autograd.grad(silu_gate(gate, gate).sum(), gate, create_graph=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_close_to_float64(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    tokens, tolerance = sum(group.tokens for group in GROUPS), 1e-5 if dtype == torch.float32 else 3e-2
    inputs = [torch.randn(2, tokens, heads, 16, dtype=dtype, device=device) for heads in (6, 2, 2)]
    wide_inputs = [part.double().requires_grad_() for part in inputs]
    inputs = [part.requires_grad_() for part in inputs]
    upstream = torch.randn(2, tokens, 6, 16, dtype=dtype, device=device)
    outputs = []
    for parts in (inputs, wide_inputs):
        out = tangent_attention(*parts, GROUPS, 0.25)
        outputs.append([out, *torch.autograd.grad(out, parts, upstream.to(out.dtype))])
    for ours, theirs in zip(*outputs, strict=True):
        assert ours.dtype == dtype
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < tolerance

"""The tangent kernels against torch's own forward-mode derivative of the plain formulas: values and gradients in float64."""

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from drdpo.kernels import tangent
from drdpo.kernels.linear_logprob import logprob_and_slope, tangent_logprob
from drdpo.kernels.packed_attention import PrefixGroup
from drdpo.kernels.tangent import Heads, rotate

GROUPS = [PrefixGroup(4, (3, 6)), PrefixGroup(0, (5,)), PrefixGroup(0, (1,)), PrefixGroup(2, (1, 40))]


def norm(x_2ND: Tensor, a_ND: Tensor, b_ND: Tensor, weight_D: Tensor) -> tuple[Tensor, ...]:
    """All parts of the norm: value, tangent, and the gradients for both and for the weight."""
    module = SimpleNamespace(weight=weight_D, variance_epsilon=1e-2)
    for_x, for_weight = tangent.rms_norm_second(module, *x_2ND, a_ND, b_ND, True)
    assert for_weight is not None
    assert tangent.rms_norm_second(module, *x_2ND, a_ND, b_ND, False)[1] is None
    for_dx = tangent.rms_norm("backward", module, x_2ND[0], b_ND)
    out = tangent.rms_norm("forward", module, x_2ND[0]), tangent.rms_norm("tangent", module, *x_2ND)
    return torch.stack(out), torch.stack([for_x, for_dx]), for_weight


def gate(gate_2NI: Tensor, up_2NI: Tensor, a_NI: Tensor, b_NI: Tensor) -> tuple[Tensor, ...]:
    """All parts of the gate."""
    (g, dg), (u, du) = gate_2NI, up_2NI
    out = tangent.silu_gate("forward", g, u) + tangent.silu_gate("tangent", g, u, dg, du)
    second, first = tangent.silu_gate("second", g, u, dg, du, a_NI, b_NI), tangent.silu_gate("backward", g, u, b_NI)
    return torch.stack(out), *(torch.stack(both) for both in zip(second, first, strict=True))


def attention(
    query_2NHE: Tensor, key_2NKE: Tensor, value_2NKE: Tensor, a_NHE: Tensor, b_NHE: Tensor, groups: Any, scale: float
) -> tuple[Tensor, ...]:
    """All parts of attention."""
    heads, moved = (Heads(query_2NHE[part], key_2NKE[part], value_2NKE[part]) for part in (0, 1))
    out, lse = tangent.attention_forward(heads, groups, scale)
    dout, mean = tangent.attention_tangent(heads, moved, groups, scale, out, lse)
    assert lse.dtype == mean.dtype == (torch.float64 if out.dtype == torch.float64 else torch.float32)
    second = tangent.attention_gradient(heads, groups, scale, out, lse, b_NHE, (moved, dout, mean, a_NHE))
    first = tangent.attention_gradient(heads, groups, scale, out, lse, b_NHE)
    return torch.stack([out, dout]), *(torch.stack(both) for both in zip(second, first, strict=True))


def pair(*shape: int) -> Tensor:
    return torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)


def agree(ours, plain, inputs: list[Tensor], parameters: list[Tensor]) -> None:
    """ours(*inputs, a, b, *parameters) is plain and its tangent, stacked, and the gradients of random upstream ones a, b."""
    value, moved = torch.func.jvp(
        lambda *values: plain(*values, *parameters), tuple(x[0] for x in inputs), tuple(x[1] for x in inputs)
    )
    expected = torch.stack([value, moved])
    upstream = torch.randn_like(expected)
    leaves = [*inputs, *parameters]
    with torch.no_grad():
        found = ours(*inputs, *upstream, *parameters)
    for one, other in zip(found, [expected, *torch.autograd.grad(expected, leaves, upstream)], strict=True):
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
    agree(norm, plain, [pair(7, 8)], [weight_D])


def test_silu_gate(pieces) -> None:
    agree(gate, lambda gate, up: silu(gate) * up, [pair(5, 9), pair(5, 9)], [])


def test_rotation() -> None:
    """As transformers turns queries and keys; a gradient is turned back."""
    angles_N1E = torch.randn(5, 1, 2, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = angles_N1E.cos(), angles_N1E.sin()
    x_NHE = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    theirs, _ = apply_rotary_pos_emb(x_NHE[None], x_NHE[None], cos[None, :, 0], sin[None, :, 0], unsqueeze_dim=2)
    torch.testing.assert_close(rotate(x_NHE, cos, sin), theirs[0])
    upstream = torch.randn(1, 5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(rotate(upstream, cos, sin, back=True)[0], torch.autograd.grad(theirs, x_NHE, upstream)[0])


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
    agree(lambda *parts: attention(*parts, GROUPS, 0.7), plain, inputs, [])


def test_logprob(pieces) -> None:
    weight_VD = torch.randn(33, 6, dtype=torch.float64, requires_grad=True)
    targets_N = torch.randint(33, (7,))

    def plain(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        return torch.log_softmax(hidden_ND @ weight_VD.T, dim=1).gather(1, targets_N[:, None]).squeeze(1)

    def ours(pair_2ND: Tensor, a_N: Tensor, b_N: Tensor, weight_VD: Tensor) -> tuple[Tensor, ...]:
        known = logprob_and_slope(pair_2ND[0].detach(), weight_VD.detach(), targets_N)
        with torch.enable_grad():
            out = torch.stack(tangent_logprob(pair_2ND, weight_VD, targets_N, known))
        return out.detach(), *torch.autograd.grad(out, [pair_2ND, weight_VD], torch.stack([a_N, b_N]))

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
    pair_2ND, weight_VD, targets_N = pair(3, 4), torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    known = logprob_and_slope(pair_2ND[0].detach(), weight_VD, targets_N)
    logprob_N, _ = tangent_logprob(pair_2ND, weight_VD, targets_N, known)
    with pytest.raises(RuntimeError, match="differentiable once only"):
        torch.autograd.grad(logprob_N.sum(), pair_2ND, create_graph=True)


def worst_error(tokens: int, groups: Sequence[PrefixGroup], dtype: torch.dtype, device: str, width: int = 16) -> float:
    """The largest of the relative errors of all that attention gives in a dtype, against float64 of the same numbers."""
    torch.manual_seed(0)
    shapes = [(2, tokens, 2, width), (2, tokens, 1, width), (2, tokens, 1, width), *[(tokens, 2, width)] * 2]
    given = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    found, exact = (attention(*parts, groups, 0.25) for parts in (given, [part.double() for part in given]))
    assert {part.dtype for part in found} == {dtype}
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(found, exact, strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_attention_of_lower_precision_is_close_to_float64(dtype: torch.dtype, bound: float, device: str) -> None:
    """On a GPU float32 is multiplied as bfloat16 halves."""
    assert worst_error(sum(group.tokens for group in GROUPS), GROUPS, dtype, device) < bound * (1 + 3 * (device == "cuda"))

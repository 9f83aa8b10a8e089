"""A decoder layer's pointwise parts on a value and its tangent, with first-order backward passes written out.

A pair (x, dx) is stacked: pair_2X[0] is x, pair_2X[1] is dx = d/dh x(h) at h = 0. Both outputs can be differentiated, once,
for inputs and parameters; that is all that WDPO's tangent solver needs. Linear maps take the stack as it is. Only inputs are
kept for the backward pass; the sums are in float32 (float64 for float64 inputs), a few rows at a time on a CPU, so that they
stay in its cache. Shapes: N tokens, D width, I inner width, C rows of one chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from drdpo.kernels.hand_written import in_pieces, refuse_graph, wide

_CHUNK_ELEMENTS = 1 << 19
"""Elements of a chunk on a CPU: 2 MiB in float32, of which several are alive at once."""


def _chunks(pair_2ND: Tensor) -> Iterator[slice]:
    rows, width = pair_2ND.shape[1:]
    size = max(1, _CHUNK_ELEMENTS // width) if in_pieces(pair_2ND) else rows
    for start in range(0, rows, max(1, size)):
        yield slice(start, min(start + size, rows))


def rms_norm(pair_2ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """w n with n = x r, r = (mean x^2 + epsilon)^(-1/2) (1910.07467), and its tangent w r (dx - n mean(n dx)).

    Args:
        pair_2ND: [2, N, D] value and tangent.
        weight_D: [D] w.
        epsilon: under the root.

    Returns:
        [2, N, D] in the input's dtype.
    """
    return _RMSNorm.apply(pair_2ND, weight_D, epsilon)


def silu_gate(gate_2NI: Tensor, up_2NI: Tensor) -> Tensor:
    """silu(g) u with silu(g) = g s, s = sigmoid(g) (2002.05202), and its tangent silu'(g) dg u + silu(g) du.

    Args:
        gate_2NI: [2, N, I] g and its tangent.
        up_2NI: [2, N, I] u and its tangent.

    Returns:
        [2, N, I] in the input's dtype.
    """
    return _SiluGate.apply(gate_2NI, up_2NI)


def _normalised(pair_2CD: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n, r [C, 1], dx and mean(n dx) [C, 1] of some rows."""
    x_CD, dx_CD = wide(pair_2CD)
    scale_C1 = torch.rsqrt(x_CD.square().mean(dim=1, keepdim=True) + epsilon)
    n_CD = x_CD * scale_C1
    return n_CD, scale_C1, dx_CD, (n_CD * dx_CD).mean(dim=1, keepdim=True)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, pair_2ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(pair_2ND, weight_D)
        ctx.epsilon = epsilon
        out_2ND = torch.empty_like(pair_2ND)
        for rows in _chunks(pair_2ND):
            n_CD, scale_C1, dx_CD, along_C1 = _normalised(pair_2ND[:, rows], epsilon)
            # Rounded before the weight is applied, as transformers does.
            out_2ND[0, rows] = n_CD.to(pair_2ND.dtype) * weight_D
            out_2ND[1, rows] = (scale_C1 * (dx_CD - n_CD * along_C1)).to(pair_2ND.dtype) * weight_D
        return out_2ND

    @staticmethod
    def backward(ctx: Any, grad_2ND: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """With a, b the gradients for n and its tangent, p = mean(n dx), q = mean(n b), u = mean(b dx):

            dx: r (b - n q);   x: r (a - n mean(n a)) - r^2 (p b + q dx + n (u - 3 p q)),

        as the Jacobian r (I - n n^T / D) is symmetric, dr/dx = -r^2 n / D and dn/dx is the Jacobian itself.
        """
        refuse_graph()
        pair_2ND, weight_D = ctx.saved_tensors
        grad_pair_2ND = torch.empty_like(pair_2ND)
        wants_weight = ctx.needs_input_grad[1]
        grad_weight_D = torch.zeros_like(wide(weight_D)) if wants_weight else None
        for rows in _chunks(pair_2ND):
            n_CD, r_C1, dx_CD, p_C1 = _normalised(pair_2ND[:, rows], ctx.epsilon)
            grad_2CD = wide(grad_2ND[:, rows])
            if grad_weight_D is not None:
                grad_weight_D += (grad_2CD[0] * n_CD + grad_2CD[1] * (r_C1 * (dx_CD - n_CD * p_C1))).sum(dim=0)
            a_CD, b_CD = grad_2CD * wide(weight_D)
            q_C1, u_C1 = (n_CD * b_CD).mean(dim=1, keepdim=True), (b_CD * dx_CD).mean(dim=1, keepdim=True)
            grad_pair_2ND[1, rows] = (r_C1 * (b_CD - n_CD * q_C1)).to(pair_2ND.dtype)
            curved_CD = p_C1 * b_CD + q_C1 * dx_CD + n_CD * (u_C1 - 3 * p_C1 * q_C1)
            straight_CD = a_CD - n_CD * (n_CD * a_CD).mean(dim=1, keepdim=True)
            grad_pair_2ND[0, rows] = (r_C1 * (straight_CD - r_C1 * curved_CD)).to(pair_2ND.dtype)
        return grad_pair_2ND, None if grad_weight_D is None else grad_weight_D.to(weight_D.dtype), None


class _SiluGate(Function):
    @staticmethod
    def forward(ctx: Any, gate_2NI: Tensor, up_2NI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_2NI, up_2NI)
        out_2NI = torch.empty_like(gate_2NI)
        for rows in _chunks(gate_2NI):
            (g_CI, dg_CI), (u_CI, du_CI) = wide(gate_2NI[:, rows]), wide(up_2NI[:, rows])
            s_CI = torch.sigmoid(g_CI)
            silu_CI = g_CI * s_CI
            out_2NI[0, rows] = (silu_CI * u_CI).to(gate_2NI.dtype)
            slope_CI = torch.addcmul(s_CI, silu_CI, 1 - s_CI)
            out_2NI[1, rows] = (slope_CI.mul_(dg_CI).mul_(u_CI).addcmul_(silu_CI, du_CI)).to(gate_2NI.dtype)
        return out_2NI

    @staticmethod
    def backward(ctx: Any, grad_2NI: Tensor) -> tuple[Tensor, Tensor]:
        """With a, b the gradients for the product and its tangent:

        g: a u silu' + b (silu'' dg u + silu' du);  dg: b u silu';  u: a silu + b silu' dg;  du: b silu,
        where silu' = s (1 + g (1 - s)) and silu'' = s (1 - s) (2 + g (1 - 2 s)).
        """
        refuse_graph()
        gate_2NI, up_2NI = ctx.saved_tensors
        grad_gate_2NI, grad_up_2NI = torch.empty_like(gate_2NI), torch.empty_like(up_2NI)
        for rows in _chunks(gate_2NI):
            (g_CI, dg_CI), (u_CI, du_CI), (a_CI, b_CI) = (wide(part[:, rows]) for part in (gate_2NI, up_2NI, grad_2NI))
            s_CI = torch.sigmoid(g_CI)
            silu_CI, rest_CI = g_CI * s_CI, 1 - s_CI
            slope_CI = torch.addcmul(s_CI, silu_CI, rest_CI)
            grad_up_2NI[1, rows] = (b_CI * silu_CI).to(gate_2NI.dtype)
            b_slope_CI = b_CI * slope_CI
            grad_up_2NI[0, rows] = (a_CI * silu_CI).addcmul_(b_slope_CI, dg_CI).to(gate_2NI.dtype)
            grad_gate_2NI[1, rows] = (b_slope_CI * u_CI).to(gate_2NI.dtype)
            # s (1 - s) (2 + g (1 - 2 s)) = (1 - s) (2 s + silu (1 - 2 s))
            bend_CI = torch.addcmul(2 * s_CI, silu_CI, rest_CI - s_CI).mul_(rest_CI).mul_(b_CI).mul_(dg_CI)
            bend_CI.addcmul_(a_CI, slope_CI).mul_(u_CI).addcmul_(b_slope_CI, du_CI)
            grad_gate_2NI[0, rows] = bend_CI.to(gate_2NI.dtype)
        return grad_gate_2NI, grad_up_2NI

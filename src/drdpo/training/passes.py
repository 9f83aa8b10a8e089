"""WDPO's four passes in one decoder layer: values, adjoints, tangents, gradients; drdpo.training.objective says why these.

Linear maps are called as the modules that they are, under another torch.nn.functional.linear, so that ZeRO-3 gathers their
weights around the call.

Shape suffixes: N tokens of the packed row, M with the sequences apart, D width, H query heads, K key-value heads, E width of
a head, I inner width; of one linear map I inputs and O outputs; R tokens that stand twice.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from drdpo.distributed import send
from drdpo.kernels import tangent as kernels
from drdpo.kernels.linear_logprob import refuse_graph
from drdpo.kernels.packed_attention import PrefixGroup
from drdpo.kernels.tangent import Heads, rms_norm, silu_gate
from drdpo.training.data import PackedBatch
from drdpo.training.lora import ADAPTER
from drdpo.training.patches import linear_by, product, value_product, weight_gradient
from drdpo.training.policy import Policy

QKV, GATES = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
LINEAR = {"self_attn": (*QKV, "o_proj"), "mlp": (*GATES, "down_proj")}


# The row, in its two forms ------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """A packed row's tokens in some order."""

    groups: tuple[PrefixGroup, ...]
    cos_N1E: Tensor
    sin_N1E: Tensor
    states_A: Tensor
    """Where the states are that predict the answers' tokens."""


class Row:
    """A micro-batch's packed row with each prompt once, and unless prompt_once with the sequences apart, where a prompt's
    gradients on its two copies are told apart. embeds_ND are the row's, the policy is the bare module."""

    def __init__(self, policy: Policy, batch: PackedBatch, embeds_ND: Tensor, prompt_once: bool) -> None:
        rotary = policy.language_model.get_decoder().rotary_emb
        cos_N1E, sin_N1E = (part[0, :, None] for part in rotary(embeds_ND, position_ids=batch.positions_1N))
        self.dtype, self.wide, self.narrow = policy.attention_dtype, embeds_ND.dtype, policy.head.weight.dtype
        """Of attention, of values and of sums over layers, and of all other tangents and gradients."""
        self._zeros = {dtype: embeds_ND.new_zeros((), dtype=dtype) for dtype in (self.wide, self.narrow)}
        device = embeds_ND.device
        self.pair_M = batch.pair_N
        self.rows_M: Tensor | None = None
        """The token of `once` that each of `apart` is."""
        self.once = Form(batch.groups, cos_N1E, sin_N1E, batch.states_A)
        self.apart = self.once
        if prompt_once or not any(group.prefix for group in batch.groups):
            return
        rows, first_N, last_N, groups = _apart(batch.groups)
        self.rows_M, self._first_N, last = (send(torch.tensor(part), device) for part in (rows, first_N, last_N))
        again = [place for place, row in enumerate(rows) if first_N[row] != place]
        self._again_R = send(torch.tensor(again), device)
        self._again_of_R = self.rows_M[self._again_R]
        rejected_A = batch.sequence_A >= len(batch.indices_B)
        states_A = torch.where(rejected_A, last[batch.states_A], self._first_N[batch.states_A])
        self.apart = Form(groups, cos_N1E[self.rows_M], sin_N1E[self.rows_M], states_A)
        self.pair_M = batch.pair_N[self.rows_M]

    def spread(self, values: Tensor) -> Tensor:
        """[M, ...] of [N, ...]."""
        return values if self.rows_M is None else values.index_select(0, self.rows_M)

    def to_first(self, grad: Tensor) -> Tensor:
        """[M, ...] of [N, ...]: the gradient of a token goes to its first copy."""
        return grad if self.rows_M is None else grad.index_select(0, self.rows_M).index_fill_(0, self._again_R, 0)

    def sum(self, grad: Tensor) -> Tensor:
        """[N, ...] of [M, ...]: a token's gradient is the sum over its copies."""
        if self.rows_M is None:
            return grad
        total = grad.index_select(0, self._first_N)
        return total.index_add_(0, self._again_of_R, grad.index_select(0, self._again_R))

    def hollow(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """[N, width] without memory, whose gradient has this dtype, or that of most gradients."""
        return self._zeros[dtype or self.narrow].expand(len(self.once.cos_N1E), width)

    def norm_second(
        self, norm: Any, x: Tensor, dx: Tensor, a: Tensor, b: Tensor, wants_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients for a norm's input and weight from mu and lambda of its output: see rms_norm_second; x and a in N rows,
        as the result, dx and b in M."""
        grad, for_weight = kernels.rms_norm_second(norm, self.spread(x), dx, self.to_first(a), b, wants_weight)
        return self.sum(grad), for_weight


# Linear maps, called as modules, by a function in place of torch's.


def value(linear: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b"""
    y_NO = value_product(x_NI, weight_OI)
    return y_NO if bias_O is None else y_NO.add_(bias_O)


def tangent(linear: Any, dx_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """dx W^T: the bias belongs to the value alone."""
    return product(dx_MI, weight_OI)


def adjoint(linear: Any, for_y_MO: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """lambda_y W"""
    return product(for_y_MO, weight_OI.T)


def called(by: Callable[..., Tensor], module: Any, x: Tensor) -> Tensor:
    """The module's output with its linear map computed so."""
    with linear_by(by):
        return module(x)


def _apart(groups: Sequence[PrefixGroup]) -> tuple[list[int], list[int], list[int], tuple[PrefixGroup, ...]]:
    """The tokens of a row with its sequences apart, as indices of the row; where each token of the row is in that, first and
    last; and its groups."""
    rows: list[int] = []
    start = 0
    for group in groups:
        suffix = start + group.prefix
        for length in group.suffixes:
            rows += [*range(start, start + group.prefix), *range(suffix, suffix + length)]
            suffix += length
        start = suffix
    last = {row: place for place, row in enumerate(rows)}
    first = {row: place for place, row in reversed([*enumerate(rows)])}
    lengths = [group.prefix + length for group in groups for length in group.suffixes]
    return (
        rows,
        [first[n] for n in range(start)],
        [last[n] for n in range(start)],
        tuple(PrefixGroup(0, (length,)) for length in lengths),
    )


# One layer's four passes --------------------------------------------------------------------------------------------------


class Inside(NamedTuple):
    """What pass 1 finds inside a layer, in N rows, or pass 3 of tangents, in M rows."""

    raw: list[Tensor]
    """Queries and keys before their norms, if they have such."""
    heads: Heads
    out_NHE: Tensor
    """Of attention."""
    sums_HN: Tensor
    """The log-sum-exp of attention's logits, or rowsum(P * dS) of drdpo.kernels.tangent."""
    gate_NI: Tensor
    up_NI: Tensor


class Adjoints(NamedTuple):
    """What pass 2 finds: lambda; M rows."""

    normed_MD: Tensor
    """Of the first norm's output."""
    heads: list[Tensor]
    """Of queries, keys and values before they are rotated."""
    out_MHE: Tensor
    mid_MD: Tensor
    gated_MI: Tensor


class Layer:
    """A decoder layer of transformers, above another or None, and what its passes leave for each other."""

    def __init__(self, module: Any, row: Row, below: "Layer | None") -> None:
        self.row, self.below = row, below
        self.keeps = not (module.gradient_checkpointing and module.training)
        self.attention, self.mlp = module.self_attn, module.mlp
        self.norms = [module.input_layernorm, module.post_attention_layernorm]
        # Qwen3 has norms over the width of a head.
        self.head_norms = [getattr(self.attention, name) for name in ("q_norm", "k_norm") if hasattr(self.attention, name)]
        self.border: dict[str, Tensor] = {}
        """x and dx of the layer's input and of its middle; lambda of its second norm's output, which spares pass 4 most
        products of pass 2."""
        self.known: Inside | None = None
        self.back: Adjoints | None = None
        self.moved: Inside | None = None
        self.operands: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        """(x, dx, lambda_y) of the linear maps that pass 4 comes to next."""

    # Passes 1 to 3.

    def values(self, x_ND: Tensor) -> Tensor:
        """Pass 1: the output [N, D]."""
        self.border["x"] = x_ND
        known = self._values()
        self.known = known if self.keeps else None
        (gated_NI,) = silu_gate("forward", known.gate_NI, known.up_NI)
        return self._map(value, "down_proj", gated_NI).add_(self.border["mid"])

    def _values(self) -> Inside:
        border, form = self.border, self.row.once
        normed_ND = rms_norm("forward", self.norms[0], border["x"])
        raw = [self._map(value, name, normed_ND) for name in QKV]
        scaled = [rms_norm("forward", norm, part) for norm, part in zip(self.head_norms, raw, strict=False)]
        heads = self._rotated([*scaled, *raw[len(scaled) :]], form)
        out_NHE, lse_HN = kernels.attention_forward(heads, form.groups, self.attention.scaling)
        if "mid" not in border:
            border["mid"] = self._map(value, "o_proj", out_NHE.flatten(1).to(normed_ND.dtype)).add_(border["x"])
        normed_ND = rms_norm("forward", self.norms[1], border["mid"])
        gate_NI, up_NI = (self._map(value, name, normed_ND) for name in GATES)
        return Inside(raw[: len(scaled)], heads, out_NHE, lse_HN, gate_NI, up_NI)

    def adjoints(self, for_y_MD: Tensor) -> Tensor:
        """Pass 2: from lambda of the output, that of the input [M, D]."""
        back = self._adjoints(self.known or self._values(), for_y_MD)
        self.back = back if self.keeps else None
        return self._for_x(back)

    def _for_x(self, back: Adjoints) -> Tensor:
        return rms_norm("backward", self.norms[0], self.row.spread(self.border["x"]), back.normed_MD).add_(back.mid_MD)

    def _adjoints(self, known: Inside, for_y_MD: Tensor) -> Adjoints:
        border, row = self.border, self.row
        gated_MI = self._map(adjoint, "down_proj", for_y_MD)
        if "for normed" not in border:
            for_gates = silu_gate("backward", row.spread(known.gate_NI), row.spread(known.up_NI), gated_MI)
            border["for normed"] = self._joined(GATES, for_gates)
        mid_MD = rms_norm("backward", self.norms[1], row.spread(border["mid"]), border["for normed"]).add_(for_y_MD)
        heads, out_MHE, lse_HM = self._apart(known)
        for_out_MHE = self._map(adjoint, "o_proj", mid_MD).view(out_MHE.shape).to(row.dtype)
        scaling = self.attention.scaling
        grads = kernels.attention_gradient(heads, row.apart.groups, scaling, out_MHE, lse_HM, for_out_MHE)
        for_heads = self._unrotated(grads, row.apart)
        return Adjoints(self._joined(QKV, self._before_norms(known, for_heads)), for_heads, for_out_MHE, mid_MD, gated_MI)

    def tangents(self, dx_MD: Tensor) -> Tensor:
        """Pass 3: the output's tangent [M, D]."""
        self.border["dx"] = dx_MD
        known = self.known or self._values()
        moved = self._tangents(known)
        self.moved = moved if self.keeps else None
        return self.border["dmid"] + self._map(tangent, "down_proj", self._gated_tangent(known, moved))

    def _tangents(self, known: Inside) -> Inside:
        border, row = self.border, self.row
        normed_MD = rms_norm("tangent", self.norms[0], row.spread(border["x"]), border["dx"], row.narrow)
        raw = [self._map(tangent, name, normed_MD) for name in QKV]
        parts = zip(self.head_norms, known.raw, raw, strict=False)
        scaled = [rms_norm("tangent", norm, row.spread(x), dx, row.narrow) for norm, x, dx in parts]
        moved = self._rotated([*scaled, *raw[len(scaled) :]], row.apart)
        heads, out_MHE, lse_HM = self._apart(known)
        scaling = self.attention.scaling
        dout_MHE, mean_HM = kernels.attention_tangent(heads, moved, row.apart.groups, scaling, out_MHE, lse_HM)
        if "dmid" not in border:
            border["dmid"] = border["dx"] + self._map(tangent, "o_proj", dout_MHE.flatten(1).to(row.narrow))
        normed_MD = rms_norm("tangent", self.norms[1], row.spread(border["mid"]), border["dmid"], row.narrow)
        gate_MI, up_MI = (self._map(tangent, name, normed_MD) for name in GATES)
        return Inside(raw[: len(scaled)], moved, dout_MHE, mean_HM, gate_MI, up_MI)

    # Pass 4: the graph, then what its nodes do, in the order in which they are reached.

    def graph(self, *parts_ND: Tensor) -> tuple[Tensor, Tensor]:
        """From the input to the output, each given as parts whose sum it is."""
        width, hollow = parts_ND[0].shape[1], self.row.hollow
        both = (hollow(width, self.row.wide), hollow(width))
        stream_ND, normed_ND = Node.apply(self._first_norm, both, *parts_ND, self.norms[0].weight)
        raw = [self._node(name, normed_ND) for name in QKV]
        heads = self.attention.head_dim * (raw[0].shape[1] // self.attention.head_dim)
        out_ND = Node.apply(self._attend, (hollow(heads),), *raw, *(norm.weight for norm in self.head_norms))
        out_ND = self._node("o_proj", out_ND)
        stream_ND, normed_ND = Node.apply(self._second_norm, both, stream_ND, out_ND, self.norms[1].weight)
        gate_NI, up_NI = (self._node(name, normed_ND) for name in GATES)
        gated_NI = Node.apply(self._gate, (hollow(gate_NI.shape[1]),), gate_NI, up_NI)
        return stream_ND, self._node("down_proj", gated_NI)

    def recall(self, for_y_MD: Tensor) -> None:
        """Have the layer's inside, and what its last map needs, from lambda [M, D] of the output."""
        known = self.known = self.known or self._values()
        self.back = self.back or self._adjoints(known, for_y_MD)
        moved = self.moved = self.moved or self._tangents(known)
        (gated_NI,) = silu_gate("forward", known.gate_NI, known.up_NI)
        self._expect("down_proj", gated_NI, self._gated_tangent(known, moved), for_y_MD)

    def _inside(self) -> tuple[Inside, Adjoints, Inside]:
        if self.known is None or self.back is None or self.moved is None:
            raise RuntimeError("the tangent solver's graph can be run backward once only")
        return self.known, self.back, self.moved

    def _gate(self, wanted: Sequence[bool], for_gated_NI: Tensor) -> list[Tensor]:
        (known, back, moved), row, border = self._inside(), self.row, self.border
        normed_ND = rms_norm("forward", self.norms[1], border["mid"]).to(row.narrow)
        dnormed_MD = rms_norm("tangent", self.norms[1], row.spread(border["mid"]), border["dmid"], row.narrow)
        gate_MI, up_MI = row.spread(known.gate_NI), row.spread(known.up_NI)
        for name, for_y in zip(GATES, silu_gate("backward", gate_MI, up_MI, back.gated_MI), strict=True):
            self._expect(name, normed_ND, dnormed_MD, for_y)
        first_MI = row.to_first(for_gated_NI)
        grads = silu_gate("second", gate_MI, up_MI, moved.gate_NI, moved.up_NI, first_MI, back.gated_MI)
        return [row.sum(grad) for grad in grads]

    def _second_norm(self, wanted: Sequence[bool], for_mid_ND: Tensor, for_normed_ND: Tensor) -> list[Tensor | None]:
        (known, back, moved), border = self._inside(), self.border
        self._expect("o_proj", known.out_NHE.flatten(1), moved.out_NHE.flatten(1), back.mid_MD)
        known_parts = border["mid"], border["dmid"], for_normed_ND, border["for normed"]
        grad_ND, for_weight_D = self.row.norm_second(self.norms[1], *known_parts, wanted[-1])
        grad_ND += for_mid_ND
        return [grad_ND, grad_ND, for_weight_D]

    def _attend(self, wanted: Sequence[bool], for_out_ND: Tensor) -> list[Tensor | None]:
        (known, back, moved), row, border = self._inside(), self.row, self.border
        normed_ND = rms_norm("forward", self.norms[0], border["x"]).to(row.narrow)
        dnormed_MD = rms_norm("tangent", self.norms[0], row.spread(border["x"]), border["dx"], row.narrow)
        for name, for_y in zip(QKV, self._before_norms(known, back.heads), strict=True):
            self._expect(name, normed_ND, dnormed_MD, for_y)
        heads, out_MHE, lse_HM = self._apart(known)
        first_MHE = row.to_first(for_out_ND.view(known.out_NHE.shape).to(row.dtype))
        along, scaling = (moved.heads, moved.out_NHE, moved.sums_HN, first_MHE), self.attention.scaling
        grads = kernels.attention_gradient(heads, row.apart.groups, scaling, out_MHE, lse_HM, back.out_MHE, along)
        for_heads = self._unrotated(Heads(*map(row.sum, grads)), row.once)
        for_weights = []
        for number, norm in enumerate(self.head_norms):
            known_parts = known.raw[number], moved.raw[number], for_heads[number], back.heads[number]
            for_heads[number], for_weight_E = row.norm_second(norm, *known_parts, wanted[3 + number])
            for_weights.append(for_weight_E)
        return [*for_heads, *for_weights]

    def _first_norm(self, wanted: Sequence[bool], for_x_ND: Tensor, for_normed_ND: Tensor) -> list[Tensor | None]:
        (_, back, _), border = self._inside(), self.border
        known_parts = border["x"], border["dx"], for_normed_ND, back.normed_MD
        grad_ND, for_weight_D = self.row.norm_second(self.norms[0], *known_parts, wanted[-1])
        grad_ND += for_x_ND
        for_x_MD = self._for_x(back)
        self.known = self.back = self.moved = None
        self.border = {}
        if self.below is not None:
            self.below.recall(for_x_MD)
        return [*[grad_ND] * (len(wanted) - 1), for_weight_D]

    # Linear maps.

    def _module(self, name: str) -> Any:
        return getattr(self.mlp if name in LINEAR["mlp"] else self.attention, name)

    def _map(self, by: Callable[..., Tensor], name: str, x: Tensor) -> Tensor:
        """W x + B (s A x) with an adapter; its transpose by `adjoint`."""
        base, adapter = halves_of(self._module(name))
        y = called(by, base, x)
        if adapter is None:
            return y
        first, second = (adapter.up, adapter.down) if by is adjoint else (adapter.down, adapter.up)
        return y.add_(called(by, second, called(by, first, x.to(first.weight.dtype)) * adapter.scale))

    def _joined(self, names: Sequence[str], grads: Sequence[Tensor]) -> Tensor:
        """lambda of the maps' common input."""
        first, *others = (self._map(adjoint, name, grad) for name, grad in zip(names, grads, strict=True))
        for other in others:
            first += other
        return first

    def _node(self, name: str, x: Tensor) -> Tensor:
        base, adapter = halves_of(self._module(name))
        y = self._linear_node(name, base, x)
        if adapter is None:
            return y
        half = self._linear_node(f"{name} down", adapter.down, x, adapter.scale)
        return y + self._linear_node(f"{name} up", adapter.up, half)

    def _linear_node(self, name: str, module: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
        def by(linear: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
            inputs = (x, weight_OI) if bias_O is None else (x, weight_OI, bias_O)
            outs = (self.row.hollow(len(weight_OI)),)
            return Node.apply(partial(self._linear, name, weight_OI, scale), outs, *inputs)

        return called(by, module, x)

    def _linear(
        self, name: str, weight_OI: Tensor, scale: float, wanted: Sequence[bool], grad_NO: Tensor
    ) -> list[Tensor | None]:
        x_NI, dx_MI, for_y_MO = self.operands.pop(name)
        if scale != 1:
            grad_NO = grad_NO * scale
        grads: list[Tensor | None] = [None] * len(wanted)
        if wanted[0]:
            grads[0] = product(grad_NO, weight_OI.T)
        if wanted[1]:
            grads[1] = weight_gradient(weight_OI.dtype, (grad_NO, x_NI), (for_y_MO, dx_MI))
        if len(wanted) > 2 and wanted[2]:
            grads[2] = grad_NO.sum(dim=0).to(weight_OI.dtype)
        return grads

    def _expect(self, name: str, x: Tensor, dx: Tensor, for_y: Tensor) -> None:
        """Pass 4 is about to come to a linear map."""
        dtype = self.row.narrow
        x, dx, for_y = self.operands[name] = x.to(dtype), dx.to(dtype), for_y.to(dtype)
        _, adapter = halves_of(self._module(name))
        if adapter is not None:
            half, dhalf = (called(tangent, adapter.down, part) * adapter.scale for part in (x, dx))
            self.operands[f"{name} down"] = x, dx, called(adjoint, adapter.up, for_y) * adapter.scale
            self.operands[f"{name} up"] = half, dhalf, for_y

    # Between maps and attention.

    def _rotated(self, parts: Sequence[Tensor], form: Form) -> Heads:
        query, key, value = (part.view(len(part), -1, self.attention.head_dim) for part in parts)
        query, key = (kernels.rotate(part, form.cos_N1E, form.sin_N1E) for part in (query, key))
        return Heads(*(part.to(self.row.dtype) for part in (query, key, value)))

    def _unrotated(self, grads: Heads, form: Form) -> list[Tensor]:
        """Gradients for queries, keys and values before _rotated."""
        query, key = (kernels.rotate(part, form.cos_N1E, form.sin_N1E, back=True) for part in grads[:2])
        return [part.flatten(1).to(self.row.narrow) for part in (query, key, grads.value_NKE)]

    def _before_norms(self, known: Inside, grads: list[Tensor]) -> list[Tensor]:
        """lambda of what the linear maps return, from that of what goes into attention."""
        parts = zip(self.head_norms, known.raw, grads, strict=False)
        first = [rms_norm("backward", norm, self.row.spread(x), grad) for norm, x, grad in parts]
        return [*first, *grads[len(first) :]]

    def _apart(self, known: Inside) -> tuple[Heads, Tensor, Tensor]:
        """Heads, output and log-sum-exp of attention, M rows."""
        rows_M, spread = self.row.rows_M, self.row.spread
        lse_HM = known.sums_HN if rows_M is None else known.sums_HN.index_select(1, rows_M)
        return Heads(*map(spread, known.heads)), spread(known.out_NHE), lse_HM

    def _gated_tangent(self, known: Inside, moved: Inside) -> Tensor:
        gate_MI, up_MI = self.row.spread(known.gate_NI), self.row.spread(known.up_NI)
        return silu_gate("tangent", gate_MI, up_MI, moved.gate_NI, moved.up_NI)[0]


class Adapter(NamedTuple):
    """y = W x + up(s down(x))."""

    down: Any
    up: Any
    scale: float


def halves_of(module: Any) -> tuple[Any, Adapter | None]:
    """A linear layer, and the adapter that peft has put beside it."""
    if not hasattr(module, "lora_A"):
        return module, None
    return module.base_layer, Adapter(module.lora_A[ADAPTER], module.lora_B[ADAPTER], module.scaling[ADAPTER])


class Node(Function):
    """A node of pass 4: its outputs are given, and `back` of (which gradients are wanted, those of the outputs) is its
    backward pass."""

    @staticmethod
    def forward(ctx: Any, back: Callable[..., Sequence[Tensor | None]], outs: tuple[Tensor, ...], *inputs: Tensor) -> Any:
        ctx.back = back
        return outs if len(outs) > 1 else outs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph()
        return None, None, *ctx.back(ctx.needs_input_grad[2:], *grads)

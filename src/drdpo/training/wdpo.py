"""WDPO's tangent solver: the gradient of l + rho |g|^2, g = grad_e l, for Llama-like policies on packed rows, without a
double backward.

A pair's loss depends on its input embeddings e through its margin m alone, so g = l'(m) q with q = grad_e m. With the
direction t = c q held fixed, c = 2 rho l'(m)^2 makes d(l'^2 |q|^2) = 2 l' l'' |q|^2 dm + d<q, t> / rho, and <q, t> is the
derivative of m along t. So four passes over the layers, each of which leaves the next what it needs:

    1  values     x of every layer, and the losses
    2  adjoints   lambda = dm/dx of every layer, down to the embeddings: q
    3  tangents   dx of every layer, the derivative of x along t, on the values of pass 1; at the end dm
    4  gradients  of A m + dm for all weights (A = l' + 2 rho l' l'' |q|^2)

The adjoint of dx in dm is lambda itself, which pass 2 has found. So pass 4 propagates only mu, the adjoint of x, and a
linear map y = W x takes

    mu_x = W^T mu_y,    dW = mu_y x^T + lambda_y dx^T

while a norm, gate or attention f adds to J^T mu_y the derivative of <lambda_y, f'(x) dx> for x (drdpo.kernels.tangent). With
F for the products of a forward pass, the passes cost 1 + 1 + 1 + 3 F, a DPO step 3 F. Pass 4 is an ordinary backward pass of
autograd through a graph whose values are known: its nodes compute nothing on the way forward, and the gradients of weights
arrive as any others, as ZeRO requires.

What is kept of a layer between the passes is its border (Layer.border) or, without gradient checkpointing, its inside too.
What is not kept is computed again when a pass comes by.

With --wdpo_prompt=per_sequence a prompt, whose values are the same in both sequences, has an adjoint and a tangent in each.
So values and mu are in one row in which the prompt stands once ("once", N rows), adjoints and tangents in one with the
sequences apart ("apart", M rows). With --wdpo_prompt=once both are the same.

Linear maps are called as the modules that they are, under another torch.nn.functional.linear, so that ZeRO-3 gathers their
weights around the call.

Shape suffixes: B pairs, S = 2B sequences, N tokens of the packed row, M with the sequences apart, A answer tokens, D width,
H query heads, K key-value heads, E width of a head, I inner width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from drdpo.distributed import send
from drdpo.errors import DataError
from drdpo.kernels import tangent as kernels
from drdpo.kernels.linear_logprob import Known, logprob_and_slope, refuse_graph, tangent_logprob
from drdpo.kernels.packed_attention import PrefixGroup
from drdpo.kernels.tangent import Heads
from drdpo.training.data import PackedBatch, Pair, pack
from drdpo.training.lora import ADAPTER
from drdpo.training.losses import Method, Pairs
from drdpo.training.patches import linear_by, product, value_product, weight_gradient
from drdpo.training.policy import Policy, decoder_of, pairs_of, sum_by_sequence

QKV, GATES = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
LINEAR = {"self_attn": (*QKV, "o_proj"), "mlp": (*GATES, "down_proj")}
DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Of transformers, whose formulas these are. Others use the same modules in another way (SmolLM3 skips the rotary positions
of some layers), which numbers in bfloat16 on a short row need not show."""


# The row, in its two forms ------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """A packed row's tokens in some order."""

    groups: tuple[PrefixGroup, ...]
    cos_N1E: Tensor
    sin_N1E: Tensor
    states_A: Tensor
    """Where the states are that predict the answers' tokens."""


class Row:
    """A micro-batch's packed row with each prompt once, and with the sequences apart if a prompt's gradients on its two
    copies are to be told apart.

    Args:
        policy: the bare module.
        batch: B pairs.
        embeds_ND: of the row.
        prompt_once: one form is enough.
    """

    def __init__(self, policy: Policy, batch: PackedBatch, embeds_ND: Tensor, prompt_once: bool) -> None:
        rotary = decoder_of(policy).rotary_emb
        cos_N1E, sin_N1E = (part[0, :, None] for part in rotary(embeds_ND, position_ids=batch.positions_1N))
        self.dtype = policy.attention_dtype
        self.zero = embeds_ND.new_zeros(())
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
        self._again_E = send(torch.tensor(again), device)
        self._again_of_E = self.rows_M[self._again_E]
        rejected_A = batch.sequence_A >= len(batch.indices_B)
        states_A = torch.where(rejected_A, last[batch.states_A], self._first_N[batch.states_A])
        self.apart = Form(groups, cos_N1E[self.rows_M], sin_N1E[self.rows_M], states_A)
        self.pair_M = batch.pair_N[self.rows_M]

    def spread(self, values: Tensor) -> Tensor:
        """[M, ...] of [N, ...]."""
        return values if self.rows_M is None else values.index_select(0, self.rows_M)

    def to_first(self, grad: Tensor) -> Tensor:
        """[M, ...] of [N, ...]: the gradient of a token goes to its first copy."""
        return grad if self.rows_M is None else grad.index_select(0, self.rows_M).index_fill_(0, self._again_E, 0)

    def sum(self, grad: Tensor) -> Tensor:
        """[N, ...] of [M, ...]: a token's gradient is the sum over its copies."""
        if self.rows_M is None:
            return grad
        total = grad.index_select(0, self._first_N)
        return total.index_add_(0, self._again_of_E, grad.index_select(0, self._again_E))

    def hollow(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """[N, width] without memory."""
        return self.zero.to(dtype or self.zero.dtype).expand(len(self.once.cos_N1E), width)

    def norm_second(
        self, norm: Any, x: Tensor, dx: Tensor, a: Tensor, b: Tensor, wants_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients for a norm's input and weight from mu and lambda of its output: see rms_norm_second; x and a in N rows,
        as the result, dx and b in M."""
        parts = (part.view(-1, len(norm.weight)) for part in (self.spread(x), dx, self.to_first(a), b))
        x_, dx_, a_, b_ = parts
        grad, for_weight = kernels.rms_norm_second(x_, dx_, norm.weight, norm.variance_epsilon, a_, b_, wants_weight)
        return self.sum(grad.view(dx.shape)), for_weight

    # Linear maps, called as modules.

    def value(self, module: Any, x_NI: Tensor) -> Tensor:
        """x W^T + b"""
        def by(linear: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
            y = value_product(x, weight_OI)
            return y if bias_O is None else y.add_(bias_O)

        with linear_by(by):
            return module(x_NI)

    def tangent(self, module: Any, dx_MI: Tensor) -> Tensor:
        """dx W^T: the bias belongs to the value alone."""
        with linear_by(lambda linear, dx, weight_OI, bias_O=None: product(dx, weight_OI)):
            return module(dx_MI)

    def adjoint(self, module: Any, for_y_MO: Tensor) -> Tensor:
        """lambda_y W"""
        with linear_by(lambda linear, grad, weight_OI, bias_O=None: product(grad, weight_OI.T)):
            return module(for_y_MO)


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
    return rows, [first[n] for n in range(start)], [last[n] for n in range(start)], tuple(
        PrefixGroup(0, (length,)) for length in lengths
    )


# One layer's four passes --------------------------------------------------------------------------------------------------


class Values(NamedTuple):
    """What pass 1 finds inside a layer; N rows."""

    raw: list[Tensor]
    """Queries and keys before their norms, if they have such."""
    heads: Heads
    out_NHE: Tensor
    """Of attention, as is the log-sum-exp of its logits."""
    lse_HN: Tensor
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


class Tangents(NamedTuple):
    """What pass 3 finds: tangents of Values, and rowsum(P * dS) of drdpo.kernels.tangent; M rows."""

    raw: list[Tensor]
    heads: Heads
    out_MHE: Tensor
    mean_HM: Tensor
    gate_MI: Tensor
    up_MI: Tensor


class Layer:
    """A decoder layer and what its passes leave for each other.

    Args:
        module: of transformers.
        row: of the micro-batch.
        below: the layer before.
    """

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
        self.known: Values | None = None
        self.back: Adjoints | None = None
        self.moved: Tangents | None = None
        self.operands: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        """(x, dx, lambda_y) of the linear maps that pass 4 comes to next."""

    # Passes 1 to 3.

    def values(self, x_ND: Tensor) -> Tensor:
        """Pass 1: the output [N, D]."""
        self.border["x"] = x_ND
        known = self._values()
        self.known = known if self.keeps else None
        gated_NI = kernels.silu_gate_forward(known.gate_NI, known.up_NI)
        return self._map(self.row.value, "down_proj", gated_NI).add_(self.border["mid"])

    def _values(self) -> Values:
        border, form, value = self.border, self.row.once, self.row.value
        normed_ND = _normed(self.norms[0], border["x"])
        raw = [self._map(value, name, normed_ND) for name in QKV]
        normed = [_normed(norm, part) for norm, part in zip(self.head_norms, raw, strict=False)]
        heads = self._rotated([*normed, *raw[len(normed) :]], form)
        out_NHE, lse_HN = kernels.attention_forward(heads, form.groups, self.attention.scaling)
        if "mid" not in border:
            border["mid"] = self._map(value, "o_proj", out_NHE.flatten(1).to(normed_ND.dtype)).add_(border["x"])
        normed_ND = _normed(self.norms[1], border["mid"])
        gate_NI, up_NI = (self._map(value, name, normed_ND) for name in GATES)
        return Values(raw[: len(normed)], heads, out_NHE, lse_HN, gate_NI, up_NI)

    def adjoints(self, for_y_MD: Tensor) -> Tensor:
        """Pass 2: from lambda of the output, that of the input [M, D]."""
        back = self._adjoints(self.known or self._values(), for_y_MD)
        self.back = back if self.keeps else None
        return self._for_x(back)

    def _for_x(self, back: Adjoints) -> Tensor:
        return _normed_back(self.norms[0], self.row.spread(self.border["x"]), back.normed_MD).add_(back.mid_MD)

    def _adjoints(self, known: Values, for_y_MD: Tensor) -> Adjoints:
        border, row = self.border, self.row
        gated_MI = self._map(row.adjoint, "down_proj", for_y_MD)
        if "for normed" not in border:
            for_gates = kernels.silu_gate_backward(row.spread(known.gate_NI), row.spread(known.up_NI), gated_MI)
            border["for normed"] = self._joined(GATES, for_gates)
        mid_MD = _normed_back(self.norms[1], row.spread(border["mid"]), border["for normed"]).add_(for_y_MD)
        heads, out_MHE, lse_HM = self._apart(known)
        for_out_MHE = self._map(row.adjoint, "o_proj", mid_MD).view(out_MHE.shape).to(row.dtype)
        scaling = self.attention.scaling
        grads = kernels.attention_backward(heads, row.apart.groups, scaling, out_MHE, lse_HM, for_out_MHE)
        for_heads = self._unrotated(grads, row.apart)
        return Adjoints(self._joined(QKV, self._before_norms(known, for_heads)), for_heads, for_out_MHE, mid_MD, gated_MI)

    def tangents(self, dx_MD: Tensor) -> Tensor:
        """Pass 3: the output's tangent [M, D]."""
        self.border["dx"] = dx_MD
        known = self.known or self._values()
        moved = self._tangents(known)
        self.moved = moved if self.keeps else None
        return self._map(self.row.tangent, "down_proj", self._gated_tangent(known, moved)).add_(self.border["dmid"])

    def _tangents(self, known: Values) -> Tangents:
        border, row, tangent = self.border, self.row, self.row.tangent
        normed_MD = _normed_tangent(self.norms[0], row.spread(border["x"]), border["dx"])
        raw = [self._map(tangent, name, normed_MD) for name in QKV]
        parts = zip(self.head_norms, known.raw, raw, strict=False)
        normed = [_normed_tangent(norm, row.spread(x), dx) for norm, x, dx in parts]
        moved = self._rotated([*normed, *raw[len(normed) :]], row.apart)
        heads, out_MHE, lse_HM = self._apart(known)
        scaling = self.attention.scaling
        dout_MHE, mean_HM = kernels.attention_tangent(heads, moved, row.apart.groups, scaling, out_MHE, lse_HM)
        if "dmid" not in border:
            border["dmid"] = self._map(tangent, "o_proj", dout_MHE.flatten(1).to(normed_MD.dtype)).add_(border["dx"])
        normed_MD = _normed_tangent(self.norms[1], row.spread(border["mid"]), border["dmid"])
        gate_MI, up_MI = (self._map(tangent, name, normed_MD) for name in GATES)
        return Tangents(raw[: len(normed)], moved, dout_MHE, mean_HM, gate_MI, up_MI)

    # Pass 4: the graph, then what its nodes do, in the order in which they are reached.

    def graph(self, *parts_ND: Tensor) -> tuple[Tensor, Tensor]:
        """From the input to the output, each given as parts whose sum it is."""
        width, hollow = parts_ND[0].shape[1], self.row.hollow
        both = (hollow(width), hollow(width))
        stream_ND, normed_ND = _Node.apply(self._first_norm, both, *parts_ND, self.norms[0].weight)
        raw = [self._node(name, normed_ND) for name in QKV]
        heads = self.attention.head_dim * (raw[0].shape[1] // self.attention.head_dim)
        out_ND = _Node.apply(self._attend, (hollow(heads),), *raw, *(norm.weight for norm in self.head_norms))
        out_ND = self._node("o_proj", out_ND)
        stream_ND, normed_ND = _Node.apply(self._second_norm, both, stream_ND, out_ND, self.norms[1].weight)
        gate_NI, up_NI = (self._node(name, normed_ND) for name in GATES)
        gated_NI = _Node.apply(self._gate, (hollow(gate_NI.shape[1]),), gate_NI, up_NI)
        return stream_ND, self._node("down_proj", gated_NI)

    def recall(self, for_y_MD: Tensor) -> None:
        """Have the layer's inside, and what its last map needs.

        Args:
            for_y_MD: [M, D] lambda of the output.
        """
        known = self.known = self.known or self._values()
        self.back = self.back or self._adjoints(known, for_y_MD)
        moved = self.moved = self.moved or self._tangents(known)
        gated_NI = kernels.silu_gate_forward(known.gate_NI, known.up_NI)
        self._expect("down_proj", gated_NI, self._gated_tangent(known, moved), for_y_MD)

    def _inside(self) -> tuple[Values, Adjoints, Tangents]:
        if self.known is None or self.back is None or self.moved is None:
            raise RuntimeError("the tangent solver's graph can be run backward once only")
        return self.known, self.back, self.moved

    def _gate(self, wanted: Sequence[bool], for_gated_NI: Tensor) -> list[Tensor]:
        (known, back, moved), row, border = self._inside(), self.row, self.border
        normed_ND = _normed(self.norms[1], border["mid"])
        dnormed_MD = _normed_tangent(self.norms[1], row.spread(border["mid"]), border["dmid"])
        gate_MI, up_MI = row.spread(known.gate_NI), row.spread(known.up_NI)
        for name, for_y in zip(GATES, kernels.silu_gate_backward(gate_MI, up_MI, back.gated_MI), strict=True):
            self._expect(name, normed_ND, dnormed_MD, for_y)
        first_MI = row.to_first(for_gated_NI)
        grads = kernels.silu_gate_second(gate_MI, up_MI, moved.gate_MI, moved.up_MI, first_MI, back.gated_MI)
        return [row.sum(grad) for grad in grads]

    def _second_norm(self, wanted: Sequence[bool], for_mid_ND: Tensor, for_normed_ND: Tensor) -> list[Tensor | None]:
        (known, back, moved), border = self._inside(), self.border
        out_ND, dout_MD = (part.flatten(1).to(for_mid_ND.dtype) for part in (known.out_NHE, moved.out_MHE))
        self._expect("o_proj", out_ND, dout_MD, back.mid_MD)
        known_parts = border["mid"], border["dmid"], for_normed_ND, border["for normed"]
        grad_ND, for_weight_D = self.row.norm_second(self.norms[1], *known_parts, wanted[-1])
        grad_ND += for_mid_ND
        return [grad_ND, grad_ND, for_weight_D]

    def _attend(self, wanted: Sequence[bool], for_out_ND: Tensor) -> list[Tensor | None]:
        (known, back, moved), row, border = self._inside(), self.row, self.border
        normed_ND = _normed(self.norms[0], border["x"])
        dnormed_MD = _normed_tangent(self.norms[0], row.spread(border["x"]), border["dx"])
        for name, for_y in zip(QKV, self._before_norms(known, back.heads), strict=True):
            self._expect(name, normed_ND, dnormed_MD, for_y)
        heads, out_MHE, lse_HM = self._apart(known)
        first_MHE = row.to_first(for_out_ND.view(known.out_NHE.shape).to(row.dtype))
        grads = kernels.attention_second(
            heads, moved.heads, row.apart.groups, self.attention.scaling, out_MHE, lse_HM,
            moved.out_MHE, moved.mean_HM, first_MHE, back.out_MHE,
        )  # fmt: skip
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

    def _map(self, call: Callable[[Any, Tensor], Tensor], name: str, x: Tensor) -> Tensor:
        """W x + B (s A x) with an adapter; its transpose for Row.adjoint."""
        base, adapter = halves_of(self._module(name))
        y = call(base, x)
        if adapter is None:
            return y
        first, second = (adapter.up, adapter.down) if call == self.row.adjoint else (adapter.down, adapter.up)
        return y.add_(call(second, call(first, x.to(first.weight.dtype)) * adapter.scale))

    def _joined(self, names: Sequence[str], grads: Sequence[Tensor]) -> Tensor:
        """lambda of the maps' common input."""
        first, *others = (self._map(self.row.adjoint, name, grad) for name, grad in zip(names, grads, strict=True))
        for other in others:
            first += other
        return first

    def _node(self, name: str, x: Tensor) -> Tensor:
        base, adapter = halves_of(self._module(name))
        y = self._linear_node(name, base, x)
        if adapter is None:
            return y
        half = self._linear_node(f"{name} down", adapter.down, x.to(adapter.down.weight.dtype), adapter.scale)
        return y + self._linear_node(f"{name} up", adapter.up, half).to(y.dtype)

    def _linear_node(self, name: str, module: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
        def by(linear: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
            inputs = (x, weight_OI) if bias_O is None else (x, weight_OI, bias_O)
            out = self.row.hollow(len(weight_OI), x.dtype)
            return _Node.apply(partial(self._linear, name, weight_OI, scale), (out,), *inputs)

        with linear_by(by):
            return module(x)

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
        self.operands[name] = x, dx, for_y
        _, adapter = halves_of(self._module(name))
        if adapter is not None:
            row, dtype = self.row, adapter.down.weight.dtype
            half = row.value(adapter.down, x.to(dtype)) * adapter.scale
            dhalf = row.tangent(adapter.down, dx.to(dtype)) * adapter.scale
            self.operands[f"{name} down"] = x, dx, row.adjoint(adapter.up, for_y.to(dtype)) * adapter.scale
            self.operands[f"{name} up"] = half, dhalf, for_y

    # Between maps and attention.

    def _rotated(self, parts: Sequence[Tensor], form: Form) -> Heads:
        query, key, value = (part.view(len(part), -1, self.attention.head_dim) for part in parts)
        query, key = (kernels.rotate(part, form.cos_N1E, form.sin_N1E) for part in (query, key))
        return Heads(*(part.to(self.row.dtype) for part in (query, key, value)))

    def _unrotated(self, grads: Heads, form: Form) -> list[Tensor]:
        """Gradients for queries, keys and values before _rotated."""
        query, key, value = (part.to(form.cos_N1E.dtype) for part in grads)
        query, key = (kernels.rotate(part, form.cos_N1E, form.sin_N1E, back=True) for part in (query, key))
        return [part.flatten(1) for part in (query, key, value)]

    def _before_norms(self, known: Values, grads: list[Tensor]) -> list[Tensor]:
        """lambda of what the linear maps return, from that of what goes into attention."""
        parts = zip(self.head_norms, known.raw, grads, strict=False)
        first = [_normed_back(norm, self.row.spread(x), grad) for norm, x, grad in parts]
        return [*first, *grads[len(first) :]]

    def _apart(self, known: Values) -> tuple[Heads, Tensor, Tensor]:
        """Heads, output and log-sum-exp of attention, M rows."""
        rows_M, spread = self.row.rows_M, self.row.spread
        lse_HM = known.lse_HN if rows_M is None else known.lse_HN.index_select(1, rows_M)
        return Heads(*map(spread, known.heads)), spread(known.out_NHE), lse_HM

    def _gated_tangent(self, known: Values, moved: Tangents) -> Tensor:
        gate_MI, up_MI = self.row.spread(known.gate_NI), self.row.spread(known.up_NI)
        return kernels.silu_gate_tangent(gate_MI, up_MI, moved.gate_MI, moved.up_MI)


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


def _normed(norm: Any, x: Tensor) -> Tensor:
    """RMS norm over blocks of x's last axis as wide as the norm's weight: the model's width, or a head's."""
    weight = norm.weight
    return kernels.rms_norm_forward(x.view(-1, len(weight)), weight, norm.variance_epsilon).view(x.shape)


def _normed_tangent(norm: Any, x: Tensor, dx: Tensor) -> Tensor:
    x_, dx_ = (part.view(-1, len(norm.weight)) for part in (x, dx))
    return kernels.rms_norm_tangent(x_, dx_, norm.weight, norm.variance_epsilon).view(x.shape)


def _normed_back(norm: Any, x: Tensor, grad: Tensor) -> Tensor:
    x_, grad_ = (part.view(-1, len(norm.weight)) for part in (x, grad))
    return kernels.rms_norm_backward(x_, norm.weight, norm.variance_epsilon, grad_).view(x.shape)


class _Node(Function):
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


# All layers, and the ends -------------------------------------------------------------------------------------------------


class Passes:
    """The four passes over a micro-batch, to be called in order, `answers` last.

    Args:
        policy: the bare module.
        batch: B pairs.
        prompt_once: has a prompt one gradient, or one in each of its sequences?
    """

    def __init__(self, policy: Policy, batch: PackedBatch, prompt_once: bool) -> None:
        decoder = decoder_of(policy)
        with torch.no_grad():
            self._embeds_ND = self._embedded(policy, batch).detach()
            self.row = Row(policy, batch, self._embeds_ND, prompt_once)
        self.norm = decoder.norm
        self.layers: list[Layer] = []
        for module in decoder.layers:
            self.layers.append(Layer(module, self.row, self.layers[-1] if self.layers else None))
        for norm in [self.norm, *(norm for layer in self.layers for norm in (*layer.norms, *layer.head_norms))]:
            # ZeRO-3 leaves a norm's weight whole once it has been gathered (engine_config).
            if not norm.weight.numel():
                norm.weight.all_gather()

    @staticmethod
    def _embedded(policy: Policy, batch: PackedBatch) -> Tensor:
        embeds_ND = policy.embed(batch)[0]
        return embeds_ND.float() if policy.wide_values else embeds_ND

    @torch.no_grad()
    def values(self, policy: Policy, batch: PackedBatch) -> Known:
        """Pass 1: of the answers' tokens, log-probabilities and their slopes for the hidden states."""
        x_ND = self._embeds_ND
        del self._embeds_ND
        for layer in self.layers:
            x_ND = layer.values(x_ND)
        self._x_AD = x_ND.index_select(0, self.row.once.states_A)
        self.hidden_AD = _normed(self.norm, self._x_AD).to(policy.head.weight.dtype)
        return policy.head(logprob_and_slope, self.hidden_AD, batch.targets_A)

    @torch.no_grad()
    def adjoints(self, for_hidden_AD: Tensor) -> Tensor:
        """Pass 2: lambda of the input embeddings [M, D]."""
        self._for_hidden_AD = for_hidden_AD.to(self._x_AD.dtype)
        lambda_MD = self._for_last_x()
        for layer in reversed(self.layers):
            lambda_MD = layer.adjoints(lambda_MD)
        return lambda_MD

    def _for_last_x(self) -> Tensor:
        """[M, D] lambda of the last layer's output."""
        for_x_AD = _normed_back(self.norm, self._x_AD, self._for_hidden_AD)
        lambda_MD = for_x_AD.new_zeros(len(self.row.pair_M), for_x_AD.shape[1])
        return lambda_MD.index_add_(0, self.row.apart.states_A, for_x_AD)

    @torch.no_grad()
    def tangents(self, direction_MD: Tensor) -> Tensor:
        """Pass 3: tangents of the hidden states, [A, D]."""
        for layer in self.layers:
            direction_MD = layer.tangents(direction_MD)
        self._dx_AD = direction_MD.index_select(0, self.row.apart.states_A)
        return _normed_tangent(self.norm, self._x_AD, self._dx_AD).to(self.hidden_AD.dtype)

    def graph(self, policy: Policy, batch: PackedBatch) -> Tensor:
        """Pass 4 is a backward pass through this: hidden_AD with a graph."""
        parts: tuple[Tensor, ...] = (self._embedded(policy, batch),)
        for layer in self.layers:
            parts = layer.graph(*parts)
        return _Node.apply(self._last_norm, (self.hidden_AD,), *parts, self.norm.weight)

    def _last_norm(self, wanted: Sequence[bool], grad_AD: Tensor) -> list[Tensor | None]:
        known_parts = self.norm.weight, self.norm.variance_epsilon, grad_AD.to(self._x_AD.dtype), self._for_hidden_AD
        for_x_AD, for_weight_D = kernels.rms_norm_second(self._x_AD, self._dx_AD, *known_parts, wanted[-1])
        grad_ND = for_x_AD.new_zeros(len(self.row.once.cos_N1E), for_x_AD.shape[1])
        grad_ND.index_add_(0, self.row.once.states_A, for_x_AD)
        self.layers[-1].recall(self._for_last_x())
        return [*[grad_ND] * (len(wanted) - 1), for_weight_D]


class InputGradient(NamedTuple):
    """Of B pairs, all without a graph."""

    losses_B: Tensor
    pairs: Pairs
    gradient_MD: Tensor
    """[M, D] q."""
    margin_slopes_B: Tensor
    """[B] |q|, the margin's slope along the unit vector of q."""
    loss_slopes_B: Tensor
    """[B] l'(m)."""
    head: Known
    passes: Passes
    """Of which two are done."""

    @property
    def penalties_B(self) -> Tensor:
        """[B] |grad_e l|^2."""
        return (self.loss_slopes_B * self.margin_slopes_B).square()


def input_gradient(policy: Policy, batch: PackedBatch, reference_B2: Tensor, method: Method) -> InputGradient:
    """The gradient of every pair's margin with respect to its input embeddings: passes 1 and 2.

    Pairs do not attend to each other: q of the summed margins separates by pair. No gradient of a parameter is computed.

    Args:
        policy: the bare module.
        batch: B pairs.
        reference_B2: [B, 2] reference log-probs.
        method: with a penalty, whose loss is a function of the margins.
    """
    assert method.penalty is not None
    passes = Passes(policy, batch, method.penalty.prompt_once)
    head = passes.values(policy, batch)
    # The margin is the chosen answer's log-prob less the rejected one's.
    signs_A = 1 - 2 * (batch.sequence_A >= len(batch.indices_B)).to(head.slope_ND.dtype)
    gradient_MD = passes.adjoints(head.slope_ND * signs_A[:, None]).to(head.logprob_N.dtype)
    squares_M = gradient_MD.square().sum(dim=1)
    norm_B = squares_M.new_zeros(len(batch.indices_B)).index_add(0, passes.row.pair_M, squares_M).sqrt()
    pairs = pairs_of(sum_by_sequence(head.logprob_N, batch.sequence_A, batch), reference_B2, batch)
    return InputGradient(method.loss(pairs), pairs, gradient_MD, norm_B, _loss_slopes(pairs, method), head, passes)


def _loss_slopes(pairs: Pairs, method: Method) -> Tensor:
    """[B] l'(m)."""
    with torch.enable_grad():
        margins_B = pairs.margins_B.detach().requires_grad_()
        return torch.autograd.grad(method.loss(pairs._replace(margins_B=margins_B)).sum(), margins_B)[0]


def tangent_answers(
    policy: Policy, batch: PackedBatch, gradient: InputGradient, scale_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [S] of the answers, and their derivatives [S] along c q: pass 3, and the graph of pass 4, in which
    the gradient for the derivatives must be 1 for chosen answers and -1 for rejected ones.

    Args:
        policy: that check_tangent has passed.
        batch: B pairs.
        gradient: of input_gradient.
        scale_B: [B] c.
    """
    passes = gradient.passes
    direction_MD = scale_B[passes.row.pair_M][:, None] * gradient.gradient_MD
    dhidden_AD = passes.tangents(direction_MD.to(passes.row.zero.dtype))
    pair_2AD = torch.stack([passes.graph(policy, batch), dhidden_AD])
    logprob_A, slope_A = policy.head(tangent_logprob, pair_2AD, batch.targets_A, gradient.head)
    return sum_by_sequence(logprob_A, batch.sequence_A, batch), sum_by_sequence(slope_A, batch.sequence_A, batch)


def without_scale(moved: Tensor) -> Tensor:
    """Zero, with the gradient of the margins' derivatives along c q, which may not be scaled any more: lambda was not."""
    return _Node.apply(_checked, (torch.zeros_like(moved),), moved)


def _checked(wanted: Sequence[bool], grad: Tensor) -> list[Tensor]:
    torch._assert_async(grad == 1, "the objective with the tangent solver must not be scaled; give its share to `objective`")
    return [grad]


# May a policy be trained by the tangent solver? By its modules, and by numbers on a small row -----------------------------


def check_architecture(policy: Policy, model_path: str) -> None:
    """Refuse an architecture that the tangent pass does not compute.

    Args:
        policy: as loaded, or on the meta device.
        model_path: for the message.

    Raises:
        DataError: it is not one of DECODERS, or does not have their default gate.
    """
    try:
        decoder = decoder_of(policy)
        name = type(decoder).__name__
        if name not in DECODERS:
            raise DataError(f"it is a {name}, and the solver supports {', '.join(DECODERS)}")
        for layer in decoder.layers:
            if "silu" not in type(layer.mlp.act_fn).__name__.lower():
                raise DataError(f"its layers gate by {type(layer.mlp.act_fn).__name__}, not by SiLU")
    except DataError as error:
        raise _refusal(error, model_path) from error


def check_tangent(policy: Policy, model_path: str, method: Method) -> None:
    """Refuse a policy or a loss that the tangent solver would get wrong.

    Args:
        policy: as loaded, before DeepSpeed takes it.
        model_path: for the message.
        method: with a penalty.

    Raises:
        DataError: another architecture, an adapter that is not linear, values or slopes on a small row that are not the
            policy's own, or a loss that depends on more than the margins.
    """
    check_architecture(policy, model_path)
    try:
        _check_loss(method)
        for layer in decoder_of(policy).layers:
            for part, names in LINEAR.items():
                for name in names:
                    _check_linear(getattr(getattr(layer, part), name), f"{part}.{name}")
        with torch.random.fork_rng(devices=[]):
            _check_numbers(policy, method)
    except DataError as error:
        raise _refusal(error, model_path) from error


def _refusal(error: DataError, model_path: str) -> DataError:
    return DataError(
        f"{model_path}: --wdpo_solver=tangent cannot differentiate this model: {error}; pass --wdpo_solver=exact with "
        "--packing=false and --zero_stage=2 or less"
    )


def _check_linear(module: nn.Module, name: str) -> None:
    """Twice the input must come out at twice the size, exactly: a power of two rounds nothing."""
    base, adapter = halves_of(module)
    for part in (base, *(adapter[:2] if adapter else ())):
        width = getattr(part, "in_features", None)
        if not isinstance(width, int):
            raise DataError(f"its {name} is a {type(module).__name__}, which is not known to be linear")
        weight = next(part.parameters())
        probe_1D = torch.ones(1, width, device=weight.device, dtype=weight.dtype)
        with torch.no_grad(), linear_by(lambda linear, x, weight, bias=None: linear(x, weight)):
            once, twice = part(probe_1D), part(2 * probe_1D)
        if not torch.equal(twice, 2 * once):
            raise DataError(f"its {name} is not linear")


def _check_loss(method: Method) -> None:
    """Its gradient must come through the margins alone, as input_gradient assumes."""
    columns = {name: torch.ones(1) for name in method.reads}
    with torch.enable_grad():
        loss_B = method.loss(Pairs(torch.zeros(1), torch.zeros(2, requires_grad=True), columns))
    if loss_B.requires_grad:
        raise DataError("the loss depends on the log-ratios, not on the margins alone")


def _check_numbers(policy: Policy, method: Method) -> None:
    """Hidden states and the margin's gradient must be those of the policy's own passes, the slope along it its square."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = policy.head.weight.shape[0]
    ids = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (6, 9, 5)]
    device = policy.head.weight.device
    batch = pack([Pair(ids[0], ids[1], ids[2], columns=dict.fromkeys(method.reads, 1.0))], [0], prompt_once=True).to(device)
    ours = input_gradient(policy, batch, torch.zeros(1, 2, device=device), method)
    with torch.no_grad():
        chosen, rejected = tangent_answers(policy, batch, ours, torch.ones(1, device=device))[1]
    embeds_1ND = policy.embed(batch).detach().requires_grad_()
    with torch.enable_grad():
        hidden_AD = policy.answer_states(batch, embeds_1ND)[0]
    signs_A = 1 - 2 * batch.sequence_A.to(hidden_AD.dtype)
    (grad_1ND,) = torch.autograd.grad(hidden_AD, embeds_1ND, ours.head.slope_ND * signs_A[:, None])
    tolerance = 0.1 if embeds_1ND.dtype == torch.bfloat16 else 1e-3
    if not _relative_error(ours.passes.hidden_AD, hidden_AD.detach()) <= tolerance:
        raise DataError("its hidden states are not those of Llama's formulas")
    slope_error = _relative_error(chosen - rejected, ours.margin_slopes_B[0].square())
    if not max(_relative_error(ours.passes.row.sum(ours.gradient_MD), grad_1ND[0]), slope_error) <= tolerance:
        raise DataError("its derivatives are not those of Llama's formulas")


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())

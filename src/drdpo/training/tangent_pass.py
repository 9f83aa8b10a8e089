"""A Llama-like policy on values and tangents at once: log-probabilities of answers and how they move along a direction.

The pair (x, dx) goes through every layer stacked as [2, N, D]. Linear maps are called as the modules they are, on the stack,
so adapters and gathered parameters need nothing of their own; the rest are the kernels of drdpo.kernels.tangent_*. Only
ordinary reverse mode runs through it, so each layer is recomputed in the backward pass as for any other method.

Shape suffixes: N tokens of the row, A answer tokens, D width, H query heads, K key-value heads, E width of a head, S = 2B
sequences.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from drdpo.kernels.tangent_attention import tangent_attention
from drdpo.kernels.tangent_layers import rms_norm, silu_gate
from drdpo.kernels.tangent_logprob import tangent_logprob
from drdpo.kernels.vocabulary import logprob_and_slope
from drdpo.training.input_gradient import InputGradient
from drdpo.training.packing import PackedBatch
from drdpo.training.policy import Policy, decoder_of, sum_by_sequence
from drdpo.training.wide_rows import first_rows, rows_in_float32

LINEAR = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Of transformers, whose formulas these are. Others have the same modules and use them otherwise (SmolLM3 skips the rotary
positions of some layers), which numbers in bfloat16 on a short row need not show."""


def tangent_answers(policy: Policy, batch: PackedBatch, found: InputGradient) -> tuple[Tensor, Tensor]:
    """Log-probabilities [S] of the answers, and their derivatives [S] along found.direction_1ND; both with a graph.

    Args:
        policy: that check_tangent has passed.
        batch: B pairs.
        found: what input_gradient says of it.
    """
    pair_2AD = answer_pairs(policy, batch, policy.embed(batch), found.direction_1ND)
    # Of these states, not of the first pass's, which rounding sets apart: with their log-sum-exp these states' probabilities
    # do not sum to one. On SmolLM2-135M in bfloat16 a pair's penalty gradient was 14% off with theirs, 7% with these.
    known = policy.head(logprob_and_slope, pair_2AD[0].detach(), batch.targets_A)
    logprob_A, moved_A = policy.head(tangent_logprob, pair_2AD, batch.targets_A, known)
    return sum_by_sequence(logprob_A, batch.sequence_A, batch), sum_by_sequence(moved_A, batch.sequence_A, batch)


def answer_pairs(policy: Policy, batch: PackedBatch, embeds_1ND: Tensor, direction_1ND: Tensor) -> Tensor:
    """[2, A, D] hidden states that predict the answers' tokens, after the final norm, and their tangents."""
    decoder = decoder_of(policy)
    dtype, rows = policy.attention_dtype, None
    if policy.wide_first:
        embeds_1ND = embeds_1ND.float()
        rows = first_rows(batch.groups, embeds_1ND.device)
    cos_1NE, sin_1NE = decoder.rotary_emb(embeds_1ND, position_ids=batch.positions_1N)
    pair_2ND = torch.cat([embeds_1ND, direction_1ND.to(embeds_1ND.dtype)])
    for layer in decoder.layers:
        arguments = (layer, pair_2ND, batch.groups, cos_1NE[0, :, None], sin_1NE[0, :, None], dtype, rows)
        if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
            pair_2ND = checkpoint(_layer, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            pair_2ND = _layer(*arguments)
    return _norm(decoder.norm, pair_2ND[:, batch.states_A]).to(policy.head.weight.dtype)


def _layer(
    layer: Any, pair_2ND: Tensor, groups: Any, cos_N1E: Tensor, sin_N1E: Tensor, dtype: torch.dtype, rows_R: Tensor | None
) -> Tensor:
    """A decoder layer; attention in `dtype`, and the rest as it is, or under rows_in_float32 as that says."""
    with nullcontext() if rows_R is None else rows_in_float32(rows_R):
        return _layer_of_pair(layer, pair_2ND, groups, cos_N1E, sin_N1E, dtype)


def _layer_of_pair(
    layer: Any, pair_2ND: Tensor, groups: Any, cos_N1E: Tensor, sin_N1E: Tensor, dtype: torch.dtype
) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    heads = (*pair_2ND.shape[:2], -1, attention.head_dim)
    normed_2ND = _norm(layer.input_layernorm, pair_2ND)
    query, key, value = (
        linear_pair(part, normed_2ND).view(heads) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):  # Qwen3: over the width of a head
        query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
    query, key = _rotated(query, cos_N1E, sin_N1E), _rotated(key, cos_N1E, sin_N1E)
    attended_2NHE = tangent_attention(query.to(dtype), key.to(dtype), value.to(dtype), groups, attention.scaling)
    pair_2ND = pair_2ND + linear_pair(attention.o_proj, attended_2NHE.flatten(2).to(pair_2ND.dtype))
    normed_2ND = _norm(layer.post_attention_layernorm, pair_2ND)
    gated_2NI = silu_gate(linear_pair(mlp.gate_proj, normed_2ND), linear_pair(mlp.up_proj, normed_2ND))
    return pair_2ND + linear_pair(mlp.down_proj, gated_2NI)


def linear_pair(module: nn.Module, pair_2ND: Tensor) -> Tensor:
    """A linear map of a value and its tangent: one product, unless it has a bias, which belongs to the value alone."""
    # The bias of a map inside an adapter is the adapter's too, as peft says it.
    if getattr(module, "bias", None) is None:
        return module(pair_2ND)
    with _bias_of_values():
        return module(pair_2ND)


@contextmanager
def _bias_of_values() -> Iterator[None]:
    """Within it, torch's linear maps add their bias to the value of a stacked pair and not to its tangent.

    So the module itself is called: adapters around it, and the hooks by which ZeRO-3 fetches its weight, need nothing more.
    Not by a TorchFunctionMode, which does not see the linear map that ZeRO-3 puts in place of torch's.
    """
    linear = nn.functional.linear

    def linear_of_pair(pair_2ND: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None:
            return linear(pair_2ND, weight)
        return torch.stack([linear(pair_2ND[0], weight, bias), linear(pair_2ND[1], weight)])

    nn.functional.linear = linear_of_pair
    try:
        yield
    finally:
        nn.functional.linear = linear


def _norm(module: Any, pair: Tensor) -> Tensor:
    """RMSNorm over the last axis of [2, ..., D]."""
    return rms_norm(pair.flatten(1, -2), module.weight, module.variance_epsilon).view(pair.shape)


def _rotated(pair_2NHE: Tensor, cos_N1E: Tensor, sin_N1E: Tensor) -> Tensor:
    """Rotary positions (2104.09864), halves turned against each other as in transformers' Llama; linear."""
    first, second = pair_2NHE.chunk(2, dim=-1)
    return pair_2NHE * cos_N1E + torch.cat([-second, first], dim=-1) * sin_N1E

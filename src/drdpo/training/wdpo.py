"""WDPO's tangent solver: the input gradient of every pair, and a pass along it, for Llama-like policies on packed rows.

The penalty's parameter gradient needs no double backward. `input_gradient` finds the direction in which a pair's margin
grows fastest; `tangent_answers` sends the pair (x, dx) of a value and its tangent along that direction through every layer,
stacked as [2, N, D]; drdpo.training.objective combines the two. Linear maps are called as the modules they are, on the
stack, so adapters and gathered parameters work unchanged; the rest are the kernels of drdpo.kernels.tangent. Only ordinary
reverse mode runs through it, so each layer is recomputed in the backward pass as for any other method.

Shape suffixes: B pairs, S = 2B sequences, N tokens of a packed row, A answer tokens, D width, H query heads, K key-value
heads, E width of a head.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from drdpo.errors import DataError
from drdpo.kernels.linear_logprob import logprob_and_slope, tangent_logprob
from drdpo.kernels.tangent import rms_norm, silu_gate, tangent_attention
from drdpo.models import decoder_of, tangent_problem, tangent_refusal
from drdpo.training.data import PackedBatch, Pair, pack
from drdpo.training.losses import Method, Pairs
from drdpo.training.patches import bias_of_value_only, first_rows, rows_in_float32
from drdpo.training.policy import Policy, pairs_of, sum_by_sequence


class InputGradient(NamedTuple):
    """Of B pairs, all without a graph."""

    losses_B: Tensor
    pairs: Pairs
    direction_1ND: Tensor
    """[1, N, D] q / |q| of every pair; zero for a pair without any gradient, so that nothing moves."""
    margin_slopes_B: Tensor
    """[B] |q|, the margin's slope along the direction."""
    loss_slopes_B: Tensor
    """[B] l'(m) |q|, the loss's slope along the direction; its square is the penalty |grad_e l|^2."""


def input_gradient(policy: Policy, batch: PackedBatch, reference_B2: Tensor, method: Method) -> InputGradient:
    """The gradient of every pair with respect to its input embeddings, by one forward and one backward pass.

    A pair's loss l(m) depends on the embeddings through its margin m alone, so grad_e l = l'(m) q with q = grad_e m, and the
    direction q / |q| serves the loss, the penalty and every kind of loss alike. Pairs do not attend to each other: q of the
    summed margins separates by pair. No gradient of a parameter is computed.

    Args:
        policy: the bare module.
        batch: B pairs.
        reference_B2: [B, 2] reference log-probs.
        method: whose loss is a function of the margins.
    """
    embeds_1ND = policy.embed(batch).detach()
    # The direction keeps float32's digits where the layers do.
    embeds_1ND = (embeds_1ND.float() if policy.wide_first else embeds_1ND).requires_grad_()
    with torch.enable_grad():
        hidden_AD, targets_A, sequence_A = policy.answer_states(batch, embeds_1ND, frozen=True)
    head = policy.head(logprob_and_slope, hidden_AD.detach(), targets_A)
    # The margin is the chosen answer's log-prob less the rejected one's.
    signs_A = 1 - 2 * (sequence_A >= len(batch.indices_B)).to(head.slope_ND.dtype)
    (grad_1ND,) = torch.autograd.grad(hidden_AD, embeds_1ND, head.slope_ND * signs_A[:, None])
    grad_1ND = grad_1ND.to(head.logprob_N.dtype)
    squares_N = grad_1ND[0].square().sum(dim=1)
    norm_B = squares_N.new_zeros(len(batch.indices_B)).index_add(0, batch.pair_N, squares_N).sqrt()
    scale_B = torch.where(norm_B > 0, 1 / norm_B, torch.zeros_like(norm_B))
    pairs = pairs_of(sum_by_sequence(head.logprob_N, sequence_A, batch), reference_B2, batch)
    direction_1ND = scale_B[batch.pair_N][None, :, None] * grad_1ND
    return InputGradient(method.loss(pairs), pairs, direction_1ND, norm_B, _loss_slopes(pairs, method) * norm_B)


def _loss_slopes(pairs: Pairs, method: Method) -> Tensor:
    """[B] l'(m)."""
    with torch.enable_grad():
        margins_B = pairs.margins_B.detach().requires_grad_()
        return torch.autograd.grad(method.loss(pairs._replace(margins_B=margins_B)).sum(), margins_B)[0]


# The pass on values and tangents ----------------------------------------------------------------------------------------

LINEAR = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def tangent_answers(policy: Policy, batch: PackedBatch, direction_1ND: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [S] of the answers, and their derivatives [S] along a direction; both with a graph.

    Args:
        policy: that check_tangent has passed.
        batch: B pairs.
        direction_1ND: of the input embeddings, see InputGradient.
    """
    pair_2AD = answer_pairs(policy, batch, policy.embed(batch), direction_1ND)
    # Of these states, not of the first pass's, from which they differ by rounding: with its log-sum-exp the probabilities do
    # not sum to one. On SmolLM2-135M in bfloat16 a pair's penalty gradient was 14% off with those, 7% with these.
    head = policy.head(logprob_and_slope, pair_2AD[0].detach(), batch.targets_A)
    logprob_A, slope_A = policy.head(tangent_logprob, pair_2AD, batch.targets_A, head)
    return sum_by_sequence(logprob_A, batch.sequence_A, batch), sum_by_sequence(slope_A, batch.sequence_A, batch)


def answer_pairs(policy: Policy, batch: PackedBatch, embeds_1ND: Tensor, direction_1ND: Tensor) -> Tensor:
    """[2, A, D] hidden states that predict the answers' tokens, after the final norm, and their tangents."""
    decoder = decoder_of(policy.language_model)
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
    # peft's adapters have the bias of the map inside as their own attribute.
    if getattr(module, "bias", None) is None:
        return module(pair_2ND)
    with bias_of_value_only():
        return module(pair_2ND)


def _norm(module: Any, pair: Tensor) -> Tensor:
    """RMSNorm over the last axis of [2, ..., D]."""
    return rms_norm(pair.flatten(1, -2), module.weight, module.variance_epsilon).view(pair.shape)


def _rotated(pair_2NHE: Tensor, cos_N1E: Tensor, sin_N1E: Tensor) -> Tensor:
    """Rotary positions (2104.09864), halves turned against each other as in transformers' Llama; linear."""
    first, second = pair_2NHE.chunk(2, dim=-1)
    return pair_2NHE * cos_N1E + torch.cat([-second, first], dim=-1) * sin_N1E


# May a policy be trained by the tangent solver? By its modules, and by numbers on a small row -----------------------------


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
    if reason := tangent_problem(policy.language_model):
        raise tangent_refusal(model_path, reason)
    try:
        _check_loss(method)
        for layer in decoder_of(policy.language_model).layers:
            for part, names in LINEAR.items():
                for name in names:
                    _check_linear(getattr(getattr(layer, part), name), f"{part}.{name}")
        with torch.random.fork_rng(devices=[]):
            _check_numbers(policy, method)
    except DataError as error:
        raise tangent_refusal(model_path, str(error)) from error


def _check_linear(module: nn.Module, name: str) -> None:
    """A tangent of twice the size must come out at twice the size, exactly: a power of two rounds nothing."""
    width = getattr(module, "in_features", None)
    if not isinstance(width, int):
        raise DataError(f"its {name} is a {type(module).__name__}, which is not known to be linear")
    weight = next(module.parameters())
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
    probe_1D = torch.ones(1, width, device=weight.device, dtype=dtype)
    with torch.no_grad():
        once, twice = (linear_pair(module, torch.stack([probe_1D, size * probe_1D]))[1] for size in (1, 2))
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
    """Hidden states must be those of the policy's own forward pass, the margin's slope that of its own backward pass."""
    assert method.penalty is not None
    generator = torch.Generator().manual_seed(0)
    vocabulary = policy.head.weight.shape[0]
    ids = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (6, 9, 5)]
    embedding = policy.language_model.get_input_embeddings().weight
    columns = dict.fromkeys(method.reads, 1.0)
    prompt, chosen, rejected = ids
    batch = pack([Pair(prompt, chosen, rejected, columns=columns)], [0], method.penalty.prompt_once).to(embedding.device)
    gradient = input_gradient(policy, batch, torch.zeros(1, 2, device=embedding.device), method)
    with torch.no_grad():
        embeds_1ND = policy.embed(batch)
        own_AD = policy.answer_states(batch, embeds_1ND)[0]
        ours_AD = answer_pairs(policy, batch, embeds_1ND, gradient.direction_1ND)[0]
        chosen, rejected = tangent_answers(policy, batch, gradient.direction_1ND)[1]
    tolerance = 0.1 if embeds_1ND.dtype == torch.bfloat16 else 1e-3
    if not _relative_error(ours_AD, own_AD) <= tolerance:
        raise DataError("its hidden states are not those of Llama's formulas")
    if not _relative_error(chosen - rejected, gradient.margin_slopes_B[0]) <= tolerance:
        raise DataError("its derivatives are not those of Llama's formulas")


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())

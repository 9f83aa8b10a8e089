"""A Llama-like policy on values and tangents at once: log-probabilities of answers and how they move along a direction.

The pair (x, dx) goes through every layer stacked as [2, N, D]. Linear maps are called as the modules they are, on the stack,
so adapters and gathered parameters need nothing of their own; the rest are the kernels of drdpo.kernels.tangent_*. Only
ordinary reverse mode runs through it, so each layer is recomputed in the backward pass as for any other method.

Shape suffixes: N tokens of the row, A answer tokens, D width, H query heads, K key-value heads, E width of a head, S = 2B
sequences.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from drdpo.config import TrainConfig
from drdpo.errors import DataError
from drdpo.kernels.linear_logprob import logprob_and_slope, tangent_logprob
from drdpo.kernels.tangent import rms_norm, silu_gate, tangent_attention
from drdpo.training.data import PackedBatch, Pair, pack
from drdpo.training.patches import first_rows, rows_in_float32
from drdpo.training.policy import PairValues, Policy, decoder_of, losses_of, sum_by_sequence, values_of

# The gradient of every pair for its input embeddings, by one ordinary backward pass: what WDPO's tangent solver needs.
#
# A pair's loss l(m) depends on the embeddings through its margin m alone, so grad_e l = l'(m) q with q = grad_e m, and
# the direction q / |q| serves the loss, the penalty and every kind of loss alike. Pairs do not attend to each other: q
# of the summed margins separates by pair.
#
# Shape suffixes: B pairs, S = 2B sequences, N tokens of a packed row, A answer tokens, D width.


class InputGradient(NamedTuple):
    """Of B pairs, all without a graph."""

    values: PairValues
    direction_1ND: Tensor
    """[1, N, D] q / |q| of every pair; zero for a pair without any gradient, so that nothing moves."""
    margin_slopes_B: Tensor
    """[B] |q|, the margin's slope along the direction."""
    loss_slopes_B: Tensor
    """[B] l'(m) |q|, the loss's slope along the direction; its square is the penalty |grad_e l|^2."""


def input_gradient(policy: Policy, batch: PackedBatch, reference_B2: Tensor, config: TrainConfig) -> InputGradient:
    """One forward pass and one backward pass to the input embeddings; no gradient of a parameter is computed.

    Args:
        policy: the bare module.
        batch: B pairs.
        reference_B2: [B, 2] reference log-probs.
        config: of the run.
    """
    embeds_1ND = policy.embed(batch).detach()
    # The direction keeps float32's digits where the layers do.
    embeds_1ND = (embeds_1ND.float() if policy.wide_first else embeds_1ND).requires_grad_()
    with torch.enable_grad():
        hidden_AD, targets_A, sequence_A = policy.answer_states(batch, embeds_1ND, frozen=True)
    known = policy.head(logprob_and_slope, hidden_AD.detach(), targets_A)
    # The margin is the chosen answer's log-prob less the rejected one's.
    signs_A = 1 - 2 * (sequence_A >= len(batch.indices_B)).to(known.slope_ND.dtype)
    (grad_1ND,) = torch.autograd.grad(hidden_AD, embeds_1ND, known.slope_ND * signs_A[:, None])
    grad_1ND = grad_1ND.to(known.logprob_N.dtype)
    squares_N = grad_1ND[0].square().sum(dim=1)
    norm_B = squares_N.new_zeros(len(batch.indices_B)).index_add(0, batch.pair_N, squares_N).sqrt()
    scale_B = torch.where(norm_B > 0, 1 / norm_B, torch.zeros_like(norm_B))
    logprob_S = sum_by_sequence(known.logprob_N, sequence_A, batch)
    values = values_of(logprob_S, embeds_1ND.detach().new_empty(0), reference_B2, config)
    return InputGradient(
        values, scale_B[batch.pair_N][None, :, None] * grad_1ND, norm_B, _loss_slopes(values.margins_B, config) * norm_B
    )


def _loss_slopes(margins_B: Tensor, config: TrainConfig) -> Tensor:
    with torch.enable_grad():
        margins_B = margins_B.detach().requires_grad_()
        return torch.autograd.grad(losses_of(margins_B, config).sum(), margins_B)[0]


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


# May a policy be trained by WDPO's tangent solver? Told from its modules, and from numbers on a small row.


def check_architecture(policy: Policy, config: TrainConfig) -> None:
    """Refuse an architecture that drdpo.training.wdpo does not compute.

    Args:
        policy: as loaded, or on the meta device.
        config: of the run.

    Raises:
        DataError: it is not one of DECODERS, or gates otherwise than they do by default.
    """
    try:
        decoder = decoder_of(policy)
        name = type(decoder).__name__
        if name not in DECODERS:
            raise DataError(f"it is a {name}, and the solver knows {', '.join(DECODERS)}")
        for layer in decoder.layers:
            if "silu" not in type(layer.mlp.act_fn).__name__.lower():
                raise DataError(f"its layers gate by {type(layer.mlp.act_fn).__name__}, not by SiLU")
    except DataError as error:
        raise _refusal(error, config) from error


def check_tangent(policy: Policy, config: TrainConfig) -> None:
    """Refuse a policy that drdpo.training.wdpo does not compute.

    Args:
        policy: as loaded, before DeepSpeed takes it.
        config: of the run.

    Raises:
        DataError: its architecture is another, an adapter is not linear, or values or slopes on a small row are not the
            policy's own.
    """
    check_architecture(policy, config)
    try:
        for layer in decoder_of(policy).layers:
            for part, names in LINEAR.items():
                for name in names:
                    _check_linear(getattr(getattr(layer, part), name), f"{part}.{name}")
        with torch.random.fork_rng(devices=[]):
            _check_numbers(policy, config)
    except DataError as error:
        raise _refusal(error, config) from error


def _refusal(error: DataError, config: TrainConfig) -> DataError:
    solver = "auto, which is tangent for packed rows," if config.wdpo_solver == "auto" else "tangent"
    exact = "--wdpo_solver=exact with --packing=false" + (" and --zero_stage=2" if config.zero_stage == 3 else "")
    return DataError(f"{config.model_path}: --wdpo_solver={solver} cannot differentiate this model: {error}; give {exact}")


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


def _check_numbers(policy: Policy, config: TrainConfig) -> None:
    """Hidden states must be those of the policy's own forward pass, the margin's slope that of its own backward pass."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = policy.head.weight.shape[0]
    ids = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (6, 9, 5)]
    embedding = policy.language_model.get_input_embeddings().weight
    batch = pack([Pair(*ids)], [0], prompt_once=config.wdpo_prompt == "once").to(embedding.device)
    found = input_gradient(policy, batch, torch.zeros(1, 2, device=embedding.device), config)
    with torch.no_grad():
        embeds_1ND = policy.embed(batch)
        own_AD = policy.answer_states(batch, embeds_1ND)[0]
        ours_AD = answer_pairs(policy, batch, embeds_1ND, found.direction_1ND)[0]
        chosen, rejected = tangent_answers(policy, batch, found)[1]
    tolerance = 0.1 if embeds_1ND.dtype == torch.bfloat16 else 1e-3
    if not _apart(ours_AD, own_AD) <= tolerance:
        raise DataError("its hidden states are not those of Llama's formulas")
    if not _apart(chosen - rejected, found.margin_slopes_B[0]) <= tolerance:
        raise DataError("its derivatives are not those of Llama's formulas")


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())

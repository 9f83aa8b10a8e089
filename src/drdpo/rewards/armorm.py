"""ArmoRM (Wang et al. 2024, arXiv 2406.12845): absolute ratings by a linear head, mixed by a gate that reads the prompt.

Shape suffixes: B sequences, T tokens, D width, P length of the gating pattern. `heads` objectives.

    stage 1   rewards = regression_layer(h[last token])                                    [heads]
    stage 2   score = sum(gate * (rewards @ reward_transform_matrix)),
              gate = softmax(gating(h[gate position]) / temperature) * logit_scale         [heads]

h is the backbone's hidden state after its final norm. The gate position is the FIRST token of the LAST occurrence of the
gating token pattern, the template's text between a prompt and its answer. The heads are float32 whatever the backbone is.
With the layout's pooling "mean", stage 1 reads the mean of h over what follows the pattern in place of h[last token].
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from drdpo.errors import DataError
from drdpo.kernels.shared_prefix import PackedRow, hidden_states
from drdpo.rewards.batching import Span, find_span
from drdpo.rewards.layout import RewardLayout, check_shapes, read_layout, read_shapes


class Rewards(NamedTuple):
    """What ArmoRM says of B sequences."""

    stage1: Tensor
    """[B, heads] float32, one rating per objective, in the order of `ArmoRM.objectives`."""
    stage2: Tensor
    """[B] float32, the gated score."""


class GatingNetwork(nn.Module):
    """Weights of the objectives, a convex combination times logit_scale, from the hidden state of the prompt."""

    def __init__(self, width: int, heads: int, hidden_dim: int, n_hidden: int, temperature: float) -> None:
        super().__init__()
        widths = [width, *[hidden_dim] * n_hidden, heads]
        self.layers = nn.ModuleList(nn.Linear(rows, columns) for rows, columns in pairwise(widths))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.temperature = temperature

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """[B, D] float32 -> [B, heads], rows that sum to logit_scale."""
        *hidden_layers, last = self.layers
        for layer in hidden_layers:
            hidden_BD = torch.relu(layer(hidden_BD))
        return torch.softmax(last(hidden_BD) / self.temperature, dim=-1) * self.logit_scale


class ArmoRM(nn.Module):
    """A multi-objective reward model with a gate; its parameters carry the published checkpoint's names."""

    reward_transform_matrix: Tensor
    gating_pattern_P: Tensor

    def __init__(self, backbone: nn.Module, layout: RewardLayout) -> None:
        super().__init__()
        heads = len(layout.objectives)
        self.layout = layout
        self.flash_attention = False
        """Do packed rows attend by drdpo.kernels.varlen_attention, which runs on CUDA only?"""
        self.objectives = layout.objectives
        self.model = backbone
        self.regression_layer = nn.Linear(layout.hidden_size, heads, bias=False)
        self.gating = GatingNetwork(
            layout.hidden_size, heads, layout.gating_hidden_dim, layout.gating_n_hidden, layout.gating_temperature
        )
        self.register_buffer("reward_transform_matrix", torch.eye(heads))
        self.register_buffer("gating_pattern_P", torch.tensor(layout.gating_token_pattern), persistent=False)

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Rewards:
        """Score whole conversations.

        Args:
            input_ids_BT: [B, T] conversations that end in a closed assistant turn, padded on the right or left.
            attention_mask_BT: [B, T], 1 for tokens and 0 for padding. It alone says what padding is: the pad id may be
                the id that ends a turn.

        Raises:
            ValueError: a sequence without tokens or without the gating pattern.
        """
        gate_position_B = gate_positions(input_ids_BT, attention_mask_BT, self.gating_pattern_P)
        last_position_B = last_positions(attention_mask_BT)
        hidden_BTD = last_hidden_states(self.model, input_ids_BT, attention_mask_BT)
        row_B = torch.arange(len(input_ids_BT), device=input_ids_BT.device)
        if self.layout.pooling == "last":
            answer_BD = hidden_BTD[row_B, last_position_B]
        else:
            first_B = torch.minimum(gate_position_B + len(self.gating_pattern_P), last_position_B)
            answer_BD = mean_over(hidden_BTD, first_B, last_position_B, attention_mask_BT)
        return self.heads(answer_BD, hidden_BTD[row_B, gate_position_B])

    def score_packed(self, row: PackedRow, spans: Sequence[Span]) -> Rewards:
        """Score the conversations of a packed row, whose shared prefixes are computed once.

        Args:
            row: groups of conversations.
            spans: where each is read, in the order of the row.
        """
        hidden_ND = hidden_states(self.model, row, self.flash_attention)
        gate_BD = hidden_ND[[row.index(number, span.gate) for number, span in enumerate(spans)]]
        if self.layout.pooling == "last":
            return self.heads(hidden_ND[[row.index(number, span.last) for number, span in enumerate(spans)]], gate_BD)
        means = [
            hidden_ND[[row.index(number, position) for position in range(span.first, span.last + 1)]].float().mean(dim=0)
            for number, span in enumerate(spans)
        ]
        return self.heads(torch.stack(means), gate_BD)

    def span(self, token_ids: Sequence[int]) -> Span | None:
        """Where a conversation is read; None without the gating pattern."""
        return find_span(token_ids, self.layout.gating_token_pattern)

    def heads(self, answer_BD: Tensor, gate_BD: Tensor) -> Rewards:
        """The two stages on [B, D] of any dtype: hidden states of the answer (as pooled) and of the gate position."""
        stage1 = self.regression_layer(answer_BD.float())
        gate = self.gating(gate_BD.float())
        return Rewards(stage1, (gate * (stage1 @ self.reward_transform_matrix)).sum(dim=-1))


def last_hidden_states(backbone: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """[B, T, D] hidden states after the final norm; those of padding mean nothing.

    Padding on the right comes after every real token, so causal attention never sees it: the mask is then left out, which
    allows the fast causal kernels. With padding elsewhere the mask and positions that skip it are passed on.
    """
    if bool((attention_mask_BT[:, 1:] <= attention_mask_BT[:, :-1]).all()):
        return backbone(input_ids=input_ids_BT, use_cache=False).last_hidden_state
    position_BT = (attention_mask_BT.long().cumsum(dim=1) - 1).clamp(min=0)
    return backbone(
        input_ids=input_ids_BT, attention_mask=attention_mask_BT, position_ids=position_BT, use_cache=False
    ).last_hidden_state


def mean_over(hidden_BTD: Tensor, first_B: Tensor, last_B: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """[B, D] float32 means of the hidden states from `first_B` to `last_B` inclusive; padding between does not count."""
    position_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
    inside_BT = (position_T >= first_B[:, None]) & (position_T <= last_B[:, None]) & attention_mask_BT.bool()
    total_BD = (hidden_BTD.float() * inside_BT[..., None]).sum(dim=1)
    return total_BD / inside_BT.sum(dim=1, keepdim=True)


def last_positions(attention_mask_BT: Tensor) -> Tensor:
    """[B] index of the last token that is not padding.

    Raises:
        ValueError: a sequence without tokens.
    """
    position_T = torch.arange(1, attention_mask_BT.shape[1] + 1, device=attention_mask_BT.device)
    last_B = (attention_mask_BT.bool() * position_T).amax(dim=1) - 1
    if bool((last_B < 0).any()):
        raise ValueError("a sequence has no tokens")
    return last_B


def gate_positions(input_ids_BT: Tensor, attention_mask_BT: Tensor, pattern_P: Tensor) -> Tensor:
    """[B] index of the FIRST token of the LAST occurrence of the pattern; padding never takes part in an occurrence.

    Raises:
        ValueError: a sequence without the pattern.
    """
    length = len(pattern_P)
    if input_ids_BT.shape[1] < length:
        raise ValueError("a sequence is shorter than the gating token pattern")
    same_BWP = input_ids_BT.unfold(1, length, 1) == pattern_P
    inside_BWP = attention_mask_BT.bool().unfold(1, length, 1)
    start_W = torch.arange(1, same_BWP.shape[1] + 1, device=input_ids_BT.device)
    position_B = ((same_BWP & inside_BWP).all(dim=-1) * start_W).amax(dim=1) - 1
    if bool((position_B < 0).any()):
        raise ValueError("a sequence does not hold the gating token pattern")
    return position_B


def load_armorm(path: str | Path, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> ArmoRM:
    """Load a reward model folder in ArmoRM's published layout; see drdpo.rewards.layout.

    Weights go from safetensors straight to the device and dtype; nothing is initialised first.

    Args:
        path: folder with config.json and safetensors, single or sharded.
        device: where the model shall live.
        dtype: of the backbone; the heads are float32.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        DataError: a tensor is missing, left over, of another shape or (in the heads) not finite; pickle weights only; a
            config.json that contradicts itself or names a backbone that transformers does not have.
    """
    folder = Path(path)
    layout, found = read_layout(folder), read_shapes(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = ArmoRM(AutoModel.from_config(config, trust_remote_code=False, attn_implementation="sdpa"), layout)
    except (ValueError, KeyError, OSError) as error:
        raise DataError(f"{folder}: the backbone cannot be built from config.json ({error})") from error
    check_shapes(folder, found, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    tensors: dict[str, Tensor] = {}
    for file in sorted({place for place, _ in found.values()}):
        with safe_open(file, framework="pt", device=str(device)) as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                tensors[name] = _cast(folder, name, stored.get_tensor(name), dtype)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.to(device).eval().requires_grad_(False)


def _cast(folder: Path, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        raise DataError(f"{folder}: the tensor {name} is {tensor.dtype}; quantised weights are not supported")
    if name.startswith("model."):
        return tensor.to(dtype)
    if not bool(tensor.isfinite().all()):
        raise DataError(f"{folder}: the tensor {name} holds NaN or infinity")
    return tensor.float()

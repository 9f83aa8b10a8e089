"""ArmoRM (Wang et al. 2024, arXiv 2406.12845): absolute ratings by a linear head, mixed by a gate that reads the prompt.

    stage 1   rewards = regression_layer(h[last token])                                    [heads]
    stage 2   score = sum(gate * (rewards @ reward_transform_matrix)),
              gate = softmax(gating(h[gate position]) / temperature) * logit_scale         [heads]

h is the backbone's hidden state after its final norm. The gate position is the FIRST token of the LAST occurrence of the
gating token pattern, the template's text between a prompt and its answer. The heads are always float32.

A reward model folder has ArmoRM's published layout:

    model.*                              the backbone, usually bfloat16
    regression_layer.weight              [heads, D]   stage 1
    reward_transform_matrix              [heads, heads]
    gating.layers.{0..n_hidden}.weight   [hidden, D], [hidden, hidden], ..., [heads, hidden], each with a .bias
    gating.logit_scale                   [1]

config.json contains num_objectives, gating_temperature, gating_hidden_dim and gating_n_hidden, and may contain `objectives`
(names in head order; default: ArmoRM's nineteen), `gating_token_pattern` (default: Llama-3's) and `pooling`: whether stage
1 reads the hidden state of the "last" token (default, ArmoRM's own) or the "mean" of those after the pattern.

Shape suffixes: B sequences, T tokens, A tokens of an answer, N tokens of a packed row, D width. `heads` objectives.
"""

from collections.abc import Hashable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
import torch
from msgspec import Meta
from safetensors import safe_open
from torch import Tensor, nn

from drdpo.errors import DataError
from drdpo.folder import read_json_object
from drdpo.kernels.packed_attention import PackedRow, hidden_states
from drdpo.models import Tensors, read_tensors, window_of
from drdpo.objectives import ARMORM_OBJECTIVES, GATED_SCORE
from drdpo.records import in_words

LLAMA3_GATING_PATTERN = (128009, 128006, 78191, 128007, 271)
"""Llama-3's ids of "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n"."""

POOLINGS = ("last", "mean")


# A reward model folder, checked without reading weights.

_Positive = Annotated[int, Meta(ge=1)]


class RewardLayout(msgspec.Struct, frozen=True):
    """The heads of a reward model, as config.json names them, and what they ask of its backbone."""

    num_objectives: _Positive
    gating_temperature: Annotated[float, Meta(gt=0)]
    gating_hidden_dim: _Positive
    gating_n_hidden: Annotated[int, Meta(ge=0)]
    hidden_size: _Positive
    vocab_size: _Positive
    max_position_embeddings: _Positive
    objectives: tuple[Annotated[str, Meta(min_length=1)], ...] = ARMORM_OBJECTIVES
    gating_token_pattern: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)] = LLAMA3_GATING_PATTERN
    pooling: Literal["last", "mean"] = "last"


def check_folder(folder: Path) -> RewardLayout:
    """Check a reward model folder without reading weights; returns its layout, with positions up to its sliding window.

    Raises:
        DataError: as load_armorm, but for values of tensors; or for a missing tokenizer.
    """
    model, _ = _build(folder)
    if not (folder / "tokenizer.json").is_file():
        raise DataError(f"{folder}: no tokenizer (tokenizer.json) in the reward model folder")
    positions = min(model.layout.max_position_embeddings, window_of(model.model.config) or 2**63)
    return msgspec.structs.replace(model.layout, max_position_embeddings=positions)


def read_layout(folder: Path) -> RewardLayout:
    """Read and check config.json of a reward model folder.

    Raises:
        DataError: no such folder or file, or a field that is missing or contradicts another.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such reward model folder (a hub id is none); run: bash setup.sh")
    if not path.is_file():
        raise DataError(f"{path}: no such file; a reward model folder needs ArmoRM's layout")
    config = read_json_object(path)
    if "num_objectives" not in config and (made := config.get("architectures")):
        made = ", ".join(map(str, made)) if isinstance(made, list) else str(made)
        kind = "a language model" if made.endswith("LM") else "no such model"
        raise DataError(
            f"{folder}: {kind} ({made}) where --reward_model needs ArmoRM's heads, with a rating per objective and a gate; "
            "pass models/ArmoRM, or a folder of that layout"
        )
    try:
        layout = msgspec.convert(config, RewardLayout)
    except msgspec.ValidationError as error:
        raise DataError(f"{path}: {in_words(error, config)}") from error
    names, largest = layout.objectives, max(layout.gating_token_pattern)
    if largest >= layout.vocab_size:
        outside = f"contains {largest}, outside the vocabulary of {layout.vocab_size}"
        raise DataError(f'{path}: field "gating_token_pattern" {outside}')
    if len(set(names)) != len(names) or GATED_SCORE in names:
        raise DataError(f'{path}: field "objectives" repeats a name or contains {GATED_SCORE}, the name of the gated score')
    if len(names) != layout.num_objectives:
        whose = "lists" if "objectives" in config else "is absent, so it is ArmoRM's"
        count = layout.num_objectives
        raise DataError(f'{path}: field "num_objectives" is {count}, but "objectives" {whose} {len(names)}')
    return layout


# The model.


class Rewards(NamedTuple):
    """Scores of B sequences."""

    stage1: Tensor
    """[B, heads] float32, one rating per objective, in the order of `ArmoRM.objectives`."""
    stage2: Tensor
    """[B] float32, the gated score."""


class Span(NamedTuple):
    """Positions of a conversation that a reward model reads."""

    gate: int
    """First token of the last gating pattern."""
    first: int
    """First token after that pattern; the last token if the answer is empty."""
    last: int
    """The last token."""


def find_span(token_ids: Sequence[int], pattern: Sequence[int]) -> Span | None:
    """The positions that a reward model reads in a conversation; None without the gating pattern."""
    size = len(pattern)
    for start in range(len(token_ids) - size, -1, -1):
        if list(token_ids[start : start + size]) == list(pattern):
            return Span(start, min(start + size, len(token_ids) - 1), len(token_ids) - 1)
    return None


class GatingNetwork(nn.Module):
    """Weights of the objectives from the hidden state of the prompt: a convex combination times logit_scale."""

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

    def __init__(self, backbone: nn.Module, layout: RewardLayout) -> None:
        super().__init__()
        heads = len(layout.objectives)
        self.layout = layout
        self.flash_attention = False
        """Use flash attention for packed rows (CUDA only)?"""
        self.objectives = layout.objectives
        self.model = backbone
        self.regression_layer = nn.Linear(layout.hidden_size, heads, bias=False)
        self.gating = GatingNetwork(
            layout.hidden_size, heads, layout.gating_hidden_dim, layout.gating_n_hidden, layout.gating_temperature
        )
        self.register_buffer("reward_transform_matrix", torch.eye(heads))

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Rewards:
        """Score whole conversations.

        Args:
            input_ids_BT: [B, T] conversations that end in a closed assistant turn, padded on the right or left.
            attention_mask_BT: [B, T], 1 for tokens and 0 for padding. Only the mask defines padding: the pad id may be
                the id that ends a turn.

        Raises:
            ValueError: a sequence without the gating pattern.
        """
        hidden_BTD = last_hidden_states(self.model, input_ids_BT, attention_mask_BT)
        answers, gates = [], []
        for ids_T, mask_T, hidden_TD in zip(input_ids_BT, attention_mask_BT.bool(), hidden_BTD, strict=True):
            span = self.span(ids_T[mask_T].tolist())
            if span is None:
                raise ValueError("a sequence does not contain the gating token pattern")
            real_TD = hidden_TD[mask_T]
            answers.append(self._pool(real_TD[span.first : span.last + 1]))
            gates.append(real_TD[span.gate])
        return self.heads(torch.stack(answers), torch.stack(gates))

    def score_packed(self, row: PackedRow, spans: Sequence[Span]) -> Rewards:
        """Score the conversations of a packed row, computing shared prefixes once.

        Args:
            row: groups of conversations that end in a closed assistant turn.
            spans: the positions to read in each, in the order of the row.
        """
        hidden_ND = hidden_states(self.model, row, self.flash_attention)
        gate_BD = hidden_ND[[row.index(number, span.gate) for number, span in enumerate(spans)]]
        if self.layout.pooling == "last":
            return self.heads(hidden_ND[[row.index(number, span.last) for number, span in enumerate(spans)]], gate_BD)
        answers = [
            self._pool(hidden_ND[[row.index(number, position) for position in range(span.first, span.last + 1)]])
            for number, span in enumerate(spans)
        ]
        return self.heads(torch.stack(answers), gate_BD)

    def span(self, token_ids: Sequence[int]) -> Span | None:
        """The positions that are read in a conversation; None without the gating pattern."""
        return find_span(token_ids, self.layout.gating_token_pattern)

    def heads(self, answer_BD: Tensor, gate_BD: Tensor) -> Rewards:
        """Both stages, from the [B, D] hidden states of any dtype of the answer (pooled) and of the gate position."""
        stage1 = self.regression_layer(answer_BD.float())
        gate = self.gating(gate_BD.float())
        return Rewards(stage1, (gate * (stage1 @ self.reward_transform_matrix)).sum(dim=-1))

    def _pool(self, hidden_AD: Tensor) -> Tensor:
        """[D] for stage 1, from the hidden states of an answer."""
        return hidden_AD[-1] if self.layout.pooling == "last" else hidden_AD.float().mean(dim=0)


def last_hidden_states(backbone: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """[B, T, D] hidden states after the final norm; those of padding are undefined.

    Padding on the right comes after every real token, so causal attention never sees it, and without a mask the fast
    causal kernels serve. Otherwise the model gets the mask and positions that skip padding.
    """
    if bool((attention_mask_BT[:, 1:] <= attention_mask_BT[:, :-1]).all()):
        return backbone(input_ids=input_ids_BT, use_cache=False).last_hidden_state
    position_BT = (attention_mask_BT.long().cumsum(dim=1) - 1).clamp(min=0)
    return backbone(
        input_ids=input_ids_BT, attention_mask=attention_mask_BT, position_ids=position_BT, use_cache=False
    ).last_hidden_state


def load_armorm(path: str | Path, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> ArmoRM:
    """Load a reward model folder.

    Weights go from safetensors straight to the device and dtype, without initialisation.

    Args:
        path: folder with config.json and safetensors, single or sharded.
        device: of the model.
        dtype: of the backbone; the heads are float32.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        DataError: a tensor is missing, unknown, of another shape or (in the heads) not finite; no safetensors weights; a
            config.json that contradicts itself or names a backbone that transformers does not have.
    """
    folder = Path(path)
    model, found = _build(folder)
    tensors: dict[str, Tensor] = {}
    for file in sorted({stored.file for stored in found.values()}):
        with safe_open(file, framework="pt", device=str(device)) as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                tensors[name] = _cast(folder, name, stored.get_tensor(name), dtype)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.to(device).eval().requires_grad_(False)


def _build(folder: Path) -> tuple[ArmoRM, Tensors]:
    """The model without its weights, and its tensors, all of which are there."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModel

    layout, found = read_layout(folder), read_tensors(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = ArmoRM(AutoModel.from_config(config, trust_remote_code=False, attn_implementation="sdpa"), layout)
    except (ValueError, KeyError, OSError) as error:
        raise DataError(f"{folder}: the backbone cannot be built from config.json ({error})") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := sorted(wanted.keys() - found.keys()):
        raise DataError(f"{folder}: the tensor {missing[0]} is missing ({len(missing)} of {len(wanted)} are missing)")
    if extra := sorted(found.keys() - wanted.keys()):
        raise DataError(f"{folder}: the tensor {extra[0]} belongs to no part of the reward model ({len(extra)} such)")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            has = f"{list(found[name].shape)}, not {list(shape)} as by config.json"
            raise DataError(f"{folder}: the tensor {name} has the shape {has}")
    return model, found


def _cast(folder: Path, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        raise DataError(f"{folder}: the tensor {name} is {tensor.dtype}; quantised weights are not supported")
    if name.startswith("model."):
        return tensor.to(dtype)
    if not bool(tensor.isfinite().all()):
        raise DataError(f"{folder}: the tensor {name} contains NaN or infinity")
    return tensor.float()


# Batches within a budget of tokens, with shared prefixes once.


class SharedPrefix(NamedTuple):
    """Sequences that begin with the same tokens."""

    shared: int
    """Number of common first tokens; each sequence is longer."""
    rows: tuple[int, ...]
    """Indices of the sequences."""


def packed_batches(sequences: Sequence[Sequence[int]], keys: Sequence[Hashable], budget: int) -> list[list[SharedPrefix]]:
    """Group the sequences of each key (the completions of a prompt) by their common prefix, and groups into batches.

    A group over the budget is divided into several, each with the prefix. The batches depend only on the sequences and
    their order, so that a resumed run finds the same ones.

    Args:
        sequences: token ids, none empty.
        keys: equal for sequences that are likely to begin with the same tokens; None leaves one out.
        budget: largest number of tokens in a batch, without padding. A longer sequence is a batch of its own.

    Returns:
        Batches, each other sequence in exactly one. The largest groups come first, so that memory peaks early.
    """
    rows_of: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        if key is not None:
            rows_of.setdefault(key, []).append(row)
    groups = [group for rows in rows_of.values() for group in _cut(sequences, rows, budget)]
    sizes = [group.shared + sum(len(sequences[row]) - group.shared for row in group.rows) for group in groups]
    batches: list[list[SharedPrefix]] = []
    room = 0
    for number in sorted(range(len(groups)), key=lambda number: (-sizes[number], number)):
        if not batches or sizes[number] > room:
            batches.append([])
            room = budget
        batches[-1].append(groups[number])
        room -= sizes[number]
    return batches


def _cut(sequences: Sequence[Sequence[int]], rows: list[int], budget: int) -> list[SharedPrefix]:
    """The rows of one key with their common prefix, in groups within the budget."""
    shared = common_prefix([sequences[row] for row in rows])
    parts: list[list[int]] = []
    room = 0
    for row in rows:
        if not parts or len(sequences[row]) - shared > room:
            parts.append([])
            room = budget - shared
        parts[-1].append(row)
        room -= len(sequences[row]) - shared
    # A single sequence shares nothing.
    return [SharedPrefix(shared if len(part) > 1 else 0, tuple(part)) for part in parts]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of first tokens that all sequences share; at least one token of each is not shared."""
    # All sequences share what the first and the last in lexicographic order share.
    low, high = min(map(tuple, sequences)), max(map(tuple, sequences))
    longest = min(map(len, sequences)) - 1
    return next((place for place in range(longest) if low[place] != high[place]), longest)

"""ArmoRM (Wang et al. 2024, arXiv 2406.12845): absolute ratings by a linear head, mixed by a gate that reads the prompt.

Shape suffixes: B sequences, T tokens, D width, P length of the gating pattern. `heads` objectives.

    stage 1   rewards = regression_layer(h[last token])                                    [heads]
    stage 2   score = sum(gate * (rewards @ reward_transform_matrix)),
              gate = softmax(gating(h[gate position]) / temperature) * logit_scale         [heads]

h is the backbone's hidden state after its final norm. The gate position is the FIRST token of the LAST occurrence of the
gating token pattern, the template's text between a prompt and its answer. The heads are float32 whatever the backbone is.
With the layout's pooling "mean", stage 1 reads the mean of h over what follows the pattern in place of h[last token].
"""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from drdpo.errors import DataError
from drdpo.folder import read_json_object
from drdpo.kernels.packed_attention import PackedRow, hidden_states
from drdpo.objectives import ARMORM_OBJECTIVES, GATED_SCORE

# ArmoRM's published checkpoint layout, read without torch: config.json, safetensors headers, names and shapes.
#
#     model.*                              the backbone, usually bfloat16
#     regression_layer.weight              [heads, D]   stage 1
#     reward_transform_matrix              [heads, heads]
#     gating.layers.{0..n_hidden}.weight   [hidden, D], [hidden, hidden], ..., [heads, hidden], each with a .bias
#     gating.logit_scale                   [1]
#
# config.json holds num_objectives, gating_temperature, gating_hidden_dim and gating_n_hidden, and may hold `objectives`
# (names in head order; default: ArmoRM's nineteen), `gating_token_pattern` (default: Llama-3's) and `pooling`: what
# stage 1 reads, the hidden state of the "last" token (default, ArmoRM's own) or the "mean" of those of the answer's
# tokens.

LLAMA3_GATING_PATTERN = (128009, 128006, 78191, 128007, 271)
"""Llama-3's ids of "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n"."""

POOLINGS = ("last", "mean")

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class RewardLayout:
    """What config.json says about the heads of a reward model of width D."""

    objectives: tuple[str, ...]
    gating_token_pattern: tuple[int, ...]
    gating_temperature: float
    gating_hidden_dim: int
    gating_n_hidden: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    pooling: str = "last"

    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that is not the backbone's."""
        heads, hidden, last = len(self.objectives), self.gating_hidden_dim, self.gating_n_hidden
        shapes: dict[str, tuple[int, ...]] = {
            "regression_layer.weight": (heads, self.hidden_size),
            "reward_transform_matrix": (heads, heads),
            "gating.logit_scale": (1,),
        }
        for layer in range(last + 1):
            rows = heads if layer == last else hidden
            shapes[f"gating.layers.{layer}.weight"] = (rows, hidden if layer else self.hidden_size)
            shapes[f"gating.layers.{layer}.bias"] = (rows,)
        return shapes


def read_layout(folder: Path) -> RewardLayout:
    """Read and check config.json of a reward model folder.

    Raises:
        DataError: no such folder or file, or a field that is missing or contradicts another; the message names it.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such reward model folder; run: bash setup.sh")
    if not path.is_file():
        raise DataError(f"{path}: no such file; a reward model folder holds ArmoRM's layout")
    config = read_json_object(path)
    count = _positive(path, config, "num_objectives")
    pattern = config.get("gating_token_pattern", list(LLAMA3_GATING_PATTERN))
    if not isinstance(pattern, list) or not pattern or not all(type(token) is int and token >= 0 for token in pattern):
        raise DataError(f'{path}: field "gating_token_pattern" must be a list of token ids')
    temperature = config.get("gating_temperature")
    if not isinstance(temperature, int | float) or isinstance(temperature, bool) or not temperature > 0:
        raise DataError(f'{path}: field "gating_temperature" is {temperature!r}, not a positive number')
    vocabulary = _positive(path, config, "vocab_size")
    if max(pattern) >= vocabulary:
        raise DataError(f'{path}: field "gating_token_pattern" holds {max(pattern)}, outside the vocabulary of {vocabulary}')
    pooling = config.get("pooling", "last")
    if pooling not in POOLINGS:
        raise DataError(f'{path}: field "pooling" is {pooling!r}, not one of {", ".join(POOLINGS)}')
    return RewardLayout(
        objectives=_objectives(path, config, count),
        gating_token_pattern=tuple(pattern),
        gating_temperature=float(temperature),
        gating_hidden_dim=_positive(path, config, "gating_hidden_dim"),
        gating_n_hidden=_positive(path, config, "gating_n_hidden", least=0),
        hidden_size=_positive(path, config, "hidden_size"),
        vocab_size=vocabulary,
        max_positions=_positive(path, config, "max_position_embeddings"),
        pooling=pooling,
    )


def read_shapes(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of every tensor in a folder's safetensors, single or sharded, from the headers alone.

    Raises:
        DataError: pickle weights only, no weights, a shard missing or cut, or an index that disagrees with its shards.
    """
    files, indexed = _weight_files(folder)
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        for name, shape in _header(file).items():
            if name in found:
                raise DataError(f"{file}: the tensor {name} is also in {found[name][0].name}")
            found[name] = (file, shape)
    for name, file_name in indexed.items():
        if name not in found or found[name][0].name != file_name:
            raise DataError(f"{folder / INDEX}: says that {file_name} holds {name}, which it does not")
    if indexed and (extra := sorted(set(found) - set(indexed))):
        raise DataError(f"{found[extra[0]][0]}: the tensor {extra[0]} is not in {INDEX}")
    return found


def check_shapes(folder: Path, found: dict[str, tuple[Path, tuple[int, ...]]], expected: dict[str, tuple[int, ...]]) -> None:
    """Compare the tensors of a folder with those that the model has: none missing, none of another shape, none left over.

    Args:
        folder: named in messages.
        found: from read_shapes, all of it or a part.
        expected: name and shape of every tensor there must be.

    Raises:
        DataError: naming the tensor.
    """
    if missing := sorted(set(expected) - set(found)):
        raise DataError(f"{folder}: the tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are)")
    if extra := sorted(set(found) - set(expected)):
        raise DataError(
            f"{folder}: the tensor {extra[0]} belongs to no part of the reward model ({len(extra)} are left over)"
        )
    for name, shape in expected.items():
        if found[name][1] != shape:
            raise DataError(
                f"{folder}: the tensor {name} has the shape {list(found[name][1])} where config.json means {list(shape)}"
            )


def check_folder(folder: Path) -> RewardLayout:
    """Check, without torch, all of a reward model folder but its backbone's tensors; returns its layout.

    Raises:
        DataError: from read_layout, read_shapes and check_shapes, or for a missing tokenizer.
    """
    layout = read_layout(folder)
    found = read_shapes(folder)
    heads = {name: place for name, place in found.items() if not name.startswith("model.")}
    check_shapes(folder, heads, layout.head_shapes())
    if len(heads) == len(found):
        raise DataError(f"{folder}: no tensor model.*; the weights hold heads without a backbone")
    if not (folder / "tokenizer.json").is_file():
        raise DataError(f"{folder}: no tokenizer (tokenizer.json) in the reward model folder")
    return layout


def _objectives(path: Path, config: dict[str, Any], count: int) -> tuple[str, ...]:
    names = config.get("objectives", list(ARMORM_OBJECTIVES))
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f'{path}: field "objectives" must be a list of names')
    if len(set(names)) != len(names) or GATED_SCORE in names:
        raise DataError(f'{path}: field "objectives" repeats a name or holds {GATED_SCORE}, the name of the gated score')
    if len(names) != count:
        whose = "lists" if "objectives" in config else "is absent, which means ArmoRM's"
        raise DataError(f'{path}: field "num_objectives" is {count}, but "objectives" {whose} {len(names)}')
    return tuple(names)


def _positive(path: Path, config: dict[str, Any], name: str, least: int = 1) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DataError(f'{path}: field "{name}" is {value!r}, not an integer of at least {least}')
    return value


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files, and the index's {tensor: file name}, empty for a single file."""
    if (folder / INDEX).is_file():
        try:
            indexed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(indexed.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f'{folder / INDEX}: not an index with a "weight_map"') from error
        for name in names:
            if not isinstance(name, str) or "/" in name or not (folder / name).is_file():
                raise DataError(f"{folder}: the shard {name} that {INDEX} names is missing")
        return [folder / name for name in names], indexed
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"], {}
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise DataError(f"{folder}: only pickle weights ({pickles[0]}); they can run code, so only safetensors are loaded")
    raise DataError(f"{folder}: no weights (model.safetensors or {INDEX})")


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: not whole safetensors ({error})") from error


# Batches of token ids within a budget of tokens: padded on the right, or packed with the shared prefixes once.

if TYPE_CHECKING:
    import torch


def pad_right(
    sequences: Sequence[Sequence[int]], pad_id: int, device: "torch.device"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Token ids [B, T] and their attention mask [B, T]; the mask alone tells padding from a token with the pad's id."""
    import torch

    longest = max(map(len, sequences))
    ids = [[*sequence, *[pad_id] * (longest - len(sequence))] for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class Group(NamedTuple):
    """Sequences that begin alike."""

    shared: int
    """So many first tokens are the same in all; each sequence is longer."""
    rows: tuple[int, ...]
    """Which sequences."""


def packed_batches(sequences: Sequence[Sequence[int]], keys: Sequence[Hashable], budget: int) -> list[list[Group]]:
    """Group sequences of one key (completions of one prompt) by what they begin with, and groups into batches.

    A group over the budget is cut into several, each with the prefix again. The batches depend on the sequences and their
    order only, so that a later run finds the same ones.

    Args:
        sequences: token ids, none empty.
        keys: what is the same for sequences that are likely to begin alike.
        budget: most tokens of a batch; there is no padding. A single longer sequence goes alone.

    Returns:
        Batches, the largest groups first, so that memory peaks at once; every sequence is in exactly one.
    """
    rows_of: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        rows_of.setdefault(key, []).append(row)
    groups = [group for rows in rows_of.values() for group in _cut(sequences, rows, budget)]
    sizes = [group.shared + sum(len(sequences[row]) - group.shared for row in group.rows) for group in groups]
    batches: list[list[Group]] = []
    room = 0
    for number in sorted(range(len(groups)), key=lambda number: (-sizes[number], number)):
        if not batches or sizes[number] > room:
            batches.append([])
            room = budget
        batches[-1].append(groups[number])
        room -= sizes[number]
    return batches


def _cut(sequences: Sequence[Sequence[int]], rows: list[int], budget: int) -> list[Group]:
    """The rows of one key, with their common prefix, in groups within the budget."""
    shared = common_prefix([sequences[row] for row in rows])
    parts: list[list[int]] = []
    room = 0
    for row in rows:
        if not parts or len(sequences[row]) - shared > room:
            parts.append([])
            room = budget - shared
        parts[-1].append(row)
        room -= len(sequences[row]) - shared
    # A sequence alone shares nothing: it is one causal piece.
    return [Group(shared if len(part) > 1 else 0, tuple(part)) for part in parts]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all sequences share; at least one token of each is left to itself."""
    # What the first and the last in lexicographic order share, all between them share.
    low, high = min(map(tuple, sequences)), max(map(tuple, sequences))
    longest = min(map(len, sequences)) - 1
    return next((place for place in range(longest) if low[place] != high[place]), longest)


class Span(NamedTuple):
    """Where a reward model reads a conversation."""

    gate: int
    """First token of the last gating pattern."""
    first: int
    """First token after that pattern, or the last token where the answer is empty."""
    last: int
    """The last token."""


def find_span(token_ids: Sequence[int], pattern: Sequence[int]) -> Span | None:
    """Where a reward model reads a conversation; None without the gating pattern."""
    gate = last_occurrence(token_ids, pattern)
    return None if gate is None else Span(gate, min(gate + len(pattern), len(token_ids) - 1), len(token_ids) - 1)


def last_occurrence(token_ids: Sequence[int], pattern: Sequence[int]) -> int | None:
    """Index of the first token of the last occurrence of `pattern`; None without one."""
    size = len(pattern)
    for start in range(len(token_ids) - size, -1, -1):
        if list(token_ids[start : start + size]) == list(pattern):
            return start
    return None


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
        """Do packed rows attend by drdpo.kernels.packed_attention, which runs on CUDA only?"""
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
    """Load a reward model folder in ArmoRM's published layout; see drdpo.scoring.armorm.

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

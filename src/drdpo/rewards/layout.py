"""ArmoRM's published checkpoint layout, read without torch: config.json, safetensors headers, names and shapes.

    model.*                              the backbone, usually bfloat16
    regression_layer.weight              [heads, D]   stage 1
    reward_transform_matrix              [heads, heads]
    gating.layers.{0..n_hidden}.weight   [hidden, D], [hidden, hidden], ..., [heads, hidden], each with a .bias
    gating.logit_scale                   [1]

config.json holds num_objectives, gating_temperature, gating_hidden_dim and gating_n_hidden, and may hold `objectives`
(names in head order; default: ArmoRM's nineteen), `gating_token_pattern` (default: Llama-3's) and `pooling`: what stage 1
reads, the hidden state of the "last" token (default, ArmoRM's own) or the "mean" of those of the answer's tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drdpo.errors import DataError
from drdpo.folder import read_json_object
from drdpo.objectives import ARMORM_OBJECTIVES, GATED_SCORE

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

"""A reward model folder: fitted heads put on their backbone; those this repository commits, on the embedded policy's.

Layout of the published ArmoRM checkpoint (RLHFlow/ArmoRM-Llama3-8B-v0.1): sharded safetensors with an index; backbone
tensors `model.*`, and float32 heads `regression_layer.weight`, `reward_transform_matrix`, `gating.*`; no lm_head.
The backbone's files become the first shards, without an output head and, where the heads read a shallower backbone
(num_hidden_layers in their config.json), without the layers beyond; the heads are the last shard.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from drdpo.errors import DataError
from drdpo.folder import atomic_folder, read_json_object, read_manifest, write_manifest
from drdpo.models import fingerprint

COMMITTED = Path(__file__).parent / "armorm_smollm2"
HEADS, CONFIG, CARD, TEMPLATE = "heads.safetensors", "config.json", "README.md", "chat_template.jinja"
INDEX = "model.safetensors.index.json"
ARCHITECTURE = "LlamaForRewardModelWithGating"
LAYOUT = 1
"""Raised when this module writes another folder from the same files, so that setup assembles it again."""

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def reward_model_is_made(folder: Path, policy: Path, committed: Path = COMMITTED) -> bool:
    """Does `folder` hold what make_reward_model would write?"""
    if not (policy / "config.json").is_file() or not (folder / INDEX).is_file():
        return False
    if not all((folder / shard).is_file() for shard in read_json_object(folder / INDEX)["weight_map"].values()):
        return False
    return bool(read_manifest(folder).get("assets", {}).get("made_by") == _made_by(policy, committed))


def make_reward_model(folder: Path, policy: Path, committed: Path = COMMITTED) -> None:
    """Assemble a reward model folder, whole or not at all.

    Args:
        folder: where to write.
        policy: Hugging Face folder of a Llama in safetensors, single or sharded.
        committed: heads.safetensors, config.json (what the heads add to the backbone's config), README.md and
            chat_template.jinja.

    Raises:
        DataError: a file is missing, a head is not float32, or the backbone has fewer layers than the heads read.
    """
    for name in (HEADS, CONFIG, CARD, TEMPLATE):
        if not (committed / name).is_file():
            raise DataError(f"{committed / name}: no such file; experiments/fit_reward_heads.py writes it with the others")
    with atomic_folder(folder) as aside:
        _write_config(policy / "config.json", committed / CONFIG, aside / CONFIG)
        shards = _write_backbone(policy, aside)
        shutil.copyfile(committed / HEADS, aside / shards[-1])
        _write_index(aside, shards)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(policy / name, aside / name)
        # Raw messages: the policy's template would add its default system message.
        shutil.copyfile(committed / TEMPLATE, aside / TEMPLATE)
        shutil.copyfile(committed / CARD, aside / CARD)
        write_manifest(aside, "assets", _made_by(policy, committed))


def _made_by(policy: Path, committed: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name in (HEADS, CONFIG, CARD, TEMPLATE):
        digest.update((committed / name).read_bytes() if (committed / name).is_file() else b"")
    return {"policy": fingerprint(policy), "committed": digest.hexdigest()[:32], "layout": LAYOUT}


def _write_backbone(policy: Path, folder: Path) -> list[str]:
    """The backbone's tensors that `folder`'s config.json counts; returns the names of all shards, the heads' last."""
    layers = read_json_object(folder / CONFIG)["num_hidden_layers"]
    files = sorted(policy.glob("model*.safetensors"))
    if not files:
        raise DataError(f"{policy}: no model*.safetensors")
    found = {file: list(_tensors(file)) for file in files}
    kept = {
        file: [name for name in names if name.startswith("model.") and _layer(name) < layers]
        for file, names in found.items()
    }
    kept = {file: names for file, names in kept.items() if names}  # a file may hold the output head alone
    if not kept:
        raise DataError(f"{policy}: no tensor model.*; the backbone is a causal language model's folder")
    total = len(kept) + 1
    shards = [f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)]
    for (file, names), shard in zip(kept.items(), shards, strict=False):
        if len(names) == len(found[file]):
            _link(file, folder / shard)
        else:
            _copy_tensors(file, names, folder / shard, mode=(folder / CONFIG).stat().st_mode)
    return shards


def _copy_tensors(source: Path, names: list[str], target: Path, mode: int) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, framework="pt") as stored:
        save_file({name: stored.get_tensor(name) for name in names}, target, metadata={"format": "pt"})
    target.chmod(mode)  # safetensors makes it private


def _layer(name: str) -> int:
    """Which layer a tensor belongs to, counted from 0; -1 for embeddings and the final norm."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # Another file system, or one without hard links: 269 MB more on the disk.
        shutil.copyfile(source, target)


def _write_index(folder: Path, shards: list[str]) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        for name, (dtype, size) in _tensors(folder / shard).items():
            backbone = shard != shards[-1]
            if backbone != name.startswith("model.") or (not backbone and dtype != "F32"):
                raise DataError(f"{shard}: the tensor {name} ({dtype}) has no place there; backbone model.*, heads float32")
            weight_map[name] = shard
            total += size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensors(path: Path) -> dict[str, tuple[str, int]]:
    """{name: (dtype, bytes)} from a safetensors header."""
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(path, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                part = tensors.get_slice(name)
                size = _BYTES[part.get_dtype()]
                for length in part.get_shape():
                    size *= length
                found[name] = (part.get_dtype(), size)
    except SafetensorError as error:
        raise DataError(f"{path}: not whole safetensors ({error})") from error
    return found


def _write_config(backbone: Path, heads: Path, target: Path) -> None:
    config, added = read_json_object(backbone), read_json_object(heads)
    layers = added.get("num_hidden_layers", config["num_hidden_layers"])
    if layers > config["num_hidden_layers"]:
        raise DataError(f"{heads}: the heads read {layers} layers, and {backbone} has {config['num_hidden_layers']}")
    if isinstance(config.get("layer_types"), list):  # One word a layer, in families that have several kinds.
        config["layer_types"] = config["layer_types"][:layers]
    config |= added | {"architectures": [ARCHITECTURE]}
    target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""The embedded reward model: the heads that this repository commits, put on the embedded policy's backbone.

Layout of the published ArmoRM checkpoint (RLHFlow/ArmoRM-Llama3-8B-v0.1): sharded safetensors with an index; backbone
tensors `model.*`, and float32 heads `regression_layer.weight`, `reward_transform_matrix`, `gating.*`; no lm_head.
Shard 1 is the policy's own file, linked: its embeddings are tied, so it holds exactly the backbone.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from drdpo.errors import DataError
from drdpo.files import atomic_folder
from drdpo.manifest import fingerprint, read_manifest, write_manifest

COMMITTED = Path(__file__).parent / "armorm_smollm2"
HEADS, CONFIG, CARD, TEMPLATE = "heads.safetensors", "config.json", "README.md", "chat_template.jinja"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ARCHITECTURE = "LlamaForRewardModelWithGating"
LAYOUT = 1
"""Raised when this module writes another folder from the same files, so that setup assembles it again."""

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def reward_model_is_made(folder: Path, policy: Path, committed: Path = COMMITTED) -> bool:
    """Does `folder` hold what make_reward_model would write?"""
    if not (policy / "config.json").is_file() or not all((folder / shard).is_file() for shard in SHARDS):
        return False
    return bool(read_manifest(folder).get("assets", {}).get("made_by") == _made_by(policy, committed))


def make_reward_model(folder: Path, policy: Path, committed: Path = COMMITTED) -> None:
    """Assemble a reward model folder, whole or not at all.

    Args:
        folder: where to write.
        policy: Hugging Face folder of a Llama with tied embeddings, in one model.safetensors.
        committed: heads.safetensors, config.json (what the heads add to the backbone's config), README.md and
            chat_template.jinja.

    Raises:
        DataError: a committed file is missing, a head is not float32, or the policy's file is no bare backbone.
    """
    for name in (HEADS, CONFIG, CARD, TEMPLATE):
        if not (committed / name).is_file():
            raise DataError(f"{committed / name}: no such file; it is part of this repository")
    with atomic_folder(folder) as aside:
        _link(policy / "model.safetensors", aside / SHARDS[0])
        shutil.copyfile(committed / HEADS, aside / SHARDS[1])
        _write_index(aside)
        _write_config(policy / "config.json", committed / CONFIG, aside / CONFIG)
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


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # Another file system, or one without hard links: 269 MB more on the disk.
        shutil.copyfile(source, target)


def _write_index(folder: Path) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for shard in SHARDS:
        for name, (dtype, size) in _tensors(folder / shard).items():
            backbone = shard == SHARDS[0]
            if backbone != name.startswith("model.") or (not backbone and dtype != "F32"):
                raise DataError(f"{shard}: the tensor {name} ({dtype}) has no place there; backbone model.*, heads float32")
            weight_map[name] = shard
            total += size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
    config = json.loads(backbone.read_text(encoding="utf-8"))
    added = json.loads(heads.read_text(encoding="utf-8"))
    config |= added | {"architectures": [ARCHITECTURE]}
    target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""Cheap checks of a model folder, before a library is imported or a weight is read, and its fingerprint."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from drdpo.errors import DataError
from drdpo.folder import read_json_object

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_AGAIN = "copy or download it again, or pass an earlier checkpoint"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")

_BLOCK = 1 << 16
_BLOCKS = 64
_HEAD_BYTES = 1 << 26

_MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "vocab*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
)  # fmt: skip


def check_model_folder(path: str) -> None:
    """Refuse a model folder that no step could use.

    Args:
        path: a Hugging Face folder, or a hub id (`owner/name`, not an existing folder), which passes.

    Raises:
        DataError: no such folder; config.json is missing or cut; no safetensors weights (pickled weights can run code when
            they are read, so they are refused); a shard of the index is missing, or weights are cut or have a damaged
            header; no tokenizer.
    """
    folder = Path(path)
    if not path or not folder.is_dir():
        if not _may_be_hub_id(path):
            raise DataError(f"{path}: no such model folder")
        return
    _json_object(folder / "config.json")
    _check_weights(folder)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise DataError(f"{path}: no tokenizer (tokenizer.json) in the model folder; copy the one of its base model there")


def _may_be_hub_id(path: str) -> bool:
    """`owner/name`, or a name without owner; absolute, relative and deeper paths are not, nor is a file."""
    words = path.split("/")
    plain = all(word and word not in (".", "..") and not word.startswith("~") for word in words)
    # models/X and outputs/X are this repository's own folders: a missing one is a typo, not a hub id.
    return plain and len(words) <= 2 and words[0] not in ("models", "outputs", "datasets") and not Path(path).exists()


def _check_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
        if pickled:
            raise DataError(
                f"{folder}: the weights are pickled ({pickled[0]}), which can run code when they are read; save them as "
                "safetensors (model.save_pretrained(folder) in transformers does)"
            )
        raise DataError(f"{folder}: no weights (*.safetensors) in the model folder")
    for file in sorted(folder.glob("*.safetensors")):
        check_safetensors(file)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    weight_map = _json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise DataError(f'{index}: no "weight_map"')
    for shard in sorted(set(weight_map.values())):
        if not (folder / str(shard)).is_file():
            raise DataError(f"{folder}: the weights are not complete: {shard} is missing")


def check_safetensors(file: Path) -> None:
    """Check that a safetensors file is as long as its header says. Reads only the header: 8 bytes of its length, then JSON.

    Raises:
        DataError: the file is too short or too long, or its header is damaged.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise DataError(f"{file}: cut short, or its header is damaged ({size} bytes); {_AGAIN}")
        try:
            header = json.loads(stream.read(length))
            data = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
            whole = 8 + length + data == size
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise DataError(f"{file}: its header is damaged, so these are not whole safetensors; {_AGAIN}") from error
    if not whole:
        raise DataError(f"{file}: has {size} bytes where its header says {8 + length + data}; {_AGAIN}")


def _json_object(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise DataError(f"{path.parent}: no {path.name} in the model folder")
    return read_json_object(path)


def fingerprint(path: str | Path) -> str:
    """Hash of a file, or of a model folder's own files, by name, size and content; a hub id is its own fingerprint.

    Results beside a model (completions, scores, plots) are ignored. Weights over 4 MiB are read at 65 places from start to
    end, since trained weights differ everywhere. Heads may be refitted on the same backbone, so all tensors outside the
    backbone (`model.*`) are read whole, up to 64 MiB each.
    """
    path = Path(path)
    if not path.exists():
        return f"hub:{path}"
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()[:32]
    for file in sorted(file for pattern in _MODEL_FILES for file in path.glob(pattern) if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= _BLOCK * _BLOCKS:
                digest.update(stream.read())
                continue
            for number in range(_BLOCKS + 1):
                stream.seek((size - _BLOCK) * number // _BLOCKS)
                digest.update(stream.read(_BLOCK))
            if file.suffix == ".safetensors":
                for tensor in _head_tensors(stream, size):
                    digest.update(tensor)
    return digest.hexdigest()[:32]


def _head_tensors(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """The bytes of every tensor outside the backbone in a safetensors file; none if its header is damaged."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    try:
        header = json.loads(stream.read(length)) if length < size else {}
        places = [entry["data_offsets"] for name, entry in header.items() if not name.startswith(("model.", "__metadata__"))]
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    for start, end in places:
        if end - start <= _HEAD_BYTES:
            stream.seek(8 + length + start)
            yield stream.read(end - start)

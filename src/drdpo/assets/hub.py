"""Models and data sets from the hub: probed first, safetensors only, appearing whole or not at all."""

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from drdpo.assets.helpsteer2 import UPSTREAM, parse_lines, write_prompts
from drdpo.errors import DataError
from drdpo.folder import atomic_file, write_manifest

PROBE_REPO = "RLHFlow/ArmoRM-Llama3-8B-v0.1"
"""Public, so that an answer needs no login."""

ALLOW = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt", "*.md", "LICENSE*")
NEVER = (
    "original/*",
    "*.bin",
    "*.bin.*",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.py",
    "*.gguf",
    "*.onnx",
    "*.h5",
    "*.msgpack",
)
"""Pickles can run code when they are read, and so can a repository's Python files: neither is ever fetched."""

LLAMA3_PAD = ("<|finetune_right_pad_id|>", 128004)
"""Llama 3.x names no pad token; its end-of-turn token must not serve as one."""


class NeedsLoginError(Exception):
    """A gated repository whose licence this user has not accepted, or is not logged in for."""


def hub_answers(timeout: float = 3.0) -> bool:
    """Does the hub answer within `timeout` seconds? False also under HF_HUB_OFFLINE=1."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        HfApi().model_info(PROBE_REPO, timeout=timeout)
    except (HTTPError, OSError):
        return False
    return True


def wanted(name: str) -> bool:
    """Is a repository's file fetched?"""
    return any(fnmatch(name, pattern) for pattern in ALLOW) and not any(fnmatch(name, pattern) for pattern in NEVER)


def download_model(repo: str, folder: Path) -> None:
    """Download a model, after printing its size; a broken download is resumed by the next call.

    Args:
        repo: hub id.
        folder: where the model appears once it is whole; until then its files lie in `.<name>.download` beside it.

    Raises:
        NeedsLoginError: the repository is gated; the message says what to do.
        DataError: no safetensors there, too little disk space, or the download broke.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _hub_errors(repo):
        info = HfApi().model_info(repo, files_metadata=True, timeout=30)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if wanted(file.rfilename)}
    if not any(name.endswith(".safetensors") for name in sizes):
        raise DataError(f"{repo}: holds no safetensors weights, and pickled ones are not loaded")
    aside = folder.parent / f".{folder.name}.download"
    aside.mkdir(parents=True, exist_ok=True)
    _check_space(repo, aside, sum(sizes.values()))
    with _hub_errors(repo):
        snapshot_download(repo, revision=info.sha, local_dir=aside, allow_patterns=list(ALLOW), ignore_patterns=list(NEVER))
    for name, size in sizes.items():
        if not (aside / name).is_file() or (aside / name).stat().st_size != size:
            raise DataError(f"{repo}: {name} did not arrive whole; run the same command again")
    shutil.rmtree(aside / ".cache", ignore_errors=True)
    if repo.startswith("meta-llama/"):
        set_pad_token(aside, *LLAMA3_PAD)
    write_manifest(aside, "assets", {"repository": repo, "revision": info.sha})
    os.replace(aside, folder)


def set_pad_token(folder: Path, token: str, token_id: int) -> None:
    """Name the pad token in tokenizer_config.json and generation_config.json.

    Raises:
        DataError: the tokenizer does not have this token under this id.
    """
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
    if not any(entry.get("content") == token and entry.get("id") == token_id for entry in added):
        raise DataError(f"{folder}/tokenizer.json: no token {token} with the id {token_id}, so no pad token can be set")
    changes = {"tokenizer_config.json": token, "special_tokens_map.json": token, "generation_config.json": token_id}
    for name, value in changes.items():
        path = folder / name
        if name == "special_tokens_map.json" and not path.is_file():
            continue  # Older folders only.
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        config["pad_token_id" if isinstance(value, int) else "pad_token"] = value
        with atomic_file(path) as stream:
            json.dump(config, stream, indent=2, ensure_ascii=False)
            stream.write("\n")


def download_helpsteer2(repo: str, folder: Path) -> dict[str, dict[str, int]]:
    """Download HelpSteer2 (about 25 MB) and write its prompts.

    Returns:
        {split: counts of rows, prompts and dropped rows}.

    Raises:
        DataError: the hub does not answer, or the files are not HelpSteer2's.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with _hub_errors(repo):
        info = HfApi().dataset_info(repo, timeout=30)
        names = {file.rfilename for file in info.siblings or []}
        paths = {}
        for split, upstream in UPSTREAM.items():
            found = [name for name in (f"{upstream}.jsonl.gz", f"{upstream}.jsonl") if name in names]
            if not found:
                raise DataError(f"{repo}: holds neither {upstream}.jsonl.gz nor {upstream}.jsonl")
            paths[split] = Path(hf_hub_download(repo, found[0], repo_type="dataset", revision=info.sha))
    rows = {split: _rows(path) for split, path in paths.items()}
    return write_prompts(folder, rows, {"repository": repo, "revision": info.sha})


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            yield from parse_lines(lines, path.name)
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the downloaded file is broken ({error}); delete it and run setup again") from error


def _check_space(repo: str, folder: Path, size: int) -> None:
    """Print the size; what an earlier, broken download already holds counts as there."""
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    resumed = f" ({there / 1e9:.1f} GB of it are there)" if there > 1e8 else ""
    print(f"{repo}: downloading {size / 1e9:.1f} GB{resumed}, {free / 1e9:.1f} GB are free", flush=True)
    if size - there > free:
        raise DataError(f"{repo}: needs {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free")


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HTTPError,
        RepositoryNotFoundError,
        XetDownloadError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise NeedsLoginError(
            f"gated: accept the licence at https://huggingface.co/{repo}, then `hf auth login`, then this command again"
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(f"{repo}: the hub knows no such repository, or it is private") from error
    except (HTTPError, EntryNotFoundError, XetDownloadError, ConnectionError, TimeoutError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{repo}: the download broke ({first}); run the same command again to resume it") from error

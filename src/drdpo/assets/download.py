"""Step 0, setup's second half: make or download every selected model and prompt set that is missing, then print a table;
and the downloads from the Hugging Face hub: models (safetensors only), and the prompts of HelpSteer2."""

import gzip
import json
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from drdpo.asset_names import HUB_DATASETS, HUB_MODELS, select_datasets, select_models
from drdpo.assets import embedded
from drdpo.config.data import AssetsConfig
from drdpo.errors import DataError
from drdpo.folder import ROOT, atomic_folder, read_json_object, write_json, write_manifest
from drdpo.records import Message, Prompt, write_records


class Asset(NamedTuple):
    """A model or prompt set for `folder`."""

    folder: Path
    is_made: Callable[[], bool]
    make: Callable[[], object]


@dataclass(frozen=True)
class Outcome:
    """A row of the table."""

    name: str
    state: str
    note: str
    failed: bool = False


def download_assets(config: AssetsConfig, root: Path = ROOT) -> list[Outcome]:
    """Put the selected models into `root`/models and prompts into `root`/datasets, and print a table.

    Returns:
        One outcome per asset.

    Raises:
        DataError: an asset failed, after all others were done. With `auto`, a gated model without a login and a hub that
            does not answer are not failures.
    """
    chosen = select_models(config.models) | select_datasets(config.datasets)
    answers = cache(hub_answers)  # asked only if something is missing
    outcomes = []
    for name, asset in _assets(root).items():
        if name not in chosen and not (name == "SmolLM2-135M" and "ArmoRM-SmolLM2" in chosen):  # its backbone
            continue
        state, note, required = "present", str(asset.folder), chosen.get(name, True)
        try:
            if not asset.is_made() and name in (*HUB_MODELS, *HUB_DATASETS) and not answers():
                state, note = "failed" if required else "left out", "the hub does not answer"
            elif not asset.is_made():
                print(f"{name}: making {asset.folder}", flush=True)
                asset.make()
                state = "made"
        except NeedsLoginError as error:
            state, note = "needs a login", str(error)
        except DataError as error:
            state, note, required = "failed", str(error), True
        outcomes.append(Outcome(name, state, note, required and state not in ("present", "made")))
    if any(outcome.state == "left out" for outcome in outcomes):
        print("The hub does not answer: using only the embedded models and prompts, which are enough for quickstart.sh.")
    outcomes = [outcome for outcome in outcomes if outcome.state != "left out"]
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    for outcome in outcomes:
        print(f"{outcome.name:<{width}}  {outcome.state:<13}  {outcome.note.removeprefix(f'{root}/')}")
    if failed := [outcome.name for outcome in outcomes if outcome.failed]:
        raise DataError(f"{len(failed)} of {len(outcomes)} models and prompt sets are missing: {', '.join(failed)}")
    return outcomes


def _assets(root: Path) -> dict[str, Asset]:
    """All of them, dependencies first: the reward model's backbone is the policy."""
    models, datasets = root / "models", root / "datasets"
    policy, reward, prompts = models / "SmolLM2-135M", models / "ArmoRM-SmolLM2", datasets / "embedded_prompts"
    assets = [
        Asset(policy, partial(embedded.policy_is_made, policy), partial(embedded.make_policy, policy)),
        Asset(
            reward,
            partial(embedded.reward_model_is_made, reward, policy),
            partial(embedded.make_reward_model, reward, policy),
        ),
        Asset(prompts, partial(embedded.prompts_are_made, prompts), partial(embedded.make_prompts, prompts)),
    ]
    for folder, repo in ((models / name, repo) for name, repo in HUB_MODELS.items()):
        assets.append(Asset(folder, (folder / "config.json").is_file, partial(download_model, repo, folder)))
    for folder, repo in ((datasets / name, repo) for name, repo in HUB_DATASETS.items()):
        assets.append(Asset(folder, (folder / "test.jsonl").is_file, partial(download_helpsteer2, repo, folder)))
    return {asset.folder.name: asset for asset in assets}


PROBE_REPO = "RLHFlow/ArmoRM-Llama3-8B-v0.1"
"""Public, so the probe needs no login."""

WANTED = {
    "allow_patterns": ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt", "*.md", "LICENSE*"],
    "ignore_patterns": "original/* *.bin *.bin.* *.pt *.pth *.ckpt *.pkl *.py *.gguf *.onnx *.h5 *.msgpack".split(),
}
"""Loading a pickle or a repository's Python file can run code, so neither is ever downloaded."""

LLAMA3_PAD = ("<|finetune_right_pad_id|>", 128004)
"""Llama 3.x defines no pad token, and padding with its end-of-turn token would be wrong."""

HELPSTEER2_LICENCE = (
    "CC-BY-4.0; HelpSteer2, NVIDIA (Wang et al. 2024, arXiv 2406.08673); the prompts, deduplicated and split into turns"
)
HELPSTEER2_SPLITS = {"train": "train", "test": "validation"}
"""Our split -> HelpSteer2's."""

FIRST_TEST_ID = 1_000_000
"""Keeps prompt_id unique across both splits."""

_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


class NeedsLoginError(Exception):
    """A gated repository: the licence is not accepted, or the user is not logged in."""


def hub_answers() -> bool:
    """Whether the hub answers within three seconds; False if HF_HUB_OFFLINE=1."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        HfApi().model_info(PROBE_REPO, timeout=3)
    except (HTTPError, OSError):
        return False
    return True


def download_model(repo: str, folder: Path) -> None:
    """Download a model after printing its size; rerunning resumes an interrupted download, from `.<name>.download` beside
    the folder, which appears once the model is complete.

    Raises:
        NeedsLoginError: the repository is gated; the message says what to do.
        DataError: the folder has other files, the repository has no safetensors, the disk is too small, or the download
            failed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: exists without config.json, so it is no whole model; move it away, then rerun setup.sh")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    with _hub_errors(repo):
        info = HfApi().model_info(repo, files_metadata=True, timeout=30)
    of_model = filter_repo_objects(info.siblings or [], **WANTED, key=lambda file: file.rfilename)
    sizes = {file.rfilename: file.size or 0 for file in of_model}
    if not any(name.endswith(".safetensors") for name in sizes):
        raise DataError(f"{repo}: no safetensors weights; pickled weights are not loaded")
    aside = folder.parent / f".{folder.name}.download"
    aside.mkdir(parents=True, exist_ok=True)
    _check_space(repo, aside, sum(sizes.values()))
    with _hub_errors(repo):
        snapshot_download(repo, revision=info.sha, local_dir=aside, **WANTED)
    for name, size in sizes.items():
        if not (aside / name).is_file() or (aside / name).stat().st_size != size:
            raise DataError(f"{repo}: {name} is incomplete; rerun the same command")
    shutil.rmtree(aside / ".cache", ignore_errors=True)
    if repo.startswith("meta-llama/"):
        set_pad_token(aside, *LLAMA3_PAD)
    write_manifest(aside, "assets", {"repository": repo, "revision": info.sha})
    os.replace(aside, folder)


def set_pad_token(folder: Path, token: str, token_id: int) -> None:
    """Set the pad token in tokenizer_config.json and generation_config.json.

    Raises:
        DataError: the tokenizer does not have this token under this id.
    """
    added = read_json_object(folder / "tokenizer.json").get("added_tokens", [])
    if not any(entry.get("content") == token and entry.get("id") == token_id for entry in added):
        raise DataError(f"{folder}/tokenizer.json: no token {token} with the id {token_id}, so no pad token can be set")
    changes: dict[str, dict[str, Any]] = {"tokenizer_config.json": {"pad_token": token}}
    changes["generation_config.json"] = {"pad_token_id": token_id}
    if (folder / "special_tokens_map.json").is_file():  # Only older folders have it.
        changes["special_tokens_map.json"] = {"pad_token": token}
    for name, change in changes.items():
        config = read_json_object(folder / name) if (folder / name).is_file() else {}
        write_json(folder / name, config | change)


def download_helpsteer2(repo: str, folder: Path) -> None:
    """Download HelpSteer2 (about 25 MB), two rated responses per prompt, and write its prompts to
    `folder/{train,test}.jsonl`.

    Raises:
        DataError: the hub does not answer, a file is damaged, or a split has no usable prompt.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with _hub_errors(repo):
        revision = HfApi().dataset_info(repo, timeout=30).sha
        paths = {
            split: Path(hf_hub_download(repo, f"{upstream}.jsonl.gz", repo_type="dataset", revision=revision))
            for split, upstream in HELPSTEER2_SPLITS.items()
        }
    test = convert_rows(_read_gzip(paths["test"]), first_id=FIRST_TEST_ID)
    train = convert_rows(_read_gzip(paths["train"]), held_out=test[0])
    with atomic_folder(folder) as aside:
        for split, (prompts, _) in (("train", train), ("test", test)):
            if not prompts:
                raise DataError(f"{repo}: the {HELPSTEER2_SPLITS[split]} split has no usable prompt")
            write_records(aside / f"{split}.jsonl", prompts)
        made_by, counts = {"repository": repo, "revision": revision}, {"train": train[1], "test": test[1]}
        write_manifest(aside, "assets", made_by, licence=HELPSTEER2_LICENCE, count=counts)


def convert_rows(
    rows: Iterable[Any], first_id: int = 0, held_out: Iterable[Prompt] = ()
) -> tuple[list[Prompt], dict[str, int]]:
    """Unique prompts of rows of HelpSteer2, in order of first appearance, and counts of rows, prompts and dropped rows.

    Args:
        rows: JSON objects with a string field `prompt`; other fields are not read.
        first_id: prompt_id of the first prompt; later prompts count up from it.
        held_out: prompts to omit (the test split's, for the train split).

    Raises:
        DataError: a row without that field; the message names the row.
    """
    prompts: list[Prompt] = []
    held, seen, counts = {str(prompt.prompt) for prompt in held_out}, set[str](), Counter[str]()
    for number, row in enumerate(rows, start=1):
        text = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise DataError(f'HelpSteer2, row {number}: field "prompt" is missing or is not a string')
        try:
            messages = split_helpsteer_turns(text)
        except ValueError:
            messages = []
        key = str(messages)
        if not messages or "<extra_id_" in key:  # a turn marker in another form
            counts["dropped_broken_turns"] += 1
        elif key in seen:
            counts["dropped_repeated"] += 1
        elif key in held:
            counts["dropped_also_in_test"] += 1
        else:
            prompts.append(Prompt(first_id + len(prompts), messages))
        seen.add(key)
        counts["rows"] = number
    counts |= {"prompts": len(prompts), "multi_turn": sum(len(prompt.prompt) > 1 for prompt in prompts)}
    names = ("rows", "prompts", "multi_turn", "dropped_repeated", "dropped_broken_turns", "dropped_also_in_test")
    return prompts, {name: counts[name] for name in names}


def split_helpsteer_turns(text: str) -> list[Message]:
    """The messages of a HelpSteer2 prompt, user, assistant, ..., user, stripped of outer white space.

    About 29% of HelpSteer2's prompts are conversations in one string: the first user turn, then turns opened by
    "\\n<extra_id_1>Assistant\\n" and "\\n<extra_id_1>User\\n".

    Raises:
        ValueError: the turns do not alternate, a turn is empty, or the last is not the user's.
    """
    first, *rest = _TURN.split(text)
    turns = list(zip(rest[0::2], rest[1::2], strict=True))
    if first.strip() or not rest:  # Otherwise the text opens with a marker of its own.
        turns.insert(0, ("User", first))
    messages = [{"role": role.lower(), "content": content.strip()} for role, content in turns]
    for number, message in enumerate(messages):
        expected = "assistant" if number % 2 else "user"
        if message["role"] != expected:
            raise ValueError(f"turn {number + 1} is the {message['role']}'s, expected the {expected}'s")
        if not message["content"]:
            raise ValueError(f"turn {number + 1} is empty")
    if messages[-1]["role"] != "user":
        raise ValueError("the prompt does not end in a user turn")
    return messages


def _read_gzip(path: Path) -> list[Any]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise DataError(f"{path}: the download is damaged ({error}); delete it and rerun setup.sh") from error


def _check_space(repo: str, folder: Path, size: int) -> None:
    """Print the download's size and check the disk; files of an interrupted download count as present."""
    present = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    resumed = f" ({present / 1e9:.1f} GB already present)" if present > 1e8 else ""
    print(f"{repo}: downloading {size / 1e9:.1f} GB{resumed}; {free / 1e9:.1f} GB free", flush=True)
    if size - present > free:
        raise DataError(f"{repo}: needs {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free")


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn huggingface_hub's exceptions into one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise NeedsLoginError(
            f"gated: accept the licence at https://huggingface.co/{repo}, run `hf auth login`, then rerun this command"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(f"{repo}: no such repository on the hub, or it is private") from error
    except (errors.HTTPError, errors.EntryNotFoundError, errors.XetDownloadError, ConnectionError, TimeoutError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{repo}: the download failed ({first}); rerun the same command to resume") from error

"""The prompts of a run: find, read and render them, and reject those that cannot be used."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drdpo import chat
from drdpo.errors import DataError, UsageError
from drdpo.models import Model
from drdpo.records import SPLITS, Prompt, check_unique, read_records

_ROOT = Path(__file__).resolve().parents[3]

AUTO_DATASETS = ("helpsteer2_prompts", "embedded_prompts")
"""Folders under datasets/ for --dataset=auto; the first that exists is used."""


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt that can be used; `row` is its number in the file, from 1."""

    row: int
    prompt: Prompt
    token_ids: list[int]


Reject = dict[str, Any]
"""A prompt that cannot be used, and why: {file, row, prompt_id, reason}."""


def find_dataset(dataset: str, root: Path = _ROOT) -> Path:
    """The folder of prompts that --dataset names; prints which one `auto` is.

    Raises:
        DataError: no such folder.
    """
    if dataset != "auto":
        folder = Path(dataset)
        if not folder.is_dir():
            raise DataError(f"{dataset}: no such folder of prompts (with test.jsonl, and train.jsonl for training)")
        return folder
    for name in AUTO_DATASETS:
        folder = root / "datasets" / name
        if folder.is_dir():
            print(f"prompts: {folder} (--dataset=auto)", flush=True)
            return folder
    raise DataError(
        f"no prompts: none of {', '.join(f'datasets/{name}' for name in AUTO_DATASETS)} exists; run: bash setup.sh, or pass "
        "--dataset=FOLDER with train.jsonl and test.jsonl"
    )


def read_prompts(dataset: Path, only_test: bool, max_prompts: int | None) -> dict[str, list[Prompt]]:
    """Read and check the prompts of each split, test first; at most `max_prompts` of each are kept, the files checked whole.

    Raises:
        DataError: naming file, row and field; also for a repeated prompt_id.
    """
    prompts = {}
    for split in ("test",) if only_test else tuple(reversed(SPLITS)):
        path = dataset / f"{split}.jsonl"
        records = read_records(path, Prompt.from_row)
        check_unique(path, [(record.prompt_id,) for record in records], "prompt_id")
        prompts[split] = records[:max_prompts]
    return prompts


def render(
    tokenizer: Any, prompts: list[Prompt], file: Path, prompt_max_len: int
) -> tuple[list[RenderedPrompt], list[Reject]]:
    """Token ids of each prompt; prompts that are too long or that the chat template rejects are returned apart.

    Raises:
        DataError: no prompt can be used.
    """
    rendered: list[RenderedPrompt] = []
    rejects: list[Reject] = []
    for row, prompt in enumerate(prompts, start=1):
        try:
            token_ids = chat.prompt_token_ids(tokenizer, prompt.prompt)
            if len(token_ids) > prompt_max_len:
                raise ValueError(f"{len(token_ids)} tokens, more than --prompt_max_len={prompt_max_len}")
        except ValueError as error:
            rejects.append({"file": str(file), "row": row, "prompt_id": prompt.prompt_id, "reason": str(error)})
        else:
            rendered.append(RenderedPrompt(row, prompt, token_ids))
    if not rendered:
        raise DataError(f"{file}: none of its {len(prompts)} prompts can be used; row 1: {rejects[0]['reason']}")
    return rendered, rejects


def stop_token_ids(model_path: str, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: the template's end of turn first, then the model's and the tokenizer's end of sequence.

    Llama 3's instruct models list three in their generation config, many models a single one.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        source: Any = GenerationConfig.from_pretrained(model_path)
    except OSError:  # the folder has no generation_config.json
        source = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    ends = getattr(source, "eos_token_id", None)
    ids = [chat.end_of_turn_id(tokenizer), *(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return tuple(dict.fromkeys(int(token) for token in ids if token is not None))


def check_context(model: Model, prompt_max_len: int, max_new_tokens: int) -> int:
    """Largest number of tokens of a prompt with its completion; raises UsageError if the model has a shorter context."""
    context, need = model.structure.positions, prompt_max_len + max_new_tokens
    if context is not None and need > context:
        raise UsageError(
            f"--prompt_max_len={prompt_max_len} and --max_new_tokens={max_new_tokens} need {need} tokens, but {model.path} "
            f"has a context of {context}; pass smaller values"
        )
    return need

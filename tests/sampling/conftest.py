"""Prompts and flags for the sampling tests."""

import json
from pathlib import Path

import pytest

from drdpo import chat
from drdpo.config.data import CompletionsConfig
from drdpo.sampling.engines import Request, stream_seed

QUESTIONS = [
    "What is rain?", "Name a fruit.", "Say hi.", "Why is the sky blue, in one line?", "List three colours.",
    "Who wrote Emma?", "Is it late?", "Add two and two.", "Spell cat.", "Translate 'dog' into French, please, and say why.",
]  # fmt: skip


def write_prompts(path: Path, contents: list[str], first_id: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt_id": first_id + number, "prompt": [{"role": "user", "content": content}]}
        for number, content in enumerate(contents)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def prompts(tmp_path):
    """A folder whose name has a space, with ten test and four train prompts."""
    folder = tmp_path / "my prompts"
    write_prompts(folder / "test.jsonl", QUESTIONS)
    write_prompts(folder / "train.jsonl", QUESTIONS[:4], first_id=100)
    return folder


@pytest.fixture(scope="session")
def requests(tiny_policy):
    """The ten questions for the tiny model."""
    tokenizer = chat.load_tokenizer(str(tiny_policy))
    return [
        Request(chat.prompt_token_ids(tokenizer, [{"role": "user", "content": content}]), stream_seed(1, "test", number))
        for number, content in enumerate(QUESTIONS)
    ]


@pytest.fixture
def flags(tmp_path, prompts, tiny_policy):
    """A config for a small run with the tiny model and transformers, in float32; flags can be replaced."""

    def make(**changes):
        usual = {
            "save_path": str(tmp_path / "out put"), "model_path": str(tiny_policy), "dataset": str(prompts), "best_of_n": 3,
            "temperature": 1.0, "max_new_tokens": 6, "prompt_max_len": 64, "engine": "transformers", "dtype": "float32",
        }  # fmt: skip
        return CompletionsConfig(**{**usual, **changes})

    return make

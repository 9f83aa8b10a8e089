"""Prompts and flags for the sampling tests."""

import pytest

from drdpo import chat
from drdpo.records import write_rows
from drdpo.sampling.engines import Request, stream_seed

QUESTIONS = [
    "What is rain?", "Name a fruit.", "Say hi.", "Why is the sky blue, in one line?", "List three colours.",
    "Who wrote Emma?", "Is it late?", "Add two and two.", "Spell cat.", "Translate 'dog' into French, please, and say why.",
]  # fmt: skip


def write_prompts(folder):
    """A folder below, whose name has a space, with ten test and four train prompts."""
    for split, first_id, count in (("test", 0, 10), ("train", 100, 4)):
        messages = ([{"role": "user", "content": content}] for content in QUESTIONS[:count])
        rows = ({"prompt_id": number, "prompt": prompt} for number, prompt in enumerate(messages, first_id))
        write_rows(folder / "my prompts" / f"{split}.jsonl", rows)
    return folder / "my prompts"


@pytest.fixture(scope="session")
def requests(tiny_policy):
    """The ten questions for the tiny model."""
    tokenizer = chat.load_tokenizer(str(tiny_policy))
    return [
        Request(chat.prompt_token_ids(tokenizer, [{"role": "user", "content": content}]), stream_seed(1, "test", number))
        for number, content in enumerate(QUESTIONS)
    ]

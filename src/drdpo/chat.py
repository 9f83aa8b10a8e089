"""The only caller of a chat template: messages -> token ids, with exactly one BOS and content as plain text.

A template that writes today's date (Llama 3.x) would give sampling, training and evaluation different prompts, so the date
is fixed. Content that spells a special token (`<|eot_id|>` in an answer) would end a turn, or move a reward model's gate, so
it is encoded as plain text."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from drdpo.errors import DataError
from drdpo.records import Message

DATE_STRING = "26 Jul 2024"
"""Today's date for Llama 3.2's template: the one in its documentation."""

UNRENDERABLE = (TemplateError, ValueError, TypeError)
"""Errors of rendering: the template's own, this module's, and those of a template that fails on a message."""

Tokenizer = Any
"""A transformers PreTrainedTokenizerFast."""


def load_tokenizer(path: str) -> Tokenizer:
    """Load a tokenizer that has a chat template.

    Args:
        path: a Hugging Face folder or hub id.

    Raises:
        DataError: no tokenizer, no chat template, or no end-of-sequence token there.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise DataError(f"{path}: no tokenizer (tokenizer.json) in the model folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no tokenizer could be loaded ({_first_line(error)})") from error
    if not tokenizer.chat_template:
        raise DataError(f"{path}: the tokenizer has no chat template; use an instruct model")
    if tokenizer.eos_token_id is None:
        raise DataError(f"{path}: the tokenizer has no end-of-sequence token")
    return tokenizer


def prompt_token_ids(tokenizer: Tokenizer, prompt: list[Message]) -> list[int]:
    """Token ids of a prompt, up to where the assistant's answer begins.

    Args:
        tokenizer: from load_tokenizer.
        prompt: messages ending in a user turn.

    Returns:
        Ids with exactly one BOS, if the model has one.
    """
    return _one_bos(tokenizer, _encode(tokenizer, prompt, add_generation_prompt=True))


def conversation_token_ids(tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    """Token ids of a conversation with its last answer closed, as a reward model reads it.

    Args:
        tokenizer: from load_tokenizer.
        messages: prompt and completion, ending in an assistant turn.

    Returns:
        Ids with exactly one BOS, if the model has one.
    """
    return _one_bos(tokenizer, _encode(tokenizer, messages, add_generation_prompt=False))


def answer_token_ids(tokenizer: Tokenizer, answer: list[Message]) -> list[int]:
    """Token ids of an answer given as text: its content and the template's end-of-turn token.

    Sampled token ids are better where they exist: text that is tokenised again may differ.

    Args:
        tokenizer: from load_tokenizer.
        answer: one assistant message.

    Raises:
        ValueError: the answer has more than one message.
    """
    if len(answer) != 1:
        raise ValueError(f"an answer is one assistant message, not {len(answer)}")
    return [*_plain(tokenizer, answer[0]["content"].strip()), end_of_turn_id(tokenizer)]


def end_of_turn_id(tokenizer: Tokenizer) -> int:
    """The token with which the template closes an assistant turn (`<|eot_id|>`, `<|im_end|>`), else EOS."""
    mark = "\ue000"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
    tail = _render(tokenizer, turns, add_generation_prompt=False).rpartition(mark)[2]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return int(ids[0] if ids and ids[0] in tokenizer.all_special_ids else tokenizer.eos_token_id)


def decode(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """The text of an answer, without special tokens and outer white space."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=True)).strip()


def _render(tokenizer: Tokenizer, messages: list[Message], add_generation_prompt: bool) -> str:
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=DATE_STRING
        )
    )


def _encode(tokenizer: Tokenizer, messages: list[Message], add_generation_prompt: bool) -> list[int]:
    messages = [{"role": message["role"], "content": message["content"].strip()} for message in messages]
    for message in messages:
        message["content"].encode()  # as in _plain
    special = [str(token) for token in tokenizer.added_tokens_encoder]
    hostile = [any(token in message["content"] for token in special) for message in messages]
    if not any(hostile):
        text = _render(tokenizer, messages, add_generation_prompt)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # Render with a mark instead of every such content, then encode the template's text and the contents separately.
    mark = "\ue000"
    while any(mark in message["content"] for message in messages):
        mark += "\ue001"
    marked = [
        {"role": message["role"], "content": mark if bad else message["content"]}
        for message, bad in zip(messages, hostile, strict=True)
    ]
    contents = [message["content"] for message, bad in zip(messages, hostile, strict=True) if bad]
    pieces = _render(tokenizer, marked, add_generation_prompt).split(mark)
    if len(pieces) != len(contents) + 1:
        raise ValueError("the chat template does not print every message once, so special tokens in it cannot be escaped")
    ids = list(tokenizer(pieces[0], add_special_tokens=False)["input_ids"])
    for content, piece in zip(contents, pieces[1:], strict=True):
        ids += _plain(tokenizer, content)
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
    return ids


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    text.encode()  # UnicodeEncodeError is a ValueError; for half of a surrogate pair the tokenizer raises TypeError.
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _one_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    if ids[:2] == [bos, bos]:
        raise ValueError("the chat template writes the beginning-of-sequence token twice")
    wants_bos = tokenizer("x")["input_ids"][:1] == [bos]
    return [bos, *ids] if wants_bos and ids[:1] != [bos] else ids


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

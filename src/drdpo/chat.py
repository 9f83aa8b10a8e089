"""The only caller of a chat template: messages -> token ids, with exactly one BOS and content as plain text.

Time stands still: a template that writes today's date would give sampling, training and evaluation different prompts.
Content that spells a special token (`<|eot_id|>` in an answer) would end a turn, or move a reward model's gate, so it is
encoded as plain text. An answer given as text has the ids that the template renders after its prompt."""

import inspect
import os
import re
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from drdpo.errors import DataError, UsageError, reason
from drdpo.records import Message

DATE_STRING = "26 Jul 2024"
"""Today's date for every template: the one in Llama 3.2's documentation."""

Tokenizer = Any
"""A transformers PreTrainedTokenizerFast from load_tokenizer, with its `chat_template_kwargs`."""

_MARK = "\ue000"
_WORDS = "two words,\n\n  then\tfour"
_TEXTS = (_WORDS, "it's x[0] != {1}", "grüße", "привет, мир", "你好世界", "नमस्ते दुनिया", "مرحبا بالعالم", "🙂")
"""Texts that every tokenizer must give back. Lower case, since a model may know no other."""


def fixed_time(format: str) -> str:
    """The `strftime_now` of every template, which may name the argument: DATE_STRING at midnight."""
    return datetime.strptime(DATE_STRING, "%d %b %Y").strftime(format)


def template_arguments(chat_template_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
    """What every rendering passes to the template, here and in lm-eval: the fixed date, and the user's arguments."""
    return {"date_string": DATE_STRING, "strftime_now": fixed_time, **(chat_template_kwargs or {})}


# Loading --------------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str, chat_template_kwargs: dict[str, Any] | None = None, chat: bool = True) -> Tokenizer:
    """Load a tokenizer, of a folder or hub id, that gives text back and, with `chat`, has a chat template that renders a
    question with its answer; `chat_template_kwargs` are for every rendering.

    Raises:
        DataError: no tokenizer, chat template or end-of-sequence token there, or unusable ones; says what to do.
        UsageError: the template does not read one of the arguments.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise DataError(f"{path}: no tokenizer (tokenizer.json) in the model folder; copy the one of its base model there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of transformers, tokenizers and the hub's client, which raises a bare Exception
        raise DataError(f"{path}: no tokenizer could be loaded ({reason(error)})") from error
    _check_text(path, tokenizer)
    _check_mistral(path, tokenizer)
    if not chat:
        return tokenizer
    if not tokenizer.chat_template:
        raise DataError(f"{path}: the tokenizer has no chat template; use an instruct model")
    if tokenizer.eos_token_id is None:
        raise DataError(f"{path}: the tokenizer has no end-of-sequence token")
    tokenizer.chat_template_kwargs = dict(chat_template_kwargs or {})
    _check_template(path, tokenizer)
    return tokenizer


def _check_text(path: str, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that changes text, as does a class that overrides its tokenizer.json."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import cached_file

    changed = _changed_text(tokenizer)
    if changed is None:
        return
    advice = "copy the tokenizer's files of the original model again"
    file = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if file is not None and _changed_text(PreTrainedTokenizerFast(tokenizer_file=file)) is None:
        advice = (
            f"its tokenizer.json does, but transformers loads it as {type(tokenizer).__name__}: set "
            '"tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json'
        )
    raise DataError(f"{path}: the tokenizer does not give text back: {changed[0]!r} becomes {changed[1]!r}; {advice}")


def _changed_text(tokenizer: Tokenizer) -> tuple[str, str] | None:
    """The first of _TEXTS that encoding and decoding changes, and what it becomes; a script may be unknown to the model."""
    for text in _TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if back != text and (text == _WORDS or tokenizer.unk_token_id not in ids):
            return text, back
    return None


def _check_mistral(path: str, tokenizer: Tokenizer) -> None:
    """Refuse what transformers only warns of: folders of Mistral's models with a pattern that Mistral has corrected."""
    from transformers import AutoTokenizer, PreTrainedConfig

    warned = getattr(getattr(tokenizer, "backend_tokenizer", None), "fix_mistral_regex", None) is False
    if not warned or "tral" not in str(PreTrainedConfig.get_config_dict(path)[0].get("model_type")):
        return  # transformers also warns of any folder whose config.json names no version
    corrected = AutoTokenizer.from_pretrained(path, trust_remote_code=False, fix_mistral_regex=True)
    before, after = (one.backend_tokenizer.pre_tokenizer.__getstate__() for one in (tokenizer, corrected))
    if before != after and _changed_text(corrected) is None:
        raise DataError(
            f"{path}: the tokenizer splits words by a pattern that Mistral has corrected; save the corrected one: python -c "
            f"\"from transformers import AutoTokenizer as A; A.from_pretrained('{path}', fix_mistral_regex=True)"
            f".save_pretrained('{path}')\""
        )


def _check_template(path: str, tokenizer: Tokenizer) -> None:
    """Refuse templates that cannot render an exchange or leave text out, and arguments that this one does not read."""
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise DataError(
            f"{path}: the tokenizer has several chat templates ({', '.join(sorted(tokenizer.chat_template))}) and none is "
            "the default; save the one to use as chat_template.jinja in a copy of the folder"
        )
    template = tokenizer.get_chat_template()
    taken = {"messages", "strftime_now", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in tokenizer.chat_template_kwargs:
        if name in taken or not re.search(rf"\b{re.escape(name)}\b", template):
            why = "is not the user's to set" if name in taken else f"is not read by the chat template of {path}"
            raise UsageError(f"--chat_template_kwargs: {name!r} {why}")
    try:
        question = _question(tokenizer)
        text = _render(tokenizer, [*question, {"role": "assistant", "content": _MARK}], add_generation_prompt=False)
        rendered_ids(tokenizer)
    except ValueError as error:
        raise DataError(f"{path}: given a question with its answer, {error}; use another chat_template.jinja") from error
    if _MARK not in text or any(message["content"] not in text for message in question):
        raise DataError(
            f"{path}: the chat template leaves out the text of messages, as those of multimodal models do, which read "
            "content as a list of parts; put a chat_template.jinja for text into a copy of the folder"
        )


def _question(tokenizer: Tokenizer) -> list[Message]:
    """A prompt that the template accepts with an answer; some templates require a system turn.

    Raises:
        ValueError: it accepts neither.
    """
    user = {"role": "user", "content": "Name a number."}
    answer = {"role": "assistant", "content": _MARK}
    problems = []
    for prompt in ([user], [{"role": "system", "content": "Be brief."}, user]):
        try:
            _render(tokenizer, [*prompt, answer], add_generation_prompt=False)
            return prompt
        except ValueError as error:
            problems.append(error)
    raise problems[0]


# Messages to token ids ------------------------------------------------------------------------------------------------


def prompt_token_ids(tokenizer: Tokenizer, prompt: list[Message]) -> list[int]:
    """Token ids of a prompt, up to where the assistant's answer begins, with exactly one BOS, if the model has one.

    Raises:
        ValueError: the template rejects the prompt.
    """
    return _encode(tokenizer, prompt, add_generation_prompt=True)


def conversation_token_ids(tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    """The same of a prompt with its answer, closed, as a reward model reads it."""
    return _encode(tokenizer, messages, add_generation_prompt=False)


def answer_token_ids(tokenizer: Tokenizer, answer: list[Message], prompt: list[Message] | None = None) -> list[int]:
    """Token ids of an answer given as text: what the template renders after the prompt, up to the end of the turn.

    Sampled token ids are better where they exist: text that is tokenised again may differ.

    Args:
        answer: one assistant message.
        prompt: what it answers; by default a short question.

    Returns:
        Ids that continue those of prompt_token_ids; none for an answer without text. The last one is end_of_turn_id.

    Raises:
        ValueError: the answer has more than one message, or the template does not render it after this prompt.
        DataError: this template renders no answer after its prompt.
    """
    if len(answer) != 1:
        raise ValueError(f"an answer is one assistant message, not {len(answer)}")
    if not answer[0]["content"].strip():
        return []
    if problem := _answer_problem(tokenizer, tokenizer.get_chat_template()):
        raise DataError(
            f"{tokenizer.name_or_path}: answers given as text cannot be encoded: {problem}; use pairs with token ids "
            "(chosen_token_ids and rejected_token_ids of sampled completions), --chat_template_kwargs that change it, or "
            "another chat_template.jinja"
        )
    return _answer(tokenizer, prompt or _question(tokenizer), answer[0])


def rendered_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids of a short exchange, with all that the template writes around it."""
    question = _question(tokenizer)
    closed = conversation_token_ids(tokenizer, [*question, {"role": "assistant", "content": "Seven is one."}])
    return {*prompt_token_ids(tokenizer, question), *closed}


def template_facts(tokenizer: Tokenizer) -> str:
    """How answers end and whether text can be trained on, in words."""
    problem = _answer_problem(tokenizer, tokenizer.get_chat_template())
    end = tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))
    return f"answers end with {end}; " + (f"trains on sampled ids alone: {problem}" if problem else "trains on text or ids")


def end_of_turn_id(tokenizer: Tokenizer) -> int:
    """The token with which the template closes an assistant turn (`<|eot_id|>`, `<end_of_turn>`), else EOS."""
    return _turn_end(tokenizer, tokenizer.get_chat_template())[1]


def decode(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """The text of an answer, without special tokens, the end of its turn and outer white space."""
    if token_ids[-1:] == [end_of_turn_id(tokenizer)]:  # which need not be a special token
        token_ids = token_ids[:-1]
    return str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


@lru_cache(maxsize=16)
def _turn_end(tokenizer: Tokenizer, template: str) -> tuple[str, int, int | None]:
    """All that the template writes behind an answer, the token that ends the turn, and the number of tokens behind that;
    None if it is EOS, which the template does not write."""
    answer = {"role": "assistant", "content": _MARK}
    text = _render(tokenizer, [*_question(tokenizer), answer], add_generation_prompt=False).rpartition(_MARK)[2]
    ids, added = _ids(tokenizer, text, "x"), tokenizer.added_tokens_decoder
    marks = [place for place, token in enumerate(ids) if token in added]
    special = [place for place in marks if added[ids[place]].special]
    for place in special or marks:
        return text, ids[place], len(ids) - place - 1
    return text, int(tokenizer.eos_token_id), None


@lru_cache(maxsize=16)
def _answer_problem(tokenizer: Tokenizer, template: str) -> str:
    """Why no answer given as text can be encoded, or nothing."""
    try:
        _answer(tokenizer, _question(tokenizer), {"role": "assistant", "content": "Seven is one."})
    except ValueError as error:
        return str(error)
    return ""


def _answer(tokenizer: Tokenizer, prompt: list[Message], answer: Message) -> list[int]:
    messages, mark, plain = _escaped(tokenizer, [*prompt, answer])
    before = _render(tokenizer, messages[:-1], add_generation_prompt=True)
    whole = _render(tokenizer, messages, add_generation_prompt=False)
    shared = len(os.path.commonprefix([before, whole]))  # noqa: RUF071, characters are meant
    if shared < len(before):
        raise ValueError(
            f"the prompt continues with {before[shared : shared + 50]!r} where the chat template has "
            f"{whole[shared : shared + 50]!r} in a conversation"
        )
    (closing, end, beyond), text = _turn_end(tokenizer, tokenizer.get_chat_template()), whole[shared:]
    if beyond is None and closing.strip():
        raise ValueError(f"the chat template closes an answer by {closing!r}, and the tokenizer has no token for it")
    if "".join(messages[-1]["content"].split()) not in "".join(text.split()) or not text.endswith(closing):
        raise ValueError("the chat template does not print the whole answer with the end of its turn")
    # Whatever precedes a special token has no influence on the ids that follow it.
    context = before[max((found.start() for found in _special(tokenizer).finditer(before)), default=0) :]
    context = context.rpartition(mark)[2]
    parts = (text.removesuffix(closing) if beyond is None else text).split(mark)
    ids = _joined(tokenizer, parts, plain[len(plain) + 1 - len(parts) :], context, strict=True)
    return [*ids, end] if beyond is None else ids[: len(ids) - beyond]


def _render(tokenizer: Tokenizer, messages: list[Message], add_generation_prompt: bool) -> str:
    arguments = template_arguments(tokenizer.chat_template_kwargs)
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt, **arguments)
        )
    except Exception as error:  # a template is a program, and may fail in any way
        raise ValueError(f"the chat template rejects it ({reason(error)})") from error


def _encode(tokenizer: Tokenizer, messages: list[Message], add_generation_prompt: bool) -> list[int]:
    messages, mark, plain = _escaped(tokenizer, messages)
    parts = _render(tokenizer, messages, add_generation_prompt).split(mark)
    if len(parts) != len(plain) + 1:
        raise ValueError("the chat template does not print every message once, so special tokens in it cannot be escaped")
    ids, bos = _joined(tokenizer, parts, plain), tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise ValueError("the chat template writes the beginning-of-sequence token twice")
    lacks_bos = bos is not None and ids[:1] != [bos] and tokenizer("x")["input_ids"][:1] == [bos]
    return [bos, *ids] if lacks_bos else ids


def _joined(tokenizer: Tokenizer, parts: list[str], plain: list[str], context: str = "", strict: bool = False) -> list[int]:
    """Ids of the template's parts after `context`, with the contents between them as plain text; `strict` as in _ids."""
    ids = _ids(tokenizer, parts[0], context, strict=strict)
    for before, content, after in zip([context + parts[0], *parts[1:]], plain, parts[1:], strict=False):
        ids += [*_ids(tokenizer, content, before[-8:], plain=True), *_ids(tokenizer, after, "x")]
    return ids


def _escaped(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[Message], str, list[str]]:
    """Messages with a mark instead of every content that spells a special token; the mark; those contents."""
    messages = [{"role": message["role"], "content": message["content"].strip()} for message in messages]
    for message in messages:
        message["content"].encode()  # for half of a surrogate pair tokenizers raise TypeError, and this a ValueError
    mark = _MARK
    while any(mark in message["content"] for message in messages):
        mark += "\ue001"
    plain = []
    for message in messages:
        if _special(tokenizer).search(message["content"]):
            plain.append(message["content"])
            message["content"] = mark
    return messages, mark, plain


@lru_cache(maxsize=16)
def _special(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Special tokens in text. Added tokens that are not special (Gemma has 6,415) are words of the language."""
    texts = [re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(sorted(texts, key=len, reverse=True)) or r"(?!)")


def _ids(tokenizer: Tokenizer, text: str, context: str = "", plain: bool = False, strict: bool = False) -> list[int]:
    """Ids of a text as they follow those of `context`: SentencePiece begins a text with a space, and does not here.

    Args:
        plain: special tokens are words.
        strict: refuse a token that spans the seam; otherwise the text is then encoded alone.
    """
    if not text:
        return []
    encode = lambda words: tokenizer(words, add_special_tokens=False, split_special_tokens=plain)["input_ids"]  # noqa: E731
    head = encode(context) if context else []
    whole = encode(context + text)
    if whole[: len(head)] == head:
        return list(whole[len(head) :])
    if strict:
        raise ValueError(f"a token spans the end of the prompt, {context[-20:]!r}, and the answer's start, {text[:20]!r}")
    return list(encode(text))

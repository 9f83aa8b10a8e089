"""What is counted while a file of prompts, completions, pairs or ratings streams by: numbers and hashes stay, texts go.

Shapes: R rows, U distinct prompts (by prompt_id where rows have one, else by text).
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import TemplateError

from drdpo import chat
from drdpo.evaluation.excerpts import Reservoir
from drdpo.evaluation.kinds import RATINGS, Kind, Row, read_file
from drdpo.evaluation.runs import sort_objectives
from drdpo.records import Message

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_UNKNOWN = -1
"""Length in tokens of a text that has none: no ids in the record, or refused by the chat template."""


@dataclass
class Lengths:
    """Lengths of one text field, in row order; [U] for the prompt, [R] for an answer."""

    characters: "array[int]" = field(default_factory=lambda: array("q"))
    tokens: "array[int]" = field(default_factory=lambda: array("q"))

    @property
    def all_in_tokens(self) -> bool:
        return _UNKNOWN not in self.tokens

    def values(self, in_tokens: bool) -> Array:
        """The lengths in one unit, without those that are not known."""
        lengths = self.all_values(in_tokens)
        return lengths[lengths != _UNKNOWN]

    def all_values(self, in_tokens: bool) -> Array:
        """The lengths in one unit."""
        return np.array(self.tokens if in_tokens else self.characters, dtype=np.float64)


@dataclass(eq=False)
class Tally:
    """The figures of one file. `rows`, `counts` and the first rows of a problem grow as `add` is called."""

    name: str
    """How tables and pictures call the file."""
    path: Path
    kind: Kind
    sample: Reservoir
    tokenizer: chat.Tokenizer | None = None
    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """How many rows (of "system" and "multi-turn": prompts) are so."""
    first: dict[str, int] = field(default_factory=dict)
    """{name in counts: the first row that is so}"""
    answers_of: Counter[Hashable] = field(default_factory=Counter)
    """{prompt_id, or hash of the prompt: rows}, [U]."""
    row_of_prompt: dict[bytes, int] = field(default_factory=dict)
    """{hash of the prompt's text: its first row}; shorter than U where two ids have one text."""
    lengths: dict[str, Lengths] = field(default_factory=dict)
    """{"prompt" or name of an answer}"""
    scores: "dict[str, array[float]]" = field(default_factory=dict)
    """{objective: [rows that have it]}"""
    margins: "array[float]" = field(default_factory=lambda: array("d"))
    """chosen_score - rejected_score, [pairs with both]."""
    _keys: set[Hashable] = field(default_factory=set)
    _prompt_of_id: dict[int, bytes] = field(default_factory=dict)
    _answers: set[Hashable] = field(default_factory=set)

    def add(self, row: Row) -> None:
        """Count one row."""
        self.rows += 1
        self.sample.offer(row)
        digest = prompt_hash(row.prompt)
        group: Hashable = digest if row.prompt_id is None else row.prompt_id
        self.answers_of[group] += 1
        if self.answers_of[group] == 1:
            self._add_prompt(row, digest)
        if row.prompt_id is not None:
            self._check_ids(row, row.prompt_id, digest)
        for name, text in row.answers.items():
            self._add_length(row, name, text)
            self._count("empty answers", row, not text.strip())
        for name, score in row.scores.items():
            self.scores.setdefault(name, array("d")).append(score)
        if "chosen" in row.answers:
            self._add_pair(row)
        elif row.answers:
            answer = (group, _hash(" ".join(row.answers["answer"].split())))
            self._count("repeated answers", row, answer in self._answers)
            self._answers.add(answer)
            self._count("scored", row, bool(row.scores))
        if row.finish_reason is not None:
            self._count(f"finish_reason {row.finish_reason}", row)

    def _add_prompt(self, row: Row, digest: bytes) -> None:
        self._count("repeated prompts", row, digest in self.row_of_prompt)
        self.row_of_prompt.setdefault(digest, row.number)
        self._count("system", row, any(message["role"] == "system" for message in row.prompt))
        self._count("multi-turn", row, sum(message["role"] == "user" for message in row.prompt) > 1)
        lengths = self.lengths.setdefault("prompt", Lengths())
        lengths.characters.append(sum(len(message["content"].strip()) for message in row.prompt))
        lengths.tokens.append(_UNKNOWN if self.tokenizer is None else self._tokens(row, chat.prompt_token_ids, row.prompt))

    def _check_ids(self, row: Row, prompt_id: int, digest: bytes) -> None:
        known = self._prompt_of_id.setdefault(prompt_id, digest)
        self._count("conflicting ids", row, known != digest)
        if not row.answers or row.sample_id is not None:
            key = (prompt_id, row.sample_id)
            self._count("repeated ids", row, key in self._keys)
            self._keys.add(key)

    def _add_length(self, row: Row, name: str, text: str) -> None:
        lengths = self.lengths.setdefault(name, Lengths())
        lengths.characters.append(len(text.strip()))
        if self.tokenizer is not None:
            lengths.tokens.append(self._tokens(row, chat.answer_token_ids, [{"role": "assistant", "content": text}]))
        else:
            ids = row.token_ids.get(name)
            lengths.tokens.append(len(ids or ()) if ids or not text.strip() else _UNKNOWN)

    def _tokens(
        self, row: Row, encode: Callable[[chat.Tokenizer, list[Message]], list[int]], messages: list[Message]
    ) -> int:
        try:
            return len(encode(self.tokenizer, messages))
        except (TemplateError, TypeError, ValueError):  # TypeError: half of a surrogate pair, which is no text
            self._count("not encoded", row)
            return _UNKNOWN

    def _add_pair(self, row: Row) -> None:
        chosen, rejected = (" ".join(row.answers[name].split()) for name in ("chosen", "rejected"))
        self._count("equal texts", row, chosen == rejected)
        if len(row.scores) == 2:
            margin = row.scores["chosen_score"] - row.scores["rejected_score"]
            self.margins.append(margin)
            self._count("ties", row, margin == 0)
            self._count("chosen scored lower", row, margin < 0)

    def _count(self, name: str, row: Row, holds: bool = True) -> None:
        if holds:
            self.counts[name] += 1
            self.first.setdefault(name, row.number)


@dataclass(frozen=True)
class Group:
    """The files of one kind in a folder, which stand side by side in tables and pictures."""

    kind: Kind
    tallies: list[Tally]

    def in_tokens(self, name: str) -> bool:
        """Is "prompt", or are the answers, measured in tokens? Then in all files, so that figures can be compared."""
        if any(tally.tokenizer is not None for tally in self.tallies):
            return True
        answers = [lengths for tally in self.tallies for key, lengths in tally.lengths.items() if key != "prompt"]
        return name != "prompt" and all(lengths.all_in_tokens for lengths in answers)

    def unit(self, name: str) -> str:
        """Of lengths."""
        return "tokens" if self.in_tokens(name) else "characters"

    def pair_lengths(self, tally: Tally) -> tuple[Array, Array]:
        """[pairs], [pairs]: of the chosen and the rejected answer, of the pairs in which both are known."""
        chosen, rejected = (tally.lengths[name].all_values(self.in_tokens(name)) for name in ("chosen", "rejected"))
        known = (chosen != _UNKNOWN) & (rejected != _UNKNOWN)
        return chosen[known], rejected[known]

    def objectives(self) -> list[str]:
        """The objectives that any file has, in ArmoRM's order; rating columns in that of the file."""
        names = dict.fromkeys(name for tally in self.tallies for name in tally.scores)
        return list(names) if self.kind is RATINGS else sort_objectives(set(names))


def tally_file(name: str, path: Path, kind: Kind, samples: int, seed: int, tokenizer: chat.Tokenizer | None) -> Tally:
    """Read a file to its end.

    Args:
        name: how to call it.
        path: a file of this kind.
        samples: how many rows to keep for printing.
        seed: of their choice.
        tokenizer: from chat.load_tokenizer, for lengths in its tokens.

    Raises:
        DataError: naming file, row and field.
    """
    tally = Tally(name, path, kind, Reservoir(samples, seed), tokenizer)
    for row in read_file(path, kind):
        tally.add(row)
    return tally


def shared_prompts(one: Tally, other: Tally) -> list[int]:
    """Rows of `one`, ascending, at which a prompt first stands that `other` has too: a leak between train and test."""
    return sorted(row for digest, row in one.row_of_prompt.items() if digest in other.row_of_prompt)


def prompt_hash(prompt: list[Message]) -> bytes:
    """16 bytes that stand for a prompt: roles and texts, white space aside."""
    return _hash("\x00".join(f"{message['role']}\x01{' '.join(message['content'].split())}" for message in prompt))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

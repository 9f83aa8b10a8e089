"""What the steps hand to each other: JSON lines, UTF-8, one record a line, in `<folder>/{train,test}.jsonl`.

    prompt      prompt_id int, prompt [{role, content}, ...] ending in a user turn
    completion  prompt_id, sample_id int, prompt, completion [{role: assistant, content}], token_ids [int] as sampled,
                finish_reason "stop" or "length", scores {objective: float} once scored
    preference  prompt_id, prompt, chosen, rejected (message lists), chosen_score, rejected_score, and, where the pair
                was sampled here, chosen_token_ids and rejected_token_ids

Records carry their key: they are joined by (prompt_id, sample_id), never by their position in a file.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from drdpo.errors import DataError
from drdpo.files import atomic_file

Message = dict[str, str]
Record = TypeVar("Record", "Prompt", "Completion", "Preference")

ROLES = ("system", "user", "assistant")
SPLITS = ("train", "test")

_HALF = "half of a surrogate pair (\\ud800 to \\udfff), no text"


@dataclass(frozen=True)
class Prompt:
    prompt_id: int
    prompt: list[Message]

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Prompt":
        return cls(_integer(row, "prompt_id"), _messages(row, "prompt", last_role="user"))


@dataclass(frozen=True)
class Completion:
    prompt_id: int
    sample_id: int
    prompt: list[Message]
    completion: list[Message]
    token_ids: list[int]
    finish_reason: str
    scores: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Completion":
        reason = _required(row, "finish_reason")
        if reason not in ("stop", "length"):
            raise ValueError(f'field "finish_reason" is {reason!r}, not "stop" or "length"')
        scores = row.get("scores") or {}
        if not isinstance(scores, dict) or not all(map(is_text, scores)) or not all(map(_is_finite, scores.values())):
            raise ValueError('field "scores" must map objectives to finite numbers')
        return cls(
            _integer(row, "prompt_id"),
            _integer(row, "sample_id"),
            _messages(row, "prompt", last_role="user"),
            _messages(row, "completion", last_role="assistant"),
            _token_ids(row, "token_ids"),
            reason,
            {str(name): float(value) for name, value in scores.items()},
        )


@dataclass(frozen=True)
class Preference:
    prompt_id: int
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    chosen_score: float | None = None
    rejected_score: float | None = None
    chosen_token_ids: list[int] | None = None
    rejected_token_ids: list[int] | None = None

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Preference":
        return cls(
            _integer(row, "prompt_id"),
            _messages(row, "prompt", last_role="user"),
            _messages(row, "chosen", last_role="assistant"),
            _messages(row, "rejected", last_role="assistant"),
            _score(row, "chosen_score"),
            _score(row, "rejected_score"),
            _token_ids(row, "chosen_token_ids") if row.get("chosen_token_ids") is not None else None,
            _token_ids(row, "rejected_token_ids") if row.get("rejected_token_ids") is not None else None,
        )


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, row) of a JSON-lines file.

    Raises:
        DataError: the file is missing, or a line is not one JSON object (cut in the middle, say).
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                # Line by line, so that the message can name the row; Windows' editors put a byte-order mark at the start.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, row {number}: not UTF-8 text ({error.reason} at byte {error.start})") from error
            if text.strip():
                yield number, _parse(path, number, text)


def row_number(path: Path, index: int) -> int:
    """The line number of record `index` (from 0) of a file; blank lines hold no record. For messages."""
    numbers = [number for number, _ in read_rows(path)]
    if index < len(numbers):
        return numbers[index]
    raise DataError(f"{path}: has no row for record {index + 1}; was it changed meanwhile?")


def is_text(content: str) -> bool:
    """JSON can spell half of a surrogate pair, which neither UTF-8 nor a tokenizer can."""
    try:
        content.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_records(path: Path, from_row: Callable[[dict[str, Any]], Record]) -> list[Record]:
    """Read and check every record of a file.

    Args:
        path: a JSON-lines file.
        from_row: `Prompt.from_row`, `Completion.from_row` or `Preference.from_row`.

    Raises:
        DataError: naming file, row and field; also for a file without rows.
    """
    records = []
    for number, row in read_rows(path):
        try:
            records.append(from_row(row))
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
    if not records:
        raise DataError(f"{path}: the file has no rows")
    return records


def to_row(record: "Prompt | Completion | Preference") -> dict[str, Any]:
    """The JSON object of a record; optional fields that are not set are left out."""
    # Not dataclasses.asdict: it copies every token id, which takes longer than writing them.
    row = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {name: value for name, value in row.items() if value is not None and not (name == "scores" and not value)}


def write_records(path: Path, records: "Iterable[Prompt | Completion | Preference]") -> int:
    """Write records as JSON lines, whole or not at all; returns how many."""
    return write_rows(path, (to_row(record) for record in records))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write JSON objects as lines, whole or not at all; returns how many."""
    count = 0
    with atomic_file(path) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def check_unique(path: Path, keys: Iterable[tuple[int, ...]], fields: str) -> None:
    """Raise DataError when two records of `path` have one key."""
    seen: set[tuple[int, ...]] = set()
    for index, key in enumerate(keys):
        if key in seen:
            raise DataError(
                f"{path}, row {row_number(path, index)}: field {fields} repeats {key}; every record needs its own"
            )
        seen.add(key)


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError also: an integer of more digits than Python reads
        raise DataError(f"{path}, row {number}: not a whole JSON object ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, row {number}: a JSON {type(row).__name__}, not an object")
    return row


def _required(row: dict[str, Any], name: str) -> Any:
    if name not in row or row[name] is None:
        raise ValueError(f'field "{name}" is missing (the row has {", ".join(sorted(map(str, row))) or "no fields"})')
    return row[name]


def _integer(row: dict[str, Any], name: str) -> int:
    value = _required(row, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f'field "{name}" is {value!r}, not an integer')
    if not -(2**63) <= value < 2**63:
        raise ValueError(f'field "{name}" is beyond 64 bits')
    return value


def _is_finite(value: Any) -> bool:
    # Not math.isfinite: it raises OverflowError for an integer that no float holds.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _score(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is not None and not _is_finite(value):
        raise ValueError(f'field "{name}" is {value!r}, not a finite number')
    return None if value is None else float(value)


def _messages(row: dict[str, Any], name: str, last_role: str) -> list[Message]:
    value = _required(row, name)
    if not isinstance(value, list) or not value:
        raise ValueError(f'field "{name}" must be a non-empty list of messages {{role, content}}')
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f'field "{name}" holds a message without text "content"')
        if message.get("role") not in ROLES:
            raise ValueError(f'field "{name}" holds the role {message.get("role")!r}, not one of {", ".join(ROLES)}')
        if not is_text(message["content"]):
            raise ValueError(f'field "{name}" holds {_HALF}')
        messages.append({"role": message["role"], "content": message["content"]})
    if messages[-1]["role"] != last_role:
        raise ValueError(f'field "{name}" ends in a turn of {messages[-1]["role"]!r}, not of {last_role!r}')
    return messages


def _token_ids(row: dict[str, Any], name: str) -> list[int]:
    value = _required(row, name)
    # Types and smallest value apart, each in one pass of C: a file has tens of millions of token ids.
    if (
        not isinstance(value, list)
        or not set(map(type, value)) <= {int}
        or not 0 <= min(value, default=0) <= max(value, default=0) < 2**31
    ):
        raise ValueError(f'field "{name}" must be a list of token ids')
    return value

"""The records that steps exchange: JSON lines, UTF-8, one record per line, in `<folder>/{train,test}.jsonl`.

    prompt      prompt_id int, prompt [{role, content}, ...] ending in a user turn
    completion  prompt_id, sample_id int, prompt, completion [{role: assistant, content}], token_ids [int] as sampled,
                finish_reason "stop" or "length", scores {objective: float} once scored
    preference  prompt_id, prompt, chosen, rejected (message lists), chosen_score, rejected_score, and, if the pair
                was sampled here, chosen_token_ids and rejected_token_ids, and chosen_scores and rejected_scores
                {objective: float}, of which chosen_score and rejected_score are a mixture

Records are joined by (prompt_id, sample_id), never by position in a file.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypedDict, TypeVar

import msgspec
from msgspec import Meta

from drdpo.errors import DataError, is_text
from drdpo.folder import atomic_file

if TYPE_CHECKING:
    Message = dict[str, str]
else:

    class Message(TypedDict):
        """A plain dict, as chat templates expect; other keys are dropped when a record is read."""

        role: Literal["system", "user", "assistant"]
        content: str


Record = TypeVar("Record", "Prompt", "Completion", "Preference")

SPLITS = ("train", "test")

_Id = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Messages = Annotated[list[Message], Meta(min_length=1)]
_TokenIds = list[Annotated[int, Meta(ge=0, lt=2**31)]]
_Score = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]  # neither infinite nor NaN


class _Record(msgspec.Struct, frozen=True):
    LAST_ROLES: ClassVar[dict[str, str]]
    """{field of messages: role of its last turn}"""

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """Check a JSON object and convert it; null counts as missing.

        Raises:
            ValueError: naming the field.
        """
        row = {name: value for name, value in row.items() if value is not None}
        try:
            record = msgspec.convert(row, cls)
        except msgspec.ValidationError as error:
            raise ValueError(in_words(error, row)) from error
        for name, last_role in cls.LAST_ROLES.items():
            messages = getattr(record, name)
            if messages[-1]["role"] != last_role:
                raise ValueError(f'field "{name}" ends in a turn of {messages[-1]["role"]!r}, not of {last_role!r}')
            if any(list(message) != ["role", "content"] for message in messages):
                ordered = [{"role": message["role"], "content": message["content"]} for message in messages]
                msgspec.structs.force_setattr(record, name, ordered)
        return record


class Prompt(_Record, frozen=True):
    LAST_ROLES = {"prompt": "user"}

    prompt_id: _Id
    prompt: _Messages


class Completion(_Record, frozen=True):
    LAST_ROLES = {"prompt": "user", "completion": "assistant"}

    prompt_id: _Id
    sample_id: _Id
    prompt: _Messages
    completion: _Messages
    token_ids: _TokenIds
    finish_reason: Annotated[str, Meta(pattern="^(stop|length)$")]
    scores: dict[str, _Score] = {}


class Preference(_Record, frozen=True):
    LAST_ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}

    prompt_id: _Id
    prompt: _Messages
    chosen: _Messages
    rejected: _Messages
    chosen_score: _Score | None = None
    rejected_score: _Score | None = None
    chosen_token_ids: _TokenIds | None = None
    rejected_token_ids: _TokenIds | None = None
    chosen_scores: dict[str, _Score] | None = None
    rejected_scores: dict[str, _Score] | None = None

    @classmethod
    def from_trl(cls, row: dict[str, Any], number: int) -> Self:
        """A preference from any of TRL's forms: conversational or plain text, with an explicit or implicit prompt.

        Args:
            row: prompt, chosen and rejected as message lists or texts, or chosen and rejected that both begin with the
                prompt, with or without its text beside them. This repository's records are one of these forms.
            number: the prompt_id of a row without one.

        Raises:
            ValueError: naming the field.
        """
        for name in ("chosen", "rejected"):
            if row.get(name) is None:
                raise ValueError(_missing(name, row))
        prompt, chosen, rejected = row.get("prompt"), _turns(row["chosen"]), _turns(row["rejected"])
        inside = all(isinstance(row[name], list) for name in ("chosen", "rejected"))
        if prompt is None and not inside:
            raise ValueError('field "prompt" is missing, and the texts of "chosen" and "rejected" do not contain it')
        # A text beside whole conversations lacks their system turn and earlier turns: they have the prompt, as in TRL.
        if prompt is None or (isinstance(prompt, str) and inside and min(len(chosen), len(rejected)) > 1):
            shared = 0
            while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
                shared += 1
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        elif isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        answers = {"chosen": chosen, "rejected": rejected}
        for name, answer in answers.items():
            if isinstance(answer, list) and isinstance(prompt, list) and answer[:-1] == prompt:
                answers[name] = answer = answer[-1:]  # Some data sets repeat the explicit prompt before each answer.
            if isinstance(answer, list) and len(answer) != 1:
                raise ValueError(f'field "{name}" must contain one assistant turn after the prompt, not {len(answer)}')
        prompt_id = row["prompt_id"] if isinstance(row.get("prompt_id"), int) else number
        # Fields of other data sets may have these names; the trainer reads them itself, where it needs them.
        row = {name: value for name, value in row.items() if name not in ("chosen_scores", "rejected_scores")}
        return cls.from_row({**row, **answers, "prompt": prompt, "prompt_id": prompt_id})


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, row) of a JSON-lines file.

    Raises:
        DataError: the file is missing, or a line is not one JSON object, e.g. because it was cut.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            # Some Windows editors write a byte-order mark at the start.
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, _parse(path, number, line)


def row_number(path: Path, index: int) -> int:
    """The line number of record `index` (from 0) of a file, for messages; blank lines are not records."""
    numbers = [number for number, _ in read_rows(path)]
    if index < len(numbers):
        return numbers[index]
    raise DataError(f"{path}: has no row for record {index + 1}; was it changed in the meantime?")


def read_records(path: Path, from_row: Callable[[dict[str, Any]], Record]) -> list[Record]:
    """Read and check every record of a file, by `Prompt.from_row`, `Completion.from_row` or `Preference.from_row`.

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
    """The JSON object of a record, without unset optional fields."""
    row = {name: getattr(record, name) for name in record.__struct_fields__}
    return {name: value for name, value in row.items() if value is not None and not (name == "scores" and not value)}


def write_records(path: Path, records: "Iterable[Prompt | Completion | Preference]") -> None:
    """Write records as JSON lines, whole or not at all."""
    write_rows(path, map(to_row, records))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON objects as lines, whole or not at all."""
    with atomic_file(path) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def write_rejects(folder: Path, split: str, rejects: list[dict[str, Any]]) -> None:
    """Replace the rows of one split in `folder/rejects.jsonl`: {file: `.../<split>.jsonl`, row, reason, ...}."""
    path = folder / "rejects.jsonl"
    before = [row for _, row in read_rows(path)] if path.is_file() else []
    others = [row for row in before if Path(str(row.get("file"))).name != f"{split}.jsonl"]
    write_rows(path, [*others, *rejects])


def check_unique(path: Path, keys: Iterable[tuple[int, ...]], fields: str) -> None:
    """Raise DataError if two records of `path` have the same key."""
    seen: set[tuple[int, ...]] = set()
    for index, key in enumerate(keys):
        if key in seen:
            raise DataError(
                f"{path}, row {row_number(path, index)}: field {fields} repeats {key}; every record needs its own"
            )
        seen.add(key)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        row = _parse_leniently(path, number, line)
    if not isinstance(row, dict):
        raise DataError(f"{path}, row {number}: a JSON {type(row).__name__}, not an object")
    return row


def _parse_leniently(path: Path, number: int, line: bytes) -> Any:
    """Python also reads NaN, which is an error only in a field of a record, and half of a surrogate pair."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, row {number}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:  # ValueError also for an integer with more digits than Python reads
        raise DataError(f"{path}, row {number}: not a whole JSON object ({error})") from error
    for name, value in row.items() if isinstance(row, dict) else ():
        if not is_text(json.dumps([name, value], ensure_ascii=False)):
            raise DataError(f'{path}, row {number}: field "{name}" contains half of a surrogate pair (\\ud800 to \\udfff)')
    return row


def in_words(error: msgspec.ValidationError, row: dict[str, Any]) -> str:
    """`Expected ... - at `$.prompt[0].role`` with the field first."""
    reason, _, path = str(error).rpartition(" - at `$.")
    if not reason:
        return _missing(path.split("`")[1], row)
    path = path.rstrip("`")
    field = re.split(r"[.\[]", path)[0]
    if "e+308" in reason or reason == "Number out of range":
        reason = "not a finite number"
    return f'field "{field}": {reason}' + (f" at {path}" if path != field else "")


def _missing(name: str, row: dict[str, Any]) -> str:
    return f'field "{name}" is missing (the row has {", ".join(sorted(row)) or "no fields"})'


def _turns(answer: Any) -> Any:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer

"""What the rows of a file are, recognised by the fields of its first row, and read into one form.

Every step's files go through here, and data sets of others: TRL's preferences, HelpSteer2's ratings.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drdpo.display import one_line
from drdpo.errors import DataError
from drdpo.helpsteer import split_helpsteer_turns
from drdpo.progress import progress
from drdpo.records import Completion, Message, Preference, Prompt, read_rows
from drdpo.trl import own_form

_IDS = ("prompt_id", "sample_id", "source_index")
"""Numbers of a ratings row that rate nothing."""


LARGEST = 1e100
"""Squares and differences of larger scores would overflow."""


@dataclass(frozen=True)
class Row:
    """One prompt, completion, pair or rated answer."""

    number: int
    """Line of the file, from 1."""
    prompt: list[Message]
    answers: dict[str, str] = field(default_factory=dict)
    """{"answer": text}, or {"chosen": text, "rejected": text}; empty for a prompt."""
    token_ids: dict[str, list[int]] = field(default_factory=dict)
    """The same names, where the row has ids."""
    scores: dict[str, float] = field(default_factory=dict)
    """{objective: score or rating}; of a pair {"chosen_score": .., "rejected_score": ..}."""
    prompt_id: int | None = None
    sample_id: int | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    name: str
    one: str
    """What one row is called."""
    fields: str
    """By which it is recognised, in words."""
    matches: Callable[[set[str]], bool]
    read: Callable[[int, dict[str, Any]], Row] | None = None
    """None for rows that hold no prompt. Raises ValueError naming the field."""


def _prompt(number: int, row: dict[str, Any]) -> Row:
    record = Prompt.from_row(row)
    return Row(number, record.prompt, prompt_id=record.prompt_id)


def _completion(number: int, row: dict[str, Any]) -> Row:
    record = Completion.from_row(row)
    return Row(
        number, record.prompt, {"answer": record.completion[-1]["content"]}, {"answer": record.token_ids}, record.scores,
        record.prompt_id, record.sample_id, record.finish_reason,
    )  # fmt: skip


def _preference(number: int, row: dict[str, Any]) -> Row:
    record = Preference.from_row(own_form(row, number))
    answers = {"chosen": record.chosen[-1]["content"], "rejected": record.rejected[-1]["content"]}
    token_ids = {"chosen": record.chosen_token_ids, "rejected": record.rejected_token_ids}
    scores = {"chosen_score": record.chosen_score, "rejected_score": record.rejected_score}
    return Row(
        number,
        record.prompt,
        answers,
        {name: ids for name, ids in token_ids.items() if ids is not None},
        {name: score for name, score in scores.items() if score is not None},
        record.prompt_id if "prompt_id" in row else None,
    )


def _rating(number: int, row: dict[str, Any]) -> Row:
    """A value that is missing or no finite number is no rating; it shows in the number of ratings of its column."""
    for name in ("prompt", "response"):
        if not isinstance(row[name], str):
            raise ValueError(f'field "{name}" is a {type(row[name]).__name__}, not a text')
    # Not math.isfinite: it raises OverflowError for an integer that no float holds.
    ratings = {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if name not in _IDS
    }
    return Row(number, split_helpsteer_turns(row["prompt"]), {"answer": row["response"]}, scores=ratings)


PREFERENCES = Kind("preference pairs", "a preference pair", "chosen, rejected", {"chosen", "rejected"}.issubset, _preference)
COMPLETIONS = Kind("completions", "a completion", "prompt, completion, token_ids", {"completion"}.issubset, _completion)
RATINGS = Kind("ratings", "a rated answer", "prompt, response, numbers", {"prompt", "response"}.issubset, _rating)
REJECTS = Kind("set-aside rows", "a set-aside row", "file, row, reason", {"row", "reason"}.issubset)
METRICS = Kind("training metrics", "a training step", "step, loss", {"step", "loss"}.issubset)
PROMPTS = Kind("prompts", "a prompt", "prompt_id, prompt", {"prompt"}.issubset, _prompt)

KINDS = (PREFERENCES, COMPLETIONS, RATINGS, REJECTS, METRICS, PROMPTS)
"""In the order in which they are tried: a pair, a completion and a rated answer hold a prompt too."""


def kind_of_row(fields: set[str]) -> Kind | None:
    """The kind that a row's fields show, if any."""
    return next((kind for kind in KINDS if kind.matches(fields)), None)


def kind_of_file(path: Path) -> Kind | None:
    """The kind of the first row; None for a file without rows.

    Raises:
        DataError: the file is missing or no JSON lines, or its first row is of no known kind; names what was found.
    """
    for number, row in read_rows(path):
        return _known(path, number, row)
    return None


def read_file(path: Path, kind: Kind) -> Iterator[Row]:
    """Read and check one row after the other; a long file shows its progress.

    Raises:
        DataError: naming file, row and field; also for a row of another kind than the first.
    """
    assert kind.read is not None
    for number, row in checked_rows(path, kind):
        try:
            record = kind.read(number, row)
            for name, score in record.scores.items():
                if abs(score) > LARGEST:
                    raise ValueError(f"the score {score:g} of {one_line(name, 50)} is beyond {LARGEST:g} and no score")
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        yield record


def checked_rows(path: Path, kind: Kind) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows as they are in the file, all of one kind.

    Raises:
        DataError: as read_file.
    """
    lines = _count_lines(path)
    for number, row in progress(read_rows(path), desc=path.name, total=lines, unit="row", leave=False, delay=2):
        found = _known(path, number, row)
        if found is not kind:
            raise DataError(
                f"{path}, row {number}: {found.one} ({found.fields}) in a file of {kind.name} ({kind.fields}); "
                "a file holds rows of one kind"
            )
        yield number, row


def _known(path: Path, number: int, row: dict[str, Any]) -> Kind:
    kind = kind_of_row(set(row))
    if kind is None:
        known = "; ".join(f"{kind.name} ({kind.fields})" for kind in KINDS)
        has = ", ".join(one_line(name, 40) for name in list(row)[:12]) or "none"
        raise DataError(f"{path}, row {number}: of no known kind; its fields are {has}. Known are {known}")
    return kind


def _count_lines(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))

"""What did not get through a step: rejects.jsonl by reason, the manifest's counts, what a killed process left unfinished."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drdpo.display import one_line
from drdpo.errors import DataError
from drdpo.evaluation.kinds import REJECTS, checked_rows
from drdpo.files import whole_lines
from drdpo.manifest import read_manifest

_DETAIL = re.compile(r"(?<![\w=.-])\d[\d,.]*\b")
"""A number of one row in a reason, as in "1201 tokens, more than --prompt_max_len=1024"; a flag's value is none."""

_MOST = 160
"""Characters of a reason."""


@dataclass(frozen=True)
class Reason:
    """Rows of one file that were set aside for one reason."""

    file: str
    reason: str
    rows: int
    first: str
    """One of them: its row in `file`."""


def count_reasons(path: Path) -> list[Reason]:
    """The reasons in a rejects.jsonl, the most frequent first; those that differ in a row's own numbers only are one.

    Raises:
        DataError: naming file, row and field.
    """
    rows: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    for number, row in checked_rows(path, REJECTS):
        reason = row["reason"]
        if not isinstance(reason, str):
            raise DataError(f'{path}, row {number}: field "reason" is {reason!r}, not a text')
        key = (one_line(str(row.get("file", "")), _MOST), one_line(_DETAIL.sub("N", reason.partition(" (")[0]), _MOST))
        rows[key] += 1
        first.setdefault(key, one_line(str(row["row"]), 20))
    return [Reason(*key, count, first[key]) for key, count in rows.most_common()]


def manifest_counts(folder: Path) -> list[str]:
    """One line for every set of counts in a folder's manifest, with its dropped rows and why.

    Raises:
        DataError: the manifest is no JSON object.
    """
    lines = []
    for step, record in read_manifest(folder).items():
        for place, counts in _find_counts(record):
            pairs = list(_flatten(counts))
            words = ", ".join(f"{name} {value}" for name, value in pairs if value) or "all 0" if pairs else "none"
            lines.append(one_line(f"{' '.join([step, *place])}: {words}", 1000))
    return lines


def unfinished(folder: Path) -> list[str]:
    """What steps that were killed, or still run, have left in a folder, one line a part file."""
    found = []
    for path in sorted({*folder.glob(".*.jsonl"), *folder.glob(".*/*.jsonl"), *folder.glob(".*/*/*.jsonl")}):
        found.append(one_line(f"{path}: {describe_part(path)}"))
    return found


def is_part(path: Path) -> bool:
    """Is this a part file: hidden, or in a hidden folder? Results never are."""
    return path.suffix == ".jsonl" and any(
        name.startswith(".") for name in (path.name, path.parent.name, path.parent.parent.name)
    )


def describe_part(path: Path) -> str:
    """In words, how far a part file goes and whether its last line is torn."""
    lines, end = 0, 0
    for offset, _ in whole_lines(path):
        lines, end = lines + 1, offset
    with path.open("rb") as stream:
        stream.seek(end)
        if lines:
            stream.readline()
        torn = bool(stream.read(1))
    tail = "; the line after them is torn, it is dropped when the step goes on" if torn else ""
    return f"unfinished, {lines} whole lines{tail}; give the step's command again to finish it"


def _find_counts(record: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every {"counts": {...}} or {"count": {...}} of a manifest's record, with the names on the way to it."""
    if not isinstance(record, dict):
        return
    for name, value in record.items():
        if name in ("counts", "count") and isinstance(value, dict):
            yield place, value
        elif name not in ("made_by", "versions", "flags"):
            yield from _find_counts(value, (*place, str(name)))


def _flatten(counts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in counts.items():
        shown = prefix + (name.replace("_", " ") if name.isidentifier() else name)
        if isinstance(value, dict):
            yield from _flatten(value, f"{shown}: ")
        elif isinstance(value, int | float):
            yield shown, value

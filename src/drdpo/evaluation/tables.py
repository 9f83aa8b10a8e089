"""What the reports share: tables, CSV files, the list of differences and the folder they are written to."""

import csv
from collections.abc import Collection, Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from tabulate import tabulate

from drdpo.errors import DataError
from drdpo.folder import atomic_files, flush, lock_folder, sweep, write_manifest


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns align left, the others right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    escaped = ([" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in [header, rule, *rows])
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The same table with aligned columns, for a terminal."""
    align = ["left"] * left + ["right"] * (len(header) - left)
    return str(tabulate(rows, header, tablefmt="simple", colalign=align if rows else None, disable_numparse=True))


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A CSV file. Numbers have full precision; None is an empty field."""
    stream = StringIO()
    csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    return stream.getvalue()


def differences(what: str, records: Mapping[str, Mapping[str, str]], ignore: Collection[str]) -> list[str]:
    """One line per field in which records differ.

    Args:
        what: the records' subject, e.g. "scoring".
        records: {run: {field: value}}.
        ignore: fields that may differ.
    """
    lines = []
    for field in sorted({field for record in records.values() for field in record} - set(ignore)):
        values = {run: record.get(field, "not recorded") for run, record in records.items()}
        if len(set(values.values())) > 1:
            lines.append(f"the {what} differs in {field}: " + ", ".join(f"{run} {value}" for run, value in values.items()))
    return lines


def write_report(
    folder: Path, step: str, made_by: dict[str, Any], files: Mapping[str, str | bytes], optional: Collection[str] = (),
    **facts: Any,
) -> None:  # fmt: skip
    """Write a report and its manifest under the folder's lock. If any file cannot be written, the old report stays.

    Args:
        folder: created if missing.
        step, made_by, facts: as for `write_manifest`.
        files: {name: content}.
        optional: files that only some reports have; those of an older report are deleted.

    Raises:
        DataError: `folder` is a file.
        UsageError: another process is writing there.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: --output_path is a file, not a folder")
    with lock_folder(folder):
        sweep(folder)
        with atomic_files(*(folder / name for name in files)) as asides:
            for aside, content in zip(asides, files.values(), strict=True):
                aside.write_bytes(content if isinstance(content, bytes) else content.encode())
                flush(aside)
        for name in set(optional) - set(files):
            (folder / name).unlink(missing_ok=True)
        write_manifest(folder, step, made_by, **facts)

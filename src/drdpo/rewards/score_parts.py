"""Finished batches of a split on disk, so that scoring that was killed goes on and ends with the same file.

`<folder>/plan.json` says what makes them; `<folder>/<rank>.jsonl` has a line for every batch that a rank finished:
{"batch": number, "rows": [{prompt_id, sample_id, and scores or reason}, ...]}. A line is written and flushed whole, so a
killed process leaves at most one cut line, at the end, which does not count. A batch is scored whole or not at all: its
figures depend, in the last bits, on what is computed with them.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from drdpo import distributed
from drdpo.errors import UsageError
from drdpo.folder import atomic_file, changed, read_json_object, whole_lines

PLAN, DONE = "plan.json", "done.jsonl"

Rows = list[dict[str, Any]]


class ScoreParts:
    """The parts of one split.

    Args:
        folder: for them.
        made_by: what the scores depend on, the batches' budget included.
    """

    def __init__(self, folder: Path, made_by: dict[str, Any]) -> None:
        self.folder = folder
        self.made_by: dict[str, Any] = json.loads(json.dumps(made_by))

    def check(self, overwrite: bool) -> None:
        """Refuse parts that something else made. Reads only, so every rank may call it before any of them writes.

        Raises:
            UsageError: other flags, models or inputs made the unfinished scores, and `overwrite` is False.
        """
        changes = changed(self._plan()["made_by"], self.made_by) if self._plan() else ""
        if changes and not overwrite:
            raise UsageError(
                f"{self.folder} holds unfinished scores made otherwise: {changes}; give --overwrite=true to drop them, "
                "another folder, or the flags of before to finish them"
            )

    def open(self, batches: object) -> dict[int, Rows]:
        """Gather what is done, and start anew where the plan of the batches is another. Every rank calls it at once.

        Args:
            batches: the plan, the same on every rank.

        Returns:
            {batch: rows} of the finished batches.
        """
        plan = {"made_by": self.made_by, "batches": hashlib.sha256(repr(batches).encode()).hexdigest()}
        distributed.barrier()
        if distributed.is_main():
            if self._plan() != plan:
                shutil.rmtree(self.folder, ignore_errors=True)
                with atomic_file(self.folder / PLAN) as stream:
                    json.dump(plan, stream)
            self._gather()
        distributed.barrier()
        # Not the ranks' own files: the faster ranks are writing to theirs already.
        return _rows_of([self.folder / DONE])

    def add(self, batch: int, rows: Rows) -> None:
        """Keep a finished batch of this rank."""
        path = self.folder / f"{distributed.rank()}.jsonl"
        try:
            with path.open("ab") as stream:
                stream.write(json.dumps({"batch": batch, "rows": rows}).encode() + b"\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def read(self) -> dict[int, Rows]:
        """{batch: rows} of all ranks' finished batches."""
        return _rows_of(sorted(self.folder.glob("*.jsonl")))

    def remove(self) -> None:
        """Delete the parts, and the folder of all parts where it is then empty."""
        shutil.rmtree(self.folder)
        if not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def _plan(self) -> dict[str, Any]:
        path = self.folder / PLAN
        return read_json_object(path) if path.is_file() else {}

    def _gather(self) -> None:
        """Bring all whole lines into one file; the ranks' own begin anew, without cut lines."""
        rows_of = self.read()
        with atomic_file(self.folder / DONE) as stream:
            for batch, rows in rows_of.items():
                stream.write(json.dumps({"batch": batch, "rows": rows}) + "\n")
        for file in self.folder.glob("*.jsonl"):
            if file.name != DONE:
                file.unlink()


def _rows_of(files: list[Path]) -> dict[int, Rows]:
    return {line["batch"]: line["rows"] for file in files for _, line in whole_lines(file)}

"""The part file of a split: finished blocks of samples, kept so that a run that was broken off can go on.

`.<split>.part.jsonl` begins with a line that says what makes it (flags, fingerprints, block size). Every further line is
one finished block: {"block": number, "samples": {prompt_id: [[token_ids, finish_reason], ...]}}. A line is written and
flushed whole, so a killed process leaves at most one cut line, at the end, which is dropped.
"""

import json
from pathlib import Path
from typing import Any

from drdpo.errors import UsageError
from drdpo.folder import whole_lines
from drdpo.generation.engines.base import Sample

Block = dict[int, list[Sample]]
"""prompt_id -> samples."""


class PartFile:
    """Finished blocks on disk; only their places are held in memory."""

    def __init__(self, path: Path, made_by: dict[str, Any], prompts_per_block: int, overwrite: bool) -> None:
        """Open or start the part file.

        Args:
            path: the file.
            made_by: what the samples depend on; as in the manifest.
            prompts_per_block: for a new file; one that is there keeps its own.
            overwrite: start anew where something else made the file.

        Raises:
            UsageError: other flags, models or inputs made the unfinished samples.
        """
        self._path = path
        self._offsets: dict[int, int] = {}
        self.prompts_per_block = prompts_per_block
        made_by = json.loads(json.dumps(made_by))
        lines = [(offset, {**line, "samples": None}) for offset, line in whole_lines(path)] if path.is_file() else []
        if lines and "prompts_per_block" in lines[0][1] and _same(path, lines[0][1].get("made_by", {}), made_by, overwrite):
            self.prompts_per_block = int(lines[0][1]["prompts_per_block"])
            self._offsets = {line["block"]: offset for offset, line in lines[1:]}
            with path.open("r+b") as stream:  # without a cut line, what is appended begins a line of its own
                stream.truncate(lines[-1][0] + _length(path, lines[-1][0]))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._append({"made_by": made_by, "prompts_per_block": prompts_per_block})

    @property
    def done(self) -> set[int]:
        """Numbers of the finished blocks."""
        return set(self._offsets)

    def add(self, number: int, block: Block) -> None:
        """Keep a finished block."""
        samples = {str(key): [(sample.token_ids, sample.finish_reason) for sample in block[key]] for key in block}
        self._offsets[number] = self._append({"block": number, "samples": samples})

    def read(self, number: int) -> Block:
        """A finished block."""
        with self._path.open("rb") as stream:
            stream.seek(self._offsets[number])
            samples = json.loads(stream.readline())["samples"]
        return {int(key): [Sample(list(ids), reason) for ids, reason in values] for key, values in samples.items()}

    def remove(self) -> None:
        """Delete the file; its samples are where they belong."""
        self._path.unlink(missing_ok=True)

    def _append(self, row: dict[str, Any]) -> int:
        """Write a line; returns where it begins."""
        try:
            with self._path.open("ab") as stream:
                offset = stream.tell()
                stream.write(json.dumps(row).encode() + b"\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        return offset


def _same(path: Path, before: dict[str, Any], now: dict[str, Any], overwrite: bool) -> bool:
    differs = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if differs and not overwrite:
        changes = ", ".join(f"{name} ({before.get(name)} -> {now.get(name)})" for name in differs)
        raise UsageError(
            f"{path} holds unfinished samples made otherwise: {changes}; give --overwrite=true to drop them, another "
            "folder, or the flags of before to finish them"
        )
    return not differs


def _length(path: Path, offset: int) -> int:
    with path.open("rb") as stream:
        stream.seek(offset)
        return len(stream.readline())

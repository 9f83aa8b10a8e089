"""What scoring leaves behind: {train,test}.jsonl, rejects.jsonl and the manifest's entry of each split."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drdpo.errors import DataError
from drdpo.folder import write_manifest
from drdpo.records import Completion, read_rows, to_row, write_rows
from drdpo.rewards.scores import mean_and_sd


@dataclass(frozen=True)
class SplitFiles:
    """Where one split comes from and goes to."""

    split: str
    sampled: Path
    scored: Path

    @property
    def step(self) -> str:
        """What manifest.json calls the scoring of this split."""
        return f"score_{self.split}"

    @property
    def source(self) -> str:
        """What rejects.jsonl calls the input file."""
        return f"{self.sampled.parent.name}/{self.sampled.name}"


def report(split: str, completions: list[Completion]) -> str:
    """An aligned table of every objective's mean and sd over a split."""
    names = list(completions[0].scores)
    width = max(map(len, names))
    lines = [f"{split}: {len(completions)} completions", f"  {'objective':<{width}}      mean        sd"]
    for name in names:
        mean, sd = mean_and_sd([completion.scores[name] for completion in completions])
        lines.append(f"  {name:<{width}}  {mean:>8.4f}  {sd:>8.4f}")
    return "\n".join(lines)


def merge(
    files: SplitFiles, completions: list[Completion], rows: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Join completions and results by key.

    Args:
        files: of the split.
        completions: all sampled completions, in input order.
        rows: {prompt_id, sample_id, and scores or reason} of every completion, in any order.

    Returns:
        The rows of the scored file and those of rejects.jsonl, in input order, and for the manifest the counts in, out,
        dropped, and why.

    Raises:
        DataError: a completion has no row, or not one could be scored.
    """
    result_of = {(row["prompt_id"], row["sample_id"]): row for row in rows}
    scored, rejects = [], []
    for number, completion in enumerate(completions, start=1):
        key = (completion.prompt_id, completion.sample_id)
        if key not in result_of:
            raise DataError(f"{files.sampled}, row {number}: no process scored prompt_id {key[0]}, sample_id {key[1]}")
        row = result_of[key]
        if "scores" in row:
            scored.append(to_row(completion) | {"scores": row["scores"]})
        else:
            rejects.append(
                {"file": files.source, "row": number, "prompt_id": key[0], "sample_id": key[1], "reason": row["reason"]}
            )
    if not scored:
        raise DataError(
            f"{files.sampled}: not one of {len(completions)} completions could be scored; the first: {rejects[0]['reason']}"
        )
    why = Counter(reject["reason"].partition(" (")[0] for reject in rejects)
    return scored, rejects, {"in": len(completions), "out": len(scored), "dropped": len(rejects), "why": dict(why)}


def write_scored(
    files: SplitFiles,
    scored: list[dict[str, Any]],
    rejects: list[dict[str, Any]],
    made_by: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Write the results of one split. The scored file comes last: where it is, the manifest speaks of it.

    Args:
        files: of the split.
        scored, rejects: from merge.
        made_by: what the scores depend on.
        facts: for the manifest; `counts` from merge is among them.
    """
    files.scored.unlink(missing_ok=True)
    _write_rejects(files, rejects)
    write_manifest(files.scored.parent, files.step, made_by, **facts)
    write_rows(files.scored, scored)
    if rejects:
        print(f"{files.split}: {len(rejects)} completions set aside in rejects.jsonl: {facts['counts']['why']}", flush=True)


def _write_rejects(files: SplitFiles, rejects: list[dict[str, Any]]) -> None:
    """Replace this split's rows of rejects.jsonl; other files' rows (the sampling's, the other split's) stay."""
    path = files.scored.parent / "rejects.jsonl"
    others = [row for _, row in read_rows(path) if row.get("file") != files.source] if path.is_file() else []
    if others or rejects:
        write_rows(path, [*others, *rejects])
    else:
        path.unlink(missing_ok=True)

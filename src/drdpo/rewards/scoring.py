"""Step 1b: score the completions of <save_path>/sampled/{train,test}.jsonl into <save_path>/{train,test}.jsonl.

One process per GPU: every rank scores its share into a part file, rank 0 merges them by (prompt_id, sample_id). Completions
that cannot be scored go to <save_path>/rejects.jsonl with the reason. `save_path` may also be a model folder, so nothing
but these files and manifest.json is written there.
"""

import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drdpo import distributed
from drdpo.config import CompletionsConfig
from drdpo.errors import DataError, UsageError
from drdpo.flags import as_dict
from drdpo.manifest import already_made, fingerprint, write_manifest
from drdpo.objectives import GATED_SCORE
from drdpo.records import Completion, check_unique, read_records, read_rows, to_row, write_rows
from drdpo.rewards.layout import check_folder
from drdpo.rewards.scores import mean_and_sd

ROOT = Path(__file__).resolve().parents[3]
PARTS = ".score_parts"


@dataclass(frozen=True)
class SplitFiles:
    """Where one split comes from and goes to."""

    split: str
    sampled: Path
    scored: Path

    @property
    def source(self) -> str:
        """What rejects.jsonl calls the input file."""
        return f"{self.sampled.parent.name}/{self.sampled.name}"


def score_completions(config: CompletionsConfig) -> None:
    """Score every sampled completion with a multi-objective reward model.

    --check_only checks the sampled files that are there: with the same flag, step 1a has made none.

    Raises:
        DataError: a sampled file is missing or malformed, or the reward model folder is not whole.
        UsageError: no reward model, --score_max_len over its positions, or results that something else made.
    """
    folder = reward_model_folder(config.reward_model)
    layout = check_folder(folder)
    if config.score_max_len > layout.max_positions:
        raise UsageError(f"--score_max_len={config.score_max_len}: {folder} reads at most {layout.max_positions} tokens")
    splits = split_files(config)
    if config.check_only:
        for files in splits:
            if files.sampled.exists():
                read_sampled(files.sampled)
        return
    completions = {files.split: read_sampled(files.sampled) for files in splits}
    made_by = {files.split: _made_by(config, folder, files) for files in splits}
    todo = [
        files
        for files in splits
        if not already_made(files.scored.parent, _step(files), made_by[files.split], [files.scored], config.overwrite)
    ]
    say(f"reward model: {folder}")
    for files in splits:
        if files not in todo:
            say(f"{files.scored}: scored already with the same model and flags; skipped")
    if todo:
        _score_splits(config, folder, todo, completions, made_by)
    if distributed.is_main():
        for files in splits:
            print(report(files.split, read_records(files.scored, Completion.from_row)), flush=True)


def reward_model_folder(flag: str) -> Path:
    """The folder that --reward_model names; 'auto' is models/ArmoRM where it exists, else models/ArmoRM-SmolLM2."""
    if flag != "auto":
        return Path(flag)
    models = ROOT / "models"
    for name in ("ArmoRM", "ArmoRM-SmolLM2"):
        if (models / name).is_dir():
            return models / name
    raise UsageError(f"--reward_model=auto: neither ArmoRM nor ArmoRM-SmolLM2 is in {models}; run: bash setup.sh")


def split_files(config: CompletionsConfig) -> list[SplitFiles]:
    """The files of the splits that the flags ask for; --only_test leaves train out."""
    save_path = Path(config.save_path)
    return [
        SplitFiles(split, save_path / "sampled" / f"{split}.jsonl", save_path / f"{split}.jsonl")
        for split in (("test",) if config.only_test else ("train", "test"))
    ]


def read_sampled(path: Path) -> list[Completion]:
    """Read sampled completions.

    Raises:
        DataError: as read_records; also for a (prompt_id, sample_id) that repeats.
    """
    completions = read_records(path, Completion.from_row)
    check_unique(path, ((c.prompt_id, c.sample_id) for c in completions), '"prompt_id", "sample_id"')
    return completions


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


def say(message: str) -> None:
    """Print on the first rank."""
    if distributed.is_main():
        print(message, flush=True)


def _score_splits(
    config: CompletionsConfig,
    folder: Path,
    todo: list[SplitFiles],
    completions: dict[str, list[Completion]],
    made_by: dict[str, dict[str, Any]],
) -> None:
    """Load the model once, score this rank's share of every split, merge on rank 0."""
    from drdpo.rewards.scorer import Scorer

    distributed.initialise()
    parts = Path(config.save_path) / PARTS
    if distributed.is_main() and parts.exists():
        shutil.rmtree(parts)  # of a run that was killed
    distributed.barrier()
    scorer = Scorer(folder, config.dtype, config.score_max_len, config.score_batch_tokens)
    for files in todo:
        share = distributed.shard(completions[files.split])
        rows = [
            {"prompt_id": completion.prompt_id, "sample_id": completion.sample_id, **result}
            for completion, result in zip(share, scorer.score(share, files.split), strict=True)
        ]
        write_rows(parts / f"{files.split}-{distributed.rank()}.jsonl", rows)
        distributed.barrier()
        if distributed.is_main():
            paths = [parts / f"{files.split}-{rank}.jsonl" for rank in range(distributed.world_size())]
            merged = [row for path in paths for _, row in read_rows(path)]
            scored, rejects, counts = merge(files, completions[files.split], merged)
            facts: dict[str, Any] = {"counts": counts, "objectives": [*scorer.objectives, GATED_SCORE]}
            facts |= {"reward_model": os.fspath(folder), "processes": distributed.world_size(), "flags": as_dict(config)}
            _write(files, scored, rejects, made_by[files.split], facts)
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(parts)


def _step(files: SplitFiles) -> str:
    return f"score_{files.split}"


def _made_by(config: CompletionsConfig, folder: Path, files: SplitFiles) -> dict[str, Any]:
    return {
        "reward_model": fingerprint(folder),
        "sampled": fingerprint(files.sampled),
        "dtype": config.dtype,
        "score_max_len": config.score_max_len,
    }


def _write(
    files: SplitFiles,
    scored: list[dict[str, Any]],
    rejects: list[dict[str, Any]],
    made_by: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Write the results of one split. The scored file comes last: where it is, the manifest speaks of it."""
    files.scored.unlink(missing_ok=True)
    _write_rejects(files, rejects)
    write_manifest(files.scored.parent, _step(files), made_by, **facts)
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

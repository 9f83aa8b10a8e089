"""Step 1b: score the completions of <save_path>/sampled/{train,test}.jsonl into <save_path>/{train,test}.jsonl.

One process per GPU: every rank scores its share of the batches into a part file, rank 0 merges them by (prompt_id,
sample_id); a run that was killed goes on from the finished batches. Completions that cannot be scored go to
<save_path>/rejects.jsonl with the reason. `save_path` may also be a model folder, so nothing but these files and
manifest.json stays there.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drdpo import distributed
from drdpo.cli import as_dict
from drdpo.config import CompletionsConfig
from drdpo.errors import DataError, UsageError
from drdpo.folder import already_made, lock_folder, refuse_if_locked, sole_writer, sweep
from drdpo.machine import agree, announce, settle
from drdpo.models import fingerprint
from drdpo.objectives import GATED_SCORE
from drdpo.progress import progress
from drdpo.records import Completion, check_unique, read_records
from drdpo.rewards.layout import check_folder
from drdpo.rewards.score_parts import ScoreParts
from drdpo.rewards.scored_files import SplitFiles, merge, report, write_scored

if TYPE_CHECKING:
    from drdpo.rewards.scorer import Scorer

ROOT = Path(__file__).resolve().parents[3]
PARTS = ".score_parts"


def score_completions(config: CompletionsConfig) -> None:
    """Score every sampled completion with a multi-objective reward model.

    --check_only checks the sampled files that are there: with the same flag, step 1a has made none.

    Raises:
        DataError: a sampled file is missing or malformed, or the reward model folder is not whole.
        UsageError: no reward model, --score_max_len over its positions, results that something else made, or another run
            that is making some.
    """
    folder = reward_model_folder(config.reward_model)
    layout = check_folder(folder)
    if config.score_max_len > layout.max_positions:
        raise UsageError(f"--score_max_len={config.score_max_len}: {folder} reads at most {layout.max_positions} tokens")
    splits = split_files(config)
    config, precision = settle(config)
    if config.check_only:
        announce(precision)
        for files in splits:
            if files.sampled.exists():
                read_sampled(files.sampled)
        return
    distributed.initialise()
    try:
        config, precision = agree(config, precision)
        announce(precision)
        _score(config, folder, splits, precision.reason)
    except (UsageError, DataError, SystemExit):
        # These end every rank. A rank that is lost is another matter: it would be waited for.
        distributed.leave()
        raise
    distributed.leave()


def _score(config: CompletionsConfig, folder: Path, splits: list[SplitFiles], dtype_reason: str) -> None:
    """Score what is not scored; the settings are the same on every rank."""
    completions = {files.split: read_sampled(files.sampled) for files in splits}
    made_by = {files.split: _made_by(config, folder, files) for files in splits}
    todo = [
        files
        for files in splits
        if not already_made(files.scored.parent, files.step, made_by[files.split], [files.scored], config.overwrite)
    ]
    parts = {files.split: _parts(config, files, made_by[files.split]) for files in todo}
    for unfinished in parts.values():
        unfinished.check(config.overwrite)
    if todo:
        refuse_if_locked(Path(config.save_path))
    say(f"reward model: {folder}")
    for files in splits:
        if files not in todo:
            say(f"{files.scored}: scored already with the same model and flags; skipped")
    if todo:
        _score_splits(config, folder, todo, completions, made_by, parts, dtype_reason)
    if distributed.is_main():
        for files in splits:
            leftover = _parts(config, files, made_by[files.split])
            if files not in todo and leftover.folder.is_dir():  # a run was killed between writing and clearing up
                with lock_folder(Path(config.save_path)):
                    leftover.remove()
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
    parts: dict[str, ScoreParts],
    dtype_reason: str,
) -> None:
    """Load the model once, score this rank's share of every split, merge on rank 0."""
    from drdpo.rewards.scorer import Scorer

    scorer = Scorer(folder, config.dtype, config.score_max_len, config.score_batch_tokens)
    with sole_writer(Path(config.save_path)):
        if distributed.is_main():
            sweep(Path(config.save_path))
        for files in todo:
            facts: dict[str, Any] = {"objectives": [*scorer.objectives, GATED_SCORE], "dtype_reason": dtype_reason}
            facts |= {"reward_model": os.fspath(folder), "processes": distributed.world_size(), "flags": as_dict(config)}
            _score_and_write(scorer, files, completions[files.split], made_by[files.split], parts, facts)
    distributed.barrier()


def _score_and_write(
    scorer: "Scorer",
    files: SplitFiles,
    completions: list[Completion],
    made_by: dict[str, Any],
    parts: dict[str, ScoreParts],
    facts: dict[str, Any],
) -> None:
    """Score this rank's share of a split; rank 0 merges all shares."""
    refused = _score_split(scorer, files.split, completions, parts[files.split])
    distributed.barrier()
    if distributed.is_main():
        rows = [row for rows in parts[files.split].read().values() for row in rows]
        scored, rejects, counts = merge(files, completions, [*rows, *refused])
        facts = facts | {"counts": counts, "attention": scorer.attention}
        write_scored(files, scored, rejects, made_by, facts)
        parts[files.split].remove()


def _score_split(scorer: "Scorer", split: str, completions: list[Completion], parts: ScoreParts) -> list[dict[str, Any]]:
    """Score this rank's share of the batches that are not done into the parts; returns the rows of what is refused."""

    def row(index: int, result: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_id": completions[index].prompt_id, "sample_id": completions[index].sample_id, **result}

    reading = scorer.read(completions)
    # What is scored already stays only if the same kernel attended.
    done = parts.open([scorer.attention, reading.batches])
    share = distributed.shard([number for number in range(len(reading.batches)) if number not in done])
    if done:
        there = sum(map(len, done.values()))
        say(f"{split}: {there} of {len(completions)} completions are scored already, by a run that was broken off")
    started, tokens = time.perf_counter(), 0
    total = sum(map(reading.completions, share))
    with progress(total=total, desc=f"score {split}", unit="completion", disable=not distributed.is_main()) as bar:
        for number in share:
            results = scorer.score(reading, number)
            parts.add(number, [row(index, result) for index, result in results.items()])
            tokens += reading.tokens(number)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
            bar.update(len(results))
    return [row(index, {"reason": reason}) for index, reason in reading.refused.items()]


def _made_by(config: CompletionsConfig, folder: Path, files: SplitFiles) -> dict[str, Any]:
    return {
        "reward_model": fingerprint(folder),
        "sampled": fingerprint(files.sampled),
        "dtype": config.dtype,
        "score_max_len": config.score_max_len,
    }


def _parts(config: CompletionsConfig, files: SplitFiles, made_by: dict[str, Any]) -> ScoreParts:
    return ScoreParts(
        Path(config.save_path) / PARTS / files.split, made_by | {"score_batch_tokens": config.score_batch_tokens}
    )

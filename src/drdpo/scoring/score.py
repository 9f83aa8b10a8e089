"""Step 1b: score the completions of <save_path>/sampled/{train,test}.jsonl into <save_path>/{train,test}.jsonl.

One process per GPU: every rank scores its share of the batches into a part file, rank 0 merges them by (prompt_id,
sample_id); a run that was killed goes on from the finished batches. Completions that cannot be scored go to
<save_path>/rejects.jsonl with the reason. `save_path` may also be a model folder, so nothing but these files and
manifest.json stays there.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2.exceptions import TemplateError

from drdpo import distributed
from drdpo.chat import conversation_token_ids, load_tokenizer
from drdpo.cli import as_dict
from drdpo.config import CompletionsConfig
from drdpo.errors import DataError, UsageError
from drdpo.folder import (
    already_made,
    atomic_file,
    changed,
    lock_folder,
    read_json_object,
    refuse_if_locked,
    sole_writer,
    sweep,
    whole_lines,
    write_manifest,
)
from drdpo.kernels.packed_attention import PackedRow, refusal
from drdpo.machine import agree, announce, settle
from drdpo.models import fingerprint
from drdpo.objectives import GATED_SCORE
from drdpo.progress import progress
from drdpo.records import Completion, check_unique, read_records, read_rows, to_row, write_rows
from drdpo.scoring.armorm import Group, Span, check_folder, last_occurrence, load_armorm, packed_batches

# A reward model at work: completions in, {objective: score} or the reason why not out.

UNRENDERABLE = (TemplateError, ValueError, TypeError)
"""What rendering raises: the template's own refusals, drdpo.chat's, and a template that trips over a message."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Reading(NamedTuple):
    """Completions as the reward model reads them."""

    token_ids: list[list[int]]
    """Of every completion's conversation."""
    refused: dict[int, str]
    """{index of a completion that cannot be scored: the reason}"""
    batches: list[list[Group]]
    """The others, in packed batches."""

    def tokens(self, number: int) -> int:
        """Tokens of a batch, each shared prefix counted once."""
        groups = self.batches[number]
        return sum(g.shared + sum(len(self.token_ids[row]) - g.shared for row in g.rows) for g in groups)

    def completions(self, number: int) -> int:
        """Completions of a batch."""
        return sum(len(group.rows) for group in self.batches[number])


class Scorer:
    """The reward model of this rank with its own tokenizer and template.

    Args:
        folder: reward model in ArmoRM's layout.
        dtype: of the backbone, "bfloat16" or "float32"; the heads are float32.
        max_len: a longer conversation, in tokens, is not scored.
        batch_tokens: most tokens of a batch; a prompt counts once for its completions.

    Raises:
        DataError: the folder is not whole, or its tokenizer is of another family than its heads.
    """

    def __init__(self, folder: Path, dtype: str, max_len: int, batch_tokens: int) -> None:
        self.max_len = max_len
        self.batch_tokens = batch_tokens
        self.device = distributed.device()
        use_cpu_well(self.device)
        self.tokenizer = load_tokenizer(str(folder))
        self.model = load_armorm(folder, self.device, DTYPES[dtype])
        self.objectives = self.model.objectives
        self.attention = self._attend(DTYPES[dtype])
        """Kernel of packed rows: "flash" on CUDA where it serves the backbone, else "sdpa"."""
        check_tokenizer(folder, self.tokenizer, self.model.layout.gating_token_pattern, self.model.layout.vocab_size)
        self._check_backbone(folder)

    def read(self, completions: Sequence[Completion]) -> Reading:
        """Render completions and plan their batches, in the same way on every rank.

        Args:
            completions: any number, of any prompts.
        """
        token_ids: list[list[int]] = []
        refused: dict[int, str] = {}
        for row, completion in enumerate(completions):
            try:
                ids = conversation_token_ids(self.tokenizer, [*completion.prompt, *completion.completion])
                reason = self._refusal(ids)
            except UNRENDERABLE as error:
                ids, reason = [], f"the chat template refuses it ({error})"
            if reason:
                refused[row] = reason
            token_ids.append(ids)
        good = [row for row in range(len(token_ids)) if row not in refused]
        batches = packed_batches(
            [token_ids[row] for row in good], [completions[row].prompt_id for row in good], self.batch_tokens
        )
        named = [[Group(group.shared, tuple(good[row] for row in group.rows)) for group in batch] for batch in batches]
        return Reading(token_ids, refused, named)

    @torch.inference_mode()
    def score(self, reading: Reading, number: int) -> dict[int, dict[str, Any]]:
        """Score one batch.

        Returns:
            {row: {"scores": {objective: float, ..., "ArmoRM": float}} or {"reason": text}}
        """
        groups = reading.batches[number]
        row = PackedRow([(group.shared, [reading.token_ids[index] for index in group.rows]) for group in groups])
        indices = [index for group in groups for index in group.rows]
        spans = [self.model.span(reading.token_ids[index]) for index in indices]
        rewards = self.model.score_packed(row, [span for span in spans if span is not None])
        scores = zip(indices, rewards.stage1.tolist(), rewards.stage2.tolist(), strict=True)
        return {index: self._result(stage1, stage2) for index, stage1, stage2 in scores}

    def _attend(self, dtype: torch.dtype) -> str:
        if self.device.type != "cuda":
            return "sdpa"
        reason = refusal(self.model.model.config, self.device, dtype)
        if any(distributed.gather_floats([float(reason is not None)])):
            if distributed.is_main():
                print(f"attention: sdpa instead of flash, because {reason or 'another process cannot'}", flush=True)
            return "sdpa"
        self.model.flash_attention = True
        return "flash"

    @torch.inference_mode()
    def _check_backbone(self, folder: Path) -> None:
        """Raise DataError where packed rows are not for this backbone, before any work is done."""
        pattern = self.model.layout.gating_token_pattern
        row = PackedRow([(len(pattern), [[*pattern, pattern[0]], [*pattern, pattern[-1]]])])
        try:
            self.model.score_packed(row, [Span(0, len(pattern), len(pattern))] * 2)
        except ValueError as error:
            raise DataError(f"{folder}: conversations cannot be scored in packed rows ({error})") from error

    def _refusal(self, ids: list[int]) -> str:
        if len(ids) > self.max_len:
            return f"longer than --score_max_len={self.max_len} ({len(ids)} tokens)"
        return "" if self.model.span(ids) is not None else "the gating token pattern is missing"

    def _result(self, stage1: list[float], stage2: float) -> dict[str, Any]:
        scores = dict(zip(self.objectives, stage1, strict=True)) | {GATED_SCORE: stage2}
        broken = [name for name, value in scores.items() if not math.isfinite(value)]
        return {"reason": f"the score is not finite ({', '.join(broken)})"} if broken else {"scores": scores}


def check_tokenizer(folder: Path, tokenizer: Any, pattern: tuple[int, ...], vocabulary: int) -> None:
    """Raise DataError unless the template renders an exchange with the gating pattern and every id fits the vocabulary."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    try:
        ids = conversation_token_ids(tokenizer, turns)
    except UNRENDERABLE as error:
        raise DataError(f"{folder}: the tokenizer's template refuses a question with its answer ({error})") from error
    if max(ids) >= vocabulary:
        raise DataError(f"{folder}: the tokenizer writes id {max(ids)}, outside the model's vocabulary of {vocabulary}")
    if last_occurrence(ids, pattern) is None:
        raise DataError(
            f"{folder}: the tokenizer's template does not write the gating token pattern {list(pattern)}; "
            "it is of another family than the reward model"
        )


def use_cpu_well(device: torch.device) -> None:
    """On a CPU: flush denormals, which slow matrix products down, and share the cores among the ranks."""
    if device.type != "cpu":
        return
    torch.set_flush_denormal(True)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // distributed.world_size()))


# Finished batches of a split on disk, so that scoring that was killed goes on and ends with the same file.
#
# `<folder>/plan.json` says what makes them; `<folder>/<rank>.jsonl` has a line for every batch that a rank finished:
# {"batch": number, "rows": [{prompt_id, sample_id, and scores or reason}, ...]}. A line is written and flushed whole,
# so a killed process leaves at most one cut line, at the end, which does not count. A batch is scored whole or not at
# all: its figures depend, in the last bits, on what is computed with them.

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


# What scoring leaves behind: {train,test}.jsonl, rejects.jsonl and the manifest's entry of each split.


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
        values = np.array([completion.scores[name] for completion in completions])
        lines.append(f"  {name:<{width}}  {values.mean():>8.4f}  {values.std():>8.4f}")
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

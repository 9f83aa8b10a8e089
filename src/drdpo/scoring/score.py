"""Step 1b: score the completions of <save_path>/sampled/{train,test}.jsonl into <save_path>/{train,test}.jsonl.

One process per GPU: every rank scores its share of the batches and keeps them as resumable parts in `.<split>.parts/`;
rank 0 merges them by (prompt_id, sample_id). A batch is scored whole or not at all, because its scores depend, in the last
bits, on what is computed together. Completions that cannot be scored go to <save_path>/rejects.jsonl with the reason.
`save_path` may also be a model folder, so only these files and manifest.json are written there.
"""

import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate

from drdpo import distributed
from drdpo.candidates import mean_and_sd
from drdpo.chat import conversation_token_ids, load_tokenizer
from drdpo.cli import as_dict
from drdpo.config.data import CompletionsConfig
from drdpo.errors import DataError, UsageError
from drdpo.folder import ROOT, Parts, SplitResult, refuse_if_locked, sole_writer, sweep, write_manifest
from drdpo.kernels.packed_attention import PackedRow, refusal
from drdpo.machine import agree, announce, settle
from drdpo.models import fingerprint
from drdpo.objectives import GATED_SCORE
from drdpo.progress import progress
from drdpo.records import Completion, check_unique, read_records, to_row, write_rejects, write_rows
from drdpo.scoring.armorm import RewardLayout, SharedPrefix, Span, check_folder, find_span, load_armorm, packed_batches


def score_completions(config: CompletionsConfig) -> None:
    """Score every sampled completion with a multi-objective reward model.

    --check_only checks the sampled files if there are any: with the same flag, step 1a has written none.

    Raises:
        DataError: a sampled file is missing or malformed, or the reward model folder is not complete.
        UsageError: no reward model, --score_max_len beyond its positions, results from a different configuration, or a
            folder locked by another run.
        ProcessError: another rank is lost; finished batches are kept.
    """
    folder = reward_model_folder(config.reward_model)
    layout = check_folder(folder)
    if config.score_max_len > layout.max_position_embeddings:
        most = layout.max_position_embeddings
        raise UsageError(f"--score_max_len={config.score_max_len}: {folder} reads at most {most} tokens")
    check_tokenizer(folder, layout)
    config, precision = settle(config)
    if config.check_only:
        announce(precision)
        for split in _splits(config):
            if (file := _sampled(config, split)).exists():
                read_sampled(file)
        return
    timeout = distributed.seconds_to_wait(int(distributed.DEFAULT_TIMEOUT.total_seconds()))
    with distributed.lost_rank_in_one_line(timeout):
        distributed.join(timedelta(seconds=timeout))
        config, precision = agree(config, precision)
        announce(precision)
        _score(config, folder, precision.reason)


def reward_model_folder(flag: str) -> Path:
    """The folder that --reward_model names; 'auto' is models/ArmoRM if it exists, else models/ArmoRM-SmolLM2."""
    if flag != "auto":
        return Path(flag)
    models = ROOT / "models"
    for name in ("ArmoRM", "ArmoRM-SmolLM2"):
        if (models / name).is_dir():
            return models / name
    raise UsageError(f"--reward_model=auto: neither ArmoRM nor ArmoRM-SmolLM2 is in {models}; run: bash setup.sh")


def read_sampled(path: Path) -> list[Completion]:
    """Read sampled completions; raises DataError as read_records, and for a repeated (prompt_id, sample_id)."""
    completions = read_records(path, Completion.from_row)
    check_unique(path, ((c.prompt_id, c.sample_id) for c in completions), '"prompt_id", "sample_id"')
    return completions


def _splits(config: CompletionsConfig) -> tuple[str, ...]:
    return ("test",) if config.only_test else ("train", "test")


def _sampled(config: CompletionsConfig, split: str) -> Path:
    return Path(config.save_path) / "sampled" / f"{split}.jsonl"


def _score(config: CompletionsConfig, folder: Path, dtype_reason: str) -> None:
    """Score the splits that are not finished; the settings are the same on every rank."""
    save_path = Path(config.save_path)
    completions = {split: read_sampled(_sampled(config, split)) for split in _splits(config)}
    flags = {"dtype": config.dtype, "score_max_len": config.score_max_len}
    todo, parts, model = [], {}, fingerprint(folder)
    for split in completions:
        file = _sampled(config, split)
        made_by = {"reward_model": model, "sampled": fingerprint(file), **flags}
        files = SplitResult("score", split, file, save_path / f"{split}.jsonl", made_by)
        if files.is_made(config.overwrite):
            continue
        depends_on = made_by | {"score_batch_tokens": config.score_batch_tokens}
        parts[split] = Parts(files.parts, depends_on, config.overwrite, distributed.rank())
        todo.append(files)
    distributed.say(f"reward model: {folder}")
    if todo:
        distributed.on_main(partial(refuse_if_locked, save_path), status=2)
        scorer = Scorer(folder, config.dtype, config.score_max_len, config.score_batch_tokens)
        facts: dict[str, Any] = {"objectives": [*scorer.objectives, GATED_SCORE], "dtype_reason": dtype_reason}
        facts |= {"reward_model": os.fspath(folder), "processes": distributed.world_size(), "flags": as_dict(config)}
        facts["attention"] = scorer.attention
        with sole_writer(save_path):
            distributed.on_main(partial(sweep, save_path))
            for files in todo:
                given = completions[files.name], parts[files.name]
                refused = _score_share(scorer, files.name, *given)
                distributed.barrier()
                distributed.on_main(partial(write_scored, files, *given, refused, facts))
    if distributed.is_main():
        for split in completions:
            print(report(split, read_records(save_path / f"{split}.jsonl", Completion.from_row)), flush=True)


def _score_share(scorer: "Scorer", split: str, completions: list[Completion], parts: Parts) -> list[dict[str, Any]]:
    """Score this rank's share of the unfinished batches; returns the rows of the completions that cannot be scored."""

    def row(index: int, result: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_id": completions[index].prompt_id, "sample_id": completions[index].sample_id, **result}

    reading = scorer.read(completions)
    # Finished batches count only if they were scored with the same kernel.
    parts.open(hashlib.sha256(repr([scorer.attention, reading.batches]).encode()).hexdigest())
    if parts.done:
        finished = sum(map(reading.completions, parts.done))
        distributed.say(f"{split}: resuming; {finished} of {len(completions)} completions are finished")
    share = distributed.shard([number for number in range(len(reading.batches)) if number not in parts.done])
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


def write_scored(
    files: SplitResult, completions: list[Completion], parts: Parts, refused: list[dict[str, Any]], facts: dict[str, Any]
) -> None:
    """Merge the parts of all ranks by key and write the results of one split, in the order of the input; the scored file
    last, so that it never lies beside another configuration's manifest.

    Args:
        refused: {prompt_id, sample_id, reason} of the completions that are in no batch.
        facts: for the manifest.

    Raises:
        DataError: a completion has no result, or none could be scored.
    """
    parts.find()
    rows = [*refused, *(row for number in parts.done for row in parts.read(number))]
    result_of = {(row["prompt_id"], row["sample_id"]): row for row in rows}
    scored, rejects = [], []
    for number, completion in enumerate(completions, start=1):
        key = (completion.prompt_id, completion.sample_id)
        if key not in result_of:
            raise DataError(f"{files.source}, row {number}: no process scored prompt_id {key[0]}, sample_id {key[1]}")
        row = result_of[key]
        if "scores" in row:
            scored.append(to_row(completion) | {"scores": row["scores"]})
        else:
            rejects.append({"file": f"{files.source.parent.name}/{files.source.name}", "row": number, **row})
    if not scored:
        first = rejects[0]["reason"]
        raise DataError(f"{files.source}: none of {len(completions)} completions could be scored; the first: {first}")
    why = dict(Counter(reject["reason"].partition(" (")[0] for reject in rejects))
    counts = {"in": len(completions), "out": len(scored), "dropped": len(rejects), "why": why}
    files.result.unlink(missing_ok=True)
    write_rejects(files.result.parent, files.name, rejects)
    write_manifest(files.result.parent, files.step, files.made_by, **facts, counts=counts)
    write_rows(files.result, scored)
    if rejects:
        print(f"{files.name}: {len(rejects)} completions are in rejects.jsonl: {why}", flush=True)
    parts.remove()


def report(split: str, completions: list[Completion]) -> str:
    """A table of the mean and standard deviation of every objective over a split."""
    rows = [[name, *mean_and_sd([row.scores[name] for row in completions])] for name in completions[0].scores]
    table = tabulate(rows, ["objective", "mean", "sd"], tablefmt="plain", floatfmt=".4f")
    return f"{split}: {len(completions)} completions\n{table}"


class Reading(NamedTuple):
    """Completions as token ids, divided into batches."""

    token_ids: list[list[int]]
    """Of every completion with its prompt."""
    refused: dict[int, str]
    """{index of a completion that cannot be scored: the reason}"""
    batches: list[list[SharedPrefix]]
    """The other completions, in packed batches."""

    def tokens(self, number: int) -> int:
        """Number of tokens in a batch, each shared prefix counted once."""
        groups = self.batches[number]
        return sum(g.shared + sum(len(self.token_ids[row]) - g.shared for row in g.rows) for g in groups)

    def completions(self, number: int) -> int:
        """Number of completions in a batch."""
        return sum(len(group.rows) for group in self.batches[number])


class Scorer:
    """The reward model of this rank, with its own tokenizer and template.

    Args:
        folder: reward model in ArmoRM's layout.
        dtype: of the backbone, "bfloat16" or "float32"; the heads are float32.
        max_len: longest conversation to score, in tokens.
        batch_tokens: largest number of tokens in a batch; a prompt counts once for its completions.

    Raises:
        DataError: the folder is not complete, or its backbone cannot score packed rows.
    """

    def __init__(self, folder: Path, dtype: str, max_len: int, batch_tokens: int) -> None:
        self.max_len = max_len
        self.batch_tokens = batch_tokens
        self.device = distributed.device()
        use_cpu_well(self.device)
        self.tokenizer = load_tokenizer(str(folder))
        self.model = load_armorm(folder, self.device, getattr(torch, dtype))
        self.objectives = self.model.objectives
        self.attention = self._attend(getattr(torch, dtype))
        """Attention kernel of packed rows: "flash" on CUDA if it supports the backbone, else "sdpa"."""
        self._check_backbone(folder)

    def read(self, completions: Sequence[Completion]) -> Reading:
        """Render completions and divide them into batches, the same on every rank."""
        token_ids: list[list[int]] = []
        refused: dict[int, str] = {}
        for row, completion in enumerate(completions):
            try:
                ids = conversation_token_ids(self.tokenizer, [*completion.prompt, *completion.completion])
            except ValueError as error:
                ids, refused[row] = [], str(error)
            else:
                if len(ids) > self.max_len:
                    refused[row] = f"longer than --score_max_len={self.max_len} ({len(ids)} tokens)"
                elif self.model.span(ids) is None:
                    refused[row] = "the gating token pattern is missing"
            token_ids.append(ids)
        keys = [None if row in refused else completion.prompt_id for row, completion in enumerate(completions)]
        return Reading(token_ids, refused, packed_batches(token_ids, keys, self.batch_tokens))

    @torch.inference_mode()
    def score(self, reading: Reading, number: int) -> dict[int, dict[str, Any]]:
        """Score one batch: {row: {"scores": {objective: float, ..., "ArmoRM": float}} or {"reason": text}}."""
        groups = reading.batches[number]
        row = PackedRow([(group.shared, [reading.token_ids[index] for index in group.rows]) for group in groups])
        indices = [index for group in groups for index in group.rows]
        spans = [self.model.span(reading.token_ids[index]) for index in indices]
        rewards = self.model.score_packed(row, [span for span in spans if span is not None])
        results: dict[int, dict[str, Any]] = {}
        for index, stage1, stage2 in zip(indices, rewards.stage1.tolist(), rewards.stage2.tolist(), strict=True):
            scores = dict(zip(self.objectives, stage1, strict=True)) | {GATED_SCORE: stage2}
            broken = ", ".join(name for name, value in scores.items() if not math.isfinite(value))
            results[index] = {"reason": f"the score is not finite ({broken})"} if broken else {"scores": scores}
        return results

    def _attend(self, dtype: torch.dtype) -> str:
        if self.device.type != "cuda":
            return "sdpa"
        reason = refusal(self.model.model.config, self.device, dtype)
        if distributed.any_rank(reason is not None):
            if distributed.is_main():
                print(f"attention: sdpa instead of flash, because {reason or 'another process cannot use it'}", flush=True)
            return "sdpa"
        self.model.flash_attention = True
        return "flash"

    @torch.inference_mode()
    def _check_backbone(self, folder: Path) -> None:
        """Raise DataError if packed rows do not support this backbone, before any work is done."""
        pattern = self.model.layout.gating_token_pattern
        row = PackedRow([(len(pattern), [[*pattern, pattern[0]], [*pattern, pattern[-1]]])])
        try:
            self.model.score_packed(row, [Span(0, len(pattern), len(pattern))] * 2)
        except ValueError as error:
            raise DataError(f"{folder}: its backbone cannot score packed rows ({error})") from error


def check_tokenizer(folder: Path, layout: RewardLayout) -> None:
    """Raise DataError unless the template writes the gating pattern and every id is in the vocabulary."""
    tokenizer, vocabulary, pattern = load_tokenizer(str(folder)), layout.vocab_size, layout.gating_token_pattern
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    try:
        ids = conversation_token_ids(tokenizer, turns)
    except ValueError as error:
        raise DataError(f"{folder}: the tokenizer's template rejects a question with its answer ({error})") from error
    if max(ids) >= vocabulary:
        raise DataError(f"{folder}: the tokenizer writes id {max(ids)}, outside the model's vocabulary of {vocabulary}")
    if find_span(ids, pattern) is None:
        raise DataError(
            f"{folder}: the tokenizer's template does not write the gating token pattern {list(pattern)}; "
            "it does not belong to this reward model"
        )


def use_cpu_well(device: torch.device) -> None:
    """On a CPU: flush denormals, which slow down matrix products, and divide the cores among the ranks."""
    if device.type != "cpu":
        return
    for kind in (np.float32, np.float64):
        # numpy warns if it first looks at the limits of a type while denormals are flushed, as libraries let it do.
        np.finfo(kind)
    torch.set_flush_denormal(True)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // distributed.world_size()))

"""A reward model at work: completions in, {objective: score} or the reason why not out."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2.exceptions import TemplateError

from drdpo import distributed
from drdpo.chat import conversation_token_ids, load_tokenizer
from drdpo.errors import DataError
from drdpo.kernels.shared_prefix import PackedRow
from drdpo.kernels.varlen_attention import refusal
from drdpo.objectives import GATED_SCORE
from drdpo.records import Completion
from drdpo.rewards.armorm import load_armorm
from drdpo.rewards.batching import Group, Span, last_occurrence, packed_batches

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

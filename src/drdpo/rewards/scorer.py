"""A reward model at work: completions in, {objective: score} or the reason why not out."""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from tqdm import tqdm

from drdpo import distributed
from drdpo.chat import conversation_token_ids, load_tokenizer
from drdpo.errors import DataError
from drdpo.objectives import GATED_SCORE
from drdpo.records import Completion
from drdpo.rewards.armorm import Rewards, load_armorm
from drdpo.rewards.batching import batches_by_length, last_occurrence, pad_right

UNRENDERABLE = (TemplateError, ValueError, TypeError)
"""What rendering raises: the template's own refusals, drdpo.chat's, and a template that trips over a message."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Scorer:
    """The reward model of this rank with its own tokenizer and template.

    Args:
        folder: reward model in ArmoRM's layout.
        dtype: of the backbone, "bfloat16" or "float32"; the heads are float32.
        max_len: a longer conversation, in tokens, is not scored.
        batch_tokens: most tokens of a batch, padding included; a single longer conversation goes alone.

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
        check_tokenizer(folder, self.tokenizer, self.model.layout.gating_token_pattern, self.model.layout.vocab_size)

    def score(self, completions: Sequence[Completion], label: str = "score") -> list[dict[str, Any]]:
        """Score completions in length-sorted batches.

        Args:
            completions: any number, of any prompts.
            label: for the progress bar, which the first rank shows.

        Returns:
            In the order of `completions`: {"scores": {objective: float, ..., "ArmoRM": float}} or {"reason": text}.
        """
        token_ids, results = self._read(completions)
        good = [index for index, result in enumerate(results) if not result]
        started, tokens = time.perf_counter(), 0
        progress = tqdm(total=len(good), desc=label, unit=" completions", disable=not distributed.is_main())
        for batch in batches_by_length([len(token_ids[index]) for index in good], self.batch_tokens):
            rows = [good[position] for position in batch]
            rewards = self._forward([token_ids[row] for row in rows])
            for row, stage1, stage2 in zip(rows, rewards.stage1.tolist(), rewards.stage2.tolist(), strict=True):
                results[row] = self._result(stage1, stage2)
            tokens += sum(len(token_ids[row]) for row in rows)
            progress.update(len(rows))
            progress.set_postfix_str(f"{tokens / (time.perf_counter() - started):.0f} tokens/s")
        progress.close()
        return results

    def _read(self, completions: Sequence[Completion]) -> tuple[list[list[int]], list[dict[str, Any]]]:
        """Token ids of every conversation, and {} or the {"reason": text} why it cannot be scored."""
        token_ids: list[list[int]] = []
        results: list[dict[str, Any]] = []
        for completion in completions:
            try:
                ids = conversation_token_ids(self.tokenizer, [*completion.prompt, *completion.completion])
                result = self._refusal(ids)
            except UNRENDERABLE as error:
                ids, result = [], {"reason": f"the chat template refuses it ({error})"}
            token_ids.append(ids)
            results.append(result)
        return token_ids, results

    @torch.inference_mode()
    def _forward(self, sequences: list[list[int]]) -> Rewards:
        ids_BT, mask_BT = pad_right(sequences, 0, self.device)
        return self.model(ids_BT, mask_BT)

    def _refusal(self, ids: list[int]) -> dict[str, Any]:
        if len(ids) > self.max_len:
            return {"reason": f"longer than --score_max_len={self.max_len} ({len(ids)} tokens)"}
        if last_occurrence(ids, self.model.layout.gating_token_pattern) is None:
            return {"reason": "the gating token pattern is missing"}
        return {}

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

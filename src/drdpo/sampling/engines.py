"""The seam between the sampling step and its engines: token ids in, token ids and a finish reason out."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from drdpo.errors import DataError

_STREAM_BITS = 14

MAX_SAMPLES = 1 << _STREAM_BITS
"""Most samples of one prompt: each has its own seed, and the seeds of two prompts must not meet."""


@dataclass(frozen=True)
class Sampling:
    """How to sample; the same for every request of a call.

    A sample ends with the first token of `stop_token_ids`, which it keeps, or after `max_new_tokens`. A temperature of 0
    is greedy: then the n samples are one and the same.
    """

    n: int
    temperature: float
    top_p: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]

    @property
    def distinct(self) -> int:
        """How many samples differ; the rest are copies."""
        return 1 if self.temperature == 0 else self.n


@dataclass(frozen=True)
class Request:
    """One prompt, rendered; sample k of it draws from the stream of seed + k."""

    prompt_token_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Sample:
    """One completion; `finish_reason` is "stop" (its last token is a stop token), "length", or an engine's own word."""

    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is built from.

    `max_model_len` is in tokens, prompt and completion together; `dtype` is "bfloat16" or "float32".
    """

    name: str
    model_path: str
    dtype: str
    max_model_len: int
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9


class Engine(Protocol):
    """Samples completions."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        """Yield (index of the request, its n samples in order), in the order in which requests finish."""
        ...

    def close(self) -> None:
        """Give memory and processes back."""
        ...


def stream_seed(seed: int, split: str, prompt_id: int) -> int:
    """Seed of a prompt's samples: a stable hash, so that results depend on neither the order nor the sharding of prompts.

    Args:
        seed: the run's seed.
        split: "train" or "test"; the two may use the same ids.
        prompt_id: the prompt's key.

    Returns:
        A multiple of MAX_SAMPLES below 2^62: sample k of the prompt uses this number + k, as vLLM does for the n samples
        of one request, and no other prompt's samples come near.
    """
    digest = hashlib.sha256(f"{seed} {split} {prompt_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big") << _STREAM_BITS


def copies(samples: list[Sample], n: int) -> list[Sample]:
    """n samples out of the distinct ones: themselves, or n times the single greedy one."""
    return samples if len(samples) == n else samples * n


# transformers: the engine where vLLM cannot be had; slower, same interface.

if TYPE_CHECKING:
    import torch

_ROWS = 64
"""Sequences that are generated together; on two CPU cores more of them gain nothing."""


class TransformersEngine:
    """A causal language model in this process, on its GPU or the CPU."""

    def __init__(self, settings: EngineSettings) -> None:
        """Load the model.

        Raises:
            DataError: transformers cannot load the model.
        """
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                settings.model_path, dtype=getattr(torch, settings.dtype), use_safetensors=True, trust_remote_code=False
            )
        except (ValueError, OSError) as error:
            raise DataError(f"{settings.model_path}: transformers cannot load this model: {error}") from error
        self._model = model.to(self._device).eval()
        # The folder's own generation config may hold a top-k or a repetition penalty: nothing but `Sampling` decides here.
        self._model.generation_config = GenerationConfig()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        """Yield (index of the request, its n samples in order), in batches of prompts of like length, longest first."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_token_ids))
        size = max(1, _ROWS // sampling.distinct)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            sampled = self._batch([requests[index] for index in batch], sampling)
            for place, index in enumerate(batch):
                of_prompt = sampled[place * sampling.distinct : (place + 1) * sampling.distinct]
                yield index, copies(of_prompt, sampling.n)

    def close(self) -> None:
        """Give the model's memory back."""
        del self._model

    def _attend_by(self, implementation: str) -> None:
        """On a CPU the fused kernel is for prompts; for one token a row, matrix products are faster."""
        if self._device.type == "cpu":
            self._model.set_attn_implementation(implementation)

    def _batch(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        """Samples of a batch, prompt after prompt: P prompts, padded on the left to T tokens, then R = P * distinct rows.

        A prompt is read once for its samples, and a row that has ended is computed no longer.
        """
        import torch

        width = max(len(request.prompt_token_ids) for request in requests)
        padding = [width - len(request.prompt_token_ids) for request in requests]
        pad = sampling.stop_token_ids[0]  # any id: the mask hides it
        input_ids = torch.tensor(
            [[pad] * left + request.prompt_token_ids for left, request in zip(padding, requests, strict=True)],
            device=self._device,
        )  # [P, T]
        mask = (torch.arange(width) >= torch.tensor(padding)[:, None]).long().to(self._device)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        draw = Draw(sampling, [request.seed + k for request in requests for k in range(sampling.distinct)], self._device)
        drawn: list[list[int]] = [[] for _ in range(len(requests) * sampling.distinct)]
        rows = list(range(len(drawn)))
        with torch.inference_mode():
            self._attend_by("sdpa")
            output = self._model(
                input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
            )
            cache, logits_RV = output.past_key_values, output.logits[:, -1].repeat_interleave(sampling.distinct, 0)
            cache.batch_repeat_interleave(sampling.distinct)
            mask, positions = (table.repeat_interleave(sampling.distinct, 0) for table in (mask, positions[:, -1:]))
            self._attend_by("eager")
            while True:
                tokens = draw(logits_RV, rows)
                for row, token in zip(rows, tokens.tolist(), strict=True):
                    drawn[row].append(token)
                open_rows = [
                    place
                    for place, row in enumerate(rows)
                    if drawn[row][-1] not in sampling.stop_token_ids and len(drawn[row]) < sampling.max_new_tokens
                ]
                if not open_rows:
                    break
                if len(open_rows) < len(rows):
                    kept = torch.tensor(open_rows, device=self._device)
                    cache.batch_select_indices(kept)
                    tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
                    rows = [rows[place] for place in open_rows]
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
                positions = positions + 1
                output = self._model(
                    input_ids=tokens[:, None],
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                )
                logits_RV = output.logits[:, -1]
        stops = sampling.stop_token_ids
        return [Sample(tokens, "stop" if tokens[-1] in stops else "length") for tokens in drawn]


class Draw:
    """Draws a token of every row from its logits by one uniform number of the row's own stream.

    So a row depends on its seed and not on its batch. Temperature 0 is the argmax.
    """

    def __init__(self, sampling: Sampling, seeds: list[int], device: "torch.device") -> None:
        """Make a stream of every seed.

        Args:
            sampling: temperature and top_p.
            seeds: one per row.
            device: where the logits are.
        """
        import torch

        self._temperature, self._top_p = sampling.temperature, sampling.top_p
        self._streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, logits_RV: "torch.Tensor", rows: list[int]) -> "torch.Tensor":
        """[R] tokens for logits [R, V] of these rows."""
        import torch

        if self._temperature == 0:
            return logits_RV.argmax(dim=-1)
        logits_RV = logits_RV.float() / self._temperature
        if self._top_p < 1.0:
            from transformers import TopPLogitsWarper

            logits_RV = TopPLogitsWarper(self._top_p)(torch.empty(0), logits_RV)
        # In float64, or the last of 100,000 summands would be rounded away.
        below_RV = logits_RV.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        uniform_R1 = torch.cat(
            [torch.rand(1, 1, generator=self._streams[row], device=logits_RV.device, dtype=torch.float64) for row in rows]
        )
        # The first token whose cumulative probability is over the number: never one of probability 0.
        return torch.searchsorted(below_RV, uniform_R1 * below_RV[:, -1:], right=True).squeeze(1)

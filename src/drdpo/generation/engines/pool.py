"""Blocks of requests over one engine in this process, or over engine processes that work side by side (data parallel).

A block is a list of requests that one engine works through on its own, beginning with nothing in its cache. Rounding
depends on what is computed together, so a block's samples depend on the block alone: not on how many engines there are,
nor on which blocks were done before a run was broken off.
"""

import multiprocessing
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, cast

from drdpo.errors import DataError, ProcessError, UsageError
from drdpo.generation.engines.base import Engine, EngineSettings, Request, Sample, Sampling

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
        from drdpo.generation.engines.vllm_engine import VllmEngine

        return VllmEngine(settings)
    from drdpo.generation.engines.transformers_engine import TransformersEngine

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

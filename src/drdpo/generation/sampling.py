"""Step 1a: sample n completions of every prompt into <save_path>/sampled/{train,test}.jsonl, unscored.

A split is worked through in blocks of prompts. Finished blocks go to a part file, so that the same command goes on after
a crash; the split's file appears whole when all are there. See drdpo.generation.engines.pool for why blocks.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drdpo import chat
from drdpo.cli import require
from drdpo.config import CompletionsConfig
from drdpo.errors import DataError
from drdpo.folder import lock_folder, refuse_if_locked, sweep
from drdpo.generation.engines.base import MAX_SAMPLES, EngineSettings, Request, Sample, Sampling, stream_seed
from drdpo.generation.engines.choose import choose_engine, open_engines, plan_engines, visible_gpus
from drdpo.generation.engines.pool import Engines
from drdpo.generation.part import PartFile
from drdpo.generation.prompts import (
    RenderedPrompt,
    check_context,
    find_dataset,
    read_prompts,
    render,
    stop_token_ids,
)
from drdpo.generation.results import Blocks, Split, finished, write_results
from drdpo.machine import announce, settle
from drdpo.models import check_model_folder, fingerprint
from drdpo.progress import progress
from drdpo.records import Prompt

CPU_BLOCK = 128
"""Samples that a CPU engine works on at a time: enough to keep it busy, little to lose when a run is broken off."""

GPU_BLOCK = 8192
"""The same for a GPU, which holds hundreds at once and should seldom wait for the last ones of a block."""

_MADE_BY_FLAGS = (
    "best_of_n", "temperature", "top_p", "max_new_tokens", "prompt_max_len", "max_prompts", "seed", "engine", "dtype",
)  # fmt: skip


def sample_completions(config: CompletionsConfig) -> None:
    """Sample completions; a split that the same flags, model and prompts have already made is skipped.

    Writes to <save_path>/sampled: {train,test}.jsonl (Completion records without scores, in the order of the prompts),
    rejects.jsonl ({file, row, prompt_id, reason}) and manifest.json. Nothing else of save_path is touched: it may be the
    folder of the model itself.

    Raises:
        UsageError: flags that cannot be honoured, results there that other flags made, or another run that is making some.
        DataError: prompts or model folder are not usable.
        ProcessError: an engine process died; finished blocks are kept.
    """
    check_model_folder(config.model_path)
    require(config.best_of_n <= MAX_SAMPLES, f"--best_of_n={config.best_of_n}: at most {MAX_SAMPLES} completions per prompt")
    save_path = Path(config.save_path)
    if save_path.is_file():
        raise DataError(f"--save_path={config.save_path} is a file, not a folder")
    dataset = find_dataset(config.dataset)
    require(
        dataset.resolve() not in (save_path.resolve(), (save_path / "sampled").resolve()),
        f"--save_path={save_path}: completions would overwrite the prompts of --dataset={dataset}; give another folder",
    )
    prompts = read_prompts(dataset, config.only_test, config.max_prompts)
    config, precision = settle(config, untouched=True)
    announce(precision)
    left = [split for split in _splits(config, dataset, prompts) if not finished(split, config.overwrite)]
    if not left:
        return
    refuse_if_locked(save_path / "sampled")
    max_model_len = check_context(config.model_path, config.prompt_max_len, config.max_new_tokens)
    tokenizer = chat.load_tokenizer(config.model_path)
    if config.check_only:
        return
    gpus = visible_gpus()
    engine = choose_engine(config.engine, config.max_new_tokens, on_gpu=bool(gpus))
    plan = plan_engines(engine, config.tensor_parallel_size, gpus)
    stops = stop_token_ids(config.model_path, tokenizer)
    sampling = Sampling(config.best_of_n, config.temperature, config.top_p, config.max_new_tokens, stops)
    if sampling.distinct < sampling.n:
        print(f"--temperature=0 is greedy: the {sampling.n} completions of a prompt are the same one", flush=True)
    settings = EngineSettings(
        engine, config.model_path, config.dtype, max_model_len, config.tensor_parallel_size, config.gpu_memory_utilization
    )
    engines = _LazyEngines(settings, plan, on_gpu=bool(gpus))
    try:
        with lock_folder(save_path / "sampled"):
            sweep(save_path / "sampled")
            for split in left:
                _sample_split(config, split.with_engine(engine), tokenizer, sampling, engines, precision.reason)
    finally:
        engines.close()


class _LazyEngines:
    """Engines that start when the first block needs them, and serve every split."""

    def __init__(self, settings: EngineSettings, plan: list[dict[str, str]], on_gpu: bool) -> None:
        self._settings, self._plan, self._on_gpu = settings, plan, on_gpu
        self._engines: Engines | None = None

    @property
    def count(self) -> int:
        return len(self._plan)

    def block_size(self, samples: int) -> int:
        """Samples of a block, where there are so many in all; no GPU stays without work."""
        return min(GPU_BLOCK, math.ceil(samples / self.count)) if self._on_gpu else CPU_BLOCK

    def start(self) -> Engines:
        if self._engines is None:
            engines = f"{self.count} engines of " if self.count > 1 else ""
            print(f"loading {self._settings.model_path} into {engines}{self._settings.name} ...", flush=True)
            self._engines = open_engines(self._settings, self._plan)
        return self._engines

    def close(self) -> None:
        if self._engines is not None:
            self._engines.close()


def _splits(config: CompletionsConfig, dataset: Path, prompts: dict[str, list[Prompt]]) -> list[Split]:
    model = fingerprint(config.model_path)
    flags = {name: getattr(config, name) for name in _MADE_BY_FLAGS}
    splits = []
    for name, of_split in prompts.items():
        file = dataset / f"{name}.jsonl"
        made_by = {"model": model, "prompts": fingerprint(file), **flags}
        splits.append(Split(name, file, Path(config.save_path) / "sampled" / f"{name}.jsonl", made_by, of_split))
    return splits


def _sample_split(
    config: CompletionsConfig, split: Split, tokenizer: Any, sampling: Sampling, engines: _LazyEngines, dtype_reason: str
) -> None:
    rendered, rejects = render(tokenizer, split.prompts, split.file, config.prompt_max_len)
    prompts_per_block = max(1, engines.block_size(len(rendered) * sampling.n) // sampling.n)
    part = PartFile(split.part, split.made_by, prompts_per_block, config.overwrite)
    blocks = dict(enumerate(_chunks(rendered, part.prompts_per_block)))
    seconds = _run_blocks(config, split, blocks, part, sampling, engines)
    facts = {"model_path": config.model_path, "dataset": str(split.file.parent), "engines": engines.count}
    facts |= {"seconds": round(seconds, 1), "dtype_reason": dtype_reason}
    write_results(split, blocks, part, rejects, sampling, tokenizer, facts)


def _run_blocks(
    config: CompletionsConfig, split: Split, blocks: Blocks, part: PartFile, sampling: Sampling, engines: _LazyEngines
) -> float:
    """Sample the blocks that the part file lacks; returns the seconds it took."""
    left = {
        number: [Request(p.token_ids, stream_seed(config.seed, split.name, p.prompt.prompt_id)) for p in block]
        for number, block in blocks.items()
        if number not in part.done
    }
    total = sampling.n * sum(len(block) for block in blocks.values())
    done = total - sampling.n * sum(len(block) for block in left.values())
    if done:
        print(f"{split.name}: {done} of {total} completions are there from a run that was broken off", flush=True)
    if not left:
        return 0.0
    running = engines.start().run(left, sampling)
    collected: dict[int, dict[int, list[Sample]]] = {number: {} for number in left}
    tokens, started = 0, time.monotonic()
    with progress(total=total, initial=done, desc=f"sample {split.name}", unit="completion", mininterval=1.0) as bar:
        for number, index, samples in running:
            collected[number][blocks[number][index].prompt.prompt_id] = samples
            tokens += sum(len(sample.token_ids) for sample in samples[: sampling.distinct])
            bar.set_postfix_str(f"{tokens / max(time.monotonic() - started, 1e-9):.0f} tokens/s", refresh=False)
            bar.update(len(samples))
            if len(collected[number]) == len(blocks[number]):
                part.add(number, collected.pop(number))
    return time.monotonic() - started


def _chunks(rendered: list[RenderedPrompt], size: int) -> Iterator[list[RenderedPrompt]]:
    for start in range(0, len(rendered), size):
        yield rendered[start : start + size]

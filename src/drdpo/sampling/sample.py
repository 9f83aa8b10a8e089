"""Step 1a: sample n completions of every prompt into <save_path>/sampled/{train,test}.jsonl, unscored.

A split is worked through in blocks of prompts. Finished blocks go to a part file, so that the same command goes on after
a crash; the split's file appears whole when all are there. See drdpo.sampling.vllm_engine for why blocks.
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drdpo import chat
from drdpo.cli import require
from drdpo.config import CompletionsConfig
from drdpo.errors import DataError, UsageError
from drdpo.folder import (
    already_made,
    lock_folder,
    owner_of,
    read_manifest,
    refuse_if_locked,
    sweep,
    whole_lines,
    write_manifest,
)
from drdpo.machine import announce, settle
from drdpo.models import check_model_folder, fingerprint
from drdpo.progress import progress
from drdpo.records import Completion, Prompt, read_rows, write_records, write_rows
from drdpo.sampling.engines import MAX_SAMPLES, EngineSettings, Request, Sample, Sampling, stream_seed
from drdpo.sampling.prompts import Reject, RenderedPrompt, check_context, find_dataset, read_prompts, render, stop_token_ids
from drdpo.sampling.vllm_engine import Engines, InProcess, Pool

# The part file of a split: finished blocks of samples, kept so that a run that was broken off can go on.
#
# `.<split>.part.jsonl` begins with a line that says what makes it (flags, fingerprints, block size). Every further line
# is one finished block: {"block": number, "samples": {prompt_id: [[token_ids, finish_reason], ...]}}. A line is written
# and flushed whole, so a killed process leaves at most one cut line, at the end, which is dropped.

Block = dict[int, list[Sample]]
"""prompt_id -> samples."""


class PartFile:
    """Finished blocks on disk; only their places are held in memory."""

    def __init__(self, path: Path, made_by: dict[str, Any], prompts_per_block: int, overwrite: bool) -> None:
        """Open or start the part file.

        Args:
            path: the file.
            made_by: what the samples depend on; as in the manifest.
            prompts_per_block: for a new file; one that is there keeps its own.
            overwrite: start anew where something else made the file.

        Raises:
            UsageError: other flags, models or inputs made the unfinished samples.
        """
        self._path = path
        self._offsets: dict[int, int] = {}
        self.prompts_per_block = prompts_per_block
        made_by = json.loads(json.dumps(made_by))
        lines = [(offset, {**line, "samples": None}) for offset, line in whole_lines(path)] if path.is_file() else []
        if lines and "prompts_per_block" in lines[0][1] and _same(path, lines[0][1].get("made_by", {}), made_by, overwrite):
            self.prompts_per_block = int(lines[0][1]["prompts_per_block"])
            self._offsets = {line["block"]: offset for offset, line in lines[1:]}
            with path.open("r+b") as stream:  # without a cut line, what is appended begins a line of its own
                stream.truncate(lines[-1][0] + _length(path, lines[-1][0]))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._append({"made_by": made_by, "prompts_per_block": prompts_per_block})

    @property
    def done(self) -> set[int]:
        """Numbers of the finished blocks."""
        return set(self._offsets)

    def add(self, number: int, block: Block) -> None:
        """Keep a finished block."""
        samples = {str(key): [(sample.token_ids, sample.finish_reason) for sample in block[key]] for key in block}
        self._offsets[number] = self._append({"block": number, "samples": samples})

    def read(self, number: int) -> Block:
        """A finished block."""
        with self._path.open("rb") as stream:
            stream.seek(self._offsets[number])
            samples = json.loads(stream.readline())["samples"]
        return {int(key): [Sample(list(ids), reason) for ids, reason in values] for key, values in samples.items()}

    def remove(self) -> None:
        """Delete the file; its samples are where they belong."""
        self._path.unlink(missing_ok=True)

    def _append(self, row: dict[str, Any]) -> int:
        """Write a line; returns where it begins."""
        try:
            with self._path.open("ab") as stream:
                offset = stream.tell()
                stream.write(json.dumps(row).encode() + b"\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        return offset


def _same(path: Path, before: dict[str, Any], now: dict[str, Any], overwrite: bool) -> bool:
    differs = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if differs and not overwrite:
        changes = ", ".join(f"{name} ({before.get(name)} -> {now.get(name)})" for name in differs)
        raise UsageError(
            f"{path} holds unfinished samples made otherwise: {changes}; give --overwrite=true to drop them, another "
            "folder, or the flags of before to finish them"
        )
    return not differs


def _length(path: Path, offset: int) -> int:
    with path.open("rb") as stream:
        stream.seek(offset)
        return len(stream.readline())


# What the sampling step leaves in <save_path>/sampled: completions of a split, rejects, the manifest.

Blocks = dict[int, list[RenderedPrompt]]
"""Number of the block -> its prompts, in the order of the file."""


@dataclass(frozen=True)
class Split:
    """One split on its way through the step; `made_by` is what its samples depend on."""

    name: str
    file: Path
    result: Path
    made_by: dict[str, Any]
    prompts: list[Prompt]

    @property
    def step(self) -> str:
        """Name of the split's entry in the manifest."""
        return f"sample {self.name}"

    @property
    def part(self) -> Path:
        """Its part file."""
        return self.result.parent / f".{self.name}.part.jsonl"

    def with_engine(self, engine: str) -> "Split":
        """The split with --engine=auto settled."""
        return dataclasses.replace(self, made_by={**self.made_by, "engine": engine})


def finished(split: Split, overwrite: bool) -> bool:
    """Are the split's results there, made with the same flags, model and prompts? Then it says so.

    Raises:
        UsageError: other flags, another model or other prompts made them.
    """
    if split.made_by["engine"] == "auto":  # whichever it was then
        before = read_manifest(split.result.parent).get(split.step, {}).get("made_by", {})
        split = split.with_engine(before.get("engine", "auto"))
    if not already_made(split.result.parent, split.step, split.made_by, [split.result], overwrite):
        return False
    if owner_of(split.result.parent) is None:
        split.part.unlink(missing_ok=True)  # of a run that was killed after the split's file was there
    print(f"{split.result} is there already, made with these flags, model and prompts; skipped", flush=True)
    return True


def write_results(
    split: Split,
    blocks: Blocks,
    part: PartFile,
    rejects: list[Reject],
    sampling: Sampling,
    tokenizer: Any,
    facts: dict[str, Any],
) -> None:
    """Write rejects, manifest, then the split's file, whole. Killed in between, the next run ends it from the part file.

    Args:
        split: what was sampled.
        blocks: its prompts, every one with samples in `part`.
        part: the finished samples; removed at the end.
        rejects: prompts that were not sampled.
        sampling: how the samples were to end.
        tokenizer: for their text.
        facts: for the manifest.

    Raises:
        DataError: no prompt has usable completions.
    """
    bad = [reject for number, block in blocks.items() for reject in _bad(split, block, part.read(number), sampling)]
    rejects = sorted([*rejects, *bad], key=lambda reject: reject.row)
    if len(rejects) == len(split.prompts):
        raise DataError(f"{split.file}: no prompt gave usable completions; row {rejects[0].row}: {rejects[0].reason}")
    skip = {reject.prompt_id for reject in rejects}
    counts = {"prompts": len(split.prompts), "rejected": len(rejects), "completions": 0, "tokens": 0, "stop": 0}
    for completion in _completions(blocks, part, skip, tokenizer):
        counts["completions"] += 1
        counts["tokens"] += len(completion.token_ids)
        counts["stop"] += completion.finish_reason == "stop"
    split.result.unlink(missing_ok=True)  # results of other flags, under --overwrite=true
    _write_rejects(split, rejects)
    write_manifest(split.result.parent, split.step, split.made_by, counts=counts, **facts)
    write_records(split.result, _completions(blocks, part, skip, tokenizer))
    part.remove()
    print(f"{split.result}: {json.dumps(counts)}", flush=True)


def _write_rejects(split: Split, rejects: list[Reject]) -> None:
    """Write the split's rejects beside those of the other split."""
    path = split.result.parent / "rejects.jsonl"
    before = [row for _, row in read_rows(path)] if path.is_file() else []
    others = [row for row in before if Path(str(row.get("file"))).name != split.file.name]
    write_rows(path, [*others, *(dataclasses.asdict(reject) for reject in rejects)])


def _bad(
    split: Split, block: list[RenderedPrompt], samples: dict[int, list[Sample]], sampling: Sampling
) -> Iterator[Reject]:
    """Prompts with a sample that the engine did not end properly; a prompt has all its n completions or none."""
    for prompt in block:
        for sample in samples[prompt.prompt.prompt_id]:
            if sample.finish_reason not in ("stop", "length"):
                reason = f"the engine ended a completion by {sample.finish_reason!r}"
            elif sample.finish_reason == "stop" and not set(sample.token_ids[-1:]) & set(sampling.stop_token_ids):
                reason = "the engine ended a completion by 'stop' without a stop token"
            else:
                continue
            yield Reject(str(split.file), prompt.row, prompt.prompt.prompt_id, reason)
            break


def _completions(blocks: Blocks, part: PartFile, skip: set[int], tokenizer: Any) -> Iterator[Completion]:
    """Completions in the order of the prompts, of one block at a time."""
    for number, block in blocks.items():
        samples = part.read(number)
        for prompt in (prompt.prompt for prompt in block if prompt.prompt.prompt_id not in skip):
            for sample_id, sample in enumerate(samples[prompt.prompt_id]):
                answer = [{"role": "assistant", "content": chat.decode(tokenizer, sample.token_ids)}]
                yield Completion(prompt.prompt_id, sample_id, prompt.prompt, answer, sample.token_ids, sample.finish_reason)


# Which engine, and how many of them.

SHORT_ANSWERS = 64
"""Tokens of an answer up to which `auto` is transformers on a CPU.

There vLLM 0.32 takes 14 s of a core to start, transformers less than 1; and 3,000 tokens in answers of 24 took vLLM 18 s and
transformers 15 in bfloat16, 31 and 25 in float32 by AVX2 (one busy core of an AVX-512 machine, AVX2 by oneDNN's and MKL's
variables). Longer answers are vLLM's: transformers copies its key-value cache for every token.
"""


def choose_engine(name: str, max_new_tokens: int, on_gpu: bool) -> str:
    """The engine that --engine names; `auto` is vLLM where it works, else transformers, which is said loudly; and
    transformers for short answers on a CPU.

    Args:
        name: "auto", "vllm" or "transformers".
        max_new_tokens: longest answer.
        on_gpu: is there a GPU to sample on?

    Raises:
        UsageError: vLLM is asked for and cannot be used here.
    """
    if name == "transformers":
        return name
    if name == "auto" and not on_gpu and max_new_tokens <= SHORT_ANSWERS:
        print(
            f"--engine=auto is transformers: answers of at most {SHORT_ANSWERS} tokens on a CPU end before vllm's start pays"
        )
        return "transformers"
    from drdpo.sampling.vllm_engine import vllm_problem

    problem = vllm_problem()
    if problem is None:
        return "vllm"
    if name == "vllm":
        raise UsageError(f"--engine=vllm: {problem}; run: bash setup.sh, or give --engine=transformers (slower)")
    print(f"WARNING: sampling with transformers, several times slower than vLLM: {problem}", file=sys.stderr, flush=True)
    return "transformers"


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES spells them; none on a CPU."""
    import torch

    count = torch.cuda.device_count()
    named = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    return (named or [str(number) for number in range(count)])[:count]


def plan_engines(engine: str, tensor_parallel_size: int, gpus: list[str]) -> list[dict[str, str]]:
    """Environment variables of each engine process; a list of one means an engine in this process.

    One engine per `tensor_parallel_size` GPUs, or one on a CPU. The environment variable DRDPO_ENGINES asks for another
    number: fewer than the GPUs allow, or several on a CPU, which share its cores.

    Args:
        engine: "vllm" or "transformers".
        tensor_parallel_size: GPUs that one engine spans.
        gpus: from visible_gpus.

    Raises:
        UsageError: that many GPUs, or engines, cannot be had.
    """
    if tensor_parallel_size > 1 and engine != "vllm":
        raise UsageError(f"--tensor_parallel_size={tensor_parallel_size} needs --engine=vllm; transformers spans one GPU")
    if tensor_parallel_size > max(1, len(gpus)):
        raise UsageError(
            f"--tensor_parallel_size={tensor_parallel_size}: {len(gpus)} GPUs are visible; give at most that many, or leave "
            "it out"
        )
    most = len(gpus) // tensor_parallel_size if gpus else None
    asked = os.environ.get("DRDPO_ENGINES")
    if asked is not None and (not asked.isdigit() or int(asked) < 1 or (most is not None and int(asked) > most)):
        limit = f"from 1 to {most} here" if most is not None else "of at least 1"
        raise UsageError(f"DRDPO_ENGINES={asked}: it must be a number {limit}")
    count = int(asked) if asked is not None else most or 1
    if not gpus:
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        return [{"OMP_NUM_THREADS": str(threads)} for _ in range(count)]
    if most is not None and count == most and len(gpus) % tensor_parallel_size:
        print(f"{len(gpus) % tensor_parallel_size} of {len(gpus)} GPUs stay idle (--tensor_parallel_size)", flush=True)
    parts = [gpus[first * tensor_parallel_size :][:tensor_parallel_size] for first in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]


def open_engines(settings: EngineSettings, plan: list[dict[str, str]]) -> Engines:
    """Start the engines of a plan; a single one runs in this process."""
    return InProcess(settings) if len(plan) == 1 else Pool(settings, plan)


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

"""Step 1a: sample n completions of every prompt into <save_path>/sampled/{train,test}.jsonl, without scores.

A split is divided into blocks of prompts (see drdpo.sampling.pool). Finished blocks are kept as resumable parts in
`.<split>.parts/`, and the split's file appears whole once all blocks are finished.

A prompt that is too long, or that the chat template rejects, goes to rejects.jsonl.

Several machines sample in three rounds of processes: one divides the unfinished blocks into `shares.json` beside the parts,
every machine samples its share, and one writes the results. If a machine is lost, the rounds are repeated.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drdpo import chat
from drdpo.cli import as_dict, require
from drdpo.config.data import CompletionsConfig
from drdpo.distributed import ALONE, Machines, machines
from drdpo.errors import DataError, UsageError
from drdpo.folder import (
    ROOT,
    Parts,
    SplitResult,
    lock_folder,
    read_manifest,
    refuse_if_locked,
    section,
    sweep,
    write_manifest,
)
from drdpo.machine import announce, settle
from drdpo.models import Model, check_model, fingerprint
from drdpo.progress import progress
from drdpo.records import SPLITS, Completion, Prompt, check_unique, read_records, write_records, write_rejects
from drdpo.sampling.engines import MAX_SAMPLES, EngineSettings, Request, Sample, Sampling, stream_seed
from drdpo.sampling.pool import InProcess, Pool, choose_engine, open_engines, plan_engines, visible_gpus

CPU_BLOCK = 128
"""Samples per block on a CPU: enough to keep the engine busy, few enough that an interruption loses little."""

GPU_BLOCK = 8192
"""Largest block on a GPU in samples: it samples hundreds at once and should seldom wait for the last ones of a block."""

_MADE_BY_FLAGS = (
    "best_of_n", "temperature", "top_p", "max_new_tokens", "prompt_max_len", "max_prompts", "seed", "engine", "dtype",
    "chat_template_kwargs",
)  # fmt: skip
"""Samples of other values of these are not the run's own."""

AUTO_DATASETS = ("helpsteer2_prompts", "embedded_prompts")
"""Folders under datasets/ for --dataset=auto; the first that exists is used."""


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt that can be used; `row` is its number among the file's records, from 1: blank lines do not count."""

    row: int
    prompt: Prompt
    token_ids: list[int]


PromptBlocks = dict[int, list[RenderedPrompt]]
"""Number of the block -> its prompts, in the order of the file."""

Reject = dict[str, Any]
"""A prompt that cannot be used, and why: {file, row, prompt_id, reason}."""


def find_dataset(dataset: str, root: Path = ROOT) -> Path:
    """The folder of prompts that --dataset names; prints which one `auto` is.

    Raises:
        DataError: no such folder.
    """
    if dataset != "auto":
        folder = Path(dataset)
        if not folder.is_dir():
            raise DataError(f"{dataset}: no such folder of prompts (with test.jsonl, and train.jsonl for training)")
        return folder
    for name in AUTO_DATASETS:
        folder = root / "datasets" / name
        if folder.is_dir():
            print(f"prompts: {folder} (--dataset=auto)", flush=True)
            return folder
    raise DataError(
        f"no prompts: none of {', '.join(f'datasets/{name}' for name in AUTO_DATASETS)} exists; run: bash setup.sh, or pass "
        "--dataset=FOLDER with train.jsonl and test.jsonl"
    )


def read_prompts(dataset: Path, only_test: bool, max_prompts: int | None) -> dict[str, list[Prompt]]:
    """Read and check the prompts of each split, test first; at most `max_prompts` of each are kept, the files checked whole.

    Raises:
        DataError: naming file, row and field; also for a repeated prompt_id.
    """
    prompts = {}
    for split in ("test",) if only_test else tuple(reversed(SPLITS)):
        path = dataset / f"{split}.jsonl"
        records = read_records(path, Prompt.from_row)
        check_unique(path, [(record.prompt_id,) for record in records], "prompt_id")
        prompts[split] = records[:max_prompts]
    return prompts


def render(
    tokenizer: Any, prompts: list[Prompt], file: Path, prompt_max_len: int
) -> tuple[list[RenderedPrompt], list[Reject]]:
    """Token ids of each prompt; prompts that are too long or that the chat template rejects are returned apart.

    Raises:
        DataError: no prompt can be used.
    """
    rendered: list[RenderedPrompt] = []
    rejects: list[Reject] = []
    for row, prompt in enumerate(prompts, start=1):
        try:
            token_ids = chat.prompt_token_ids(tokenizer, prompt.prompt)
            if len(token_ids) > prompt_max_len:
                raise ValueError(f"{len(token_ids)} tokens, more than --prompt_max_len={prompt_max_len}")
        except ValueError as error:
            rejects.append({"file": str(file), "row": row, "prompt_id": prompt.prompt_id, "reason": str(error)})
        else:
            rendered.append(RenderedPrompt(row, prompt, token_ids))
    if not rendered:
        raise DataError(f"{file}: none of its {len(prompts)} prompts can be used; row 1: {rejects[0]['reason']}")
    return rendered, rejects


def stop_token_ids(model_path: str, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: the template's end of turn first, then the model's and the tokenizer's end of sequence.

    Llama 3's instruct models list three in their generation config, many models a single one.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        source: Any = GenerationConfig.from_pretrained(model_path)
    except OSError:  # the folder has no generation_config.json
        source = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    ends = getattr(source, "eos_token_id", None)
    ids = [chat.end_of_turn_id(tokenizer), *(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return tuple(dict.fromkeys(int(token) for token in ids if token is not None))


def check_context(model: Model, prompt_max_len: int, max_new_tokens: int) -> int:
    """Largest number of tokens of a prompt with its completion; raises UsageError if the model has a shorter context."""
    context, need = model.structure.positions, prompt_max_len + max_new_tokens
    if context is not None and need > context:
        raise UsageError(
            f"--prompt_max_len={prompt_max_len} and --max_new_tokens={max_new_tokens} need {need} tokens, but {model.path} "
            f"has a context of {context}; pass smaller values"
        )
    return need


def sample_completions(config: CompletionsConfig) -> None:
    """Sample completions; splits that are finished with the same flags, model and prompts are skipped.

    Writes to <save_path>/sampled: {train,test}.jsonl (Completion records without scores, in the order of the prompts),
    rejects.jsonl ({file, row, prompt_id, reason}) and manifest.json. Nothing else in save_path changes: it may be the
    model's own folder.

    Raises:
        UsageError: flags that cannot be honoured, results from a different configuration, or a folder locked by another
            run.
        DataError: prompts or model folder are not usable.
        ProcessError: an engine process died; finished blocks are kept.
    """
    model = check_model(config.model_path)
    require(config.best_of_n <= MAX_SAMPLES, f"--best_of_n={config.best_of_n}: at most {MAX_SAMPLES} completions per prompt")
    save_path, group = Path(config.save_path), machines()
    if save_path.is_file():
        raise DataError(f"--save_path={config.save_path} is a file, not a folder")
    dataset = find_dataset(config.dataset)
    require(
        dataset.resolve() not in (save_path.resolve(), (save_path / "sampled").resolve()),
        f"--save_path={save_path}: completions would overwrite the prompts of --dataset={dataset}; choose another folder",
    )
    prompts = read_prompts(dataset, config.only_test, config.max_prompts)
    config, precision = settle(config, untouched=True)
    announce(precision)
    left = _unfinished(config, dataset, prompts)
    if not left:
        return
    refuse_if_locked(save_path / "sampled", group.this)
    max_model_len = check_context(model, config.prompt_max_len, config.max_new_tokens)
    tokenizer = chat.load_tokenizer(config.model_path, config.chat_template_kwargs)
    if config.check_only:
        return
    gpus = visible_gpus()
    engine = choose_engine(config.engine, config.max_new_tokens, on_gpu=bool(gpus))
    plan = plan_engines(engine, config.tensor_parallel_size, gpus)
    stops = stop_token_ids(config.model_path, tokenizer)
    sampling = Sampling(config.best_of_n, config.temperature, config.top_p, config.max_new_tokens, stops)
    if sampling.distinct < sampling.n:
        print(f"--temperature=0 is greedy: the {sampling.n} completions of a prompt are identical", flush=True)
    settings = EngineSettings(
        engine, config.model_path, config.dtype, max_model_len, config.tensor_parallel_size, config.gpu_memory_utilization
    )
    engines = _LazyEngines(settings, plan, bool(gpus), group)
    try:
        with lock_folder(save_path / "sampled", group.this):
            if group.this is None:
                sweep(save_path / "sampled")
            for split in left:
                split.made_by["engine"] = engine  # "auto" is decided only now
                rendered, rejects = render(tokenizer, prompts[split.name], split.source, config.prompt_max_len)
                _sample_split(config, split, rendered, rejects, tokenizer, sampling, engines, precision.reason)
    finally:
        engines.close()


def _unfinished(config: CompletionsConfig, dataset: Path, prompts: dict[str, list[Prompt]]) -> list[SplitResult]:
    """The splits that are not finished with the same flags, model and prompts; see SplitResult.is_made."""
    model = fingerprint(config.model_path)
    flags = {name: getattr(config, name) for name in _MADE_BY_FLAGS}
    left = []
    for name in prompts:
        file = dataset / f"{name}.jsonl"
        made_by = {"model": model, "prompts": fingerprint(file), **flags}
        split = SplitResult("sample", name, file, Path(config.save_path) / "sampled" / f"{name}.jsonl", made_by)
        if config.engine == "auto":  # any engine will do
            before = section(read_manifest(split.result.parent), split.step, "made_by")
            made_by["engine"] = before.get("engine", "auto")
        if not split.is_made(config.overwrite):
            left.append(split)
    return left


class _LazyEngines:
    """Engines that start when the first block needs them and serve every split."""

    def __init__(self, settings: EngineSettings, plan: list[dict[str, str]], on_gpu: bool, group: Machines = ALONE) -> None:
        self._settings, self._plan, self._on_gpu, self.group = settings, plan, on_gpu, group
        self._engines: InProcess | Pool | None = None

    @property
    def count(self) -> int:
        """Engines on all machines, which must be alike."""
        return len(self._plan) * self.group.nodes

    def block_size(self, prompts: int, n: int) -> int:
        """Prompts per block, if there are this many with n samples each; all GPUs have equally many blocks."""
        if not self._on_gpu:
            return max(1, CPU_BLOCK // n)
        blocks = self.count * math.ceil(prompts * n / (self.count * GPU_BLOCK))
        return math.ceil(prompts / blocks)

    def start(self) -> InProcess | Pool:
        if self._engines is None:
            engines = f"{len(self._plan)} engines of " if len(self._plan) > 1 else ""
            print(f"loading {self._settings.model_path} into {engines}{self._settings.name} ...", flush=True)
            self._engines = open_engines(self._settings, self._plan)
        return self._engines

    def close(self) -> None:
        if self._engines is not None:
            self._engines.close()


def _sample_split(
    config: CompletionsConfig,
    split: SplitResult,
    rendered: list[RenderedPrompt],
    rejects: list[Reject],
    tokenizer: Any,
    sampling: Sampling,
    engines: _LazyEngines,
    dtype_reason: str,
) -> None:
    group, what = engines.group, f"blocks of {split.name}"
    parts = Parts(split.parts, split.made_by, config.overwrite, group.this or 0)
    share = parts.share(group, what)
    # An interrupted run keeps its block size, whatever the number of engines is now: samples depend on their block.
    size = parts.plan or engines.block_size(len(rendered), sampling.n)
    parts.open(size)
    blocks = {number: rendered[start : start + size] for number, start in enumerate(range(0, len(rendered), size))}
    if group.by_others and parts.divide(len(blocks), group, what):
        return
    ours = blocks if share is None else {number: blocks[number] for number in share}
    seconds = _run_blocks(config, split, ours, parts, sampling, engines)
    if group.this is not None:
        return  # Another process writes.
    facts = {"model_path": config.model_path, "dataset": str(split.source.parent), "engines": engines.count}
    facts |= {"seconds": round(seconds, 1), "dtype_reason": dtype_reason}
    facts["flags"] = as_dict(config) | {"engine": split.made_by["engine"]}
    write_results(split, blocks, parts, rejects, sampling, tokenizer, facts)


def _run_blocks(
    config: CompletionsConfig,
    split: SplitResult,
    blocks: PromptBlocks,
    parts: Parts,
    sampling: Sampling,
    engines: _LazyEngines,
) -> float:
    """Sample the unfinished blocks; returns the seconds it took."""
    left = {
        number: [Request(p.token_ids, stream_seed(config.seed, split.name, p.prompt.prompt_id)) for p in block]
        for number, block in blocks.items()
        if number not in parts.done
    }
    total = sampling.n * sum(len(block) for block in blocks.values())
    done = total - sampling.n * sum(len(block) for block in left.values())
    if done:
        print(f"{split.name}: resuming; {done} of {total} completions are finished", flush=True)
    if not left:
        return 0.0
    running = engines.start().run(left, sampling)
    collected: dict[int, dict[int, list[Sample]]] = {number: {} for number in left}
    tokens, started = 0, time.monotonic()
    with progress(total=total, initial=done, desc=f"sample {split.name}", unit="completion") as bar:
        for number, index, samples in running:
            collected[number][blocks[number][index].prompt.prompt_id] = samples
            tokens += sum(len(sample.token_ids) for sample in samples[: sampling.distinct])
            bar.set_postfix_str(f"{tokens / max(time.monotonic() - started, 1e-9):.0f} tokens/s", refresh=False)
            bar.update(len(samples))
            if len(collected[number]) == len(blocks[number]):
                parts.add(number, collected.pop(number))
    return time.monotonic() - started


def _kept(parts: Parts, number: int) -> dict[int, list[Sample]]:
    """{prompt_id: samples} of a finished block."""
    return {int(key): [Sample(*sample) for sample in samples] for key, samples in parts.read(number).items()}


def write_results(
    split: SplitResult,
    blocks: PromptBlocks,
    parts: Parts,
    rejects: list[Reject],
    sampling: Sampling,
    tokenizer: Any,
    facts: dict[str, Any],
) -> None:
    """Write rejects and manifest, then the split's file. If it is killed in between, the next run repeats this from `parts`,
    which has samples of all prompts of the blocks, and is removed at the end. `facts` are for the manifest.

    Raises:
        DataError: no prompt has usable completions.
    """
    prompts = len(rejects) + sum(map(len, blocks.values()))
    counts = {"prompts": prompts, "rejected": 0, "completions": 0, "tokens": 0, "stop": 0}
    rejects = list(rejects)
    for number, block in blocks.items():
        kept = _kept(parts, number)
        for rendered in block:
            samples = kept[rendered.prompt.prompt_id]
            if reason := _problem(samples, sampling):
                prompt_id = rendered.prompt.prompt_id
                rejects.append({"file": str(split.source), "row": rendered.row, "prompt_id": prompt_id, "reason": reason})
                continue
            counts["completions"] += len(samples)
            counts["tokens"] += sum(len(sample.token_ids) for sample in samples)
            counts["stop"] += sum(sample.finish_reason == "stop" for sample in samples)
    rejects.sort(key=lambda reject: reject["row"])
    counts["rejected"] = len(rejects)
    if len(rejects) == prompts:
        first = f"row {rejects[0]['row']}: {rejects[0]['reason']}"
        raise DataError(f"{split.source}: no prompt has usable completions; {first}")
    split.result.unlink(missing_ok=True)  # from a different configuration, with --overwrite=true
    write_rejects(split.result.parent, split.name, rejects)
    write_manifest(split.result.parent, split.step, split.made_by, counts=counts, **facts)
    write_records(split.result, _completions(blocks, parts, {reject["prompt_id"] for reject in rejects}, tokenizer))
    parts.remove()
    print(f"{split.result}: {json.dumps(counts)}", flush=True)


def _problem(samples: list[Sample], sampling: Sampling) -> str:
    """Why a prompt is rejected, or "": one sample that cannot be used rejects all n."""
    for sample in samples:
        if sample.finish_reason not in ("stop", "length"):
            return f"the engine ended a completion by {sample.finish_reason!r}"
        if sample.finish_reason == "stop" and not set(sample.token_ids[-1:]) & set(sampling.stop_token_ids):
            return "the engine ended a completion by 'stop' without a stop token"
    return ""


def _completions(blocks: PromptBlocks, parts: Parts, skip: set[int], tokenizer: Any) -> Iterator[Completion]:
    """Completions in the order of the prompts, one block in memory at a time."""
    for number, block in blocks.items():
        kept = _kept(parts, number)
        for prompt in (rendered.prompt for rendered in block if rendered.prompt.prompt_id not in skip):
            for sample_id, sample in enumerate(kept[prompt.prompt_id]):
                answer = [{"role": "assistant", "content": chat.decode(tokenizer, sample.token_ids)}]
                yield Completion(prompt.prompt_id, sample_id, prompt.prompt, answer, sample.token_ids, sample.finish_reason)

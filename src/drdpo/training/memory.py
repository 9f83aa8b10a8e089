"""What a run will need, printed before anything slow, and what is chosen for the machine where flags leave it open.

The peak memory of an optimizer step is predicted: ZeRO's shares by formula, the rest by a dry run, which sends the largest
micro-batch through the real policy and objective on torch's meta device, where tensors have shapes but no content, and
counts what is alive; so it covers every architecture, method and kind of checkpointing.
"""

import os
import sys
import weakref
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from drdpo import distributed
from drdpo.config.training import TrainConfig
from drdpo.errors import DataError, UsageError, one_line
from drdpo.folder import read_manifest, section
from drdpo.kernels import linear_logprob
from drdpo.kernels.packed_attention import SHARED_PREFIX, PrefixGroup, refusal, register_shared_prefix
from drdpo.models import meta_model, positions_of, read_settings
from drdpo.training.data import AnyBatch, Batch, PackedBatch, Pair, form_batch
from drdpo.training.engine import BUCKET
from drdpo.training.log import Shape, shape_of
from drdpo.training.lora import add_lora
from drdpo.training.losses import Method
from drdpo.training.objective import Population, objective
from drdpo.training.policy import (
    ALL_LAYERS,
    Policy,
    check_pairs,
    fix_rotary,
    recomputable_layers,
    set_recomputation,
    widen_values,
)
from drdpo.training.run import Run, deals_by_tokens

MARGIN = 0.9
"""Share of a GPU's memory that a prediction may take."""
CPU_SHARE = 0.5
"""Of a CPU's: the machine stays usable."""
ROWS = (16_384, 8_192, 4_096, 2_048, 1_024)
"""Tokens of a row from which CUDA's default is chosen: beyond the largest a GPU is no busier."""
BUSY = 4_096
"""Tokens of a row that keep a GPU busy: shorter ones wait for their kernels to be launched."""
PERCENTILES = (50, 90, 99, 100)
HEAD_KERNELS = linear_logprob.__code__.co_filename
"""The file whose functions work on logits, a block of the vocabulary at a time."""
GATHERED = 1_000_000_000
"""Elements of weights that ZeRO-3 keeps gathered at most, DeepSpeed's default (stage3_max_live_parameters)."""

Lines = list[tuple[str, str]]


def preflight(run: Run) -> tuple[Run, Shape]:
    """Print, on rank 0, what the run will do and the memory it will need; the run, with its recomputed layers, and what a
    step's work depends on. Every rank must call. DataError and UsageError as shapes."""
    pairs, config, world = run.sequences, run.config, distributed.world_size()
    policy = shapes(config, pairs)
    shape, memory, layers = shape_of(policy), _free(), 0
    if distributed.is_main():
        # All ranks' micro-batches of the steps that take every pair once, or of the run if that is shorter.
        steps = min(run.steps, -(-len(run.train) // config.train_batch_size))
        plans = [replace(run.plans["train"], rank=rank) for rank in range(world)]
        dealt = [[run.train[row] for row in rows] for step in range(steps) for plan in plans for rows in plan.of_step(step)]
        tokens = [_batch_tokens(batch, config) for batch in dealt]
        layers, needed = _memory(run, policy, dealt[tokens.index(max(tokens))], *memory)
        # Beyond the model's context its rotary positions were not trained.
        positions, longest = positions_of(policy.language_model)[0], max(map(len, pairs))
        warning = f"the longest pair has {longest} tokens, beyond the model's context: pass --max_len={positions}"
        beyond = [("warning", warning)] if positions is not None and longest > positions else []
        lines = [*_work(run, shape, steps, sum(tokens)), *beyond, *needed]
        print("preflight\n" + "\n".join(f"  {name:<9} {text}" for name, text in lines), flush=True)
    return replace(run, recompute=int(_of_all(layers)[0])), shape


def _batch_tokens(pairs: Sequence[Pair], config: TrainConfig) -> int:
    """Tokens, with padding, that a micro-batch of these pairs takes through the model."""
    if not config.packing:
        return 2 * len(pairs) * max(len(pair) for pair in pairs)
    return sum(pair.row_tokens() for pair in pairs)


def _work(run: Run, shape: Shape, steps: int, tokens: int) -> Lines:
    """Model, data, steps and lengths; the first `steps` have so many tokens."""
    config, world, train = run.config, distributed.world_size(), run.train
    trained = "all trained" if shape.trained == shape.parameters else f"{shape.trained:,} of them trained"
    batches = config.train_batch_size // (config.micro_batch * world)
    parts = f"{batches} micro-batch{'es' if batches > 1 else ''} of {config.micro_batch}"
    if config.micro_batch_tokens is not None:
        parts = f"packed rows of at most {config.micro_batch_tokens:,} tokens"
    lengths = {
        "prompt": [len(pair.prompt) for pair in train],
        "answer": [len(answer) for pair in train for answer in (pair.chosen, pair.rejected)],
        "pair": [_batch_tokens([pair], config) for pair in train],
    }
    quantiles = [
        f"{name} {' '.join(f'{value:,.0f}' for value in np.percentile(found, PERCENTILES, method='inverted_cdf'))}"
        for name, found in lengths.items()
    ]
    return [
        ("model", f"{shape.parameters:,} parameters, {trained}, in {config.dtype}; attention {config.attention_kernel}"),
        ("data", f"{len(train):,} pairs, {tokens:,} tokens {'packed' if config.packing else 'padded'} in the first "
                 f"{steps:,} steps, {run.counts['train']['answer cut']:,} answers cut by --max_len={config.max_len}"),
        ("work", f"{run.steps:,} steps of {config.train_batch_size} pairs = {run.epochs(run.steps):.2f} epochs; "
                 f"a step is {parts} on each of {world} process{'es' if world > 1 else ''}"),
        ("tokens", f"at {', '.join(f'{part}%' for part in PERCENTILES)}: {'; '.join(quantiles)}"),
    ]  # fmt: skip


def _memory(run: Run, policy: Policy, pairs: list[Pair], free: int, sharers: int) -> tuple[int, Lines]:
    """How many layers recompute their activations, and what is printed about memory: of the largest micro-batch, by a
    policy on the meta device; `free` and `sharers` are from _free."""
    config, process = run.config, None if distributed.use_cuda() else _resident()
    whole = max(1, len(recomputable_layers(policy.language_model)))
    layers, lines = whole if config.recompute else 0, []
    need_of = partial(predicted, config, run.method, policy, pairs, process=process)
    try:
        need = need_of(whole if config.gradient_checkpointing == "true" else 0)
        if config.gradient_checkpointing == "auto":
            limit, kept = int(CPU_SHARE * free) // sharers if process else int(MARGIN * free), need.total
            layers = 0 if kept <= limit else fewest_layers(whole, limit, lambda layers: need_of(layers).total)
            need = need_of(layers) if layers else need
            config = replace(config, gradient_checkpointing="true" if layers else "false")
            state, verdict = (f"on for {layers} of {whole} layers", "exceeds") if layers else ("off", "fits")
            share = f"{CPU_SHARE if process else MARGIN:.0%}" + f", for each of {sharers} processes" * (sharers > 1)
            limits = f"the {_gib(limit)} that a process may take of {_gib(free)} free ({share})"
            without = f"without recomputation the predicted peak of {_gib(kept)} {verdict} {limits}"
            lines.append(("recompute", f"{state}: {without}"))
    except Exception as error:  # of any kind, on rank 0 alone: the others wait for what it decides
        # Some models' forward passes look at values (experts are chosen by them), which shapes alone do not have.
        reason = one_line(str(error), 100)
        return layers, [("memory", f"not predicted: the model's forward pass needs more than shapes ({reason})")]
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in vars(need).items() if size)
    lines.append(("memory", f"predicted peak {_gib(need.total)} a {'process' if process else 'device'}: {parts}"))
    lines.append(("", advice(need, config, distributed.world_size())))
    if need.total * sharers <= free:
        return layers, [*lines, ("", f"{_gib(free)} free" + (f" for {sharers} processes" if sharers > 1 else ""))]
    moved = need.optimizer + need.copies
    offload = not process and config.zero_stage and not config.optimizer_offload and need.total - moved <= free
    helps = f"; --optimizer_offload=true moves {_gib(moved)} of it to the CPU's memory" if offload else ""
    total = f"{sharers} processes need {_gib(need.total * sharers)}" if sharers > 1 else f"needs {_gib(need.total)}"
    warning = f"{total}, but {_gib(free)} is free: the run may end for lack of memory{helps}"
    return layers, [*lines, ("warning", warning)]


def fewest_layers(total: int, limit: int, need: Callable[[int], int]) -> int:
    """The fewest of a model's `total` layers whose recomputation brings the predicted peak to the limit, in bytes; all if
    none does."""
    return 1 + bisect_left(range(1, total), True, key=lambda layers: need(layers) <= limit)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _free() -> tuple[int, int]:
    """Bytes that are free for training, on the fullest of the ranks' GPUs, and how many processes share them."""
    if distributed.use_cuda():
        return int(min(_of_all(torch.cuda.mem_get_info(distributed.device())[0]))), 1
    import psutil  # A bare GPU machine (benchmarks/gpu_lease.py) has none.

    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    free = int(psutil.virtual_memory().available) + sharers * _resident()
    # A container may have less than the machine.
    for path in map(Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            free = min(free, int(text))
    return free, sharers


def _resident() -> int:
    """Bytes that this process has in memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _of_all(value: float) -> list[float]:
    """Numbers of all ranks. Under --dry_run they do not talk to each other, and rank 0 alone prints."""
    return distributed.gather_floats([value]) if distributed.joined() else [value]


def advice(need: "Memory", config: TrainConfig, world: int) -> str:
    """The largest part, and the flag that lowers it."""
    part = max((name for name in vars(need) if name != "process"), key=lambda name: getattr(need, name))
    passes = part in ("activations", "head")
    stage = 3 if part == "weights" and config.lora_quantize == "none" else 2
    offload = "--optimizer_offload=true" + ("" if config.zero_stage else " with --zero_stage=2")
    # ZeRO-3 keeps up to GATHERED weights whole beside its share: small models gain nothing.
    gathered = getattr(torch, config.dtype).itemsize * GATHERED * world / (world - 1 or 1)
    flags = [
        (part == "activations" and not config.recompute, "--gradient_checkpointing=true"),
        (passes and config.second_derivative, "--wdpo_solver=tangent with --packing=true"),
        (passes and not config.packing, "--packing=true"),
        (passes and config.micro_batch_tokens is not None, "a smaller --micro_batch_tokens"),
        (passes and config.micro_batch > 1, f"--micro_batch_size={max(1, config.micro_batch // 2)}"),
        (passes, "a smaller --max_len"),
        (
            world > 1 and config.zero_stage < stage and (part != "weights" or need.weights > gathered),
            f"--zero_stage={stage}",
        ),
        # On a CPU it is the same memory.
        (part in ("optimizer", "copies") and not need.process and not config.optimizer_offload, offload),
        (part != "weights" and not config.lora_rank, "--lora_rank=16"),
        (config.dtype == "float32", "--dtype=bfloat16"),
        (config.zero_stage >= stage, "more processes"),
        (True, "a smaller model"),
    ]
    return f"the largest part is {part}; {next(flag for fits, flag in flags if fits)} lowers it"


# Choices for the machine.


def resolve_attention(config: TrainConfig) -> TrainConfig:
    """The flags with the kernel instead of --attn=auto: for packed rows on CUDA flash attention where it supports the model,
    else what the flags' property `attention_kernel` says. UsageError if --attn=flash is given and it does not. Every rank
    must call."""
    if not config.packing or config.attn not in ("auto", "flash") or not distributed.use_cuda():
        return replace(config, attn=config.attention_kernel)
    from transformers import AutoConfig

    if config.attn == "auto" and config.wide_values:
        reason: str | None = "--wdpo_solver=tangent attends in float32 to keep its accuracy"
    else:
        settings = AutoConfig.from_pretrained(config.model_path, trust_remote_code=False)
        reason = refusal(settings, distributed.device(), getattr(torch, config.dtype))
    if not any(_of_all(reason is not None)):
        return replace(config, attn="flash")
    why = reason or "another process cannot use it"
    if config.attn == "flash":
        raise UsageError(f"--attn=flash: torch's kernel does not support this model here: {why}; pass --attn=sdpa")
    distributed.say(f"--attn=auto: sdpa instead of flash, because {why}")
    return replace(config, attn="sdpa")


def resolve_rows(config: TrainConfig, method: Method) -> TrainConfig:
    """The flags, with the kernel of resolve_attention, with --micro_batch_tokens, where deals_by_tokens says so: those of a
    run that is resumed, whatever --gradient_checkpointing is now and the GPUs are, or else rows_that_fit. Every rank must
    call."""
    if not deals_by_tokens(config):
        return config
    before = section(read_manifest(Path(config.save_path)), "train", "made_by") if config.resume == "auto" else {}
    kept = int(_of_all(before.get("micro_batch_tokens") or 0)[0])
    memory = torch.cuda.get_device_properties(distributed.device()).total_memory
    least = int(min(_of_all(memory)))
    return replace(config, micro_batch_tokens=kept or rows_that_fit(config, method, shapes(config), least))


def rows_that_fit(config: TrainConfig, method: Method, policy: Policy, memory: int) -> int:
    """--micro_batch_tokens of a new run for GPUs of that many bytes: the largest of ROWS that fit, without recomputation
    down to BUSY tokens, if the flags allow that, else with it. The longest pair that --max_len allows must have room."""
    least = 2 * config.max_len
    choices = [tokens for tokens in ROWS if tokens >= least] or [least]
    tried = [(tokens, config.recompute) for tokens in choices]
    if config.gradient_checkpointing == "auto":
        tried = [(tokens, False) for tokens in choices if tokens >= BUSY] + tried
    for tokens, recompute in tried:
        flags, pairs = replace(config, micro_batch_tokens=tokens), _row_of(tokens, method.columns)
        try:
            need = predicted(flags, method, policy, pairs, ALL_LAYERS if recompute else 0)
        except Exception:  # the model's forward pass looks at values: nothing is known
            return choices[-1]
        if need.total <= MARGIN * memory:
            return tokens
    return choices[-1]


def _row_of(tokens: int, columns: Sequence[str] = ()) -> list[Pair]:
    """Pairs of equal parts, about 256 tokens each, that fill a row."""
    pairs = max(1, tokens // (3 * 256))
    part = [0] * (tokens // (3 * pairs))
    return [Pair(part, part, part, columns=dict.fromkeys(columns, 0.0))] * pairs


# The prediction.


def predicted(
    config: TrainConfig, method: Method, policy: Policy, pairs: list[Pair], layers: int, process: int | None = None
) -> "Memory":
    """Peak memory of a step whose largest micro-batch is these pairs, with the activations of the first layers recomputed.
    Raises RuntimeError if the model's forward pass needs more than shapes. `policy` and `process`: see predict."""
    set_recomputation(policy.language_model, layers)
    batch = form_batch(pairs, range(len(pairs)), config.packing)
    return predict(policy, config, distributed.world_size(), *dry_run(policy, batch, method), process)


def shapes(config: TrainConfig, pairs: Sequence[Pair] = ()) -> Policy:
    """The policy of a run without its weights: shapes alone, from the model's config.json. DataError for a model that
    transformers does not know; UsageError if its blocks have no linear layers for --lora_rank, or as check_pairs."""
    settings, dtype = read_settings(config.model_path), getattr(torch, config.dtype)
    register_shared_prefix()
    try:
        try:
            model = meta_model(settings, dtype, "eager" if config.second_derivative else SHARED_PREFIX)
        except KeyError:
            # A model with attentions of its own (Falcon): predicted with one over the whole row, which takes more.
            model = meta_model(settings, dtype, "eager")
    except (OSError, ValueError, ImportError) as error:
        reason = one_line(str(error), 300)
        raise DataError(f"{config.model_path}: the model could not be loaded ({reason})") from error
    policy = Policy(model, config.second_derivative).train()
    policy.flash_attention = config.packed_flash
    if config.lora:
        add_lora(policy, config.lora)
    set_recomputation(policy.language_model, ALL_LAYERS if config.recompute else 0)
    check_pairs(policy, pairs, config.model_path)
    fix_rotary(policy)
    if config.wide_values:
        widen_values(policy)
    return policy


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the moment of its peak. Activations are those between the input embeddings and the last hidden
    states, forward and backward; the output head has logits of a block of the vocabulary, and its gradient; copies are what
    the optimizer step makes; a process has libraries and data, on a CPU."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    copies: int
    process: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def predict(policy: Policy, config: TrainConfig, world: int, activations: int, head: int, process: int | None) -> Memory:
    """Peak memory of an optimizer step on one of `world` devices, of a policy on the meta device, with its adapters.
    `activations` and `head` are from dry_run; `process`: bytes of the process before a model is loaded, None on a GPU.

    Activations and what the step copies are alive one after the other, so a GPU needs room for the larger. A CPU needs room
    for both: its allocator keeps freed blocks of less than 32 MiB. What it cannot reuse is not predicted.
    """
    size, stage, (total, trained, *_) = getattr(torch, config.dtype).itemsize, config.zero_stage, shape_of(policy)
    share = trained // world if stage else trained
    # At stage 3 a share, and what is gathered of the rest.
    weights = size * (total // world + min(total, GATHERED)) if stage == 3 else size * total
    if config.lora_quantize != "none":
        weights = _quantized_bytes(policy, size, total)
    # Their sum over the micro-batches in float32, and the bucket they are reduced in; in float32 at stages 1 and 2 also
    # those of one micro-batch apart.
    gradients = 4 * (share if stage >= 2 else trained) + (size * min(trained, BUCKET) if stage else 0)
    if size == 4 and stage in (1, 2):
        gradients += 4 * share
    # AdamW's two moments, and under ZeRO the weights in float32 that they move. The step makes the gradients flat; in
    # bfloat16 at stages 1 and 2 every micro-batch after the first adds a float32 copy of its gradients to their sum.
    optimizer, copies = (12 if stage else 8) * share, 4 * share if stage else 0
    if size == 2 and stage in (1, 2) and config.train_batch_size > config.micro_batch * world:
        copies += size * share
    if process is None:
        if config.optimizer_offload:
            optimizer, copies = 0, 0
        if copies > activations + head:
            activations, head = 0, 0
        else:
            copies = 0
    return Memory(weights, gradients, optimizer, activations, head, copies, process or 0)


def _quantized_bytes(policy: Policy, size: int, total: int) -> int:
    """Bytes of `total` weights of `size` bytes, of which those of frozen linear layers are NF4 codes.

    Each n of these take n/2 bytes for their codes, n/64 for 8-bit scales and 4 n/(64 256) for the scales of those; the
    largest layer's weight is dequantized while it is multiplied by.
    """
    linear = [module.weight for module in policy.modules() if isinstance(module, nn.Linear)]
    sizes = [weight.numel() for weight in linear if weight is not policy.head.weight and not weight.requires_grad]
    codes = sum(sizes) * (1 / 2 + 1 / 64 + 4 / (64 * 256))
    return size * (total - sum(sizes) + max(sizes)) + round(codes)


def dry_run(policy: Policy, batch: AnyBatch, method: Method) -> tuple[int, int]:
    """Peak bytes of a forward and backward pass of a run's largest micro-batch: (in the model, in the output head).

    Weights, and the sum of gradients, are not counted. A padded batch counts as rows of its width. The policy is from
    shapes. Raises an Exception of any kind if the model's forward pass looks at values.
    """
    meta = torch.device("meta")
    # WDPO's exact solver attends to padded rows by plain products, which shapes take as they are.
    given = (_as_packed(batch) if isinstance(batch, Batch) and not policy.second_derivative else batch).to(meta)
    tensors = (value for value in vars(given).values() if isinstance(value, Tensor))
    known = [*policy.parameters(), *policy.buffers(), *tensors]
    with ExitStack() as hooks:
        # As under ZeRO, a parameter's gradient leaves as soon as it exists.
        for parameter in filter(lambda parameter: parameter.requires_grad, policy.parameters()):
            gone = parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
            hooks.callback(gone.remove)
        with _Alive(policy.head.weight.shape[0], known) as alive:
            plain = replace(method, weights=None, begin=None, update=None)  # weights look at values
            reference_B2 = torch.zeros(len(given.indices_B), 2, device=meta)
            objective(policy, given, reference_B2, plain, Population(mean_penalty=torch.ones(()))).total.backward()
    return alive.at_peak["model"], alive.at_peak["head"]


def _as_packed(batch: Batch) -> PackedBatch:
    """A packed row with the shapes of a padded batch; its content means nothing."""
    rows, width = batch.input_ids_ST.shape
    nothing_A = torch.zeros_like(batch.targets_A)
    tokens_1N = torch.zeros(1, rows * width, dtype=torch.int64)
    groups = (PrefixGroup(0, (width,)),) * rows
    return PackedBatch(
        batch.indices_B, nothing_A, nothing_A, nothing_A, tokens_1N, tokens_1N, tokens_1N[0], groups, columns=batch.columns
    )


class _Alive(TorchDispatchMode):
    """Counts the bytes of all tensors on the meta device that are alive and not known, and keeps the counts of their peak.
    Those with a side as long as the vocabulary are the output head's, as are all that its kernels make."""

    def __init__(self, vocabulary: int, known: list[Tensor]) -> None:
        super().__init__()
        self.at_peak: Counter[str] = Counter()
        self._vocabulary = vocabulary
        self._alive: Counter[str] = Counter()
        self._seen: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return tree_map_only(Tensor, self._count, out)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if tensor.is_meta and place not in self._seen:
            kind = "head" if self._vocabulary in tensor.shape or _called_by(HEAD_KERNELS) else "model"
            size = storage.nbytes()
            self._alive[kind] += size
            self._seen[place] = weakref.finalize(storage, self._forget, place, kind, size)
            if self._alive.total() > self.at_peak.total():
                self.at_peak = Counter(self._alive)
        return tensor

    def _forget(self, place: int, kind: str, size: int) -> None:
        del self._seen[place]
        self._alive[kind] -= size


def _called_by(file: str) -> bool:
    """Is a function of this file being run? Also in a backward pass, where no module is."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != file:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None

"""What a run will do and need, told before anything slow: sizes, work, lengths, memory and whether it fits."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drdpo import distributed
from drdpo.config import TrainConfig
from drdpo.errors import DataError
from drdpo.kernels.shared_prefix import NAME as PACKED
from drdpo.training.automatic import CPU_SHARE, MARGIN, of_all, of_main, predicted, set_recomputation
from drdpo.training.batches import step_indices
from drdpo.training.data import Pair, row_tokens
from drdpo.training.dealing import step_batches
from drdpo.training.log import Shape, shape_of
from drdpo.training.lora import add_lora
from drdpo.training.memory import GATHERED, Memory
from drdpo.training.policy import Policy, widen_first_tokens
from drdpo.training.rotary import check_rotary, fix_rotary
from drdpo.training.run import Run
from drdpo.training.tangent_support import check_architecture

PERCENTILES = (50, 90, 99, 100)
_GIB = 2**30


def preflight(run: Run) -> tuple[Run, Shape]:
    """Print, on rank 0, what the run will do and the memory it will need. Every rank must call.

    Returns:
        The run, in whose flags --gradient_checkpointing=auto is resolved, and what a step's work depends on.

    Raises:
        DataError: the model's architecture cannot be made from its config.json, or --wdpo_solver=tangent does not know it.
        UsageError: --lora_targets names no linear layer of the model, or pairs are too long for its rotary positions.
    """
    policy = shapes(run.config, [*run.train, *run.test])
    shape = shape_of(policy)
    memory = _free()
    recompute = run.config.recompute
    if distributed.is_main():
        dealt = _dealt(run)
        largest = max(dealt, key=lambda rows: _batch_tokens([run.train[row] for row in rows], run.config))
        recompute, told = _memory(run, policy, [run.train[row] for row in largest], *memory)
        lines = [*_work(run, shape, dealt), *_lengths(run), *told]
        print("preflight\n" + "\n".join(f"  {name:<9} {text}" for name, text in lines), flush=True)
    return replace(run, config=_checkpointing(run.config, of_main(float(recompute)) > 0)), shape


def shapes(config: TrainConfig, pairs: Sequence[Pair] = ()) -> Policy:
    """The policy of a run without its weights, as a dry run needs it. Raises as preflight does."""
    policy = meta_policy(config)
    check_rotary(policy, list(pairs), config)
    fix_rotary(policy)
    if config.method == "wdpo" and config.solver == "tangent":
        check_architecture(policy, config)
        widen_first_tokens(policy, config)
    return policy


def meta_policy(config: TrainConfig) -> Policy:
    """The policy of a run without its weights: shapes alone, from the model's config.json.

    Raises:
        DataError: there is no such model, or transformers does not know its architecture.
        UsageError: --lora_targets names no linear layer of the model.
    """
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(config.model_path, trust_remote_code=False)
        model = _without_weights(settings, config)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{config.model_path}: the model could not be loaded ({reason})") from error
    policy = Policy(model, config.second_derivative).train()
    policy.flash_attention = config.packed_flash
    if config.lora_rank:
        add_lora(policy, config)
    set_recomputation(policy, config.recompute)
    return policy


def _without_weights(settings: Any, config: TrainConfig) -> Any:
    from transformers import AutoModelForCausalLM

    def build(attention: str) -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                settings, dtype=getattr(torch, config.dtype), attn_implementation=attention, trust_remote_code=False
            )

    try:
        return build("eager" if config.second_derivative else PACKED)
    except KeyError:
        # A model whose attentions are its own (Falcon): predicted with one over the whole row, which takes more.
        return build("eager")


def _dealt(run: Run) -> list[list[int]]:
    """All ranks' micro-batches of the first epoch, or of the run where that is shorter."""
    config, world = run.config, distributed.world_size()
    dealt = []
    for step in range(min(run.steps, run.steps_per_epoch)):
        indices = step_indices(len(run.train), config.train_batch_size, config.seed, step)
        for rank in range(world):
            dealt += step_batches(indices, run.train_lengths, config, rank, world)
    return dealt


def _batch_tokens(pairs: Sequence[Pair], config: TrainConfig) -> int:
    """Tokens, with padding, that a micro-batch of these pairs takes through the model."""
    if not config.packing:
        return 2 * len(pairs) * max(len(pair) for pair in pairs)
    return sum(row_tokens(pair, config) for pair in pairs)


def _work(run: Run, shape: Shape, dealt: list[list[int]]) -> list[tuple[str, str]]:
    config, world = run.config, distributed.world_size()
    tokens = sum(_batch_tokens([run.train[row] for row in rows], config) for rows in dealt)
    trained = "all trained" if shape.trained == shape.parameters else f"{shape.trained:,} of them trained"
    cut = run.counts["train"]["answer cut"]
    form = "packed" if config.packing else "padded"
    batches = config.train_batch_size // (config.micro_batch * world)
    parts = f"{batches} micro-batch{'es' if batches > 1 else ''} of {config.micro_batch} on each of {world} "
    if config.micro_batch_tokens is not None:
        parts = f"packed rows of at most {config.micro_batch_tokens:,} tokens on each of {world} "
    span = "an epoch" if run.steps >= run.steps_per_epoch else "in all"
    data = f"{len(run.train):,} pairs, {tokens:,} tokens {span} {form}, {cut:,} answers cut by --max_len={config.max_len}"
    work = (
        f"{run.steps:,} steps of {config.train_batch_size} pairs = {run.steps / run.steps_per_epoch:.2f} epochs; a step is "
        f"{parts}process{'es' if world > 1 else ''}"
    )
    return [
        ("model", f"{shape.parameters:,} parameters, {trained}, in {config.dtype}; attention {config.attention_kernel}"),
        ("data", data),
        ("work", work),
    ]


def _lengths(run: Run) -> list[tuple[str, str]]:
    answers = [len(answer) for pair in run.train for answer in (pair.chosen, pair.rejected)]
    kinds = {
        "prompt": [len(pair.prompt) for pair in run.train],
        "answer": answers,
        "pair": [_batch_tokens([pair], run.config) for pair in run.train],
    }
    told = []
    for name, lengths in kinds.items():
        values = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
        told.append(f"{name} " + " ".join(f"{value:,.0f}" for value in values))
    return [("tokens", f"at {', '.join(f'{part}%' for part in PERCENTILES)}: " + "; ".join(told))]


def _checkpointing(config: TrainConfig, recompute: bool) -> TrainConfig:
    return replace(config, gradient_checkpointing="true" if recompute else "false")


def _memory(run: Run, policy: Policy, pairs: list[Pair], free: int, sharers: int) -> tuple[bool, list[tuple[str, str]]]:
    """Are activations recomputed, and what is to be told of memory.

    Args:
        run: with its flags.
        policy: on the meta device.
        pairs: of the largest micro-batch.
        free, sharers: from _free.
    """
    config, world, cuda = run.config, distributed.world_size(), distributed.use_cuda()
    process = None if cuda else _resident()
    lines = []
    try:
        need = predicted(config, policy, pairs, config.gradient_checkpointing == "true", process)
        if config.gradient_checkpointing == "auto":
            limit = int(MARGIN * free) if cuda else int(CPU_SHARE * free) // sharers
            config = _checkpointing(config, need.total > limit)
            what = f"{MARGIN:.0%} of a GPU's" if cuda else f"{CPU_SHARE:.0%} of the memory's"
            what += f" {_gib(free)} that are free"
            lines = [
                ("recompute", f"{'on' if config.recompute else 'off'}: without recomputation the predicted peak of "
                              f"{_gib(need.total)} {'exceeds' if config.recompute else 'fits'} {_gib(limit)}, {what}"
                              f"{f', for each of {sharers} processes' if sharers > 1 else ''}")
            ]  # fmt: skip
            if config.recompute:
                need = predicted(config, policy, pairs, True, process)
    except Exception as error:  # of any kind, on rank 0 alone: the others wait for what it decides
        # Some models' forward passes look at values (experts are chosen by them), which shapes alone do not have.
        reason = " ".join(str(error).split())[:100]
        return config.recompute, [("memory", f"not predicted: the model's forward pass needs more than shapes ({reason})")]
    parts = {name: size for name, size in vars(need).items() if size}
    where = "device" if cuda else "process"
    lines += [
        ("memory", f"predicted peak {_gib(need.total)} a {where}: " + ", ".join(f"{k} {_gib(v)}" for k, v in parts.items())),
        ("", advice(need, config, world)),
    ]
    if need.total * sharers > free:
        moved = need.optimizer + need.copies
        offload = config.zero_stage and not config.optimizer_offload and need.total - moved <= free
        helps = f"; --optimizer_offload=true moves {_gib(moved)} of it to the CPU's memory" if cuda and offload else ""
        of = f"{sharers} processes need {_gib(need.total * sharers)}" if sharers > 1 else f"needs {_gib(need.total)}"
        lines.append(("warning", f"{of}, but {_gib(free)} is free: the run may end for lack of memory{helps}"))
    else:
        lines.append(("", f"{_gib(free)} free" + (f" for {sharers} processes" if sharers > 1 else "")))
    return config.recompute, lines


def advice(need: Memory, config: TrainConfig, world: int) -> str:
    """Which part is the largest, and the flag that lowers it."""
    sizes = {name: size for name, size in vars(need).items() if name != "process"}
    part = max(sizes, key=lambda name: sizes[name])
    flags: list[tuple[bool, str]]
    if part in ("activations", "head"):
        flags = [
            (part == "activations" and not config.recompute, "--gradient_checkpointing=true"),
            (config.second_derivative, "--wdpo_solver=tangent with --packing=true"),
            (not config.packing, "--packing=true"),
            (config.micro_batch_tokens is not None, "a smaller --micro_batch_tokens"),
            (config.micro_batch > 1, f"--micro_batch_size={max(1, config.micro_batch // 2)}"),
            (True, "a smaller --max_len"),
        ]
    else:
        stage = 3 if part == "weights" and config.lora_quantize == "none" else 2
        on_gpu = not need.process
        offload = "--optimizer_offload=true" + ("" if config.zero_stage else " with --zero_stage=2")
        # ZeRO-3 keeps up to GATHERED weights whole beside its share: small models gain nothing.
        element = getattr(torch, config.dtype).itemsize
        gains = part != "weights" or need.weights > element * GATHERED * world / (world - 1 or 1)
        flags = [
            (world > 1 and config.zero_stage < stage and gains, f"--zero_stage={stage}"),
            # On a CPU it is the same memory.
            (part in ("optimizer", "copies") and on_gpu and not config.optimizer_offload, offload),
            (part != "weights" and not config.lora_rank, "--lora_rank=16"),
            (config.dtype == "float32", "--dtype=bfloat16"),
            (config.zero_stage >= stage, "more processes"),
            (True, "a smaller model"),
        ]
    return f"the largest part is {part}; {next(flag for fits, flag in flags if fits)} lowers it"


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"


def _resident() -> int:
    """Bytes this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _free() -> tuple[int, int]:
    """Bytes that are free for training, on the fullest of the ranks' GPUs, and how many processes share them."""
    if distributed.use_cuda():
        return int(min(of_all(float(torch.cuda.mem_get_info(distributed.device())[0])))), 1
    import psutil

    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    free = int(psutil.virtual_memory().available) + sharers * _resident()
    # A container may be given less than the machine has.
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text: Any = Path(path).read_text().strip() if Path(path).is_file() else ""
        if text.isdigit():
            free = min(free, int(text))
    return free, sharers

"""What --attn, --micro_batch_tokens and --gradient_checkpointing are where the flags leave it to the machine."""

from dataclasses import replace

import torch

from drdpo import distributed
from drdpo.config import TrainConfig
from drdpo.errors import UsageError
from drdpo.kernels.varlen_attention import refusal
from drdpo.training.data import Pair, row_tokens
from drdpo.training.memory import Memory, dry_run, predict
from drdpo.training.packing import form_batch
from drdpo.training.policy import Policy

MARGIN = 0.9
"""Share of a GPU's memory that a prediction may take."""
CPU_SHARE = 0.5
"""Of a CPU's: the machine stays usable."""
ROWS = (16_384, 8_192, 4_096, 2_048, 1_024)
"""Tokens of a row from which CUDA's default is chosen: beyond the largest a GPU is no busier."""
BUSY = 4_096
"""Tokens of a row that keep a GPU busy: shorter ones wait for their kernels to be launched."""


def resolve_attention(config: TrainConfig) -> TrainConfig:
    """The flags with the kernel in place of --attn=auto: for packed rows on CUDA flash attention where it serves the model,
    else what the flags' property `attention_kernel` says. Every rank must call.

    Raises:
        UsageError: --attn=flash is given, and this machine's flash attention does not serve the model.
    """
    if not config.packing or config.attn not in ("auto", "flash") or not distributed.use_cuda():
        return replace(config, attn=config.attention_kernel)
    from transformers import AutoConfig

    reason = None
    if config.attn == "auto" and config.wide_first_tokens:
        reason = "--wdpo_solver=tangent attends in float32 to keep its accuracy"
    else:
        settings = AutoConfig.from_pretrained(config.model_path, trust_remote_code=False)
        reason = refusal(settings, distributed.device(), getattr(torch, config.dtype))
    if any(of_all(float(reason is not None))):
        if config.attn == "flash":
            raise UsageError(
                "--attn=flash: torch's flash attention does not serve this model here: "
                f"{reason or 'another process found so'}; pass --attn=sdpa"
            )
        if distributed.is_main():
            print(f"--attn=auto: sdpa instead of flash, because {reason or 'another process cannot use it'}", flush=True)
        return replace(config, attn="sdpa")
    return replace(config, attn="flash")


def resolve_rows(config: TrainConfig, policy: Policy) -> TrainConfig:
    """The flags with --micro_batch_tokens, where deals_by_tokens says so: a function of the model, the flags, the number of
    ranks and the GPUs' memory as they are sold, so that a resumed run has the same rows. Every rank must call.

    The most of ROWS that fit: without recomputation down to BUSY tokens, if the flags allow that, else with it. A row must
    hold the longest pair that --max_len allows.

    Args:
        config: with the kernel of resolve_attention.
        policy: on the meta device.
    """
    memory = torch.cuda.get_device_properties(distributed.device()).total_memory
    return replace(config, micro_batch_tokens=rows_that_fit(config, policy, int(min(of_all(float(memory))))))


def rows_that_fit(config: TrainConfig, policy: Policy, memory: int) -> int:
    """--micro_batch_tokens for a GPU of that many bytes; see resolve_rows."""
    least = 2 * config.max_len
    choices = [tokens for tokens in ROWS if tokens >= least] or [least]
    tried = [(tokens, config.recompute) for tokens in choices]
    if config.gradient_checkpointing == "auto":
        tried = [(tokens, False) for tokens in choices if tokens >= BUSY] + tried
    for tokens, recompute in tried:
        try:
            need = predicted(replace(config, micro_batch_tokens=tokens), policy, _row_of(tokens, config), recompute)
        except Exception:  # the model's forward pass looks at values: nothing is known
            return choices[-1]
        if need.total <= MARGIN * memory:
            return tokens
    return choices[-1]


def _row_of(tokens: int, config: TrainConfig) -> list[Pair]:
    """Pairs of equal parts, some 256 tokens each, that fill a row."""
    parts = row_tokens(Pair([0], [0], [0]), config)
    pairs = max(1, tokens // (256 * parts))
    part = [0] * (tokens // (pairs * parts))
    return [Pair(part, part, part)] * pairs


def predicted(config: TrainConfig, policy: Policy, pairs: list[Pair], recompute: bool, process: int | None = None) -> Memory:
    """Peak memory of a step whose largest micro-batch is these pairs, with or without recomputation of activations.

    Args:
        config: of the run.
        policy: on the meta device.
        pairs: as they go through the model together.
        recompute: as --gradient_checkpointing.
        process: see drdpo.training.memory.predict.

    Raises:
        RuntimeError: the model's forward pass needs more than shapes.
    """
    set_recomputation(policy, recompute)
    batch = form_batch(pairs, list(range(len(pairs))), config, pad_token_id=0)
    return predict(policy, config, distributed.world_size(), *dry_run(policy, batch, config), process)


def set_recomputation(policy: Policy, recompute: bool) -> None:
    """Recompute activations in the backward pass, or keep them; non-reentrant, the form that has a second derivative."""
    if recompute:
        policy.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        policy.language_model.gradient_checkpointing_disable()


def of_main(value: float) -> float:
    """Rank 0's number, on every rank."""
    return of_all(value)[0]


def of_all(value: float) -> list[float]:
    """Numbers of all ranks. Under --dry_run they do not talk to each other, and rank 0 alone prints."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed.gather_floats([value]) if joined else [value]

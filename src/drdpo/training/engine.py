"""The DeepSpeed engine: optimizer, schedule, precision and ZeRO stage from the flags.

Only this file and checkpoint.py import deepspeed.
"""

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch

from drdpo import distributed
from drdpo.config.training import TrainConfig
from drdpo.training.patches import note_gradient_norm
from drdpo.training.policy import Policy

Engine = Any
"""A deepspeed.DeepSpeedEngine around a Policy; see drdpo.training.loop.train_step for which of both runs forward."""


def join_with_deepspeed(timeout: timedelta = distributed.DEFAULT_TIMEOUT) -> None:
    """As distributed.join, but through DeepSpeed, and also of a process without a launcher."""
    if not distributed.use_cuda():
        os.environ["DS_ACCELERATOR"] = "cpu"  # otherwise it looks for other accelerators, and prints so
    import deepspeed

    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("", 0))
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            os.environ.update(alone, MASTER_PORT=str(probe.getsockname()[1]))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls a collective by its older name; nothing a user could do about it.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    if distributed.use_cuda():
        torch.cuda.set_device(distributed.local_rank())
        deepspeed.init_distributed("nccl", auto_mpi_discovery=False, timeout=timeout)
        return
    # DeepSpeed's shared-memory collective leaks shared memory on every start and takes half a minute to compile.
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Gradients of rarely used tokens become denormal numbers, which CPUs handle a hundred times slower than zeros.
    # NumPy warns when it first measures a float type after that, so it measures them before.
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)
    torch.set_flush_denormal(True)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, timeout=timeout)


def be_deterministic() -> None:
    """Let torch choose deterministic kernels from here on, and raise RuntimeError if there is none.

    Flash and memory-efficient attention sum their gradients in a fixed order then (torch's attention_backward.cu asks
    deterministicAlgorithms()), as do index_add and the embedding's gradient; drdpo's own kernels have no atomic additions.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It would also fill every new tensor, for code that reads what it never wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False


def start_engine(policy: Policy, config: TrainConfig, steps: int) -> Engine:
    """Wrap a policy on the CPU, in the run's dtype, for training for so many optimizer steps."""
    import deepspeed
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    trained = sum(parameter.numel() for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, round(steps * config.warmup_ratio), steps, min_lr_rate=0.1
    )
    engine, *_ = deepspeed.initialize(
        model=policy, optimizer=optimizer, lr_scheduler=schedule,
        config=engine_config(config, distributed.world_size(), trained, largest_vector(policy)),
    )  # fmt: skip
    if config.zero_stage == 0:
        note_gradient_norm(engine, parameters, config.max_grad_norm)
    return engine


BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once at most, its default."""
KEPT_WHOLE = 100_000
"""Elements of a weight that ZeRO-3 leaves whole on every process, DeepSpeed's default."""


def largest_vector(policy: Policy) -> int:
    """Elements of the largest weight with one axis: of a norm, or a bias."""
    return max((parameter.numel() for parameter in policy.parameters() if parameter.dim() == 1), default=0)


def engine_config(config: TrainConfig, world: int, trained: int = BUCKET, vector: int = 0) -> dict[str, Any]:
    """DeepSpeed's configuration of a run on `world` processes that trains so many parameters; `vector` is its policy's
    largest_vector."""
    bfloat16, offload = getattr(torch, config.dtype) is torch.bfloat16, config.optimizer_offload
    return {
        "train_batch_size": config.train_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.train_batch_size // (config.micro_batch * world),
        "gradient_clipping": config.max_grad_norm,
        # Without the second, stage 1 adds a micro-batch's gradient again with every later one: its clearing hangs on the
        # engine's own forward, which train_step does not use.
        "bf16": {"enabled": bfloat16, "immediate_grad_update": bfloat16},
        # Micro-batches are summed in float32: bfloat16 would round the later ones away.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": config.zero_stage,
            # A buffer of this size is held during the backward pass: no larger than all gradients.
            "reduce_bucket_size": max(1, min(BUCKET, trained)),
            # The tangent pass calls linear maps, embeddings and head as modules, around which ZeRO-3 fetches their weights,
            # and reads the norms' weights itself: these must be whole.
            "stage3_param_persistence_threshold": max(KEPT_WHOLE, vector),
            "stage3_gather_16bit_weights_on_model_save": config.zero_stage == 3,
            **({"offload_optimizer": {"device": "cpu", "pin_memory": distributed.use_cuda()}} if offload else {}),
        },
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own AdamW for CPUs takes a compiler and a minute to build; torch's, fused, makes the same steps.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


class Part(NamedTuple):
    """What this rank's optimizer holds of one trained parameter: K consecutive elements of it, from `start` on, as views [K]
    of the engine's memory, float32: weight, and AdamW's moments exp_avg and exp_avg_sq."""

    name: str
    start: int
    tensors: dict[str, torch.Tensor]


def parts(engine: Engine) -> Iterator[Part]:
    """What this rank's optimizer holds; over the ranks every element of every trained parameter.

    ZeRO 1 and 2 cut all parameters, laid end to end, into a piece per rank; ZeRO-3 cuts each parameter. Without ZeRO every
    rank holds all, in float32.
    """
    optimizer = engine.optimizer
    adamw = getattr(optimizer, "optimizer", optimizer)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if engine.zero_optimization_stage() == 3:
            group, first, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            held, start = optimizer.fp32_partitioned_groups_flat[group], distributed.rank() * size
            # The last pieces are padded.
            size = min(size, parameter.ds_numel - start)
        elif engine.zero_optimization_stage():
            if (place := parameter._hp_mapping) is None:
                continue
            held, start = adamw.param_groups[place.param_group_index]["params"][0], place.lp_fragment_address.start
            first, size = place.hp_fragment_address.start, place.hp_fragment_address.numel
        else:
            held, start, first, size = parameter, 0, 0, parameter.numel()
        if size > 0:
            state, moments = adamw.state[held], ("exp_avg", "exp_avg_sq")
            if not state:  # before the first step, as torch's AdamW begins
                state["step"] = torch.zeros((), dtype=torch.float32, device=held.device)
                state |= {kind: torch.zeros_like(held) for kind in moments}
            whole = {"weight": held.detach(), **{kind: state[kind] for kind in moments}}
            yield Part(name, start, {kind: value.view(-1).narrow(0, first, size) for kind, value in whole.items()})


def continue_after(engine: Engine, step: int) -> None:
    """Turn a fresh engine, whose `parts` were overwritten by a state's, into the one that has made `step` steps."""
    optimizer = engine.optimizer
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        state["step"].fill_(step)
    if engine.zero_optimization_stage() == 3:
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif engine.zero_optimization_stage():
        optimizer.update_lp_params()
    engine.global_steps = step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects an optimizer step before
        for _ in range(step):
            engine.lr_scheduler.step()


@contextlib.contextmanager
def evaluating(engine: Engine) -> Iterator[Policy]:
    """The bare policy without gradients or recomputation."""
    engine.module.eval()
    try:
        with torch.no_grad():
            yield engine.module
    finally:
        engine.module.train()

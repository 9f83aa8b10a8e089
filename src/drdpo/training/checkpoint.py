"""Checkpoints: plain Hugging Face folders for use, DeepSpeed state for going on."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from drdpo import distributed
from drdpo.chat import Tokenizer
from drdpo.errors import DataError
from drdpo.files import atomic_folder
from drdpo.training.engine import Engine
from drdpo.training.newest import keep_only, read_newest, write_newest


def save_model(engine: Engine, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the policy as a Hugging Face folder (safetensors in the training dtype, tokenizer), whole or not at all.

    Args:
        engine: of any ZeRO stage; every rank must call.
        tokenizer: of the policy.
        folder: save_path/global_step_<n>.
    """
    model = engine.module.language_model
    weights = _gathered(model) if engine.zero_optimization_stage() == 3 else model.state_dict()
    if distributed.is_main():
        if model.config.tie_word_embeddings:
            # The tied head is the embedding; written twice it would be loaded as a second, stale copy.
            head = model.get_output_embeddings().weight
            tied = [name for name, value in model.named_parameters(remove_duplicate=False) if value is head]
            weights = {name: value for name, value in weights.items() if name not in tied[1:]}
        try:
            with atomic_folder(folder) as aside:
                model.save_pretrained(aside, state_dict=weights)
                tokenizer.save_pretrained(aside)
        except SafetensorError as error:
            # What safetensors makes of a full disk.
            raise DataError(f"{folder}: the checkpoint could not be written ({error}); earlier ones are kept") from error
    distributed.barrier()


def _gathered(model: Any) -> dict[str, torch.Tensor]:
    """Full weights of a model that ZeRO-3 has partitioned, on the CPU of rank 0, one parameter at a time."""
    import deepspeed

    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            if distributed.is_main():
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def save_state(engine: Engine, folder: Path, step: int) -> None:
    """Write DeepSpeed's state after `step` optimizer steps and drop the one before; every rank must call.

    Args:
        engine: the running engine.
        folder: save_path/resume.
        step: optimizer steps done.
    """
    tag = f"step_{step}"
    state = {"step": step, "world_size": distributed.world_size()}
    if distributed.is_main():
        keep_only(folder, str((read_newest(folder) or {}).get("tag")))
    distributed.barrier()
    try:
        engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
    except (OSError, RuntimeError) as error:
        # RuntimeError is what torch makes of a full disk.
        shutil.rmtree(folder / tag, ignore_errors=True)
        raise DataError(f"{folder / tag}: the state could not be written ({error}); the one before is kept") from error
    distributed.barrier()
    if distributed.is_main():
        write_newest(folder, {**state, "tag": tag})
        keep_only(folder, tag)
    distributed.barrier()


def load_state(engine: Engine, folder: Path) -> int:
    """Load the newest complete state.

    Args:
        engine: freshly started.
        folder: save_path/resume.

    Returns:
        Optimizer steps done; 0 where there is no state.

    Raises:
        DataError: DeepSpeed cannot read the state.
    """
    newest = read_newest(folder)
    if newest is None:
        return 0
    loaded, _ = engine.load_checkpoint(str(folder), tag=newest["tag"])
    if loaded is None:
        raise DataError(f"{folder / newest['tag']}: DeepSpeed cannot read this state; start anew with --resume=never")
    return int(newest["step"])

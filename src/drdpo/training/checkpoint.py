"""Checkpoints: plain Hugging Face folders for use, DeepSpeed state for going on."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from drdpo import distributed
from drdpo.chat import Tokenizer
from drdpo.config import TrainConfig
from drdpo.errors import DataError
from drdpo.files import atomic_folder
from drdpo.training.engine import Engine
from drdpo.training.lora import merged, save_adapter
from drdpo.training.newest import keep_only, read_newest, write_newest


def save_model(engine: Engine, tokenizer: Tokenizer, folder: Path, config: TrainConfig) -> None:
    """Write the policy as a Hugging Face folder (safetensors in the training dtype, tokenizer), whole or not at all.

    With LoRA the folder holds the merged model, and the adapters in its subfolder `adapter` as peft lays them out; with
    --lora_merge=false it holds the adapters alone.

    Args:
        engine: of any ZeRO stage; every rank must call.
        tokenizer: of the policy.
        folder: save_path/global_step_<n>.
        config: of the run.

    Raises:
        DataError: a weight is not finite, or the disk is full; every rank raises the former.
    """
    model = engine.module.language_model
    weights = _gathered(model) if engine.zero_optimization_stage() == 3 else model.state_dict()
    _check_weights(engine, weights, folder)
    if distributed.is_main():
        try:
            with atomic_folder(folder) as aside:
                if not config.lora_rank:
                    model.save_pretrained(aside, state_dict=_untied(model, weights))
                elif config.lora_merge:
                    save_adapter(model, weights, config, aside / "adapter")
                    model.save_pretrained(aside, state_dict=_untied(model, merged(weights, config)))
                else:
                    save_adapter(model, weights, config, aside)
                tokenizer.save_pretrained(aside)
        except SafetensorError as error:
            # What safetensors makes of a full disk.
            raise DataError(f"{folder}: the checkpoint could not be written ({error}); earlier ones are kept") from error
    distributed.barrier()


def _check_weights(engine: Engine, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """A gradient can be finite and the step it takes not."""
    bad = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    # Under ZeRO-3 rank 0 alone has the weights; all ranks stop, or the others would wait for it.
    found = distributed.gather(torch.tensor([float(len(bad))], device=engine.device))
    if found.any():
        raise DataError(
            f"{folder}: not written, as {bad[0] if bad else 'a weight'} holds values that are not finite; lower "
            "--learning_rate; earlier checkpoints are kept"
        )


def _untied(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the tied head, which is the embedding: written twice it would be loaded as a second, stale copy."""
    if not model.config.tie_word_embeddings:
        return weights
    head = model.get_output_embeddings().weight
    tied = [name for name, value in model.named_parameters(remove_duplicate=False) if value is head]
    return {name: value for name, value in weights.items() if name not in tied[1:]}


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
        engine.save_checkpoint(
            str(folder), tag=tag, client_state=state, save_latest=False, exclude_frozen_parameters=_has_frozen(engine)
        )
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
    # Frozen weights are not in the state: they are those that were loaded.
    loaded, _ = engine.load_checkpoint(str(folder), tag=newest["tag"], load_module_strict=not _has_frozen(engine))
    if loaded is None:
        raise DataError(f"{folder / newest['tag']}: DeepSpeed cannot read this state; start anew with --resume=never")
    return int(newest["step"])


def _has_frozen(engine: Engine) -> bool:
    return not all(parameter.requires_grad for parameter in engine.module.parameters())

"""Checkpoints: plain Hugging Face folders for use, DeepSpeed state for going on."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from drdpo import distributed
from drdpo.chat import Tokenizer
from drdpo.errors import UsageError
from drdpo.files import atomic_file, atomic_folder
from drdpo.training.engine import Engine


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
        with atomic_folder(folder) as aside:
            model.save_pretrained(aside, state_dict=weights)
            tokenizer.save_pretrained(aside)
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
    engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
    distributed.barrier()
    if distributed.is_main():
        # The state counts only once this file names it: a save that was cut short is never read.
        with atomic_file(folder / "newest.json") as stream:
            json.dump({**state, "tag": tag}, stream)
        for other in folder.glob("step_*"):
            if other.name != tag:
                shutil.rmtree(other)
    distributed.barrier()


def load_state(engine: Engine, folder: Path) -> int:
    """Load the newest complete state.

    Args:
        engine: freshly started.
        folder: save_path/resume.

    Returns:
        Optimizer steps done; 0 where there is no state.

    Raises:
        UsageError: the state was written by another number of processes.
    """
    newest = folder / "newest.json"
    if not newest.is_file():
        return 0
    state = json.loads(newest.read_text(encoding="utf-8"))
    if state["world_size"] != distributed.world_size():
        raise UsageError(
            f"{folder} was written by {state['world_size']} processes and cannot be resumed by "
            f"{distributed.world_size()}; use as many, or start anew with --resume=never"
        )
    engine.load_checkpoint(str(folder), tag=state["tag"])
    return int(state["step"])

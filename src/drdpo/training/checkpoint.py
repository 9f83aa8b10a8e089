"""Checkpoints: plain Hugging Face folders for use, DeepSpeed state for going on."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from drdpo import distributed
from drdpo.chat import Tokenizer
from drdpo.config import TrainConfig
from drdpo.errors import DataError
from drdpo.folder import atomic_folder, flush
from drdpo.training.disk import check_room
from drdpo.training.engine import Engine
from drdpo.training.lora import load_base, merged, save_adapter
from drdpo.training.newest import check_owner, damage, describe, keep_only, states, write_index
from drdpo.training.stop import is_lost_rank, patient

KEPT = 2
"""States that stay: the newest, and the one before should the newest be damaged."""


def save_model(engine: Engine, tokenizer: Tokenizer, folder: Path, config: TrainConfig) -> None:
    """Write the policy as a Hugging Face folder (safetensors in the training dtype, tokenizer), whole or not at all.

    With LoRA the folder holds the merged model, and the adapters in its subfolder `adapter` as peft lays them out; with
    --lora_merge=false it holds the adapters alone. Quantized weights are merged in full precision, from --model_path.

    Args:
        engine: of any ZeRO stage; every rank must call.
        tokenizer: of the policy.
        folder: save_path/global_step_<n>.
        config: of the run.

    Raises:
        DataError: a weight is not finite, or the disk is full; every rank raises the former.
    """
    # Rank 0 writes while the others wait.
    with patient(4 * _elements(engine.module)):
        _save_model(engine, tokenizer, folder, config)


def _save_model(engine: Engine, tokenizer: Tokenizer, folder: Path, config: TrainConfig) -> None:
    model = engine.module.language_model
    weights = _gathered(model) if engine.zero_optimization_stage() == 3 else model.state_dict()
    _check_weights(engine, weights, folder)
    check_room(folder, written_bytes(model, weights, config), engine.device)
    distributed.on_main(lambda: _write_model(model, weights, tokenizer, folder, config))


def _write_model(
    model: Any, weights: dict[str, torch.Tensor], tokenizer: Tokenizer, folder: Path, config: TrainConfig
) -> None:
    try:
        with atomic_folder(folder) as aside:
            if not config.lora_rank:
                model.save_pretrained(aside, state_dict=_untied(model, weights))
            elif config.lora_merge:
                save_adapter(model, weights, aside / "adapter")
                whole = model
                if config.lora_quantize != "none":
                    whole = load_base(config)
                    weights = whole.state_dict() | {name: w.cpu() for name, w in weights.items() if ".lora_" in name}
                whole.save_pretrained(aside, state_dict=_untied(whole, merged(weights, config)))
            else:
                save_adapter(model, weights, aside)
            tokenizer.save_pretrained(aside)
    except SafetensorError as error:
        # What safetensors makes of a full disk.
        raise DataError(f"{folder}: the checkpoint could not be written ({error}); earlier ones are kept") from error


def written_bytes(model: Any, weights: dict[str, torch.Tensor], config: TrainConfig) -> int:
    """Bytes of the weights that save_model writes.

    Args:
        model: the run's.
        weights: of it, whole, by name.
        config: of the run.
    """
    adapters = sum(weight.nbytes for name, weight in weights.items() if ".lora_" in name)
    if config.lora_rank and not config.lora_merge:
        return adapters
    if config.lora_quantize != "none":
        # Written in full precision; transformers counts 4-bit weights one by one.
        return int(getattr(torch, config.dtype).itemsize * model.num_parameters())
    return sum(weight.nbytes for weight in _untied(model, weights).values())


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
    """Write DeepSpeed's state after `step` optimizer steps, whole or not at all, and keep the one before.

    Every rank must call.

    Args:
        engine: the running engine.
        folder: save_path/resume, on a file system that all ranks share.
        step: optimizer steps done.

    Raises:
        DataError: the disk is full, or a rank cannot see what another one wrote.
    """
    with patient(_state_bytes(engine)):
        _save_state(engine, folder, step)


def _save_state(engine: Engine, folder: Path, step: int) -> None:
    aside = folder / f".step_{step}.tmp"
    distributed.on_main(lambda: _make_room(folder))
    check_room(folder / f"step_{step}", _state_bytes(engine), engine.device)
    try:
        engine.save_checkpoint(str(folder), tag=aside.name, save_latest=False, exclude_frozen_parameters=_has_frozen(engine))
        distributed.barrier()
        files = _described(engine, aside)
        distributed.on_main(lambda: _into_place(aside, folder, step, files))
    except (OSError, RuntimeError) as error:
        # RuntimeError is what torch makes of a full disk, and of a rank that is gone.
        if is_lost_rank(error):
            raise
        shutil.rmtree(aside, ignore_errors=True)
        raise DataError(
            f"{folder / f'step_{step}'}: the state could not be written ({error}); the one before is kept"
        ) from error


def _make_room(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    keep_only(folder, states(folder)[0][:1])


def _into_place(aside: Path, folder: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    place = folder / f"step_{step}"
    write_index(aside, step, distributed.world_size(), files)
    flush(aside)
    if place.exists():
        # Damaged, or it would have been loaded.
        os.replace(place, place.with_name(f".{place.name}.old"))
    os.replace(aside, place)
    flush(folder)
    keep_only(folder, states(folder)[0][:KEPT])


def _described(engine: Engine, folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file, flushed to disk, each by one of the ranks."""
    names = sorted(path.name for path in folder.iterdir())
    rows = []
    for number in distributed.shard(range(len(names))):
        flush(folder / names[number])
        about = describe(folder / names[number])
        rows.append([number, about["size"], *bytes.fromhex(about["sha256"])])
    table_K34 = torch.tensor(rows, dtype=torch.int64, device=engine.device).reshape(-1, 34)
    return {
        names[number]: {"size": size, "sha256": bytes(digest).hex()}
        for number, size, *digest in distributed.gather(table_K34).tolist()
    }


def _state_bytes(engine: Engine) -> int:
    """Bytes of all ranks' state, by formula: AdamW's moments, float32 weights, and the weights in the training dtype."""
    size = next(parameter.element_size() for parameter in engine.module.parameters() if parameter.requires_grad)
    return _elements(engine.module, trained=True) * (8 + 4 + (size if engine.zero_optimization_stage() < 3 else 0))


def _elements(policy: torch.nn.Module, trained: bool = False) -> int:
    """How many numbers a policy's weights, or those of them that are trained, hold."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad or not trained]
    # ZeRO-3 leaves a parameter's true size in ds_numel.
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def load_state(engine: Engine, folder: Path) -> int:
    """Load the newest complete state; says, on rank 0, which ones were damaged and skipped.

    Args:
        engine: freshly started.
        folder: save_path/resume.

    Returns:
        Optimizer steps done; 0 where there is no state.

    Raises:
        DataError: DeepSpeed cannot read the state.
    """
    found, torn = states(folder)
    # Rank 0's view of the folder counts: on a network file system another's may be older.
    steps = distributed.gather(torch.tensor([state.step for state in found] + [-1], device=engine.device)).tolist()
    steps = steps[: steps.index(-1)]
    chosen = None
    for step in steps:
        state = next((state for state in found if state.step == step), None)
        bad = damage(state, distributed.shard(sorted(state.files))) if state else f"{folder}/step_{step}: not seen"
        if not distributed.gather(torch.tensor([float(bad is not None)], device=engine.device)).any():
            chosen = state
            break
        torn.append(bad or f"{folder}/step_{step} does not hold what was written, as another rank sees it")
    if torn and distributed.is_main():
        where = f"the state after step {chosen.step}" if chosen else "the beginning"
        print(f"{torn[0]}: a state that is not whole; skipped, going on from {where}", flush=True)
    # One that is damaged but newer would be taken for the one to keep when the next is saved.
    kept = [state for state in found if chosen is not None and state.step <= chosen.step]
    distributed.on_main(lambda: keep_only(folder, kept))
    if chosen is None:
        return 0
    distributed.on_main(lambda: check_owner(chosen.folder))
    # Frozen weights are not in the state: they are those that were loaded.
    loaded, _ = engine.load_checkpoint(str(folder), tag=chosen.folder.name, load_module_strict=not _has_frozen(engine))
    if loaded is None:
        raise DataError(f"{chosen.folder}: DeepSpeed cannot read this state; start anew with --resume=never")
    return chosen.step


def _has_frozen(engine: Engine) -> bool:
    return not all(parameter.requires_grad for parameter in engine.module.parameters())

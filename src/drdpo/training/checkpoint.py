"""Checkpoints: global_step_<n>, plain Hugging Face folders for use, and resume/step_<n>, states to resume from.

A state has an index of its files, state.json: {step, world_size, files: {name: {size, sha256}}}. It is written under another
name, index last, flushed to disk and only then renamed: a save that was cut short is never taken for a state, and a state
whose files were cut or changed later is recognised and the one before used. Sizes are compared wherever states are listed,
contents only where a state is loaded.
"""

import contextlib
import hashlib
import itertools
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from drdpo import distributed
from drdpo.chat import Tokenizer
from drdpo.config.training import LoraSettings
from drdpo.errors import DataError
from drdpo.folder import atomic_folder, flush, read_json_object, remove_tree, whole_lines, write_json
from drdpo.training.engine import Engine, continue_after, parts
from drdpo.training.lora import load_base, merged, save_adapter
from drdpo.training.policy import Policy

STATE_INDEX = "state.json"
METHOD = "method.safetensors"
AT_ONCE = 2**30
"""Bytes of a state that a rank copies to the CPU before it writes them."""
KEPT = 2
"""States that stay: the newest, and the one before in case the newest is damaged."""
SLACK = 2**24
"""Bytes for a tokenizer and headers."""

Weights = dict[str, torch.Tensor]


def save_model(engine: Engine, tokenizer: Tokenizer, folder: Path, lora: LoraSettings | None, card: str = "") -> None:
    """Write the policy as a Hugging Face folder (safetensors in the training dtype, tokenizer), whole or not at all.

    With LoRA the folder contains the merged model, and the adapters in its subfolder `adapter` as peft lays them out;
    without `lora.merge` it contains the adapters alone. Quantized weights are merged into those of `lora.model_path`.
    Every rank must call; `card`, its README.md, is rank 0's. DataError if a weight is not finite, or the disk is full.
    """
    # Rank 0 writes while the others wait.
    with distributed.patient(4 * _elements(engine.module)):
        model = engine.module.language_model
        weights = _gathered(model) if engine.zero_optimization_stage() == 3 else model.state_dict()
        # A gradient can be finite and the step it takes not.
        bad = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
        # Under ZeRO-3 rank 0 alone has the weights; all ranks stop, or the others would wait for it.
        if distributed.any_rank(bool(bad)):
            what = f"{bad[0] if bad else 'a weight'} has values that are not finite"
            raise DataError(f"{folder}: not written, as {what}; lower --learning_rate; earlier checkpoints are kept")
        check_room(folder, written_bytes(model, weights, lora))
        distributed.on_main(lambda: _write_model(engine.module, weights, tokenizer, folder, lora, card))


def _gathered(model: Any) -> Weights:
    """Full weights of a model that ZeRO-3 has partitioned, on the CPU of rank 0, one parameter at a time."""
    import deepspeed

    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            if distributed.is_main():
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def _write_model(
    policy: Policy, weights: Weights, tokenizer: Tokenizer, folder: Path, lora: LoraSettings | None, card: str
) -> None:
    model, generation = policy.language_model, policy.generation_config
    try:
        with atomic_folder(folder) as aside:
            if lora:
                save_adapter(model, weights, aside / "adapter" if lora.merge else aside)
                if lora.merge and lora.quantize != "none":
                    model = load_base(lora)
                    weights = model.state_dict() | {name: w.cpu() for name, w in weights.items() if ".lora_" in name}
                weights = merged(weights, lora.rank) if lora.merge else weights
            if lora is None or lora.merge:
                if generation is not None:
                    model.generation_config = type(model.generation_config)()
                model.save_pretrained(aside, state_dict=_untied(model, weights))
                if generation is not None:
                    (aside / "generation_config.json").write_bytes(generation)
            tokenizer.save_pretrained(aside)
            if card:  # peft writes an empty one
                (aside / "README.md").write_text(card, encoding="utf-8")
    except SafetensorError as error:
        # How safetensors reports a full disk.
        raise DataError(f"{folder}: the checkpoint could not be written ({error}); earlier ones are kept") from error


def written_bytes(model: Any, weights: Weights, lora: LoraSettings | None) -> int:
    """Bytes of the weights that save_model writes for a model with these weights, whole, by name."""
    if lora and not lora.merge:
        return sum(weight.nbytes for name, weight in weights.items() if ".lora_" in name)
    if lora and lora.quantize != "none":
        # Written in full precision; transformers counts 4-bit weights one by one.
        return int(getattr(torch, lora.dtype).itemsize * model.num_parameters())
    return sum(weight.nbytes for weight in _untied(model, weights).values())


def _untied(model: Any, weights: Weights) -> Weights:
    """Without the tied head, which is the embedding: written twice it would be loaded as a second, stale copy."""
    if not model.config.tie_word_embeddings:
        return weights
    head = model.get_output_embeddings().weight
    tied = [name for name, value in model.named_parameters(remove_duplicate=False) if value is head]
    return {name: value for name, value in weights.items() if name not in tied[1:]}


def check_room(folder: Path, needed: int) -> None:
    """Stop every rank with a DataError if the disk has no room for a folder of so many bytes (rank 0's count), before one of
    them is written; every rank must call."""
    usage = shutil.disk_usage(folder.parent)
    # File systems that do not know report zero.
    short = distributed.is_main() and usage.total > 0 and usage.free < needed + SLACK
    if distributed.any_rank(short):
        raise DataError(
            f"{folder}: not written, as it takes {(needed + SLACK) / 1e9:.2f} GB and the disk has {usage.free / 1e9:.2f} GB "
            "left; earlier checkpoints are kept; make room, then rerun the same command"
        )


# --keep_checkpoints: which of the folders global_step_<n> stay.


def kept_steps(steps: Sequence[int], losses: dict[int, float], newest: int) -> set[int]:
    """Which checkpoints stay: the `newest` newest, all if it is 0, and of those with an evaluation loss the one with the
    lowest, the earlier one of equals."""
    best = sorted((step for step in steps if step in losses), key=lambda step: (losses[step], step))
    return {*sorted(steps)[-newest:], *best[:1]}


def remove_old_checkpoints(folder: Path, newest: int) -> None:
    """Delete the checkpoints in save_path that kept_steps does not keep, by the losses in metrics.jsonl. On rank 0, after a
    checkpoint is complete."""
    metrics = folder / "metrics.jsonl"
    lines = [line for _, line in whole_lines(metrics)] if metrics.is_file() else []
    losses = {int(line["step"]): float(line["eval_loss"]) for line in lines if "eval_loss" in line}
    places = _by_step(folder, "global_step_")
    for step in places.keys() - kept_steps(list(places), losses, newest):
        # Renamed first: a deletion that is cut short leaves nothing that looks like a checkpoint.
        gone = folder / f".global_step_{step}.old"
        try:
            places[step].replace(gone)
        except OSError as error:
            print(f"warning: {places[step]} could not be removed ({error.strerror})", file=sys.stderr)
        else:
            remove_tree(gone)


def _by_step(folder: Path, prefix: str) -> dict[int, Path]:
    """The folders <prefix><n> by n, newest first."""
    paths = {path.name.removeprefix(prefix): path for path in folder.glob(f"{prefix}*")}
    return {int(step): paths[step] for step in sorted(filter(str.isdigit, paths), key=int, reverse=True)}


# States to resume from.


class State(NamedTuple):
    """A state as its index describes it, after so many finished optimizer steps."""

    folder: Path
    step: int
    world_size: int
    files: dict[str, dict[str, Any]]
    """By name, as describe."""


def write_index(folder: Path, step: int, world_size: int, files: dict[str, dict[str, Any]]) -> None:
    """Describe a state whose files are all written."""
    write_json(folder / STATE_INDEX, {"step": step, "world_size": world_size, "files": files})


def describe(path: Path) -> dict[str, Any]:
    """{size, sha256} of a file."""
    with path.open("rb") as stream:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def states(folder: Path) -> tuple[list[State], list[str]]:
    """The states in save_path/resume whose files have their sizes, newest first; and what is wrong with the others."""
    found: list[State] = []
    torn: list[str] = []
    for place in _by_step(folder, "step_").values():
        try:
            index = read_json_object(place / STATE_INDEX)
            state = State(place, int(index["step"]), int(index["world_size"]), dict(index["files"]))
            sizes = {name: ((place / name).stat().st_size, about["size"]) for name, about in state.files.items()}
            wrong = [f"{place / name} has {size} bytes, not {of}" for name, (size, of) in sizes.items() if size != of]
        except (OSError, DataError, KeyError, TypeError, ValueError) as error:
            wrong = [f"{place / STATE_INDEX} or a file that it names is missing or not readable ({error})"]
        torn += wrong[:1]
        found += [] if wrong else [state]
    return found, torn


def damage(state: State, names: list[str]) -> str | None:
    """What is wrong with the contents of some of a state's files, or None."""
    for name in names:
        with contextlib.suppress(OSError, KeyError, TypeError):
            if describe(state.folder / name)["sha256"] == state.files[name]["sha256"]:
                continue
        return f"{state.folder / name} was changed after it was written"
    return None


def _keep_only(folder: Path, kept: list[State]) -> None:
    """Remove every state in save_path/resume but these, and what saves that were cut short left."""
    for other in {*folder.glob("step_*"), *folder.glob(".step_*")} - {state.folder for state in kept}:
        remove_tree(other)


def save_state(engine: Engine, folder: Path, step: int) -> None:
    """Write the state after `step` steps to save_path/resume, which all ranks share, whole or not at all, and keep the one
    before.

    Every rank writes what it holds: float32 weights and AdamW's moments as name/kind/start, flat, so any number of ranks can
    read them. Rank 0 adds what the method keeps. Frozen weights are not in it. Every rank must call. DataError if the disk
    is full, or a rank cannot see what another one wrote.
    """
    place, aside, size = folder / f"step_{step}", folder / f".step_{step}.tmp", 12 * _elements(engine.module, trained=True)
    with distributed.patient(size):
        distributed.on_main(lambda: _make_room(folder))
        check_room(place, size)
        try:
            distributed.on_main(lambda: _begin(engine, aside))
            _write_parts(engine, aside)
            distributed.barrier()
            files = _described(engine, aside)
            distributed.on_main(lambda: _into_place(aside, place, step, files))
        except (OSError, RuntimeError, SafetensorError) as error:
            # safetensors raises its own error when a disk is full, torch a RuntimeError when a rank is gone.
            if distributed.is_lost_rank(error):
                raise
            shutil.rmtree(aside, ignore_errors=True)
            raise DataError(f"{place}: the state could not be written ({error}); the one before is kept") from error


def _make_room(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _keep_only(folder, states(folder)[0][:1])


def _begin(engine: Engine, aside: Path) -> None:
    aside.mkdir()
    save_file({name: value.to("cpu") for name, value in engine.module.method_state.items()}, aside / METHOD)


def _write_parts(engine: Engine, aside: Path) -> None:
    """What this rank holds, a GiB at a time, or a tensor. Without ZeRO all hold the same."""
    mine = parts(engine) if engine.zero_optimization_stage() or distributed.is_main() else ()
    left = ((f"{part.name}/{kind}/{part.start}", value) for part in mine for kind, value in part.tensors.items())
    for number in itertools.count():
        held: Weights = {}
        room = AT_ONCE
        for name, values_K in left:
            held[name] = values_K.to("cpu", copy=True)
            room -= values_K.nbytes
            if room <= 0:
                break
        if not held:
            return
        save_file(held, aside / f"rank_{distributed.rank():05}_{number:05}.safetensors")


def _read_parts(engine: Engine, place: Path) -> None:
    """What this rank holds, from the files of all ranks that wrote, which may be another number; DataError on every rank if
    they lack some of it."""
    wrong = None
    with contextlib.ExitStack() as stack:
        pieces: dict[str, list[tuple[int, Any]]] = {}
        for path in sorted(place.glob("rank_*.safetensors")):
            stored = stack.enter_context(safe_open(path, framework="pt"))
            for name in stored.keys():  # noqa: SIM118 - not a dict
                key, _, start = name.rpartition("/")
                pieces.setdefault(key, []).append((int(start), stored.get_slice(name)))
        for part in parts(engine):
            for kind, values_K in part.tensors.items():
                end, found = part.start + len(values_K), 0
                for start, piece in pieces.get(f"{part.name}/{kind}", []):
                    first, last = max(start, part.start), min(start + piece.get_shape()[0], end)
                    if first < last:
                        values_K[first - part.start : last - part.start].copy_(piece[first - start : last - start])
                        found += last - first
                if found < len(values_K):
                    wrong = wrong or f"{len(values_K) - found} of {part.name}'s values ({kind})"
    if distributed.any_rank(wrong is not None):
        raise DataError(f"{place} lacks {wrong or 'values of another rank'}; start over with --resume=never")


def _described(engine: Engine, folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file, flushed to disk, each by one of the ranks."""
    names = sorted(path.name for path in folder.iterdir())
    if distributed.any_rank(len(set(distributed.gather_floats([len(names)]))) > 1):
        raise OSError("not every rank sees all files")
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


def _into_place(aside: Path, place: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    write_index(aside, step, distributed.world_size(), files)
    flush(aside)
    if place.exists():
        # Damaged, or it would have been loaded.
        os.replace(place, place.with_name(f".{place.name}.old"))
    os.replace(aside, place)
    flush(place.parent)
    _keep_only(place.parent, states(place.parent)[0][:KEPT])


def _elements(policy: Policy, trained: bool = False) -> int:
    """Elements of a policy's weights, or of those that are trained."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad or not trained]
    # ZeRO-3 leaves a parameter's true size in ds_numel.
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def load_state(engine: Engine, folder: Path) -> int:
    """Load the newest complete state of save_path/resume into a fresh engine, with what the method keeps, and return its
    finished optimizer steps, 0 without one; rank 0 prints if a damaged one was skipped. DataError if it lacks weights."""
    found, torn = states(folder)
    # Rank 0's view of the folder counts: on a network file system another's may be older.
    steps = distributed.gather(torch.tensor([state.step for state in found] + [-1], device=engine.device)).tolist()
    chosen = None
    for step in steps[: steps.index(-1)]:
        state = next((state for state in found if state.step == step), None)
        bad = damage(state, distributed.shard(sorted(state.files))) if state else f"{folder}/step_{step} is not visible"
        if not distributed.any_rank(bad is not None):
            chosen = state
            break
        torn.append(bad or f"{folder}/step_{step} is damaged, as another rank sees it")
    if torn:
        where = f"the state after step {chosen.step}" if chosen else "the beginning"
        distributed.say(f"skipped a damaged state: {torn[0]}; resuming from {where}")
    # A newer one that is damaged would be taken for the one to keep when the next is saved.
    kept = [state for state in found if chosen is not None and state.step <= chosen.step]
    distributed.on_main(lambda: _keep_only(folder, kept))
    if chosen is None:
        return 0
    if chosen.world_size != (world := distributed.world_size()):
        resumed = f"written by {chosen.world_size} and resumed by {world} process{'es' * (world > 1)}"
        distributed.say(f"{chosen.folder}: {resumed}, so not bit-identical to a run on one number of them")
    _read_parts(engine, chosen.folder)
    continue_after(engine, chosen.step)
    kept_by_method = load_file(chosen.folder / METHOD)
    engine.module.method_state = {name: value.to(engine.device) for name, value in kept_by_method.items()}
    return chosen.step

"""A training run's folder and inputs: checked before anything slow, written down before the work begins."""

import hashlib
import importlib.util
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from drdpo import chat, distributed
from drdpo.candidates import Candidates, load_candidates
from drdpo.cli import as_dict
from drdpo.config.training import TrainConfig
from drdpo.errors import DataError, UsageError
from drdpo.folder import (
    changed,
    read_manifest,
    refuse_if_locked,
    remove_tree,
    sweep,
    write_json,
    write_manifest,
)
from drdpo.machine import announce, check_device, settle
from drdpo.models import check_model, fingerprint
from drdpo.records import Preference
from drdpo.training.data import BatchPlan, Pair, tokenise
from drdpo.training.log import DASHBOARD, check_trackers
from drdpo.training.losses import Method, method_of
from drdpo.training.rows import Columns, load_split
from drdpo.training.shifts import Shifts, shifts_of

NOT_COMPARED = (
    "save_path", "save_steps", "eval_steps", "save_resume", "keep_checkpoints", "log", "gradient_checkpointing",
    "eval_columns", "eval_mixture", "eval_candidates", "max_candidate_prompts",
)  # fmt: skip
"""Flags that do not change the trained model, besides those of one start (as_dict)."""

CANDIDATES = "candidates"
"""Folder of step_<n>.safetensors: log-ratios of --eval_candidates."""

ROUNDINGS = ("micro_batch_size", "micro_batch_tokens")
"""Flags that divide a step's pairs, which changes its roundings alone, unless a micro-batch is a population or has
--wdpo_fraction's penalty or not. A run that ran out of memory may resume with others."""


@dataclass(frozen=True)
class Run:
    """What the training loop needs to know of its inputs."""

    config: TrainConfig
    method: Method
    folder: Path
    tokenizer: chat.Tokenizer
    train: list[Pair]
    test: list[Pair]
    counts: dict[str, Any]
    made_by: dict[str, Any]
    dtype_reason: str = ""
    shifts: Shifts = field(default_factory=lambda: Shifts({}, {}))
    candidates: Candidates | None = None
    """Of --eval_candidates."""
    recompute: int = 0
    """The first layers, whose activations are recomputed; from preflight."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the run; the pairs that do not fill a last one are not trained on once more."""
        return self.config.max_steps or self.config.max_epochs * len(self.train) // self.config.train_batch_size

    @property
    def sequences(self) -> list[Pair]:
        """All pairs, and the longest candidate of every prompt as one: what the model must have room for."""
        found = self.candidates
        of_prompts = zip(found.prompts, found.answers, strict=True) if found else ()
        longest = [Pair(prompt, answer, answer) for prompt, answers in of_prompts for answer in [max(answers, key=len)]]
        return [*self.train, *self.test, *longest]

    def epochs(self, steps: int) -> float:
        """Passes over the training pairs that so many steps make."""
        return steps * self.config.train_batch_size / len(self.train)

    @cached_property
    def plans(self) -> dict[str, BatchPlan]:
        """This rank's micro-batches of each split."""
        pad = self.tokenizer.pad_token_id
        pad = int(self.tokenizer.eos_token_id if pad is None else pad)
        return {split: batch_plan(self.config, pairs, pad) for split, pairs in (("train", self.train), ("test", self.test))}


def batch_plan(config: TrainConfig, pairs: list[Pair], pad_token_id: int = 0) -> BatchPlan:
    """This rank's plan of a split's micro-batches, as the flags say."""
    return BatchPlan(
        pairs, config.train_batch_size, config.micro_batch, config.micro_batch_tokens, config.robust_scope == "step",
        config.seed, config.packing, pad_token_id, distributed.rank(), distributed.world_size(),
    )  # fmt: skip


def arithmetic_of(config: TrainConfig) -> str:
    """What a log-prob depends on besides weights and pairs."""
    kernel = config.attention_kernel + " and plain log-softmax" * config.second_derivative
    kernel += " and values in float32" * config.wide_values
    return " ".join([config.dtype, config.attention, kernel, config.lora_quantize])


def check_inputs(config: TrainConfig, method: Method) -> None:
    """Refuse what cannot be trained, before any model is loaded: UsageError for flags, DataError for the model folder or the
    data set. --check_only prints what --dtype=auto is."""
    _check_own(config, method)
    _check_batches(config, method)
    distributed.seconds_to_wait()
    check_device(kernels=True)
    if config.attn in ("flex", "flash") and not distributed.use_cuda():
        raise UsageError(f"--attn={config.attn} needs a CUDA device, and there is none; pass --attn=sdpa")
    if config.attn == "flash" and not config.packing and importlib.util.find_spec("flash_attn") is None:
        raise UsageError("--attn=flash needs the package flash-attn, which is not installed; pass --attn=sdpa")
    asked, (config, precision) = config.dtype, settle(config)
    check_trackers(config.trackers)
    check_model(config.model_path).refuse_training(
        config.packing, config.attention_kernel == "eager", config.tangent, bool(config.lora_rank), config.max_len
    )
    if config.chat_template_kwargs or config.eval_candidates:
        _candidates(config, chat.load_tokenizer(config.model_path, config.chat_template_kwargs))
    if Path(config.dataset_path).exists():
        _check_pairs(config, method, {split: columns for split, (_, columns) in _load(config, method).items()})
    folder = Path(config.save_path)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--save_path={folder} is a file, not a folder")
    refuse_if_locked(folder)
    before = read_manifest(folder).get("train")
    if before is not None and config.resume == "auto":
        now = {name: value for name, value in _made_by(config, method).items() if name not in _left_open(config)}
        if asked == "auto" and distributed.world_size() > 1:
            del now["dtype"]  # settled when the ranks meet
        known = {name: before["made_by"].get(name) for name in now}
        _other_roundings(config, folder, {**before, "made_by": known}, now)
        # It imports engine and policy, for which a check before a launch should not wait.
        from drdpo.training.checkpoint import states

        world, newest = distributed.world_size(), next(iter(states(folder / "resume")[0]), None)
        if newest and newest.world_size != world and (bound := _bound(config)) and not before.get("complete"):
            raise UsageError(
                f"{folder} was written by {newest.world_size} processes, and with {bound} another number of them ({world}) "
                f"is another objective; use {newest.world_size}, or start over with --resume=never"
            )
    if config.check_only:
        announce(precision)


def _check_own(config: TrainConfig, method: Method) -> None:
    """Refuse an own method that the rest of the run would take for another."""
    chosen = method_of(config)
    if type(config) is not TrainConfig and method.label == chosen.label:
        raise UsageError(
            f"{type(config).__name__} is a command line of its own, but its method is called {method.label}, as one of "
            "train_alignment.sh; return a Method with another name, see docs/own.md"
        )
    if config.weight_column != method.weight_column:
        given = (
            f"and --weight_column is {config.weight_column}; make it with replace(method_of(config), ...), or pass the same"
        )
        raise UsageError(f"{method.name} has weight_column {method.weight_column}, {given}")
    if method.penalty not in (None, chosen.penalty):
        raise UsageError(f"{method.name} has a penalty of its own: pass --wdpo_rho and keep the penalty of method_of")


def _check_batches(config: TrainConfig, method: Method) -> None:
    world, micro = distributed.world_size(), config.micro_batch
    if config.train_batch_size % (micro * world) and deals_by_tokens(config):
        micro = 1
    if config.train_batch_size % (micro * world):
        times = f"--micro_batch_size={micro} times " if config.micro_batch_tokens is None else ""
        whole = f"{times}{world} process{'es' * (world > 1)}"
        raise UsageError(f"--train_batch_size={config.train_batch_size} is not divisible by {whole}")
    if config.robust_scope == "micro" and method.update:
        raise UsageError(f"--robust_scope=micro: {method.name} changes what it keeps once a step, by all its pairs; omit it")
    if config.robust_scope == "micro" and not method.needs_population:
        squared = " with --wdpo_penalty=squared" if method.penalty else ""
        raise UsageError(
            f"--robust_scope=micro has no meaning for {method.name}{squared}: no pair's term depends on others; omit it, or "
            "pass --kldpo_tau, --drdpo_beta, --method=tv, chi2 or cvar, or --wdpo_penalty=root"
        )
    population = config.train_batch_size if config.robust_scope == "step" else micro * world
    if method.weights is not None and method.population and population == 1:
        more = "--train_batch_size" if config.robust_scope == "step" else "--micro_batch_size"
        raise UsageError(f"a population of one pair: its robust weight is always 1, which is plain DPO; raise {more}")
    count = config.train_batch_size // (micro * world)
    if config.wdpo_fraction * count < 1 and config.micro_batch_tokens is None and not deals_by_tokens(config):
        raise UsageError(
            f"--wdpo_fraction={config.wdpo_fraction} of {count} micro-batch{'es' * (count > 1)} a step is less than 1; "
            f"pass --wdpo_fraction={1 / count:.3g} or more, or a smaller --micro_batch_size"
        )


def deals_by_tokens(config: TrainConfig) -> bool:
    """Does the machine choose --micro_batch_tokens? On CUDA, for packed rows, unless a flag says how many pairs or tokens,
    or --robust_scope=micro makes the population a micro-batch."""
    given = config.micro_batch_size is not None or config.micro_batch_tokens is not None
    return not given and config.packing and config.robust_scope == "step" and distributed.use_cuda()


def _left_open(config: TrainConfig) -> set[str]:
    """Flags that drdpo.training.memory will replace by what the machine needs."""
    rows = {"micro_batch_size", "micro_batch_tokens"} if deals_by_tokens(config) else set()
    return rows | ({"attn"} if config.attn == "auto" else set())


def open_run(config: TrainConfig, method: Method, dtype_reason: str = "") -> Run:
    """Read and tokenise the pairs; writes nothing. `dtype_reason`: why --dtype is what it is, for the manifest. DataError as
    _check_pairs, UsageError for pairs beyond --micro_batch_tokens."""
    tokenizer = chat.load_tokenizer(config.model_path, config.chat_template_kwargs)
    pairs, counts, of = {}, {}, {}
    for split, (preferences, columns) in _load(config, method).items():
        pairs[split], dropped = tokenise(preferences, tokenizer, config.max_len, columns)
        counts[split] = {"in": len(preferences), "out": len(pairs[split]), **dropped}
        reasons = ", ".join(f"{count} {why}" for why, count in dropped.items() if count)
        reasons = f" ({reasons})" if reasons else ""
        of[split] = f" of {len(preferences)}{reasons}"
        distributed.say(f"{split}: {len(pairs[split])} of {len(preferences)} pairs{reasons}")
        longest, budget = max((pair.row_tokens() for pair in pairs[split]), default=0), config.micro_batch_tokens
        if budget is not None and longest > budget:
            more = f"the longest {split} pair takes {longest} tokens of a row; raise it, or lower --max_len"
            raise UsageError(f"--micro_batch_tokens={budget}: {more}")
    shifts, lines = _check_pairs(config, method, pairs, of)
    if (column := method.group) is not None:
        names = sorted({pair.groups[column] for part in pairs.values() for pair in part})
        numbers = {name: float(number) for number, name in enumerate(names)}
        for split, part in pairs.items():
            pairs[split] = [replace(p, columns={**p.columns, column: numbers[p.groups[column]]}) for p in part]
    for line in lines:
        distributed.say(f"test, {line}")
    made_by = {**_made_by(config, method), "pairs": pairs_hash([*pairs["train"], *pairs["test"]])}
    return Run(
        config, method, Path(config.save_path), tokenizer, pairs["train"], pairs["test"], counts, made_by, dtype_reason,
        shifts, _candidates(config, tokenizer),
    )  # fmt: skip


def _load(config: TrainConfig, method: Method) -> dict[str, tuple[list[Preference], list[Columns]]]:
    """Both sides of the data, with what the method reads of their rows, and on the test side the evaluation."""
    read = partial(load_split, config.data, reads=method.reads, weight=method.weight_column)
    groups = [method.group] if method.group else []
    train = read("train", groups=groups)
    preferences, columns = read("test", groups=[*groups, *config.eval_groups], mixtures=config.mixtures)
    return {"train": train, "test": (preferences[: config.max_test_pairs], columns[: config.max_test_pairs])}


def _check_pairs(
    config: TrainConfig, method: Method, found: Mapping[str, Sequence[Pair] | Sequence[Columns]], of: Mapping[str, str] = {}
) -> tuple[Shifts, list[str]]:
    """What shifts_of makes of the test pairs, or of what is read of their rows. DataError as it does, for too few pairs, or
    for training pairs of one group, or with a group of one, whose weight would be that pair's."""
    source = config.dataset_path
    for split, least in (("train", config.train_batch_size), ("test", 1)):
        count = len(found[split])
        if count < least:
            way_out = f"; pass --train_batch_size={count} or less" if split == "train" and count else ""
            raise DataError(f"{source}: {count} usable {split} pairs{of.get(split, '')}, fewer than {least}{way_out}")
    counts = Counter(pair.groups[method.group] for pair in found["train"] if method.group)
    few = min(counts, key=lambda name: counts[name], default="")
    if len(counts) == 1:
        raise DataError(f'{source}: field "{method.group}" names one group only; --method=group needs two or more')
    if counts and counts[few] == 1:
        raise DataError(
            f'{source}: of {len(counts)} groups in field "{method.group}", "{few}" is left with 1 usable training '
            "pair; a group needs two: merge it into another, or remove its rows"
        )
    return shifts_of(found["test"], config.eval_groups, list(config.mixtures), source)


def _candidates(config: TrainConfig, tokenizer: chat.Tokenizer) -> Candidates | None:
    """Those of --eval_candidates; DataError as load_candidates, UsageError if one is longer than --max_len."""
    if config.eval_candidates is None:
        return None
    found = load_candidates(config.eval_candidates, "test", tokenizer, config.mixtures, config.max_candidate_prompts)
    if found.longest > config.max_len:
        raise UsageError(f"{found.path}: one has {found.longest} tokens, and none is cut; pass --max_len={found.longest}")
    return found


def pairs_hash(pairs: list[Pair], columns: bool = True) -> str:
    """Hash of the token ids of pairs, and of the columns that the method reads, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr((pair.prompt, pair.chosen, pair.rejected)).encode())
        if columns and pair.columns:
            digest.update(repr(sorted(pair.columns.items())).encode())
    return digest.hexdigest()


def _made_by(config: TrainConfig, method: Method) -> dict[str, Any]:
    """What the trained model depends on, as far as it is known before the pairs are tokenised."""
    flags = {name: value for name, value in as_dict(config).items() if name not in NOT_COMPARED}
    return {**flags, "method": method.label, "model": fingerprint(config.model_path)}


def _bound(config: TrainConfig) -> str:
    """Flags by which the division of a step's pairs into micro-batches changes more than roundings; none if it does not."""
    scope = "--robust_scope=micro" if config.robust_scope == "micro" else ""
    return scope or ("--wdpo_fraction below 1" if config.wdpo_fraction < 1 else "")


def _other_roundings(config: TrainConfig, folder: Path, entry: dict[str, Any], made_by: dict[str, Any]) -> str:
    """Refuse to resume the run of a manifest's entry as another run; which flags change roundings alone, for a message."""
    before, roundings = entry["made_by"], ""
    if not _bound(config) and not entry.get("complete"):
        kept = {name: made_by[name] for name in ROUNDINGS if name in made_by}
        roundings = changed({name: before.get(name) for name in kept}, kept)
        before = before | kept
    if changes := changed(before, made_by):
        raise UsageError(
            f"{folder} contains a run from a different configuration: {changes}; pass another --save_path, or "
            "--resume=never to replace it"
        )
    return roundings


def is_complete(run: Run) -> bool:
    """Does the run's folder contain this run, complete? UsageError if another is in it that --resume=auto would continue."""
    before = read_manifest(run.folder).get("train")
    if before is None or run.config.resume == "never":
        return False
    roundings = _other_roundings(run.config, run.folder, before, run.made_by)
    if roundings:
        distributed.say(f"{run.folder}: resuming with another {roundings}, so not bit-identical to a run without it")
    return bool(before.get("complete")) and is_saved(run.folder / f"global_step_{run.steps}")


def is_saved(folder: Path) -> bool:
    """Does global_step_<n> contain a model or, under --lora_merge=false, an adapter?"""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def claim_folder(run: Run) -> None:
    """Prepare the run's folder for writing; on rank 0, once no rank reads what an earlier run left there."""
    folder, config = run.folder, run.config
    if config.resume == "never":
        for old in [folder / "resume", folder / "tensorboard", folder / CANDIDATES, *folder.glob("global_step_*")]:
            shutil.rmtree(old, ignore_errors=True)
        references = (f"reference_{part}.safetensors" for part in ("train", "test", CANDIDATES))
        for name in ("metrics.jsonl", "eval_pairs.json", DASHBOARD, "training.png", *references):
            (folder / name).unlink(missing_ok=True)
    sweep(folder)
    for removed in folder.glob(".global_step_*.old"):
        remove_tree(removed)
    write_json(folder / "config.json", as_dict(config))
    note_run(run, complete=False)


def note_run(run: Run, complete: bool) -> None:
    """Write the run's manifest."""
    facts = {"counts": run.counts, "steps": run.steps, "complete": complete, "dtype_reason": run.dtype_reason}
    write_manifest(run.folder, "train", run.made_by, as_dict(run.config), **facts)

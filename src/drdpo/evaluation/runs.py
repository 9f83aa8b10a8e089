"""Folders of scored completions: scores averaged per prompt, and how the completions were made.

Shapes: P prompts, C completions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from drdpo.candidates import check_scored
from drdpo.errors import DataError, UsageError
from drdpo.folder import read_json_object, read_manifest
from drdpo.objectives import ARMORM_OBJECTIVES, GATED_SCORE, flag_name, objective_from_flag
from drdpo.records import Completion, Message, read_records

ANSWERS = ("tokens", "repeated", "cut")
"""Metrics of the answers: length in tokens, `repeated_share`, and whether the length limit cut the answer."""


@dataclass(frozen=True)
class ScoredRun:
    """The scores of one policy on one split. Every prompt has the same weight, regardless of its number of completions."""

    name: str
    folder: Path
    prompts: dict[int, list[Message]]
    """{prompt_id: messages}, in ascending order: the index of `scores` and `answers`."""
    scores: pd.DataFrame
    """[P, objectives]: mean over a prompt's completions."""
    answers: pd.DataFrame
    """[P, ANSWERS]: mean over a prompt's completions."""
    completions: pd.DataFrame
    """[C, objectives]: the score of every completion."""
    seeds: tuple["ScoredRun", ...] = ()
    """If several training seeds are pooled in this run: each of them, on the prompts that all share."""

    @property
    def members(self) -> tuple["ScoredRun", ...]:
        """The seeds of the run; the run itself if there is only one."""
        return self.seeds or (self,)

    def mean(self, objective: str) -> float:
        """Mean over prompts."""
        return float(self.scores[objective].to_numpy().mean())

    def sd(self, objective: str) -> float:
        """Standard deviation over completions (population form); 0 if all scores are equal."""
        scores_C = self.completions[objective].to_numpy()
        return 0.0 if np.ptp(scores_C) == 0 else float(scores_C.std())


def repeated_share(token_ids: Sequence[int], n: int = 4) -> float:
    """seq-rep-n of one answer (Welleck et al. 2020, arXiv 1908.04319, section 6): 1 - |distinct n-grams| / |n-grams|.

    0 if no n-gram repeats, near 1 for a loop, 0 for answers of fewer than n tokens. The tokens are the policy's own, so
    compare runs that share a tokenizer.
    """
    grams = len(token_ids) - n + 1
    if grams < 1:
        return 0.0
    return 1 - len({tuple(token_ids[start : start + n]) for start in range(grams)}) / grams


def parse_runs(arguments: list[str], flag: str = "--runs") -> dict[str, list[Path]]:
    """{name: folders} of NAME=FOLDER arguments, in order. A name with several folders is one run of several seeds.

    Names and folders may contain "=" (`tau=0.05=outputs/tau=0.05`): the first split whose folder exists is used, else the
    one at the first "=".

    Raises:
        UsageError: an argument without "=", an empty part, or the same name and folder twice.
    """
    folders: dict[str, list[Path]] = {}
    for argument in arguments:
        parts = argument.split("=")
        splits = [("=".join(parts[:cut]), "=".join(parts[cut:])) for cut in range(1, len(parts))]
        splits = [(name, folder) for name, folder in splits if name and folder]
        if not splits:
            raise UsageError(f"{flag} {argument}: write NAME=FOLDER, e.g. {flag} base=outputs/base dpo=outputs/dpo")
        name, folder = next((split for split in splits if Path(split[1]).is_dir()), splits[0])
        if Path(folder) in folders.setdefault(name, []):
            raise UsageError(f"{flag}: the name {name} is given twice with {folder}; pass a different folder for every seed")
        folders[name].append(Path(folder))
    return folders


def load_run(name: str, folder: Path, split: str) -> ScoredRun:
    """Read `folder/<split>.jsonl` and average per prompt.

    Raises:
        DataError: a missing folder or split, or a row that is not a completion, is not scored, has other objectives than
            row 1, repeats a (prompt_id, sample_id), or has another prompt than earlier rows with its prompt_id.
    """
    if not folder.is_dir():
        raise DataError(f"run {name}: {folder}: no such folder")
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        there = sorted(file.name for file in folder.glob("*.jsonl"))
        raise DataError(
            f"run {name}: {path}: no such file; the folder has {', '.join(there) or 'no completions'}; "
            "choose with --split=train or --split=test"
        )
    rows = read_records(path, Completion.from_row)
    prompts = dict(sorted(check_scored(path, rows).items()))
    scores = pd.DataFrame([row.scores for row in rows], columns=sort_objectives(rows[0].scores), dtype=np.float64)
    answers = pd.DataFrame(
        [(len(row.token_ids), repeated_share(row.token_ids), row.finish_reason == "length") for row in rows],
        columns=list(ANSWERS),
        dtype=np.float64,
    )
    prompt_ids = [row.prompt_id for row in rows]
    return ScoredRun(name, folder, prompts, _by_prompt(scores, prompt_ids), _by_prompt(answers, prompt_ids), scores)


def _by_prompt(values: pd.DataFrame, prompt_ids: list[int]) -> pd.DataFrame:
    """[C, columns] -> [P, columns]: means per prompt, in ascending order of the id."""
    index, rows_C = np.unique(prompt_ids, return_inverse=True)
    counts_P = np.bincount(rows_C)
    return pd.DataFrame({name: np.bincount(rows_C, weights=values[name]) / counts_P for name in values}, index=index)


def pool_seeds(name: str, seeds: list[ScoredRun]) -> ScoredRun:
    """Pool the seeds of a run: the mean over seeds for every prompt that all of them share.

    Raises:
        DataError: the seeds share no prompt, have different prompts under one id, or were scored in different objectives.
    """
    if len(seeds) == 1:
        return seeds[0]
    first = seeds[0]
    for run in seeds[1:]:
        if odd := sorted(set(run.scores) ^ set(first.scores)):
            raise DataError(f"run {name}: {first.folder} and {run.folder} are not both scored in {', '.join(odd)}")
    common = common_prompts(seeds)
    prompts = {prompt_id: first.prompts[prompt_id] for prompt_id in common}
    # The standard deviation is over `completions`, which keep all prompts.
    members = tuple(
        replace(run, prompts=prompts, scores=run.scores.loc[common], answers=run.answers.loc[common]) for run in seeds
    )
    return ScoredRun(
        name,
        first.folder,
        prompts,
        sum((run.scores for run in members[1:]), start=members[0].scores) / len(seeds),
        sum((run.answers for run in members[1:]), start=members[0].answers) / len(seeds),
        pd.concat([run.completions for run in seeds], ignore_index=True),
        members,
    )


def common_prompts(runs: list[ScoredRun]) -> list[int]:
    """Ids of the prompts that every run has, ascending.

    Raises:
        DataError: there is none, or two runs have different prompts under one id.
    """
    base, *others = runs
    common = [prompt_id for prompt_id in base.prompts if all(prompt_id in run.prompts for run in others)]
    if not common:
        names = ", ".join(run.name for run in runs)
        raise DataError(f"the runs {names} have no prompt_id in common; sample them from the same prompts")
    for run in others:
        for prompt_id in common:
            if run.prompts[prompt_id] != base.prompts[prompt_id]:
                raise DataError(
                    f'prompt_id {prompt_id}: field "prompt" differs between {base.name} ({base.folder}) and '
                    f"{run.name} ({run.folder}); the runs were sampled from different prompts"
                )
    return common


def sort_objectives(names: dict[str, float] | set[str]) -> list[str]:
    """ArmoRM's order, then other objectives by name, the gated score last."""
    order = {name: rank for rank, name in enumerate(ARMORM_OBJECTIVES)}
    return sorted(names, key=lambda name: (name == GATED_SCORE, order.get(name, len(order)), name))


def choose_objectives(runs: list[ScoredRun], wanted: list[str]) -> list[str]:
    """The objectives to report.

    Args:
        runs: at least one.
        wanted: names in either spelling; empty for all that every run has.

    Raises:
        UsageError: an unknown objective.
        DataError: a run lacks a wanted objective; or none is wanted and the runs share none.
    """
    has = {run.name: ", ".join(map(flag_name, run.scores)) for run in runs}
    if not wanted:
        common = set.intersection(*(set(run.scores) for run in runs))
        if not common:
            raise DataError("the runs share no objective: " + "; ".join(f"{run} has {names}" for run, names in has.items()))
        return sort_objectives(common)
    chosen = resolve_objectives(runs, wanted)
    for name in chosen:
        for run in runs:
            if name not in run.scores:
                raise DataError(f"run {run.name} ({run.folder}) has no scores of {name}; it has scores of {has[run.name]}")
    return chosen


def resolve_objectives(runs: list[ScoredRun], words: list[str]) -> list[str]:
    """Objectives by their own names, from either spelling, without repetition; a name that no run has must be ArmoRM's.

    Raises:
        UsageError: an unknown objective.
    """
    known = {flag_name(name): name for run in runs for name in run.scores}
    return list(dict.fromkeys(known.get(flag_name(word)) or objective_from_flag(word) for word in words))


# How the runs were made ---------------------------------------------------------------------------------------------------

_PLACES = ("save_path", "output_path", "overwrite", "check_only", "resume")
"""Flags on which results do not depend."""

MAY_DIFFER = ("model", "model_path", "model_fingerprint", "sampled", "save_path")
"""Fields of `made_by` that differ between any two runs: the policy and its samples."""


@dataclass(frozen=True)
class Provenance:
    """How one run was made. Steps without a record are empty here and named in `notes`."""

    records: dict[str, dict[str, str]]
    """{"sampling" or "scoring": the step's record, by dotted names such as `made_by.temperature`}."""
    policy: str
    """The sampled model, as its flag named it."""
    training: dict[str, str]
    """Flags and method of the training that wrote the policy; empty if it is not one of ours."""
    mixture: dict[str, float]
    """{objective: weight} of the training pairs."""
    notes: list[str]

    @property
    def method(self) -> str:
        """How the policy was trained, e.g. `KLDPO (kldpo_tau=0.05), beta=0.01, seed=42`."""
        shown = [f"{flag}={self.training[flag]}" for flag in ("beta", "seed") if flag in self.training]
        return ", ".join([method_label(self.training), *shown]) if self.training else "no training recorded"

    def made_by(self, step: str) -> dict[str, str]:
        """The flags and fingerprints on which a step's results depend."""
        record = self.records.get(step, {})
        return {name.removeprefix("made_by."): text for name, text in record.items() if name.startswith("made_by.")}


def read_provenance(folder: Path, split: str) -> Provenance:
    """Read how `folder/<split>.jsonl` was made: its manifest, that of `sampled/`, and the policy's training.

    Raises:
        DataError: a manifest that is not JSON.
    """
    records, notes = {}, []
    policy = None
    for title, step, place in (("sampling", "sample", folder / "sampled"), ("scoring", "score", folder)):
        manifest = read_manifest(place)
        record = section(manifest, f"{step}_{split}")
        if "made_by" not in record:
            notes.append(f"{place / 'manifest.json'} has no record of {step}_{split}")
            continue
        flat = _flat(record)
        if step == "sample":
            policy = next((flat[n] for n in ("made_by.model_path", "model_path", "flags.model_path") if n in flat), None)
        # "flags" repeats made_by.
        records[title] = {name: text for name, text in flat.items() if not name.startswith("flags.")}
    training = _training_flags(policy)
    return Provenance(records, policy or "not recorded", training, _mixture(training), notes)


def section(record: Any, *names: str) -> dict[str, Any]:
    """The object at record[name][name]...; empty if it, or anything on the way to it, is missing or not an object."""
    for name in names:
        record = record.get(name) if isinstance(record, dict) else None
    return record if isinstance(record, dict) else {}


def method_label(flags: Mapping[str, Any]) -> str:
    """The method of a training and its strength, e.g. `KLDPO (kldpo_tau=0.05)`: as its manifest records it, or derived from
    the flags of a folder whose manifest does not.
    """
    if flags.get("method"):
        return str(flags["method"])
    names = {"kldpo_tau": "KLDPO", "wdpo_rho": "WDPO", "drdpo_beta": "Dr. DPO"}
    return next((f"{name} ({flag}={flags[flag]})" for flag, name in names.items() if flags.get(flag) is not None), "DPO")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{dotted name: text}, without nulls and places."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None and name not in _PLACES:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _training_flags(model_path: str | None) -> dict[str, str]:
    """Flags and method of the training that wrote a checkpoint `<save_path>/global_step_<n>`; empty for other models."""
    if model_path is None or not (path := Path(model_path).parent / "config.json").is_file():
        return {}
    try:
        flags = read_json_object(path)
    except DataError:
        return {}
    # A folder of models may have another config.json; a training's has these two flags.
    if not {"dataset_path", "beta"} <= set(flags):
        return {}
    named = section(read_manifest(path.parent), "train", "made_by").get("method")
    return _flat(flags | {"method": named or flags.get("method")})


def _mixture(training: dict[str, str]) -> dict[str, float]:
    """The weights in the manifest of the pairs that a training used."""
    if not training or not Path(folder := training["dataset_path"]).is_dir():
        return {}
    weights = section(read_manifest(Path(folder)), "preferences", "made_by", "weights")
    return {name: float(weight) for name, weight in weights.items()}

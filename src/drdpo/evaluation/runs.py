"""Folders of scored completions: scores averaged per prompt, and how the completions were made.

Shapes: P prompts, C completions.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from drdpo.candidates import check_scored, mean_and_sd
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
        return mean_and_sd(self.completions[objective].to_numpy())[1]


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
    prompts = {prompt_id: group[0].prompt for prompt_id, group in sorted(check_scored(path, rows).items())}
    scores = pd.DataFrame([row.scores for row in rows], columns=sort_objectives(rows[0].scores), dtype=np.float64)
    answers = pd.DataFrame(
        [(len(row.token_ids), repeated_share(row.token_ids), row.finish_reason == "length") for row in rows],
        columns=list(ANSWERS),
        dtype=np.float64,
    )
    prompt_ids = np.array([row.prompt_id for row in rows])
    return ScoredRun(
        name, folder, prompts, scores.groupby(prompt_ids).mean(), answers.groupby(prompt_ids).mean(), scores
    )  # fmt: skip


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
    known = {flag_name(name): name for run in runs for name in run.scores}
    chosen = list(dict.fromkeys(known.get(flag_name(word)) or objective_from_flag(word) for word in wanted))
    for name in chosen:
        for run in runs:
            if name not in run.scores:
                raise DataError(f"run {run.name} ({run.folder}) has no scores of {name}; it has scores of {has[run.name]}")
    return chosen


# How the runs were made ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provenance:
    """How one run was made."""

    policy: str
    """The sampled model, as its flag named it."""
    method: str
    """How the policy was trained, e.g. `KLDPO (kldpo_tau=0.05), beta=0.01, seed=42`."""
    mixture: dict[str, float]
    """{objective: weight} of the training pairs; empty if none is recorded."""
    made_by: dict[str, dict[str, str]]
    """{"sampling" or "scoring": the flags and fingerprints on which its results depend}, without the policy and its samples,
    which differ between any two runs."""
    notes: list[str]
    """Names the steps without a record."""


def read_provenance(folder: Path, split: str) -> Provenance:
    """Read how `folder/<split>.jsonl` was made: its manifest, that of `sampled/`, and the policy's training.

    Raises:
        DataError: a manifest that is not JSON.
    """
    made_by, notes, policy = {}, [], None
    for title, step, place in (("sampling", "sample", folder / "sampled"), ("scoring", "score", folder)):
        record = section(read_manifest(place), f"{step}_{split}")
        if "made_by" not in record:
            notes.append(f"{place / 'manifest.json'} has no record of {step}_{split}")
            continue
        if step == "sample" and "model_path" in record:
            policy = str(record["model_path"])
        made_by[title] = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in section(record, "made_by").items()
            if value is not None and name not in ("model", "sampled")
        }
    return Provenance(policy or "not recorded", *_training(policy), made_by, notes)


def section(record: Any, *names: str) -> dict[str, Any]:
    """The object at record[name][name]...; empty if it, or anything on the way to it, is missing or not an object."""
    for name in names:
        record = record.get(name) if isinstance(record, dict) else None
    return record if isinstance(record, dict) else {}


def _training(policy: str | None) -> tuple[str, dict[str, float]]:
    """Method and mixture of the training that wrote a checkpoint `<save_path>/global_step_<n>`."""
    folder = None if policy is None else Path(policy).parent
    try:
        flags = read_json_object(folder / "config.json") if folder and (folder / "config.json").is_file() else {}
    except DataError:
        flags = {}
    # A folder of models may have another config.json; a training's has these two flags.
    if folder is None or not {"dataset_path", "beta"} <= set(flags):
        return "no training recorded", {}
    method = section(read_manifest(folder), "train", "made_by").get("method", "a method without a record")
    shown = [f"{name}={flags[name]}" for name in ("beta", "seed") if name in flags]
    weights = section(read_manifest(Path(str(flags["dataset_path"]))), "preferences", "made_by", "weights")
    return ", ".join([str(method), *shown]), {name: float(weight) for name, weight in weights.items()}

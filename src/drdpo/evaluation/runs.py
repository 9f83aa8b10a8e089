"""Folders of scored completions: scores averaged per prompt, and how the completions were made.

Shapes: P prompts, C completions.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from drdpo.candidates import check_scored, mean_and_sd
from drdpo.errors import DataError, UsageError
from drdpo.folder import read_json_object, read_manifest, section
from drdpo.objectives import ARMORM_OBJECTIVES, GATED_SCORE, flag_name, objective_from_flag
from drdpo.records import Completion, Message, read_records

ANSWERS = ("tokens", "repeated", "cut")
"""Metrics of the answers: length in tokens, `repeated_share`, and whether the length limit cut the answer."""


@dataclass(frozen=True)
class ScoredRun:
    """The scores of one policy on one split, of one or more training seeds. Every prompt has the same weight, regardless of
    its number of completions."""

    name: str
    folders: list[Path]
    """One per seed."""
    prompts: dict[int, list[Message]]
    """{prompt_id: messages} of the prompts that all seeds share, in ascending order."""
    completions: pd.DataFrame
    """A row per completion, indexed by (seed, prompt_id); columns ("scores", objective) and ("answers", one of ANSWERS)."""

    @cached_property
    def means(self) -> dict[tuple[str, str], pd.DataFrame]:
        """{column of `completions`: [P, seeds], the mean over the completions of a prompt}"""
        means = self.completions.groupby(level=[0, 1]).mean()
        return {column: means[column].unstack(0).loc[list(self.prompts)] for column in means}

    @property
    def objectives(self) -> list[str]:
        return list(self.completions["scores"])

    def by_prompt(self, objective: str) -> "pd.Series[float]":
        """[P] scores: means over the seeds."""
        return self.means["scores", objective].mean(axis=1)

    def mean(self, objective: str) -> float:
        """Mean over prompts."""
        return float(self.by_prompt(objective).to_numpy().mean())

    def sd(self, objective: str) -> float:
        """Standard deviation over completions (population form), also of prompts that not all seeds have; 0 if all scores
        are equal."""
        return mean_and_sd(self.completions["scores", objective].to_numpy())[1]


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


def load_run(name: str, folders: list[Path], split: str) -> ScoredRun:
    """Read `<split>.jsonl` of every seed's folder.

    Raises:
        DataError: a missing folder or split, or a row that is not a completion, is not scored, has other objectives than
            row 1, repeats a (prompt_id, sample_id), or has another prompt than earlier rows with its prompt_id; or the seeds
            share no prompt, have different prompts under one id, or were scored in different objectives.
    """
    prompts: dict[str, dict[int, list[Message]]] = {}
    tables: list[pd.DataFrame] = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"run {name}: {folder}: no such folder")
        path = folder / f"{split}.jsonl"
        if not path.is_file():
            there = ", ".join(sorted(file.name for file in folder.glob("*.jsonl"))) or "no completions"
            raise DataError(
                f"run {name}: {path}: no such file; the folder has {there}; choose with --split=train or --split=test"
            )
        rows = read_records(path, Completion.from_row)
        groups = check_scored(path, rows)
        prompts[f"{name} ({folder})"] = {prompt_id: group[0].prompt for prompt_id, group in groups.items()}
        ids = [row.prompt_id for row in rows]
        answers = [(len(row.token_ids), repeated_share(row.token_ids), row.finish_reason == "length") for row in rows]
        table = {
            "scores": pd.DataFrame([row.scores for row in rows], ids, sort_objectives(rows[0].scores), np.float64),
            "answers": pd.DataFrame(answers, ids, list(ANSWERS), np.float64),
        }
        tables.append(pd.concat(table, axis=1))
        if odd := sorted(name for _, name in {*tables[0]} ^ {*tables[-1]}):
            raise DataError(f"run {name}: {folders[0]} and {folder} are not both scored in {', '.join(odd)}")
    first = next(iter(prompts.values()))
    shared = {prompt_id: first[prompt_id] for prompt_id in common_prompts(prompts)}
    return ScoredRun(name, folders, shared, pd.concat(dict(enumerate(tables))))


def common_prompts(prompts: Mapping[str, Mapping[int, list[Message]]]) -> list[int]:
    """Ascending ids of the prompts that all runs, or all seeds of one, have, of {name: {prompt_id: messages}}.

    Raises:
        DataError: there is none, or two have different prompts under one id.
    """
    (base, first), *others = prompts.items()
    common = sorted(set(first).intersection(*(of_run for _, of_run in others)))
    if not common:
        raise DataError(f"{', '.join(prompts)} have no prompt_id in common; sample them from the same prompts")
    for run, of_run in others:
        for prompt_id in common:
            if of_run[prompt_id] != first[prompt_id]:
                raise DataError(f'prompt_id {prompt_id}: field "prompt" differs between {base} and {run}')
    return common


def sort_objectives(names: Iterable[str]) -> list[str]:
    """ArmoRM's order, then other objectives by name, the gated score last."""
    order = {name: rank for rank, name in enumerate(ARMORM_OBJECTIVES)}
    return sorted(names, key=lambda name: (name == GATED_SCORE, order.get(name, len(order)), name))


def choose_objectives(runs: list[ScoredRun], wanted: list[str]) -> list[str]:
    """The objectives to report: the wanted ones, in either spelling, or all that every run has.

    Raises:
        UsageError: an unknown objective.
        DataError: a run lacks a wanted objective; or none is wanted and the runs share none.
    """
    has = {run.name: ", ".join(map(flag_name, run.objectives)) for run in runs}
    if not wanted:
        common = set.intersection(*(set(run.objectives) for run in runs))
        if not common:
            raise DataError("the runs share no objective: " + "; ".join(f"{run} has {names}" for run, names in has.items()))
        return sort_objectives(common)
    known = {flag_name(name): name for run in runs for name in run.objectives}
    chosen = list(dict.fromkeys(known.get(flag_name(word)) or objective_from_flag(word) for word in wanted))
    for name in chosen:
        for run in runs:
            if name not in run.objectives:
                raise DataError(f"run {run.name} ({run.folders[0]}) has no scores of {name}, but of {has[run.name]}")
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
    # What trained a checkpoint `<save_path>/global_step_<n>` wrote beside it.
    file, flags = Path(policy or "").parent / "config.json", {}
    if policy and file.is_file():
        with suppress(DataError):
            flags = read_json_object(file)
    # A folder of models may have another config.json; a training's has these two flags.
    if not {"dataset_path", "beta"} <= set(flags):
        return Provenance(policy or "not recorded", "no training recorded", {}, made_by, notes)
    method = section(read_manifest(file.parent), "train", "made_by").get("method", "a method without a record")
    shown = ", ".join([str(method), *(f"{name}={flags[name]}" for name in ("beta", "seed") if name in flags)])
    weights = section(read_manifest(Path(str(flags["dataset_path"]))), "preferences", "made_by", "weights")
    return Provenance(str(policy), shown, {name: float(weight) for name, weight in weights.items()}, made_by, notes)

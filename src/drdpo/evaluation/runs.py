"""A run: one folder of scored completions, read and averaged per prompt.

Shapes: P prompts, C completions.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from drdpo.errors import DataError, UsageError
from drdpo.evaluation.repetition import repeated_share
from drdpo.objectives import ARMORM_OBJECTIVES, GATED_SCORE, flag_name, objective_from_flag
from drdpo.records import Completion, Message, check_unique, read_records

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True)
class Run:
    """The scores of one policy on one split. Every prompt counts once, however many completions it has."""

    name: str
    folder: Path
    prompts: dict[int, list[Message]]
    """{prompt_id: messages}, in ascending order of the id: the rows of every [P] array below."""
    completions: int
    scores_P: dict[str, Array]
    """{objective: [P]}: the mean over a prompt's completions."""
    scores_C: dict[str, Array]
    """{objective: [C]}: every completion."""
    tokens_P: Array
    """Answer length in tokens, mean over a prompt's completions."""
    cut_P: Array
    """Share of a prompt's completions that were cut by the length limit."""
    repeated_P: Array
    """Share of an answer's token 4-grams that stood in it before, mean over a prompt's completions; see repetition.py."""
    seeds: tuple["Run", ...] = ()
    """Where several training seeds are pooled in this run: each of them, on the prompts that all have."""

    @property
    def members(self) -> tuple["Run", ...]:
        """Its seeds; itself where there is one."""
        return self.seeds or (self,)

    def rows(self, prompt_ids: list[int]) -> list[int]:
        """Where these prompts stand in the [P] arrays."""
        position = {prompt_id: row for row, prompt_id in enumerate(self.prompts)}
        return [position[prompt_id] for prompt_id in prompt_ids]


def parse_runs(words: list[str]) -> dict[str, list[Path]]:
    """{name: folders} of NAME=FOLDER words, in order; a name that stands with several folders is one run, of several seeds.

    A name or a folder may hold "=" itself (`tau=0.05=outputs/tau=0.05`): of the ways to split, the first whose folder
    exists counts, else the one at the first "=".

    Raises:
        UsageError: a word without "=", an empty part, or a name given twice with one folder.
    """
    folders: dict[str, list[Path]] = {}
    for word in words:
        parts = word.split("=")
        splits = [("=".join(parts[:cut]), "=".join(parts[cut:])) for cut in range(1, len(parts))]
        splits = [(name, folder) for name, folder in splits if name and folder]
        if not splits:
            raise UsageError(f"--runs {word}: write NAME=FOLDER, e.g. --runs base=outputs/base dpo=outputs/dpo")
        name, folder = next((split for split in splits if Path(split[1]).is_dir()), splits[0])
        if Path(folder) in folders.setdefault(name, []):
            raise UsageError(f"--runs: the name {name} is given twice with {folder}; every seed of a run has its own")
        folders[name].append(Path(folder))
    return folders


def load_run(name: str, folder: Path, split: str) -> Run:
    """Read `folder/<split>.jsonl` and average per prompt.

    Raises:
        DataError: no such folder or split; a row that is no completion, is unscored, lacks an objective that others have,
            repeats a (prompt_id, sample_id) or shows another prompt than its prompt_id did before.
    """
    if not folder.is_dir():
        raise DataError(f"run {name}: {folder}: no such folder")
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        there = sorted(file.name for file in folder.glob("*.jsonl"))
        raise DataError(
            f"run {name}: {path}: no such file; the folder has {', '.join(there) or 'no completions'}; "
            "choose the split by --split=train or --split=test"
        )
    completions = read_records(path, Completion.from_row)
    check_unique(path, ((row.prompt_id, row.sample_id) for row in completions), "(prompt_id, sample_id)")
    prompts = _check_rows(path, completions)
    row_of = {prompt_id: row for row, prompt_id in enumerate(prompts)}
    rows_C = np.array([row_of[completion.prompt_id] for completion in completions])
    scores_C = {
        objective: np.array([completion.scores[objective] for completion in completions], dtype=np.float64)
        for objective in sort_objectives(completions[0].scores)
    }
    tokens_C = np.array([len(completion.token_ids) for completion in completions], dtype=np.float64)
    repeated_C = np.array([repeated_share(completion.token_ids) for completion in completions], dtype=np.float64)
    cut_C = np.array([completion.finish_reason == "length" for completion in completions], dtype=np.float64)
    return Run(
        name=name,
        folder=folder,
        prompts=prompts,
        completions=len(completions),
        scores_P={objective: _mean_by_prompt(values_C, rows_C) for objective, values_C in scores_C.items()},
        scores_C=scores_C,
        tokens_P=_mean_by_prompt(tokens_C, rows_C),
        cut_P=_mean_by_prompt(cut_C, rows_C),
        repeated_P=_mean_by_prompt(repeated_C, rows_C),
    )


def pool_seeds(name: str, seeds: list[Run]) -> Run:
    """Several seeds of a run as one: the mean over seeds of every prompt's figures, on the prompts that all seeds have.

    Args:
        name: of the run.
        seeds: at least one.

    Raises:
        DataError: the seeds have no prompt in common, different prompts under one id, or other objectives.
    """
    if len(seeds) == 1:
        return seeds[0]
    for run in seeds[1:]:
        if set(run.scores_P) != set(seeds[0].scores_P):
            odd = ", ".join(sorted(set(run.scores_P) ^ set(seeds[0].scores_P)))
            raise DataError(f"run {name}: {seeds[0].folder} and {run.folder} are not both scored in {odd}")
    common = common_prompts(seeds)
    members = tuple(_only(run, common) for run in seeds)

    def mean_over_seeds(values: list[Array]) -> Array:
        mean_P: Array = np.mean(values, axis=0)
        return mean_P

    return Run(
        name=name,
        folder=seeds[0].folder,
        prompts=members[0].prompts,
        completions=sum(run.completions for run in seeds),
        scores_P={key: mean_over_seeds([run.scores_P[key] for run in members]) for key in seeds[0].scores_P},
        scores_C={key: np.concatenate([run.scores_C[key] for run in seeds]) for key in seeds[0].scores_P},
        tokens_P=mean_over_seeds([run.tokens_P for run in members]),
        cut_P=mean_over_seeds([run.cut_P for run in members]),
        repeated_P=mean_over_seeds([run.repeated_P for run in members]),
        seeds=members,
    )


def _only(run: Run, prompt_ids: list[int]) -> Run:
    """The run on some of its prompts; the spread of its scores (scores_C) stays that of all."""
    rows = run.rows(prompt_ids)
    return replace(
        run,
        prompts={prompt_id: run.prompts[prompt_id] for prompt_id in prompt_ids},
        scores_P={key: values_P[rows] for key, values_P in run.scores_P.items()},
        tokens_P=run.tokens_P[rows],
        cut_P=run.cut_P[rows],
        repeated_P=run.repeated_P[rows],
    )


def _check_rows(path: Path, completions: list[Completion]) -> dict[int, list[Message]]:
    prompts: dict[int, list[Message]] = {}
    objectives = set(completions[0].scores)
    for row, completion in enumerate(completions, start=1):
        if not completion.scores:
            raise DataError(f'{path}, row {row}: field "scores" is missing; score the completions first')
        if set(completion.scores) != objectives:
            odd = ", ".join(sorted(set(completion.scores) ^ objectives))
            raise DataError(f'{path}, row {row}: field "scores" has other objectives than row 1 ({odd})')
        if prompts.setdefault(completion.prompt_id, completion.prompt) != completion.prompt:
            raise DataError(f'{path}, row {row}: field "prompt" differs from that of an earlier row with this id')
    return dict(sorted(prompts.items()))


def _mean_by_prompt(values_C: Array, rows_C: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Array:
    return np.bincount(rows_C, weights=values_C) / np.bincount(rows_C)


def common_prompts(runs: list[Run]) -> list[int]:
    """Ids of the prompts that every run has, ascending.

    Raises:
        DataError: there is none, or one id stands for two different prompts.
    """
    base, *others = runs
    common = [prompt_id for prompt_id in base.prompts if all(prompt_id in run.prompts for run in others)]
    if not common:
        names = ", ".join(run.name for run in runs)
        raise DataError(f"the runs {names} have no prompt_id in common; compare runs on the same prompts")
    for run in others:
        for prompt_id in common:
            if run.prompts[prompt_id] != base.prompts[prompt_id]:
                raise DataError(
                    f'prompt_id {prompt_id}: field "prompt" differs between {base.name} ({base.folder}) and '
                    f"{run.name} ({run.folder}); the runs sampled different prompt sets"
                )
    return common


def sort_objectives(names: dict[str, float] | set[str]) -> list[str]:
    """ArmoRM's order, then other objectives by name, the gated score last."""
    order = {name: rank for rank, name in enumerate(ARMORM_OBJECTIVES)}
    return sorted(names, key=lambda name: (name == GATED_SCORE, order.get(name, len(order)), name))


def choose_objectives(runs: list[Run], wanted: list[str]) -> list[str]:
    """The objectives to average.

    Args:
        runs: at least one.
        wanted: names in either spelling; empty for all that every run has.

    Raises:
        UsageError: a word names no objective at all.
        DataError: a run lacks a wanted objective; or nothing is wanted and the runs share no objective.
    """
    if not wanted:
        common = set.intersection(*(set(run.scores_P) for run in runs))
        if not common:
            raise DataError("the runs share no objective: " + "; ".join(f"{run.name} has {_names(run)}" for run in runs))
        return sort_objectives(common)
    # Another reward model may have objectives of its own; what no run has must be one of ArmoRM's.
    known = {flag_name(name): name for run in runs for name in run.scores_P}
    chosen: list[str] = []
    for word in wanted:
        name = known.get(flag_name(word)) or objective_from_flag(word)
        for run in runs:
            if name not in run.scores_P:
                raise DataError(f"run {run.name} ({run.folder}) has no scores of {name}; it has scores of {_names(run)}")
        if name not in chosen:
            chosen.append(name)
    return chosen


def _names(run: Run) -> str:
    return ", ".join(flag_name(name) for name in run.scores_P)

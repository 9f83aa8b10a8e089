"""Step 2: mix scored objectives into top-versus-bottom preference pairs. Needs neither a GPU nor torch."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drdpo.config import PreferencesConfig
from drdpo.errors import DataError, UsageError
from drdpo.files import atomic_files
from drdpo.flags import as_dict
from drdpo.manifest import already_made, fingerprint, write_manifest
from drdpo.records import SPLITS, Completion, Preference, check_unique, read_records, write_records
from drdpo.rewards.scores import Floats, best_and_worst, mean_and_sd, mix, standardise

STEP = "preferences"


@dataclass(frozen=True)
class SplitPairs:
    """The pairs of one split and how they came about."""

    pairs: list[Preference]
    statistics: dict[str, tuple[float, float]]
    """{objective: (mean, population sd)} of the raw scores over the split, of the weighted objectives."""
    counts: dict[str, int]
    """prompts, completions, pairs, and the prompts dropped, by reason."""


def generate_preferences(config: PreferencesConfig) -> None:
    """Pair the best and the worst completion of every prompt; writes <output_path>/{train,test}.jsonl and manifest.json.

    Nothing is written unless both splits are good.

    Raises:
        DataError: a split is missing, empty or malformed, a key repeats, an objective has no scores, no prompt has two
            completions, or no pair is left.
        UsageError: the results of other flags or inputs are there, or the output folder is the input folder.
    """
    source, target = Path(config.completions), Path(config.output_path)
    if source.resolve() == target.resolve():
        raise UsageError(f"--output_path={target} is the folder of the completions; pairs never overwrite their input")
    inputs, outputs = ([folder / f"{split}.jsonl" for split in SPLITS] for folder in (source, target))
    for path in inputs:
        if not path.is_file():
            raise DataError(f"{path}: no such file; pairs need the scored train and test completions of step 1")
    weights = config.objective_weights()
    made_by = {
        "weights": weights,
        "standardize": config.standardize,
        "completions": {split: fingerprint(path) for split, path in zip(SPLITS, inputs, strict=True)},
    }
    if already_made(target, STEP, made_by, outputs, config.overwrite):
        print(f"{target}: the pairs are there already, made with the same flags from the same completions; skipped")
        return
    splits = {
        split: pair_completions(path, read_completions(path), weights, config.standardize)
        for split, path in zip(SPLITS, inputs, strict=True)
    }
    facts = {split: {"counts": made.counts, "scores": _named(made.statistics)} for split, made in splits.items()}
    with atomic_files(*outputs) as asides:
        for aside, made in zip(asides, splits.values(), strict=True):
            write_records(aside, made.pairs)
        # Old pairs go and new ones come last, so that pairs never stand beside a manifest of other flags.
        for path in outputs:
            path.unlink(missing_ok=True)
        write_manifest(target, STEP, made_by, flags=as_dict(config), **facts)
    for split, made in splits.items():
        print(report(split, made, weights))


def read_completions(path: Path) -> list[Completion]:
    """Read scored completions.

    Raises:
        DataError: as read_records; also for a (prompt_id, sample_id) that repeats.
    """
    completions = read_records(path, Completion.from_row)
    check_unique(path, ((c.prompt_id, c.sample_id) for c in completions), '"prompt_id", "sample_id"')
    return completions


def pair_completions(path: Path, completions: list[Completion], weights: dict[str, float], standardize: bool) -> SplitPairs:
    """Pair the best with the worst completion of each prompt, by the mixed score.

    Args:
        path: file of the completions, named in messages.
        completions: of one split, in any order; prompts may have different numbers of them.
        weights: {objective: weight}.
        standardize: z-score every objective over the split before mixing.

    Raises:
        DataError: see generate_preferences.
    """
    groups = group_by_prompt(path, completions)
    if max(map(len, groups)) < 2:
        raise DataError(f"{path}: every prompt has one completion only; a pair needs best_of_n >= 2 when sampling")
    scores = {objective: score_matrix(path, groups, objective) for objective in weights}
    statistics = {objective: mean_and_sd(scores_Mn) for objective, scores_Mn in scores.items()}
    mixed_Mn = mix({name: standardise(value) for name, value in scores.items()} if standardize else scores, weights)
    best_M, worst_M, usable_M = best_and_worst(mixed_Mn)
    counts = {"prompts": len(groups), "completions": len(completions), "pairs": 0}
    counts |= {"dropped_one_completion": 0, "dropped_zero_margin": 0, "dropped_equal_texts": 0}
    pairs = []
    for group, mixed_n, best, worst, usable in zip(groups, mixed_Mn, best_M, worst_M, usable_M, strict=True):
        chosen, rejected = group[best], group[worst]
        if len(group) < 2:
            counts["dropped_one_completion"] += 1
        elif not usable:
            counts["dropped_zero_margin"] += 1
        elif _text(chosen) == _text(rejected):
            counts["dropped_equal_texts"] += 1
        else:
            pairs.append(_preference(chosen, rejected, float(mixed_n[best]), float(mixed_n[worst])))
    counts["pairs"] = len(pairs)
    if not pairs:
        reasons = ", ".join(f"{count} {name}" for name, count in counts.items() if name.startswith("dropped") and count)
        raise DataError(f"{path}: no pair is left of {len(groups)} prompts ({reasons})")
    return SplitPairs(pairs, statistics, counts)


def group_by_prompt(path: Path, completions: list[Completion]) -> list[list[Completion]]:
    """Completions by prompt_id, each group sorted by sample_id, groups in order of first appearance.

    Raises:
        DataError: one prompt_id has two different prompts.
    """
    groups: dict[int, list[Completion]] = {}
    for row, completion in enumerate(completions, start=1):
        group = groups.setdefault(completion.prompt_id, [])
        if group and group[0].prompt != completion.prompt:
            raise DataError(
                f'{path}, row {row}: field "prompt" differs from that of another row with prompt_id {completion.prompt_id}'
            )
        group.append(completion)
    return [sorted(group, key=lambda completion: completion.sample_id) for group in groups.values()]


def score_matrix(path: Path, groups: list[list[Completion]], objective: str) -> Floats:
    """Scores [M, n] of one objective; a prompt with fewer completions than n ends in NaN.

    Raises:
        DataError: a completion lacks the objective; the message lists what it has.
    """
    scores_Mn = np.full((len(groups), max(map(len, groups))), np.nan)
    for row, group in enumerate(groups):
        for column, completion in enumerate(group):
            if objective not in completion.scores:
                there = ", ".join(completion.scores) or "no scores at all; score them with step 1"
                raise DataError(
                    f'{path}, prompt_id {completion.prompt_id}, sample_id {completion.sample_id}: field "scores" lacks '
                    f"{objective}; it has {there}"
                )
            scores_Mn[row, column] = completion.scores[objective]
    return scores_Mn


def report(split: str, made: SplitPairs, weights: dict[str, float]) -> str:
    """A small table: weight, mean and sd of every weighted objective, then how many pairs."""
    width = max(map(len, weights))
    lines = [f"{split}: {'objective':<{width}}  weight      mean        sd"]
    for objective, (mean, sd) in made.statistics.items():
        lines.append(f"{split}: {objective:<{width}}  {weights[objective]:>6.3g}  {mean:>8.4f}  {sd:>8.4f}")
    dropped = {name.removeprefix("dropped_"): count for name, count in made.counts.items() if name.startswith("dropped_")}
    why = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in dropped.items() if count) or "none"
    lines.append(f"{split}: {made.counts['pairs']} pairs from {made.counts['prompts']} prompts; dropped: {why}")
    return "\n".join(lines)


def _text(completion: Completion) -> str:
    return completion.completion[-1]["content"].strip()


def _preference(chosen: Completion, rejected: Completion, chosen_score: float, rejected_score: float) -> Preference:
    return Preference(
        chosen.prompt_id, chosen.prompt, chosen.completion, rejected.completion, chosen_score, rejected_score,
        chosen.token_ids, rejected.token_ids,
    )  # fmt: skip


def _named(statistics: dict[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {objective: {"mean": mean, "sd": sd} for objective, (mean, sd) in statistics.items()}

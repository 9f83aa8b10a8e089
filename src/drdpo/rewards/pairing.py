"""Step 2: mix scored objectives into preference pairs. Needs neither a GPU nor torch."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drdpo.cli import as_dict
from drdpo.config import PreferencesConfig
from drdpo.errors import DataError, UsageError
from drdpo.folder import already_made, atomic_files, lock_folder, refuse_if_locked, sweep, write_manifest
from drdpo.models import fingerprint
from drdpo.progress import progress
from drdpo.records import SPLITS, Completion, Preference, write_records
from drdpo.rewards.pair_report import length_lines, objective_lines, pair_lines, why_none
from drdpo.rewards.by_prompt import group_by_prompt, read_completions, score_matrices
from drdpo.rewards.length_bias import Lengths, lengths
from drdpo.rewards.scores import best_and_worst, mean_and_sd, mix, standardise
from drdpo.rewards.selection import REASONS, Rule, select

STEP = "preferences"

Statistics = dict[str, tuple[float, float]]
"""{objective: (mean, population sd)} of the raw scores of the weighted objectives."""


@dataclass(frozen=True)
class SplitPairs:
    """The pairs of one split and how they came about."""

    pairs: list[Preference]
    statistics: Statistics
    """Of this split."""
    standardised_by: Statistics | None
    """What the scores were standardised by; None where they were not."""
    counts: dict[str, int]
    """prompts, completions, candidates (two completions that the selection puts together), pairs, prompts_without_pair,
    dropped_one_completion (prompts), dropped_* (candidates, by reason), not_drawn."""
    margins: dict[str, float]
    """min, median, mean and max of the pairs' margins, in units of the mixed score."""
    lengths: Lengths


def generate_preferences(config: PreferencesConfig) -> None:
    """Pair completions of every prompt by the mixed score; writes <output_path>/{train,test}.jsonl and manifest.json.

    Nothing is written unless both splits are good, and nothing at all with --dry_run.

    Raises:
        DataError: a split is missing, empty or malformed, a key repeats, an objective has no scores, no prompt has two
            completions, or no pair is left.
        UsageError: the results of other flags or inputs are there, the output folder is the input folder, or another run
            is writing to it.
    """
    source, target = Path(config.completions), Path(config.output_path)
    if source.resolve() == target.resolve():
        raise UsageError(f"--output_path={target} is the folder of the completions; pairs never overwrite their input")
    inputs, outputs = ({split: folder / f"{split}.jsonl" for split in SPLITS} for folder in (source, target))
    for path in inputs.values():
        if not path.is_file():
            raise DataError(f"{path}: no such file; pairs need the scored train and test completions of step 1")
    weights = config.objective_weights()
    made_by = {
        "weights": weights,
        "standardize": config.standardize,
        "standardize_by": config.standardize_by,
        **rule_of(config).made_by(),
        "completions": {split: fingerprint(path) for split, path in inputs.items()},
    }
    if not config.dry_run and already_made(target, STEP, made_by, list(outputs.values()), config.overwrite):
        print(f"{target}: the pairs are there already, made with the same flags from the same completions; skipped")
        return
    if not config.dry_run:
        refuse_if_locked(target)
    splits: dict[str, SplitPairs] = {}
    for split, path in inputs.items():
        fitted = splits["train"].statistics if config.standardize_by == "train" and split != "train" else None
        splits[split] = pair_completions(path, read_completions(path, weights), config, split, fitted)
    if not config.dry_run:
        with lock_folder(target):
            sweep(target)
            _write(target, outputs, splits, made_by, config)
    for split, made in splits.items():
        print(report(split, made, weights, config))
    if config.dry_run:
        print("dry run: nothing was written")


def rule_of(config: PreferencesConfig) -> Rule:
    """The flags that select pairs."""
    return Rule(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Rule)})


def pair_completions(
    path: Path, completions: list[Completion], config: PreferencesConfig, split: str, fitted: Statistics | None = None
) -> SplitPairs:
    """Pair the completions of each prompt by their mixed scores. The order of the completions changes no pair.

    Args:
        path: file of the completions, named in messages.
        completions: of one split, with scores of all weighted objectives, in any order; prompts may have different numbers
            of them.
        config: weights, standardisation and selection.
        split: "train" or "test".
        fitted: statistics of the split to standardise by; this split's own by default.

    Returns:
        Pairs in the order in which their prompts first appear; of one prompt, the largest margin first.

    Raises:
        DataError: see generate_preferences.
    """
    weights, rule = config.objective_weights(), rule_of(config)
    groups = group_by_prompt(path, completions)
    scores = score_matrices(groups, weights)
    # In order of prompt_id, because the last bit of a sum depends on its order.
    by_id = np.argsort([group[0].prompt_id for group in groups])
    own = {objective: mean_and_sd(scores_Mn[by_id]) for objective, scores_Mn in scores.items()}
    used = (own if fitted is None else fitted) if config.standardize else None
    if used is not None:
        scores = {objective: standardise(scores_Mn, used[objective]) for objective, scores_Mn in scores.items()}
    mixed_Mn = mix(scores, weights)
    counts: Counter[str] = Counter(prompts=len(groups), completions=len(completions))
    pairs, largest_margin = [], 0.0
    rows = zip(groups, mixed_Mn, *best_and_worst(mixed_Mn), strict=True)
    for group, mixed_n, best, worst, _ in progress(rows, desc=f"pair {split}", total=len(groups), unit="prompt", delay=2):
        if len(group) < 2:
            counts.update(prompts_without_pair=1, dropped_one_completion=1)
            continue
        texts = [completion.completion[-1]["content"] for completion in group]
        made = select(mixed_n, texts, int(best), int(worst), rule, f"{split}/{group[0].prompt_id}")
        counts += made.counts
        counts["prompts_without_pair"] += not made.pairs
        largest_margin = max(largest_margin, made.largest_margin)
        pairs += [
            _preference(group[chosen], group[rejected], float(mixed_n[chosen]), float(mixed_n[rejected]))
            for chosen, rejected in made.pairs
        ]
    facts = _counts(counts, len(pairs))
    if not pairs:
        raise DataError(
            f"{path}: no pair is left of {len(groups)} prompts ({why_none(facts, rule, largest_margin)})"
        )
    return SplitPairs(pairs, own, used, facts, _margins(pairs), lengths(pairs))


def report(split: str, made: SplitPairs, weights: dict[str, float], config: PreferencesConfig) -> str:
    """Weight, mean and sd of every weighted objective, then how many pairs, their margins and their lengths."""
    own = made.standardised_by is made.statistics or made.standardised_by is None
    lines = [
        *objective_lines(split, made.statistics, weights, None if own else made.standardised_by),
        *pair_lines(split, made.counts, made.margins, rule_of(config)),
        *length_lines(split, made.lengths),
    ]
    return "\n".join(lines)


def _write(
    target: Path,
    outputs: dict[str, Path],
    splits: dict[str, SplitPairs],
    made_by: dict[str, object],
    config: PreferencesConfig,
) -> None:
    facts = {
        split: {
            "counts": made.counts,
            "scores": _named(made.statistics),
            "standardized_by": None if made.standardised_by is None else _named(made.standardised_by),
            "margins": made.margins,
            "lengths": dataclasses.asdict(made.lengths) | {"biased": made.lengths.biased},
        }
        for split, made in splits.items()
    }
    with atomic_files(*outputs.values()) as asides:
        for aside, (split, made) in zip(asides, splits.items(), strict=True):
            write_records(aside, progress(made.pairs, desc=f"write {split}", unit="pair", delay=2))
        # Old pairs go and new ones come last, so that pairs never stand beside a manifest of other flags.
        for path in outputs.values():
            path.unlink(missing_ok=True)
        write_manifest(target, STEP, made_by, flags=as_dict(config), **facts)


def _counts(counts: Counter[str], pairs: int) -> dict[str, int]:
    """Every count, those of 0 included, in one order."""
    first = ("prompts", "completions", "candidates")
    found = {name: counts[name] for name in first} | {"pairs": pairs}
    found |= {name: counts[name] for name in ("prompts_without_pair", "dropped_one_completion")}
    found |= {f"dropped_{reason}": counts[reason] for reason in REASONS}
    return found | {"not_drawn": counts["not_drawn"]}


def _margins(pairs: list[Preference]) -> dict[str, float]:
    margin_P = np.array([(pair.chosen_score or 0.0) - (pair.rejected_score or 0.0) for pair in pairs])
    found = {"min": margin_P.min(), "median": np.median(margin_P), "mean": margin_P.mean(), "max": margin_P.max()}
    return {name: float(value) for name, value in found.items()}


def _preference(chosen: Completion, rejected: Completion, chosen_score: float, rejected_score: float) -> Preference:
    return Preference(
        chosen.prompt_id, chosen.prompt, chosen.completion, rejected.completion, chosen_score, rejected_score,
        chosen.token_ids, rejected.token_ids,
    )  # fmt: skip


def _named(statistics: Statistics) -> dict[str, dict[str, float]]:
    return {objective: {"mean": mean, "sd": sd} for objective, (mean, sd) in statistics.items()}

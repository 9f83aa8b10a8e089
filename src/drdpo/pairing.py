"""Step 2: mix scored objectives into preference pairs. Needs neither a GPU nor torch."""

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from drdpo.cli import as_dict
from drdpo.config import PreferencesConfig
from drdpo.errors import DataError, UsageError
from drdpo.folder import already_made, atomic_files, lock_folder, refuse_if_locked, sweep, write_manifest
from drdpo.models import fingerprint
from drdpo.progress import progress
from drdpo.records import SPLITS, Completion, Preference, check_unique, read_records, row_number, write_records

# The arithmetic of scores, in numpy. M prompts, n completions of each; NaN where a prompt has fewer than n.

Floats: TypeAlias = npt.NDArray[np.float64]

DECIMALS = 12
"""Mixed scores are compared to so many decimals, so that rounding in the mix cannot break a tie."""


def mean_and_sd(scores_Mn: npt.ArrayLike) -> tuple[float, float]:
    """Mean and population standard deviation over all entries of a split; the sd of equal entries is exactly 0."""
    values = np.asarray(scores_Mn, dtype=np.float64)
    values = values[~np.isnan(values)]
    if values.size == 0:
        return float("nan"), float("nan")
    return float(values.mean()), 0.0 if values.min() == values.max() else float(values.std())


def standardise(scores_Mn: npt.ArrayLike, statistics: tuple[float, float] | None = None) -> Floats:
    """Z-scores of one objective over ALL entries of a split, as the authors' code has it, or by statistics of another split.

    Args:
        scores_Mn: [M, n] scores; NaN is kept and does not count.
        statistics: mean and population sd to standardise by; those of scores_Mn itself by default.

    Returns:
        [M, n] (x - mean) / population sd; all 0 where the sd is 0.
    """
    values_Mn = np.asarray(scores_Mn, dtype=np.float64)
    mean, sd = mean_and_sd(values_Mn) if statistics is None else statistics
    return np.where(np.isnan(values_Mn), np.nan, 0.0) if sd == 0 else (values_Mn - mean) / sd


def mix(scores: Mapping[str, npt.ArrayLike], weights: Mapping[str, float]) -> Floats:
    """The weighted sum of objectives.

    Args:
        scores: {objective: [M, n]}.
        weights: {objective: weight}, not empty.

    Returns:
        [M, n]

    Raises:
        DataError: a weighted objective has no scores; the message lists those that are there.
    """
    for objective in weights:
        if objective not in scores:
            raise DataError(f"there are no scores of {objective}; there are scores of {', '.join(scores) or 'nothing'}")
    terms = [weight * np.asarray(scores[objective], dtype=np.float64) for objective, weight in weights.items()]
    return np.sum(terms, axis=0)


def best_and_worst(mixed_Mn: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The completions to choose and to reject.

    Args:
        mixed_Mn: [M, n] scores; NaN is no completion.

    Returns:
        best [M] and worst [M], on ties the first index; usable [M], False where the margin is zero or where a prompt has
        fewer than two completions.
    """
    mixed_Mn = np.round(np.asarray(mixed_Mn, dtype=np.float64), DECIMALS)
    absent_Mn = np.isnan(mixed_Mn)
    best_M = np.where(absent_Mn, -np.inf, mixed_Mn).argmax(axis=1)
    worst_M = np.where(absent_Mn, np.inf, mixed_Mn).argmin(axis=1)
    row_M = np.arange(len(mixed_Mn))
    usable_M = mixed_Mn[row_M, best_M] > mixed_Mn[row_M, worst_M]  # False where either is NaN
    return best_M, worst_M, usable_M


# Which of a prompt's completions are paired. n completions of the prompt, in order of their sample_id.

Selection = Literal["top_bottom", "top_random", "all_pairs"]

REASONS = ("zero_margin", "small_margin", "equal_texts", "over_max_pairs_per_prompt")
"""Why a candidate, two completions that the selection puts together, is dropped; the first that holds is counted."""


@dataclass(frozen=True)
class Rule:
    """How pairs are selected; the flags of the same names say what each field does."""

    selection: Selection = "top_bottom"
    min_margin: float = 0.0
    max_pairs_per_prompt: int | None = None
    seed: int = 42

    def made_by(self) -> dict[str, object]:
        """What the pairs depend on; the seed only where something is drawn."""
        facts = {name: getattr(self, name) for name in ("selection", "min_margin", "max_pairs_per_prompt")}
        return facts | {"seed": self.seed if self.selection == "top_random" else None}


@dataclass(frozen=True)
class Chosen:
    """The pairs of one prompt."""

    pairs: list[tuple[int, int]]
    """(chosen, rejected) positions among the completions, the largest margin first, on ties the lowest positions."""
    counts: Counter[str]
    """"candidates"; how many of them each reason dropped; "not_drawn". candidates = pairs + all reasons + not_drawn."""
    largest_margin: float
    """Of all candidates."""


def select(mixed_n: npt.ArrayLike, texts: Sequence[str], best: int, worst: int, rule: Rule, key: str) -> Chosen:
    """Select the pairs of one prompt.

    Args:
        mixed_n: [n] mixed scores, n >= 2; entries after the n-th text do not count.
        texts: the n answers.
        best, worst: positions from best_and_worst.
        rule: what to select.
        key: names split and prompt; a random draw depends on the rule's seed and on this.
    """
    scores = np.round(np.asarray(mixed_n, dtype=np.float64)[: len(texts)], DECIMALS).tolist()
    answers = [text.strip() for text in texts]
    counts: Counter[str] = Counter()
    eligible: list[tuple[float, int, int]] = []
    largest = 0.0
    for chosen, rejected in _candidates(scores, best, worst, rule.selection):
        # Rounded like the scores: 0.3 - 0.1 is not below a smallest margin of 0.2.
        margin = round(scores[chosen] - scores[rejected], DECIMALS)
        largest = max(largest, margin)
        counts["candidates"] += 1
        reason = _reason(margin, answers[chosen], answers[rejected], rule)
        if reason:
            counts[reason] += 1
        else:
            eligible.append((-margin, chosen, rejected))
    eligible.sort()
    if rule.selection == "top_random" and eligible:
        # Among those that may be a pair, so that the filters cost no prompt which has another completion to reject.
        # Only random() is promised to stay the same from one Python to the next, for the same seed.
        drawn = int(random.Random(f"{rule.seed}/{key}").random() * len(eligible))
        counts["not_drawn"] = len(eligible) - 1
        eligible = [eligible[drawn]]
    kept = eligible[: rule.max_pairs_per_prompt]
    counts["over_max_pairs_per_prompt"] = len(eligible) - len(kept)
    pairs = [(chosen, rejected) for _, chosen, rejected in kept]
    return Chosen(pairs, counts, largest)


def _candidates(scores: list[float], best: int, worst: int, selection: Selection) -> list[tuple[int, int]]:
    """(higher, lower) positions of the completions that the selection puts together, margins of 0 included."""
    if selection == "top_bottom":
        return [(best, worst)]
    if selection == "top_random":
        return [(best, other) for other in range(len(scores)) if other != best]
    return [(i, j) if scores[i] >= scores[j] else (j, i) for i, j in combinations(range(len(scores)), 2)]


def _reason(margin: float, chosen: str, rejected: str, rule: Rule) -> str:
    """Why two completions are no pair; empty where they are one."""
    if margin <= 0:
        return "zero_margin"
    if margin < rule.min_margin:
        return "small_margin"
    return "equal_texts" if chosen == rejected else ""


# Scored completions, prompt by prompt, and their scores as matrices.

LARGEST = 1e100
"""Squares and sums of larger scores would overflow, and every z-score be 0."""


def read_completions(path: Path, objectives: Iterable[str]) -> list[Completion]:
    """Read scored completions.

    Args:
        path: a JSON-lines file.
        objectives: that every completion must have a score of.

    Raises:
        DataError: as read_records; also for a (prompt_id, sample_id) that repeats, for a completion without one of the
            objectives (the message lists what it has), and for a text that no file can hold.
    """
    completions = read_records(path, Completion.from_row)
    check_unique(path, ((c.prompt_id, c.sample_id) for c in completions), '"prompt_id", "sample_id"')
    needed = set(objectives)
    for index, completion in enumerate(completions):
        if not needed <= completion.scores.keys():
            lacking = ", ".join(sorted(needed - completion.scores.keys()))
            there = ", ".join(completion.scores) or "no scores at all; score them with step 1"
            raise DataError(
                f"{path}, row {row_number(path, index)} "
                f"(prompt_id {completion.prompt_id}, sample_id {completion.sample_id}): "
                f'field "scores" lacks {lacking}; it has {there}'
            )
        for name in needed:
            if abs(completion.scores[name]) > LARGEST:
                raise DataError(
                    f'{path}, row {row_number(path, index)}: field "scores": {name} is {completion.scores[name]:g}, beyond '
                    f"{LARGEST:g} and no score"
                )
    return completions


def group_by_prompt(path: Path, completions: list[Completion]) -> list[list[Completion]]:
    """Completions by prompt_id, each group sorted by sample_id, groups in order of first appearance.

    Raises:
        DataError: one prompt_id has two different prompts, or no prompt has two completions.
    """
    groups: dict[int, list[Completion]] = {}
    for index, completion in enumerate(completions):
        group = groups.setdefault(completion.prompt_id, [])
        if group and group[0].prompt != completion.prompt:
            raise DataError(
                f"{path}, row {row_number(path, index)}: "
                f'field "prompt" differs from that of another row with prompt_id {completion.prompt_id}'
            )
        group.append(completion)
    if max(map(len, groups.values())) < 2:
        raise DataError(f"{path}: every prompt has one completion only; a pair needs best_of_n >= 2 when sampling")
    return [sorted(group, key=lambda completion: completion.sample_id) for group in groups.values()]


def score_matrices(groups: list[list[Completion]], objectives: Iterable[str]) -> dict[str, Floats]:
    """{objective: scores [M, n]}; a prompt with fewer completions than n ends in NaN."""
    widest = max(map(len, groups))
    matrices = {}
    for objective in objectives:
        scores_Mn = np.full((len(groups), widest), np.nan)
        for row, group in enumerate(groups):
            scores_Mn[row, : len(group)] = [completion.scores[objective] for completion in group]
        matrices[objective] = scores_Mn
    return matrices


# Are the chosen answers longer than the rejected ones? A reward that likes length teaches length.

Unit = Literal["tokens", "characters"]

_Z = 1.959963984540054
"""The normal distribution's 97.5% quantile."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of chosen against rejected answers, as the manifest holds them."""

    unit: Unit
    """tokens as sampled, the end token included; characters where an answer has a text but no token ids."""
    chosen_mean: float
    chosen_median: float
    rejected_mean: float
    rejected_median: float
    chosen_longer: int
    """Pairs whose chosen answer is the longer one."""
    equal: int
    """Pairs whose answers have the same length; they say nothing about a bias and are left out of the share."""
    chosen_longer_share: float | None
    """chosen_longer over the pairs whose lengths differ; None where all are equal, as are the two fields below."""
    chosen_longer_low: float | None
    chosen_longer_high: float | None
    """95% interval of the share."""
    margin_correlation: float | None
    """Pearson correlation of margin and length difference over pairs; None where one of them is constant."""

    @property
    def biased(self) -> bool:
        """Does the interval exclude one half?"""
        low, high = self.chosen_longer_low, self.chosen_longer_high
        return low is not None and high is not None and not low <= 0.5 <= high


def lengths(pairs: Sequence[Preference]) -> Lengths:
    """Compare the lengths of chosen and rejected answers.

    Args:
        pairs: not empty, with scores, one or several of each prompt.
    """
    unit = unit_of(pairs)
    chosen_P = np.array([answer_length(pair.chosen[-1]["content"], pair.chosen_token_ids, unit) for pair in pairs])
    rejected_P = np.array([answer_length(pair.rejected[-1]["content"], pair.rejected_token_ids, unit) for pair in pairs])
    margin_P = np.array([(pair.chosen_score or 0.0) - (pair.rejected_score or 0.0) for pair in pairs])
    difference_P = chosen_P - rejected_P
    longer, differ = Counter[int](), Counter[int]()
    for pair, difference in zip(pairs, difference_P, strict=True):
        longer[pair.prompt_id] += int(difference > 0)
        differ[pair.prompt_id] += int(difference != 0)
    groups = [prompt_id for prompt_id, count in differ.items() if count]
    interval = share_interval([longer[group] for group in groups], [differ[group] for group in groups]) if groups else None
    varies = len(set(margin_P.tolist())) > 1 and len(set(difference_P.tolist())) > 1
    share, low, high = interval or (None, None, None)
    return Lengths(
        unit=unit,
        chosen_mean=float(chosen_P.mean()),
        chosen_median=float(np.median(chosen_P)),
        rejected_mean=float(rejected_P.mean()),
        rejected_median=float(np.median(rejected_P)),
        chosen_longer=int((difference_P > 0).sum()),
        equal=int((difference_P == 0).sum()),
        chosen_longer_share=share,
        chosen_longer_low=low,
        chosen_longer_high=high,
        margin_correlation=float(np.corrcoef(margin_P, difference_P)[0, 1]) if varies else None,
    )


def unit_of(pairs: Sequence[Preference]) -> Unit:
    """Tokens, unless an answer of the pairs has a text but no token ids."""
    answers = [(pair.chosen, pair.chosen_token_ids) for pair in pairs]
    answers += [(pair.rejected, pair.rejected_token_ids) for pair in pairs]
    return "tokens" if all(ids or not answer[-1]["content"].strip() for answer, ids in answers) else "characters"


def answer_length(text: str, token_ids: list[int] | None, unit: Unit) -> int:
    """Length of an answer: its token ids, or the characters of its text without outer white space."""
    return len(token_ids or ()) if unit == "tokens" else len(text.strip())


def share_interval(hits: Sequence[int], trials: Sequence[int]) -> tuple[float, float, float]:
    """A share and its 95% interval: Wilson's (JASA 1927), with the effective sample size of clustered trials.

    Pairs of one prompt share completions, so they count for less than as many independent ones: the sample size is
    p (1 - p) / v with v the variance of the ratio estimator over prompts (Dean and Pagano, J. Surv. Stat. Methodol. 2015),
    but at most the number of trials. With one trial of each prompt it is the number of prompts: the plain Wilson interval.

    Args:
        hits, trials: of each prompt, trials >= 1.

    Returns:
        share, low, high.
    """
    hits_M, trials_M = np.asarray(hits, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    total = float(trials_M.sum())
    share = float(hits_M.sum()) / total
    variance = float(np.square(hits_M - share * trials_M).sum()) / total**2
    if share in (0.0, 1.0):
        size = float(len(hits_M))  # no variance to estimate from; as if a prompt's trials said all the same
    else:
        size = min(total, share * (1 - share) / variance) if variance > 0 else total
    centre = (share + _Z**2 / (2 * size)) / (1 + _Z**2 / size)
    half = _Z / (1 + _Z**2 / size) * math.sqrt(share * (1 - share) / size + _Z**2 / (4 * size**2))
    return share, max(0.0, centre - half), min(1.0, centre + half)


# What step 2 prints of one split.


def objective_lines(
    split: str,
    statistics: dict[str, tuple[float, float]],
    weights: dict[str, float],
    fitted: dict[str, tuple[float, float]] | None,
) -> list[str]:
    """A table of every weighted objective.

    Args:
        split: its name.
        statistics: {objective: (mean, sd)} of the split.
        weights: {objective: weight}.
        fitted: the statistics of the other split that the scores were standardised by, if they were.
    """
    width = max(map(len, weights))
    more = "  train mean  train sd" if fitted else ""
    lines = [f"{split}: {'objective':<{width}}  weight      mean        sd{more}"]
    for objective, (mean, sd) in statistics.items():
        line = f"{split}: {objective:<{width}}  {weights[objective]:>6.3g}  {mean:>8.4f}  {sd:>8.4f}"
        if fitted:
            line += f"  {fitted[objective][0]:>10.4f}  {fitted[objective][1]:>8.4f}"
        lines.append(line)
    return lines


def pair_lines(split: str, counts: dict[str, int], margins: dict[str, float], rule: Rule) -> list[str]:
    """How many pairs, what was dropped and why, and how large the margins are."""
    lines = [f"{split}: {counts['pairs']} pairs from {counts['prompts']} prompts; dropped: {_dropped(counts) or 'none'}"]
    if rule.selection != "top_bottom":
        drawn = f", {counts['not_drawn']} of them not drawn" if rule.selection == "top_random" else ""
        lines.append(
            f"{split}: {rule.selection} of {counts['candidates']} candidates, two completions each{drawn}; "
            f"{counts['prompts_without_pair']} prompts without a pair"
        )
    lines.append(f"{split}: margin: " + ", ".join(f"{name} {value:.4f}" for name, value in margins.items()))
    return lines


def length_lines(split: str, found: Lengths) -> list[str]:
    """Lengths of chosen and rejected, and which is longer: a bias only where the interval excludes one half."""
    first = f"{split}: length in {found.unit}: chosen mean {found.chosen_mean:.1f}, median {found.chosen_median:g}"
    first += f"; rejected mean {found.rejected_mean:.1f}, median {found.rejected_median:g}"
    if found.margin_correlation is not None:
        first += f"; correlation of margin and length difference {found.margin_correlation:.2f}"
    share, low, high = found.chosen_longer_share, found.chosen_longer_low, found.chosen_longer_high
    if share is None or low is None or high is None:
        return [first, f"{split}: length: chosen and rejected are equally long in every pair"]
    of = f" that differ in length ({found.equal} do not)" if found.equal else ""
    line = f"chosen is longer in {100 * share:.1f}% of pairs{of} (95% {100 * low:.1f}-{100 * high:.1f}%)"
    return [first, f"{split}: length bias: {line}" if found.biased else f"{split}: length: {line}, no bias shown"]


def why_none(counts: dict[str, int], rule: Rule, largest_margin: float) -> str:
    """In words, what dropped every pair, and what to change."""
    words = _dropped(counts)
    if counts["dropped_small_margin"]:
        words += f"; --min_margin={rule.min_margin:g}, but the largest margin is {largest_margin:.4g}"
    return words


def _dropped(counts: dict[str, int]) -> str:
    reasons = ("one_completion", *REASONS)
    return ", ".join(
        f"{counts[f'dropped_{reason}']} {reason.replace('_', ' ')}" for reason in reasons if counts[f"dropped_{reason}"]
    )


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
        raise DataError(f"{path}: no pair is left of {len(groups)} prompts ({why_none(facts, rule, largest_margin)})")
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

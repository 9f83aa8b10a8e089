"""Step 2: mix scored objectives into preference pairs. Needs neither a GPU nor torch.

Every objective is standardised over all completions of a split, as in the authors' code, and the weighted sum of the
z-scores ranks the completions of a prompt.

Shapes: C completions of a split, n completions of one prompt, P pairs.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from drdpo.cli import as_dict
from drdpo.config.data import PreferencesConfig
from drdpo.errors import DataError, UsageError
from drdpo.folder import already_made, atomic_files, lock_folder, refuse_if_locked, sweep, write_manifest
from drdpo.models import fingerprint
from drdpo.progress import progress
from drdpo.records import SPLITS, Completion, Preference, check_unique, read_records, row_number, write_records

STEP = "preferences"
DECIMALS = 12
"""Scores that differ only by the rounding of their sum are tied."""
LARGEST_SCORE = 1e100
"""Squares and sums of larger scores would overflow."""
REASONS = ("zero_margin", "small_margin", "empty_text", "equal_texts", "over_max_pairs_per_prompt")
"""Why a candidate (two completions that the selection puts together) is dropped; the first that applies is counted."""

Floats: TypeAlias = npt.NDArray[np.float64]
_Key: TypeAlias = tuple[int, int]
Statistics: TypeAlias = dict[str, tuple[float, float]]
"""{objective: (mean, population standard deviation)} of raw scores."""


@dataclass(frozen=True)
class SplitPairs:
    """The pairs of one split and how they were made."""

    pairs: list[Preference]
    statistics: Statistics
    """Of this split."""
    standardised_by: Statistics | None
    """What the scores were standardised by; None if they were not."""
    counts: dict[str, int]
    """prompts, completions, candidates, pairs, prompts_without_pair, dropped_one_completion (prompts), dropped_<reason>
    (candidates), not_drawn (candidates). candidates = pairs + all dropped_<reason> + not_drawn."""
    margins: dict[str, float]
    """min, median, mean and max of the pairs' margins, in units of the mixed score."""
    lengths: "Lengths"


def generate_preferences(config: PreferencesConfig) -> None:
    """Pair the completions of every prompt by mixed score; write <output_path>/{train,test}.jsonl and manifest.json.

    Both splits are paired before anything is written. --dry_run=true writes nothing.

    Raises:
        DataError: a split is missing, empty or malformed, a key repeats, an objective has no scores, no prompt has two
            completions, or no pair is left.
        UsageError: the output folder contains results from a different configuration, is the input folder, or is locked.
    """
    source, target = Path(config.completions), Path(config.output_path)
    if source.resolve() == target.resolve():
        raise UsageError(f"--output_path={target} is the folder of the completions; choose another, so that they are kept")
    inputs, outputs = ({split: folder / f"{split}.jsonl" for split in SPLITS} for folder in (source, target))
    for path in inputs.values():
        if not path.is_file():
            raise DataError(f"{path}: no such file; pass --completions=FOLDER with scored train.jsonl and test.jsonl")
    weights = config.objective_weights()
    made_by: dict[str, object] = {
        "weights": weights,
        **{name: getattr(config, name) for name in ("standardize", "standardize_by")},
        **{name: getattr(config, name) for name in ("selection", "min_margin", "max_pairs_per_prompt")},
        # Only random draws depend on the seed.
        "seed": config.seed if config.selection == "top_random" else None,
        "completions": {split: fingerprint(path) for split, path in inputs.items()},
    }
    if not config.dry_run:
        if already_made(target, STEP, made_by, list(outputs.values()), config.overwrite):
            print(f"{target}: pairs from the same flags and completions exist; skipped")
            return
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
        print("\n".join(f"{split}: {line}" for line in report(made, weights, config)))
    if config.dry_run:
        print("dry run: nothing was written")


def read_completions(path: Path, objectives: Iterable[str]) -> list[Completion]:
    """Read the scored completions of a JSON-lines file.

    Args:
        path: the file.
        objectives: that every completion must have a score of.

    Raises:
        DataError: as read_records; also for a repeated (prompt_id, sample_id), and for a completion that lacks one of the
            objectives or has a score beyond LARGEST_SCORE.
    """
    completions = read_records(path, Completion.from_row)
    check_unique(path, ((c.prompt_id, c.sample_id) for c in completions), '"prompt_id", "sample_id"')
    needed = set(objectives)
    for index, completion in enumerate(completions):
        if lacking := ", ".join(sorted(needed - completion.scores.keys())):
            raise DataError(
                f"{path}, row {row_number(path, index)} "
                f"(prompt_id {completion.prompt_id}, sample_id {completion.sample_id}): "
                f'field "scores" lacks {lacking}; it has {", ".join(completion.scores) or "no scores at all; run step 1"}'
            )
        for name in needed:
            if abs(score := completion.scores[name]) > LARGEST_SCORE:
                where = f'{path}, row {row_number(path, index)}: field "scores"'
                raise DataError(f"{where}: {name} is {score:g}, beyond {LARGEST_SCORE:g}")
    return completions


def pair_completions(
    path: Path, completions: list[Completion], config: PreferencesConfig, split: str, fitted: Statistics | None = None
) -> SplitPairs:
    """Pair the completions of each prompt by their mixed scores. The order of the completions changes no pair.

    Args:
        path: file of the completions, for messages.
        completions: of one split, with scores of all weighted objectives, in any order and number per prompt.
        config: weights, standardisation and selection.
        split: "train" or "test".
        fitted: statistics of another split to standardise by; this split's own by default.

    Returns:
        Pairs in the order in which their prompts first appear; within a prompt, the largest margin first.

    Raises:
        DataError: see generate_preferences.
    """
    weights = config.objective_weights()
    groups = group_by_prompt(path, completions)
    # In order of ids, because the last bit of a sum depends on its order.
    ordered = sorted(completions, key=lambda completion: (completion.prompt_id, completion.sample_id))
    scores = {name: np.array([completion.scores[name] for completion in ordered]) for name in _shared(ordered)}
    own = {name: mean_and_sd(scores_C) for name, scores_C in scores.items()}
    used = (own if fitted is None else fitted) if config.standardize else None
    if used is not None:
        scores = {name: standardise(scores_C, used[name]) for name, scores_C in scores.items() if name in used}
    keys = [(completion.prompt_id, completion.sample_id) for completion in ordered]
    mixed = dict(zip(keys, mix(scores, weights).tolist(), strict=True))
    rows = np.array(list(scores.values())).T.tolist()
    by_objective = {key: dict(zip(scores, row, strict=True)) for key, row in zip(keys, rows, strict=True)}
    counts = Counter[str]()
    pairs: list[Preference] = []
    for group in progress(groups, desc=f"pair {split}", total=len(groups), unit="prompt", delay=2):
        mixed_n = [mixed[completion.prompt_id, completion.sample_id] for completion in group]
        texts = [completion.completion[-1]["content"] for completion in group]
        chosen, dropped = select(mixed_n, texts, config, f"{split}/{group[0].prompt_id}")
        pairs += [_preference(group[best], group[other], mixed, by_objective) for best, other in chosen]
        counts += dropped
        counts["prompts_without_pair"] += not chosen
        counts["dropped_one_completion"] += len(group) < 2
    found = {"prompts": len(groups), "completions": len(completions)}
    found |= {"candidates": counts["candidates"], "pairs": len(pairs)}
    found |= {name: counts[name] for name in ("prompts_without_pair", "dropped_one_completion")}
    found |= {f"dropped_{reason}": counts[reason] for reason in REASONS} | {"not_drawn": counts["not_drawn"]}
    if not pairs:
        why = _dropped(found)
        if counts["small_margin"]:
            mixed_by_prompt = ([mixed[c.prompt_id, c.sample_id] for c in group] for group in groups)
            largest = max(max(mixed_n) - min(mixed_n) for mixed_n in mixed_by_prompt)
            why += f"; --min_margin={config.min_margin:g}, but the largest margin is {largest:.4g}"
        raise DataError(f"{path}: no pair is left of {len(groups)} prompts ({why})")
    return SplitPairs(pairs, own, used, found, _margins(pairs), compare_lengths(pairs))


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
        raise DataError(f"{path}: every prompt has only one completion; sample with --best_of_n=2 or more")
    return [sorted(group, key=lambda completion: completion.sample_id) for group in groups.values()]


# Scores ------------------------------------------------------------------------------------------------------------------


def mean_and_sd(scores_C: npt.ArrayLike) -> tuple[float, float]:
    """Mean and population standard deviation; the latter is exactly 0 for equal scores."""
    values = np.asarray(scores_C, dtype=np.float64)
    return float(values.mean()), 0.0 if np.ptp(values) == 0 else float(values.std())


def standardise(scores_C: npt.ArrayLike, statistics: tuple[float, float]) -> Floats:
    """[C] z-scores by a mean and a standard deviation; all 0 if the latter is 0."""
    values = np.asarray(scores_C, dtype=np.float64)
    mean, sd = statistics
    return np.zeros_like(values) if sd == 0 else (values - mean) / sd


def mix(scores: Mapping[str, npt.ArrayLike], weights: Mapping[str, float]) -> Floats:
    """[C] weighted sum of {objective: scores [C]} by {objective: weight}."""
    return np.sum([weight * np.asarray(scores[name], dtype=np.float64) for name, weight in weights.items()], axis=0)


# The pairs of one prompt ---------------------------------------------------------------------------------------------------


def select(
    mixed_n: Sequence[float], texts: Sequence[str], config: PreferencesConfig, key: str
) -> tuple[list[tuple[int, int]], Counter[str]]:
    """Select the pairs of one prompt.

    Args:
        mixed_n: mixed scores.
        texts: the answers.
        config: --selection, --min_margin, --max_pairs_per_prompt and --seed.
        key: names the split and the prompt; a random draw depends on this and the seed only.

    Returns:
        (chosen, rejected) positions, the largest margin first, on ties the lowest positions; and the numbers of
        "candidates", of those dropped for each of REASONS, and of those "not_drawn".
    """
    scores = np.round(np.asarray(mixed_n, dtype=np.float64), DECIMALS).tolist()
    answers = [text.strip() for text in texts]
    counts = Counter[str]()
    eligible: list[tuple[float, int, int]] = []
    for chosen, rejected in _candidates(scores, config.selection):
        counts["candidates"] += 1
        # Rounded like the scores: 0.3 - 0.1 is not below a smallest margin of 0.2.
        margin = round(scores[chosen] - scores[rejected], DECIMALS)
        if margin <= 0:
            counts["zero_margin"] += 1
        elif margin < config.min_margin:
            counts["small_margin"] += 1
        elif not (answers[chosen] and answers[rejected]):
            counts["empty_text"] += 1
        elif answers[chosen] == answers[rejected]:
            counts["equal_texts"] += 1
        else:
            eligible.append((-margin, chosen, rejected))
    eligible.sort()
    if config.selection == "top_random" and eligible:
        # Drawn after filtering, so that no prompt is lost that has another completion to reject. Of random's methods, only
        # random() is guaranteed to give the same numbers in every Python version.
        drawn = int(random.Random(f"{config.seed}/{key}").random() * len(eligible))
        counts["not_drawn"] = len(eligible) - 1
        eligible = [eligible[drawn]]
    kept = eligible[: config.max_pairs_per_prompt]
    counts["over_max_pairs_per_prompt"] = len(eligible) - len(kept)
    return [(chosen, rejected) for _, chosen, rejected in kept], counts


def _candidates(scores: list[float], selection: str) -> list[tuple[int, int]]:
    """(higher, lower) positions of the completions that the selection puts together, ties included."""
    if len(scores) < 2:
        return []
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if selection == "top_bottom":
        return [(best, worst)]
    if selection == "top_random":
        return [(best, other) for other in range(len(scores)) if other != best]
    return [(i, j) if scores[i] >= scores[j] else (j, i) for i, j in combinations(range(len(scores)), 2)]


def _shared(completions: list[Completion]) -> list[str]:
    """The objectives that all completions have a score of, within LARGEST_SCORE."""
    shared = set.intersection(*(set(completion.scores) for completion in completions))
    return sorted(name for name in shared if all(abs(c.scores[name]) <= LARGEST_SCORE for c in completions))


def _preference(
    chosen: Completion, rejected: Completion, mixed: Mapping[_Key, float], scores: Mapping[_Key, dict[str, float]]
) -> Preference:
    first, second = ((completion.prompt_id, completion.sample_id) for completion in (chosen, rejected))
    return Preference(
        chosen.prompt_id, chosen.prompt, chosen.completion, rejected.completion, mixed[first], mixed[second],
        chosen.token_ids, rejected.token_ids, scores[first], scores[second],
    )  # fmt: skip


# Lengths: a reward that likes length teaches length ------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Lengths of chosen and rejected answers. A prompt with several pairs, which share answers, counts once in the share."""

    unit: Literal["tokens", "characters"]
    """Tokens as sampled, including the end token; characters if an answer has a text but no token ids."""
    chosen_mean: float
    chosen_median: float
    rejected_mean: float
    rejected_median: float
    chosen_longer: int
    """Prompts whose chosen answers are longer than the rejected ones, in total over the prompt's pairs."""
    chosen_shorter: int
    equal: int
    """Prompts without a difference, which do not enter the share."""
    chosen_longer_share: float | None
    """chosen_longer / (chosen_longer + chosen_shorter); None if both are 0, as are the two fields below."""
    chosen_longer_low: float | None
    chosen_longer_high: float | None
    """95% Wilson interval of the share."""
    margin_correlation: float | None
    """Pearson correlation of margin and length difference over pairs; None if one of them is constant."""

    @property
    def biased(self) -> bool:
        """Does the interval exclude one half?"""
        low, high = self.chosen_longer_low, self.chosen_longer_high
        return low is not None and high is not None and not low <= 0.5 <= high


def compare_lengths(pairs: Sequence[Preference]) -> Lengths:
    """Compare the lengths of chosen and rejected answers of pairs with scores; at least one pair."""
    chosen = [(pair.chosen[-1]["content"].strip(), pair.chosen_token_ids) for pair in pairs]
    rejected = [(pair.rejected[-1]["content"].strip(), pair.rejected_token_ids) for pair in pairs]
    by_tokens = all(ids or not text for text, ids in chosen + rejected)
    chosen_P, rejected_P = (
        np.array([len(ids or ()) if by_tokens else len(text) for text, ids in answers]) for answers in (chosen, rejected)
    )
    difference_P = chosen_P - rejected_P
    totals = Counter[int]()
    for pair, difference in zip(pairs, difference_P.tolist(), strict=True):
        totals[pair.prompt_id] += difference
    longer, shorter = (sum(sign * total > 0 for total in totals.values()) for sign in (1, -1))
    share, low, high = wilson_interval(longer, longer + shorter) if longer + shorter else (None, None, None)
    margin_P = _margins_of(pairs)
    varies = np.ptp(margin_P) > 0 and np.ptp(difference_P) > 0
    return Lengths(
        unit="tokens" if by_tokens else "characters",
        chosen_mean=float(chosen_P.mean()),
        chosen_median=float(np.median(chosen_P)),
        rejected_mean=float(rejected_P.mean()),
        rejected_median=float(np.median(rejected_P)),
        chosen_longer=longer,
        chosen_shorter=shorter,
        equal=len(totals) - longer - shorter,
        chosen_longer_share=share,
        chosen_longer_low=low,
        chosen_longer_high=high,
        margin_correlation=float(np.corrcoef(margin_P, difference_P)[0, 1]) if varies else None,
    )


def wilson_interval(hits: int, trials: int) -> tuple[float, float, float]:
    """A share and the ends of its 95% interval (Wilson, JASA 1927). Importing scipy.stats fails where torch is blocked."""
    z, share = NormalDist().inv_cdf(0.975), hits / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    return share, max(0.0, centre - half), min(1.0, centre + half)


def _margins_of(pairs: Sequence[Preference]) -> Floats:
    return np.array([(pair.chosen_score or 0.0) - (pair.rejected_score or 0.0) for pair in pairs])


def _margins(pairs: Sequence[Preference]) -> dict[str, float]:
    margin_P = _margins_of(pairs)
    return {name: float(getattr(np, name)(margin_P)) for name in ("min", "median", "mean", "max")}


# What is printed and written -----------------------------------------------------------------------------------------------


def report(made: SplitPairs, weights: dict[str, float], config: PreferencesConfig) -> list[str]:
    """Lines about one split: weight, mean and sd of every weighted objective, then pairs, margins and lengths."""
    header, columns = ["objective", "weight", "mean", "sd"], [made.statistics]
    if made.standardised_by not in (None, made.statistics):
        header, columns = [*header, "train mean", "train sd"], [made.statistics, made.standardised_by or {}]
    rows = [
        [name, f"{weight:.3g}", *(f"{value:.4f}" for column in columns for value in column[name])]
        for name, weight in weights.items()
    ]
    align = ["left"] + ["right"] * (len(header) - 1)
    lines = tabulate(rows, header, tablefmt="plain", colalign=align, disable_numparse=True).splitlines()
    counts = made.counts
    lines.append(f"{counts['pairs']} pairs from {counts['prompts']} prompts; dropped: {_dropped(counts) or 'none'}")
    if config.selection != "top_bottom":
        drawn = f" ({counts['not_drawn']} of them not drawn)" if config.selection == "top_random" else ""
        lines.append(
            f"{config.selection}: {counts['candidates']} candidate pairs{drawn}; "
            f"{counts['prompts_without_pair']} prompts without a pair"
        )
    lines.append("margin: " + ", ".join(f"{name} {value:.4f}" for name, value in made.margins.items()))
    return lines + length_lines(made.lengths)


def length_lines(found: Lengths) -> list[str]:
    """Lengths of chosen and rejected answers and which are longer; called a bias only if the interval excludes one half."""
    first = f"length in {found.unit}: chosen mean {found.chosen_mean:.1f}, median {found.chosen_median:g}"
    first += f"; rejected mean {found.rejected_mean:.1f}, median {found.rejected_median:g}"
    if found.margin_correlation is not None:
        first += f"; correlation of margin and length difference {found.margin_correlation:.2f}"
    share, low, high = found.chosen_longer_share, found.chosen_longer_low, found.chosen_longer_high
    if share is None or low is None or high is None:
        return [first, "length: chosen and rejected answers are equally long for every prompt"]
    line = f"chosen is longer for {share:.1%} of prompts (95% CI {100 * low:.1f}-{100 * high:.1f}%)"
    line += f"; {found.equal} prompts without a difference not counted" if found.equal else ""
    return [first, f"length bias: {line}" if found.biased else f"length: {line}; no significant bias"]


def _dropped(counts: dict[str, int]) -> str:
    reasons = ("one_completion", *REASONS)
    dropped = {reason.replace("_", " "): counts[f"dropped_{reason}"] for reason in reasons}
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)


def _write(
    target: Path,
    outputs: dict[str, Path],
    splits: dict[str, SplitPairs],
    made_by: dict[str, object],
    config: PreferencesConfig,
) -> None:
    def named(statistics: Statistics) -> dict[str, dict[str, float]]:
        return {objective: {"mean": mean, "sd": sd} for objective, (mean, sd) in statistics.items()}

    facts = {
        split: {
            "counts": made.counts,
            "scores": named(made.statistics),
            "standardized_by": None if made.standardised_by is None else named(made.standardised_by),
            "margins": made.margins,
            "lengths": asdict(made.lengths) | {"biased": made.lengths.biased},
        }
        for split, made in splits.items()
    }
    with atomic_files(*outputs.values()) as asides:
        for aside, (split, made) in zip(asides, splits.items(), strict=True):
            write_records(aside, progress(made.pairs, desc=f"write {split}", unit="pair", delay=2))
        # Old pairs are deleted first and new ones moved last, so that pairs never stand beside the manifest of others.
        for path in outputs.values():
            path.unlink(missing_ok=True)
        write_manifest(target, STEP, made_by, as_dict(config), **facts)

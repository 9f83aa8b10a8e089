"""Step 2: mix scored objectives into preference pairs. Needs neither a GPU nor torch.

Every objective is standardised over all completions of a split, as in the authors' code, and the weighted sum of the
z-scores ranks the completions of a prompt.

Shapes: C completions of a split, n completions of one prompt, P pairs.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, combinations
from pathlib import Path
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from drdpo.candidates import LARGEST_SCORE, check_scored, mean_and_sd
from drdpo.cli import as_dict
from drdpo.config.data import PreferencesConfig
from drdpo.errors import DataError, UsageError
from drdpo.folder import already_made, atomic_files, lock_folder, refuse_if_locked, sweep, write_manifest
from drdpo.models import fingerprint
from drdpo.progress import progress
from drdpo.records import SPLITS, Completion, Preference, read_records, write_records

STEP = "preferences"
DECIMALS = 12
"""Scores that differ only by the rounding of their sum are tied."""
REASONS = ("zero_margin", "small_margin", "empty_text", "equal_texts", "over_max_pairs_per_prompt")
"""Why a candidate (two completions that the selection puts together) is dropped; the first that applies is counted."""

Floats: TypeAlias = npt.NDArray[np.float64]
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
    lengths: "Lengths"

    @property
    def margins(self) -> dict[str, float]:
        """min, median, mean and max of the pairs' margins, in units of the mixed score."""
        return {name: float(getattr(np, name)(_margins(self.pairs))) for name in ("min", "median", "mean", "max")}


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
    names = ("standardize", "standardize_by", "selection", "min_margin", "max_pairs_per_prompt")
    made_by: dict[str, object] = {
        "weights": weights,
        **{name: getattr(config, name) for name in names},
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
        splits[split] = pair_completions(path, config, split, fitted)
    if not config.dry_run:
        with lock_folder(target):
            sweep(target)
            _write(target, outputs, splits, made_by, config)
    for split, made in splits.items():
        print("\n".join(f"{split}: {line}" for line in report(made, weights, config)))
    if config.dry_run:
        print("dry run: nothing was written")


def pair_completions(path: Path, config: PreferencesConfig, split: str, fitted: Statistics | None = None) -> SplitPairs:
    """Pair the completions of each prompt by their mixed scores. The order of the rows changes no pair.

    Args:
        path: scored completions of one split, in any order and number per prompt.
        fitted: statistics of another split to standardise by; this split's own by default.

    Returns:
        Pairs in the order in which their prompts first appear; within a prompt, the largest margin first.
    """
    weights = config.objective_weights()
    by_prompt = check_scored(path, read_records(path, Completion.from_row), weights)
    if max(map(len, by_prompt.values())) < 2:
        raise DataError(f"{path}: every prompt has only one completion; sample with --best_of_n=2 or more")
    groups: dict[int, list[int]] = {prompt_id: [] for prompt_id in by_prompt}
    # In order of ids, because the last bit of a sum depends on its order.
    rows = sorted(chain(*by_prompt.values()), key=lambda row: (row.prompt_id, row.sample_id))
    for place, row in enumerate(rows):
        groups[row.prompt_id].append(place)
    shared = sorted(set.intersection(*(set(row.scores) for row in rows)))
    scores = {name: np.array([row.scores[name] for row in rows]) for name in shared}
    scores = {name: scores_C for name, scores_C in scores.items() if np.abs(scores_C).max() <= LARGEST_SCORE}
    own = {name: mean_and_sd(scores_C) for name, scores_C in scores.items()}
    used = (own if fitted is None else fitted) if config.standardize else None
    if used is not None:
        scores = {name: standardise(scores_C, used[name]) for name, scores_C in scores.items() if name in used}
    mixed_C = mix(scores, weights).tolist()
    standard_C = [dict(zip(scores, of_row, strict=True)) for of_row in np.array(list(scores.values())).T.tolist()]
    counts = Counter[str]()
    pairs: list[Preference] = []
    for prompt_id, places in progress(groups.items(), desc=f"pair {split}", total=len(groups), unit="prompt", delay=2):
        mixed_n, texts = [mixed_C[c] for c in places], [rows[c].completion[-1]["content"] for c in places]
        chosen, dropped = select(mixed_n, texts, config, f"{split}/{prompt_id}")
        for c, r in ((places[best], places[other]) for best, other in chosen):
            pairs.append(
                Preference(
                    prompt_id, rows[c].prompt, rows[c].completion, rows[r].completion, mixed_C[c], mixed_C[r],
                    rows[c].token_ids, rows[r].token_ids, standard_C[c], standard_C[r],
                )
            )  # fmt: skip
        counts += dropped
        counts["prompts_without_pair"] += not chosen
        counts["one_completion"] += len(places) < 2
    found = {"prompts": len(groups), "completions": len(rows), "candidates": counts["candidates"], "pairs": len(pairs)}
    names = ("prompts_without_pair", "dropped_one_completion", *(f"dropped_{reason}" for reason in REASONS), "not_drawn")
    found |= {name: counts[name.replace("dropped_", "")] for name in names}
    if not pairs:
        why = _dropped(found)
        if counts["small_margin"]:
            largest = max(max(mixed_n) - min(mixed_n) for mixed_n in ([mixed_C[c] for c in g] for g in groups.values()))
            why += f"; --min_margin={config.min_margin:g}, but the largest margin is {largest:.4g}"
        raise DataError(f"{path}: no pair is left of {len(groups)} prompts ({why})")
    return SplitPairs(pairs, own, used, found, compare_lengths(pairs))


# Scores ------------------------------------------------------------------------------------------------------------------


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
    """Select the pairs of one prompt by its mixed scores; a random draw depends on `key`, its split and prompt, and --seed.

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
    margin_P = _margins(pairs)
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


def _margins(pairs: Sequence[Preference]) -> Floats:
    return np.array([(pair.chosen_score or 0.0) - (pair.rejected_score or 0.0) for pair in pairs])


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
    def named(statistics: Statistics | None) -> dict[str, dict[str, float]] | None:
        by_objective = {objective: {"mean": mean, "sd": sd} for objective, (mean, sd) in (statistics or {}).items()}
        return None if statistics is None else by_objective

    facts = {
        split: {
            "counts": made.counts,
            "scores": named(made.statistics),
            "standardized_by": named(made.standardised_by),
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

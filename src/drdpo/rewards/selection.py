"""Which of a prompt's completions are paired. n completions of the prompt, in order of their sample_id."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt

from drdpo.rewards.scores import DECIMALS

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

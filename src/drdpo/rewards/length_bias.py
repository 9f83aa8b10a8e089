"""Are the chosen answers longer than the rejected ones? A reward that likes length teaches length."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from drdpo.records import Preference

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

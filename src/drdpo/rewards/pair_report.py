"""What step 2 prints of one split."""

from drdpo.rewards.length_bias import Lengths
from drdpo.rewards.selection import REASONS, Rule


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

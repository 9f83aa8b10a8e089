"""Pairs to read on a terminal."""

from collections.abc import Sequence

from drdpo.display import shortened
from drdpo.records import Preference
from drdpo.rewards.length_bias import answer_length, unit_of

WIDTH = 100
"""Columns of a line."""

LINES = 12
"""Lines of one text; the middle of a longer one is left out."""


def preview(pairs: Sequence[Preference]) -> str:
    """The pairs of smallest, median and largest margin, with scores and lengths; fewer where there are fewer.

    Args:
        pairs: of one split, not empty, with scores.
    """
    order = sorted(range(len(pairs)), key=lambda index: (_margin(pairs[index]), pairs[index].prompt_id, index))
    places = {0: "smallest", len(order) // 2: "median", len(order) - 1: "largest"}
    if len(order) == 1:
        places = {0: "only"}
    unit = unit_of(pairs)
    lines = []
    for place, name in sorted(places.items()):
        pair = pairs[order[place]]
        lines += ["", f"== the {name} margin, {_margin(pair):.4f}: prompt_id {pair.prompt_id}"]
        for message in pair.prompt:
            lines += _block(message["role"] if message["role"] != "user" else "prompt", message["content"])
        for side, answer, score, ids in (
            ("chosen", pair.chosen, pair.chosen_score, pair.chosen_token_ids),
            ("rejected", pair.rejected, pair.rejected_score, pair.rejected_token_ids),
        ):
            text = answer[-1]["content"]
            lines += _block(f"{side}, score {score:.4f}, {answer_length(text, ids, unit)} {unit}", text)
    return "\n".join(lines)


def _block(title: str, text: str) -> list[str]:
    return [f"-- {title}", *(f"    {line}".rstrip() for line in shortened(text, WIDTH - 4, LINES))]


def _margin(pair: Preference) -> float:
    return (pair.chosen_score or 0.0) - (pair.rejected_score or 0.0)

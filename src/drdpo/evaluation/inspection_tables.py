"""The tables and notes of a look at the data: one column or line a file."""

import numpy as np

from drdpo.display import one_line
from drdpo.evaluation.dropped import Reason
from drdpo.evaluation.kinds import COMPLETIONS, PREFERENCES, PROMPTS, RATINGS
from drdpo.evaluation.tables import text_table
from drdpo.evaluation.tally import Array, Group, Tally, shared_prompts

LOWEST, HIGHEST = 0, 4
"""The range of HelpSteer2's ratings."""

Line = tuple[str, str]
"""What is counted, and how many."""


def counts_table(group: Group) -> str:
    """Counts, one column a file."""
    columns = [dict(_counts(group, tally)) for tally in group.tallies]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    return text_table(["counts", *(tally.name for tally in group.tallies)], rows)


def lengths_table(group: Group) -> str:
    """Quantiles of the lengths of prompts and answers; a prompt counts once, however many rows it has."""
    rows = []
    for name in dict.fromkeys(name for tally in group.tallies for name in tally.lengths):
        for tally in group.tallies:
            values = tally.lengths[name].values(group.in_tokens(name))
            if len(values):
                figures = [f"{value:,.0f}" for value in np.quantile(values, (0, 0.1, 0.5, 0.9, 0.99, 1))]
                rows.append([name, tally.name, group.unit(name), *figures, f"{values.mean():,.1f}"])
    return text_table(["length of", "file", "in", "min", "p10", "median", "p90", "p99", "max", "mean"], rows, left=3)


def scores_table(group: Group) -> str:
    """Mean, population sd and quartiles of every objective, and of a pair's margin; empty where nothing has a score."""
    rows = []
    for objective in group.objectives():
        for tally in group.tallies:
            values = np.array(tally.scores.get(objective, ()), dtype=np.float64)
            if len(values):
                rows.append([one_line(objective, 50), tally.name, *_figures(values)])
    rows += [["margin", tally.name, *_figures(np.array(tally.margins))] for tally in group.tallies if tally.margins]
    header = [
        "rating" if group.kind is RATINGS else "score",
        "file",
        "rows",
        "mean",
        "sd",
        "min",
        "25%",
        "median",
        "75%",
        "max",
    ]
    return text_table(header, rows, left=2) if rows else ""


def notes(group: Group) -> list[str]:
    """What a user should know before the data is used: leaks, ids that a step refuses, figures that say nothing."""
    found = []
    for place, tally in enumerate(group.tallies):
        for other in group.tallies[:place]:
            shared = shared_prompts(tally, other)
            if shared:
                found.append(
                    f"{tally.name} and {other.name} share {_many(len(shared), 'prompt')}: what is trained on one cannot be "
                    f"judged by the other (first in row {shared[0]} of {tally.name})"
                )
        found += [
            f"{tally.name}: {_many(tally.counts[name], 'row')} {says} (first: row {tally.first[name]})"
            for name, says in _PROBLEMS
            if tally.counts[name]
        ]
        found += _token_notes(tally) + _score_notes(group.kind is RATINGS, tally)
    return found


_PROBLEMS = (
    ("repeated ids", "with the id of an earlier row; the steps refuse that"),
    ("conflicting ids", "with the prompt_id of an earlier row and another prompt; the steps refuse that"),
    ("not encoded", "with a text that the tokenizer or its chat template refuses; it has no length"),
    ("chosen scored lower", "whose chosen answer has the lower score"),
)


def _counts(group: Group, tally: Tally) -> list[Line]:
    kind, counts, prompts = group.kind, tally.counts, len(tally.answers_of)
    lines = [(kind.name, f"{tally.rows:,}")]
    if kind is not PROMPTS:
        one = "pairs" if kind is PREFERENCES else "completions" if kind is COMPLETIONS else "rated answers"
        many = np.array(list(tally.answers_of.values()))
        lines.append(("distinct prompts", f"{prompts:,}"))
        lines.append((f"{one} per prompt, min / median / max", f"{many.min()} / {np.median(many):g} / {many.max()}"))
    lines.append(("prompts with a system message", _share(counts["system"], prompts)))
    lines.append(("prompts of several turns", _share(counts["multi-turn"], prompts)))
    if kind is PROMPTS or any(isinstance(key, int) for key in tally.answers_of):
        lines.append(("prompts with the text of an earlier prompt_id", _share(counts["repeated prompts"], prompts)))
    if kind is COMPLETIONS:
        lines.append(("scored", _share(counts["scored"], tally.rows)))
        lines.append(("ended by itself (stop)", _share(counts["finish_reason stop"], tally.rows)))
        lines.append(("cut by the length limit", _share(counts["finish_reason length"], tally.rows)))
    if kind is PREFERENCES:
        lines += _pair_counts(group, tally)
    elif kind is not PROMPTS:
        lines.append(("answers that repeat one to the same prompt", _share(counts["repeated answers"], tally.rows)))
    if kind is not PROMPTS:
        lines.append(("empty answers", f"{counts['empty answers']:,}"))
    return lines


def _pair_counts(group: Group, tally: Tally) -> list[Line]:
    chosen, rejected = group.pair_lengths(tally)
    lines = [("pairs with scores", _share(len(tally.margins), tally.rows))]
    if tally.margins:
        lines.append(("tied scores", _share(tally.counts["ties"], len(tally.margins))))
    lines.append(("equal texts", _share(tally.counts["equal texts"], tally.rows)))
    unit = group.unit("chosen")
    lines.append((f"chosen longer, in {unit}", _share(int((chosen > rejected).sum()), len(chosen))))
    lines.append((f"equally long, in {unit}", _share(int((chosen == rejected).sum()), len(chosen))))
    return lines


def _token_notes(tally: Tally) -> list[str]:
    if tally.tokenizer is not None:
        return []
    answers = [lengths for name, lengths in tally.lengths.items() if name != "prompt"]
    without = sum(not lengths.all_in_tokens for lengths in answers)
    some = any(max(lengths.tokens) > 0 for lengths in answers)
    return [f"{tally.name}: only some answers have token_ids, so lengths are in characters"] if without and some else []


def _score_notes(ratings: bool, tally: Tally) -> list[str]:
    found = []
    scored = tally.rows if ratings else tally.counts["scored"]
    for objective, values in tally.scores.items():
        name = one_line(objective, 50)
        if tally.kind is not PREFERENCES and len(values) < scored:
            found.append(f"{tally.name}: {_many(scored - len(values), 'row')} without a number for {name}")
        if ratings and (outside := sum(not LOWEST <= value <= HIGHEST for value in values)):
            found.append(f"{tally.name}: {_many(outside, 'rating')} of {name} outside {LOWEST} to {HIGHEST}")
        if len(values) > 1 and min(values) == max(values):
            found.append(f"{tally.name}: every row has the same {name}, {values[0]:.4g}; it cannot tell answers apart")
    return found


def _figures(values: Array) -> list[str]:
    sd = 0.0 if values.min() == values.max() else float(values.std())
    figures = (float(values.mean()), sd, *(float(value) for value in np.quantile(values, (0, 0.25, 0.5, 0.75, 1))))
    return [f"{len(values):,}", *(f"{figure:.4g}" for figure in figures)]


def _share(count: int, of: int) -> str:
    return f"{count:,} ({count / of:.1%})" if of else f"{count:,}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def set_aside_table(found: list[Reason]) -> str:
    """Set-aside rows by file and reason."""
    rows = [[reason.file, reason.reason, f"{reason.rows:,}", reason.first] for reason in found]
    return text_table(["file", "reason", "rows", "e.g. row"], rows, left=2)

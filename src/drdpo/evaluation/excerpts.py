"""Rows for a reader's eyes: a sample chosen by seed, cut to size."""

import random
import textwrap

from drdpo.display import one_line, shortened
from drdpo.evaluation.kinds import Row

_LINES = 14
"""Most lines of one message."""

_MESSAGES = 5
"""Most messages of a prompt: the first, and the last ones."""

_SCORES = 24
"""Most scores of a row."""

_GUTTER = 10
"""Columns for the role."""


class Reservoir:
    """A uniform sample of a stream of unknown length (Vitter 1985, Algorithm R); the same seed, the same rows."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._random, self._seen = size, random.Random(seed), 0
        self._rows: list[Row] = []

    def offer(self, row: Row) -> None:
        """Show the next row of the stream."""
        self._seen += 1
        if len(self._rows) < self._size:
            self._rows.append(row)
        elif (place := self._random.randrange(self._seen)) < self._size:
            self._rows[place] = row

    @property
    def rows(self) -> list[Row]:
        """The sample, in the order of the file."""
        return sorted(self._rows, key=lambda row: row.number)


def excerpt(row: Row, file: str, width: int) -> str:
    """A row as indented text.

    Args:
        row: what to show.
        file: its name, for the heading.
        width: columns of a line.
    """
    parts = [_heading(row, file)]
    shown = list(row.scores.items())[:_SCORES]
    scores = ", ".join(f"{one_line(name, 60)} {score:.4g}" for name, score in shown)
    if scores:
        scores += f", ... {len(row.scores) - len(shown)} more" if len(row.scores) > len(shown) else ""
        parts += textwrap.wrap(scores, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    messages = row.prompt
    for index, message in enumerate(messages):
        if len(messages) > _MESSAGES and index == 1:
            parts.append(f"  [{len(messages) - _MESSAGES} more messages]")
        if index == 0 or index > len(messages) - _MESSAGES:
            parts += _block(message["role"], message["content"], width)
    for name, text in row.answers.items():
        parts += _block(name.upper(), text, width)
    return "\n".join(parts)


def _heading(row: Row, file: str) -> str:
    facts = [f"{one_line(file)}, row {row.number}"]
    facts += [f"prompt_id {row.prompt_id}"] if row.prompt_id is not None else []
    facts += [f"sample_id {row.sample_id}"] if row.sample_id is not None else []
    facts += [f"{'' if name == 'answer' else f'{name} '}{len(ids)} token_ids" for name, ids in row.token_ids.items()]
    facts += [f"finish_reason {row.finish_reason}"] if row.finish_reason is not None else []
    return "--- " + ", ".join(facts)


def _block(role: str, text: str, width: int) -> list[str]:
    """One message: its role in a gutter, its text wrapped and cut."""
    lines = shortened(text, width - _GUTTER - 4, _LINES) if text.strip() else ["[empty]"]
    return [f"  {role if number == 0 else '':<{_GUTTER}}| {line}".rstrip() for number, line in enumerate(lines)]

"""report.html: a report's Markdown and pictures as one self-contained page.

Tables sort by a click, pictures are inline SVG, colours follow the system's light or dark setting. Text of models and data
is escaped: the page runs no script but its own.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_TEMPLATE = Path(__file__).parent / "report.html.jinja"
_IMAGE = re.compile(r'<img src="([^"]+)\.png" alt="([^"]*)"\s*/?>')


class Change(NamedTuple):
    """Answers to a prompt whose score changed."""

    prompt: str
    score: str
    """What changed, by name."""
    answers: Sequence[tuple[str, float, str]]
    """(run, mean score of its answers, one of them)."""


def html_report(files: Mapping[str, str | bytes], changes: Sequence[Change] = ()) -> str:
    """The page of a report.

    Args:
        files: of the report: report.md, and every picture that it names as NAME.png also as NAME.svg.
        changes: prompts to show with their answers side by side, most changed first.
    """
    from jinja2 import Environment
    from markdown_it import MarkdownIt

    text = files["report.md"]
    text = text if isinstance(text, str) else text.decode()
    # html=False: text that looks like HTML stays text.
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = _IMAGE.sub(lambda found: _inline(found[1], found[2], files), body)
    title = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")), "report")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_TEMPLATE.read_text("utf-8"))
    # Before the long tables at the end.
    before, heading, after = body.partition("<h2>How the runs were made</h2>")
    return template.render(title=title, before=before, after=heading + after, changes=changes)


def _inline(name: str, label: str, files: Mapping[str, str | bytes]) -> str:
    """An SVG as the source of an image, in which its ids cannot meet those of another and scripts do not run."""
    content = files[f"{name}.svg"]
    content = content if isinstance(content, bytes) else content.encode()
    data = base64.b64encode(content).decode("ascii")
    return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{label}"></figure>'

"""What the reports share: tables, CSV files, pictures, intervals, differences between runs, and how they are written."""

import base64
import re
from collections.abc import Collection, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
from tabulate import tabulate

from drdpo.cli import as_dict
from drdpo.evaluation.statistics import Estimate
from drdpo.folder import atomic_files, lock_folder, sweep, write_manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = {
    "font.family": "DejaVu Sans",
    "svg.hashsalt": "drdpo",
    "figure.facecolor": "white",
    "axes.titleweight": "normal",
}
"""matplotlib's settings for all pictures; a fixed salt makes SVG files reproducible."""


class Change(NamedTuple):
    """Answers to a prompt whose score changed."""

    prompt: str
    score: str
    """What changed, by name."""
    answers: Sequence[tuple[str, float, str]]
    """(run, mean score of its answers, one of them)."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns align left, the others right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    escaped = ([" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in [header, rule, *rows])
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The same table with aligned columns, for a terminal."""
    align = ["left"] * left + ["right"] * (len(header) - left)
    return str(tabulate(rows, header, tablefmt="simple", colalign=align if rows else None, disable_numparse=True))


def csv_text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A CSV file. Numbers have full precision; None is an empty field."""
    return str(pd.DataFrame(rows, columns=list(header), dtype=object).to_csv(index=False, lineterminator="\n"))


def save_picture(figure: "Figure", name: str, dpi: int) -> dict[str, bytes]:
    """{"<name>.png": bytes, "<name>.svg": bytes}; equal figures give equal bytes."""
    files = {}
    for kind in ("png", "svg"):
        stream = BytesIO()
        figure.savefig(stream, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
        files[f"{name}.{kind}"] = stream.getvalue()
    return files


def interval(estimate: Estimate | None, form: str = "{:+.3f}") -> str:
    """`+0.894 [+0.721, +1.060]`; n/a for None, or what pandas makes of it."""
    if not isinstance(estimate, Estimate):
        return "n/a"
    value = form.format(estimate.value)
    if estimate.low is None or estimate.high is None:
        return f"{value} (one prompt: no interval)"
    return f"{value} [{form.format(estimate.low)}, {form.format(estimate.high)}]"


def differences(what: str, records: Mapping[str, Mapping[str, str]], ignore: Collection[str] = ()) -> list[str]:
    """One line per field, other than those to ignore, in which the records {run: {field: value}} of `what` differ."""
    lines = []
    for field in sorted({field for record in records.values() for field in record} - set(ignore)):
        values = {run: record.get(field, "not recorded") for run, record in records.items()}
        if len(set(values.values())) > 1:
            lines.append(f"the {what} differs in {field}: " + ", ".join(f"{run} {value}" for run, value in values.items()))
    return lines


def write_report(
    step: str, config: Any, inputs: Mapping[str, Any], files: Mapping[str, str | bytes],
    optional: Collection[str] = (), changes: Sequence[Change] = (), **facts: Any,
) -> None:  # fmt: skip
    """Write a report, report.html and its manifest to --output_path, under the folder's lock, and print where it is. If any
    file cannot be written, the old report stays.

    Args:
        step, facts: as for `write_manifest`.
        inputs: fingerprints by name.
        files: {name: content}, among them report.md.
        changes: see html_report.
        optional: files that only some reports have; those of an older report are deleted.

    Raises:
        UsageError: another process is writing there.
    """
    folder, files = Path(config.output_path), {**files, "report.html": html_report(files, changes)}
    with lock_folder(folder):
        sweep(folder)
        with atomic_files(*(folder / name for name in files)) as asides:
            for aside, content in zip(asides, files.values(), strict=True):
                aside.write_bytes(content if isinstance(content, bytes) else content.encode())
        for name in set(optional) - set(files):
            (folder / name).unlink(missing_ok=True)
        write_manifest(folder, step, as_dict(config) | {"inputs": inputs}, as_dict(config), **facts)
    print(f"report: {folder / 'report.md'}")


# report.html: the Markdown and its pictures as one self-contained page. Text of models and data is escaped.

_TEMPLATE = Path(__file__).parent / "report.html.jinja"
_IMAGE = re.compile(r'<img src="([^"]+)\.png" alt="([^"]*)"\s*/?>')


def html_report(files: Mapping[str, str | bytes], changes: Sequence[Change] = ()) -> str:
    """The page of a report: its report.md, every picture NAME.png of it from NAME.svg, and below it `changes`, prompts with
    their answers side by side, most changed first.
    """
    from jinja2 import Environment
    from markdown_it import MarkdownIt

    text = files["report.md"]
    text = text if isinstance(text, str) else text.decode()
    # html=False: text that looks like HTML stays text.
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)

    def inline(found: re.Match[str]) -> str:
        """An SVG as the source of an image, in which its ids cannot meet those of another and scripts do not run."""
        content = files[f"{found[1]}.svg"]
        data = base64.b64encode(content if isinstance(content, bytes) else content.encode()).decode("ascii")
        return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{found[2]}"></figure>'

    body = _IMAGE.sub(inline, body)
    title = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")), "report")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_TEMPLATE.read_text("utf-8"))
    return template.render(title=title, body=body, changes=changes)

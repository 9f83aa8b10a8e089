"""Tables and samples of prompts, completions, preference pairs and rejected rows. Needs no torch."""

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from drdpo.config.evaluation import InspectConfig
from drdpo.errors import DataError, one_line, shortened
from drdpo.records import SPLITS, Completion, Preference, Prompt, read_rows

_WIDTH, _LINES = 100, 14
"""Largest width and number of lines of a printed message."""

_KINDS = {
    ("chosen", "rejected"): "preference pairs",
    ("prompt", "completion"): "completions",
    ("row", "reason"): "rejected rows",
    ("prompt_id", "prompt"): "prompts",
}
"""{fields of a row: its kind}; the first match counts."""


def inspect_data(config: InspectConfig) -> None:
    """Print counts, quantiles and samples of every file at a path.

    Raises:
        DataError: no such path, no JSON-lines file there, or a row that is malformed or of an unknown kind.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without Unicode
    tables = {file: read_table(file) for file in find_files(Path(config.path))}
    with pd.option_context("display.width", None, "display.max_columns", None, "display.precision", 4):
        for file, table in tables.items():
            print(f"\n== {file}: {len(table):,} {table.attrs['kind']}")
            print("\n".join(_facts(table)))
            kept = [name for name in table if str(name).endswith(("characters", "tokens")) or str(name).startswith("score ")]
            if kept:
                numbers = table[kept].astype(np.float64)
                print(numbers.describe(percentiles=[0.1, 0.5, 0.9, 0.99]).T.drop(columns="count").to_string())
            for _, row in table.sample(min(config.samples, len(table)), random_state=config.seed).sort_index().iterrows():
                print(_excerpt(file, row))
    for line in _shared_prompts(tables):
        print(f"note: {line}")


def find_files(path: Path) -> list[Path]:
    """The JSON-lines files at a path, train and test first; those in sampled/ if the folder has none."""
    if path.is_file():
        return [path]
    for folder in (path, path / "sampled"):
        files = [file for file in folder.glob("*.jsonl") if not file.name.startswith(".") and file.name != "metrics.jsonl"]
        if files:
            order = [f"{split}.jsonl" for split in SPLITS]
            return sorted(files, key=lambda file: (order.index(file.name) if file.name in order else 9, file.name))
    raise DataError(f"{path}: no JSON-lines file (*.jsonl) there; pass a file or an output folder of a step")


def read_table(path: Path) -> pd.DataFrame:
    """A file as a table of texts, lengths and scores; `attrs["kind"]` is the kind of its rows.

    Raises:
        DataError: a malformed row; the message names file, row and field.
    """
    rows: list[dict[str, Any]] = []
    kind = None
    for number, row in read_rows(path):
        found = next((known for fields, known in _KINDS.items() if set(fields) <= row.keys()), None)
        if found is None or found != (kind or found):
            what = "rows of two kinds in one file" if found else "a row of unknown kind"
            raise DataError(f"{path}, row {number}: {what}; its fields are {one_line(', '.join(row), 200) or 'none'}")
        kind = found
        try:
            rows.append({"row": number, **_columns(kind, number, row)})
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
    table = pd.DataFrame(rows)
    table.attrs["kind"] = kind or "rows"
    return table


def _columns(kind: str, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError naming the field."""
    if kind == "rejected rows":
        return {"reason": one_line(str(row["reason"]), 160)}
    record: Any
    if kind == "preference pairs":
        record = Preference.from_trl(row, number)
    else:
        record = (Completion if kind == "completions" else Prompt).from_row(row)
    texts = [f"{message['role']}: {' '.join(message['content'].split())}" for message in record.prompt]
    columns = {"prompt_id": record.prompt_id, "prompt": "\n".join(texts), "turns": len(texts)}
    columns["prompt characters"] = sum(map(len, texts))
    if kind == "completions":
        columns |= {"answer": record.completion[-1]["content"], "answer tokens": len(record.token_ids)}
        columns["finish_reason"] = record.finish_reason
        columns |= {f"score {one_line(name, 50)}": score for name, score in record.scores.items()}
    for name in ("chosen", "rejected") if kind == "preference pairs" else ():
        text, ids = getattr(record, name)[-1]["content"], getattr(record, f"{name}_token_ids")
        columns |= {name: text, f"{name} characters": len(text.strip())}
        columns |= {} if ids is None else {f"{name} tokens": len(ids)}
    if kind == "preference pairs" and record.chosen_score is not None and record.rejected_score is not None:
        columns["score margin"] = record.chosen_score - record.rejected_score
    return columns


def _facts(table: pd.DataFrame) -> list[str]:
    lines = []
    if "reason" in table:
        return [f"{count:>8,}  {reason}" for reason, count in table["reason"].value_counts().items()]
    if "prompt" in table:
        per_prompt = table["prompt"].value_counts()
        spread = f"{per_prompt.min()} / {per_prompt.median():g} / {per_prompt.max()}"
        lines.append(f"{len(per_prompt):,} distinct prompts; rows of each, min / median / max: {spread}")
        lines.append(f"{(table['turns'] > 1).mean():.1%} have a system message or several turns")
    if "finish_reason" in table:
        lines.append("finish_reason: " + ", ".join(f"{k} {v:,}" for k, v in table["finish_reason"].value_counts().items()))
    if answers := [name for name in ("answer", "chosen", "rejected") if name in table]:
        empty = (table[answers].apply(lambda texts: texts.str.strip()) == "").any(axis=1).sum()
        lines.append(f"empty answers: {empty:,}" + " (such pairs are not trained on)" * bool(empty and "chosen" in table))
    if "chosen" in table:
        ids = table.filter(regex="^(chosen|rejected) tokens$")
        unit = "tokens" if len(ids.columns) == 2 and ids.notna().all(axis=None) else "characters"
        longer = table[f"chosen {unit}"] > table[f"rejected {unit}"]
        lines.append(f"chosen is longer in {longer.mean():.1%} of the pairs (in {unit})")
        lines.append(f"equal texts: {(table['chosen'].str.strip() == table['rejected'].str.strip()).sum():,}")
        if "score margin" in table:
            lines.append(f"chosen scored lower: {(table['score margin'] < 0).sum():,}")
    return lines


def _shared_prompts(tables: dict[Path, pd.DataFrame]) -> list[str]:
    """Numbers of prompts that two files share: training and test data should share none."""
    known = [(file.name, set(table["prompt"])) for file, table in tables.items() if "prompt" in table]
    pairs = [(first, second, len(ours & theirs)) for (first, ours), (second, theirs) in combinations(known, 2)]
    return [f"{first} and {second} share {shared:,} prompts" for first, second, shared in pairs if shared]


def _excerpt(file: Path, row: "pd.Series[Any]") -> str:
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if str(name).startswith("score "))
    lines = [f"--- {file.name}, row {row['row']}" + (f": {numbers}" if numbers else "")]
    for name in ("prompt", "answer", "chosen", "rejected", "reason"):
        if name in row:
            text = [f"    {line}" for line in shortened(str(row[name]), _WIDTH - 4, _LINES)]
            lines += [name.upper(), *text]
    return "\n".join(lines)

"""A look at the data: what a file or folder of any step holds, in words, tables and histograms. Needs no torch."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drdpo import chat
from drdpo.config import InspectConfig
from drdpo.display import one_line
from drdpo.errors import DataError
from drdpo.evaluation import inspection_tables as tables
from drdpo.evaluation.dropped import count_reasons, describe_part, is_part, manifest_counts, unfinished
from drdpo.evaluation.excerpts import excerpt
from drdpo.evaluation.kinds import METRICS, PREFERENCES, REJECTS, Kind, kind_of_file
from drdpo.evaluation.tally import Group, tally_file
from drdpo.files import atomic_file
from drdpo.flags import as_dict
from drdpo.manifest import fingerprint, read_manifest, write_manifest
from drdpo.records import SPLITS

STEP = "inspect_data"


def inspect_data(config: InspectConfig) -> None:
    """Print what a file or folder holds and draw its histograms.

    Args:
        config: the flags.

    Raises:
        DataError: no such path, no JSON-lines file in it, rows of an unknown or of another kind, a bad row (names file, row
            and field), or an unfinished part file in place of a result.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show all of Unicode
    path = Path(config.path)
    files = find_files(path)
    kinds = {name: kind_of_file(file) for name, file in files.items()}
    for name, file in files.items():
        if kinds[name] is None and file.name != "rejects.jsonl":
            raise DataError(f"{file}: the file has no rows")
    tokenizer = chat.load_tokenizer(config.tokenizer) if config.tokenizer is not None else None
    found = list(dict.fromkeys(kind for kind in kinds.values() if kind is not None and kind is not REJECTS))
    pictures: dict[str, Any] = {}
    for kind in found:
        of_kind = {name: file for name, file in files.items() if kinds[name] is kind}
        prefix = f"{kind.name.replace(' ', '_')}_" if len(found) > 1 else ""
        print(f"{path}: {kind.name} in {', '.join(one_line(file.name) for file in of_kind.values())} ({_seen_by(kind)})")
        drawn = _look_at_metrics(of_kind) if kind is METRICS else _look_at_records(config, kind, of_kind, tokenizer)
        pictures |= {f"{prefix}{name}": picture for name, picture in drawn}
    rejects = [file for name, file in files.items() if kinds[name] in (None, REJECTS)]
    beside = path.parent / "rejects.jsonl"
    if pictures:
        _write_pictures(config, files, pictures)
    _print_dropped(path, rejects)
    if found and path.is_file() and beside.is_file():
        try:
            _print_rejects(beside)
        except DataError as error:  # of a neighbour that nobody asked for
            print(f"note: {one_line(str(error))}")


def find_files(path: Path) -> dict[str, Path]:
    """{how to call it: file} of a path: train and test first; of a folder, what is in its sampled/ where that is all.

    Raises:
        DataError: no such path, or nothing to look at in it.
    """
    if path.is_file():
        if is_part(path.absolute()):
            raise DataError(f"{path}: {describe_part(path)}, then look at its result")
        return {one_line(path.stem, 30): path}
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    found = _results(path)
    sampled = path / "sampled"
    if sampled.is_dir():
        # Once scored, they are the same completions; until then, or where nobody has looked yet, these are the ones.
        names = {file.name for file in found}
        found += [file for file in _results(sampled) if file.name == "rejects.jsonl" or file.name not in names]
    if not found:
        lines = [f"{line.removeprefix(f'{path}/')}" for folder in (path, sampled) for line in unfinished(folder)]
        there = ", ".join(sorted(file.name for file in path.iterdir())[:12]) or "nothing"
        hint = "; a data set saved by datasets.save_to_disk is written as JSON lines by its to_json" * (
            (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()
        )
        raise DataError(f"{path}: no JSON-lines file (*.jsonl) in the folder; it has {'; '.join(lines) or there}{hint}")
    return {one_line(file.relative_to(path).with_suffix("").as_posix(), 30): file for file in found}


def _results(folder: Path) -> list[Path]:
    order = {f"{split}.jsonl": place for place, split in enumerate(SPLITS)}
    files = [file for file in folder.glob("*.jsonl") if file.is_file() and not file.name.startswith(".")]
    return sorted(files, key=lambda file: (order.get(file.name, len(order)), not file.name.startswith("train"), file.name))


def _seen_by(kind: Kind) -> str:
    return f"recognised by the fields {kind.fields}"


def _look_at_records(
    config: InspectConfig, kind: Kind, files: dict[str, Path], tokenizer: chat.Tokenizer | None
) -> Iterator[tuple[str, Any]]:
    """Print tables, notes and samples of files of one kind; yields the names of the pictures, and the pictures."""
    group = Group(
        kind, [tally_file(name, file, kind, config.samples, config.seed, tokenizer) for name, file in files.items()]
    )
    for table in (tables.counts_table(group), tables.lengths_table(group), tables.scores_table(group)):
        if table:
            print(f"\n{table}")
    if found := tables.notes(group):
        print("\n" + "\n".join(f"note: {line}" for line in found))
    for tally in group.tallies:
        for row in tally.sample.rows:
            print(f"\n{excerpt(row, tally.path.name, config.width)}")
    print()
    from drdpo.evaluation import histograms

    yield "lengths.png", histograms.draw_lengths(group, config.path)
    if kind is PREFERENCES:
        yield "margins.png", histograms.draw_margins(group, config.path)
    elif objectives := group.objectives():
        if len(objectives) > histograms.MOST_PANELS:
            print(f"note: scores.png shows the first {histograms.MOST_PANELS} of {len(objectives)} objectives")
        yield "scores.png", histograms.draw_scores(group, config.path)


def _look_at_metrics(files: dict[str, Path]) -> Iterator[tuple[str, Any]]:
    from drdpo.evaluation.metrics_table import draw_metrics, metrics_table, read_metrics

    for name, file in files.items():
        metrics = read_metrics(file)
        print(f"\n{metrics_table(metrics)}\n")
        if metrics:
            yield f"{_file_name(name)}.png", draw_metrics(metrics, str(file))


def _print_dropped(path: Path, rejects: list[Path]) -> None:
    """Rows that steps set aside, and why; the manifests' counts; part files."""
    for file in rejects:
        _print_rejects(file)
    for place in (path, path / "sampled") if path.is_dir() else (path.parent,):
        if counts := manifest_counts(place):
            print(f"counts in {place / 'manifest.json'}:")
            print("\n".join(f"  {line}" for line in counts))
        if path.is_dir():
            for line in unfinished(place):
                print(f"note: {line}")


def _print_rejects(file: Path) -> None:
    found = count_reasons(file)
    print(f"set aside in {file}: {sum(reason.rows for reason in found) or 'no'} rows")
    if found:
        print(f"{tables.set_aside_table(found)}\n")


def _write_pictures(config: InspectConfig, files: dict[str, Path], pictures: dict[str, Any]) -> None:
    """Write the pictures and what they show; those that an earlier look drew and this one did not are removed."""
    folder = output_folder(config)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: --output_path is a file, not a folder")
    before = read_manifest(folder).get(STEP, {}).get("pictures", [])
    for name in before:
        if name not in pictures and re.fullmatch(r"[\w-]+\.png", str(name)):
            (folder / name).unlink(missing_ok=True)
    for name, picture in pictures.items():
        with atomic_file(folder / name, "wb") as stream:
            picture.savefig(stream, format="png", dpi=150)
    made_by = as_dict(config) | {"inputs": {str(file): fingerprint(file) for file in files.values()}}
    write_manifest(folder, STEP, made_by, pictures=sorted(pictures))
    print("pictures: " + ", ".join(str(folder / name) for name in pictures))


def output_folder(config: InspectConfig) -> Path:
    """--output_path, or outputs/inspection/<the path, with _ for />; a path outside the current folder counts whole."""
    if config.output_path is not None:
        return Path(config.output_path)
    path = Path(config.path).resolve()
    here = Path.cwd()
    parts = path.relative_to(here).parts if path.is_relative_to(here) else path.parts[1:]
    return Path("outputs") / "inspection" / (_file_name("_".join(parts))[-120:] or "here")


def _file_name(text: str) -> str:
    return re.sub(r"[^\w .=-]", "_", text)

"""Rows of a preference data set, from a folder or the hub: texts, and the fields that a method or the evaluation reads."""

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

from drdpo.config.training import DataSettings
from drdpo.errors import DataError, reason
from drdpo.records import Preference, read_rows
from drdpo.training.losses import TOKENS

SPLIT_NAMES = {"train": ("train",), "test": ("test", "validation", "eval")}
"""What data sets call the two sides of a run; the first that exists is used. Files have the first name."""
LARGEST = 3.4e38
"""Of a number: the method's columns are float32."""


class Columns(NamedTuple):
    """What a run reads of a row besides its texts."""

    numbers: Mapping[str, float] = {}
    """By field, for the method; TOKENS are counted later."""
    groups: Mapping[str, str] = {}
    """Names by field."""
    mixed: Mapping[str, tuple[float, float]] = {}
    """By mixture of objectives: scores of the chosen and of the rejected answer."""


def load_split(
    data: DataSettings,
    split: str,
    reads: Sequence[str] = (),
    groups: Sequence[str] = (),
    mixtures: Mapping[str, Mapping[str, float]] | None = None,
    weight: str | None = None,
) -> tuple[list[Preference], list[Columns]]:
    """One side of a run's data, "train" or "test": the preferences, and the fields of each.

    Args:
        data: `path` is a folder with <split>.jsonl, a folder of datasets.save_to_disk, or a hub id. Rows are our own records
            or TRL's form, see Preference.from_trl. With `test_share`, the test side is that share of the training split's
            distinct prompts, with all their rows, and the training side is the rest.
        reads, groups, mixtures: fields of a row: see Method.reads; names of groups, as texts or whole numbers; and {name:
            {objective: weight}} of the scores in chosen_scores and rejected_scores.
        weight: the one of `reads` that must not be negative.

    Raises:
        DataError: no such data set or split, no rows, a row without the fields, weights that are all 0, or a side that
            `test_share` leaves empty; names file, row and field.
    """
    source, rows = _rows(data, "train" if data.test_share is not None else split)
    preferences, columns = [], []
    for number, row in rows:
        try:
            preferences.append(Preference.from_trl(row, number))
            mixed = {
                name: (_mixed(row, "chosen_scores", weights), _mixed(row, "rejected_scores", weights))
                for name, weights in (mixtures or {}).items()
            }
            read = {name: 0.0 if name in TOKENS else _number(row, name, name == weight) for name in reads}
            columns.append(Columns(read, {name: _group(row, name) for name in groups}, mixed))
        except ValueError as error:
            raise DataError(f"{source}, row {number}: {error}") from error
    if not preferences:
        raise DataError(f"{source}: the data set has no rows")
    if data.test_share is not None:
        # Distinct prompts, of which the first so many of a random order are the test side.
        prompts = list(dict.fromkeys(str(preference.prompt) for preference in preferences))
        random.Random(f"{data.seed}/test").shuffle(prompts)
        held_out = set(prompts[: max(1, round(data.test_share * len(prompts)))])
        if len(held_out) == len(prompts):
            count = f"{len(prompts)} distinct prompts"
            raise DataError(f"{source}: --test_share={data.test_share} of {count} leaves none to train on")
        kept = [(str(preference.prompt) in held_out) == (split == "test") for preference in preferences]
        preferences, columns = list(compress(preferences, kept)), list(compress(columns, kept))
    if weight is not None and split == "train" and not any(found.numbers[weight] for found in columns):
        raise DataError(f'{source}: field "{weight}" is 0 in every row, so no pair would train; omit --weight_column')
    return preferences, columns


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _number(row: Mapping[str, Any], name: str, weight: bool = False) -> float:
    value = row.get(name)
    if value is None:
        raise ValueError(f'field "{name}" is missing, and the method reads it; every row needs it')
    if not _is_number(value):
        raise ValueError(f'field "{name}" is no finite number (of float32), and the method reads it')
    if weight and value < 0:
        raise ValueError(f'field "{name}" is {value}, and a weight is not negative; change it, or omit --weight_column')
    return float(value)


def _group(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value in (None, ""):
        raise ValueError(f'field "{name}" is missing or empty, and the run groups pairs by it; every row needs it')
    if not isinstance(value, str | int):
        raise ValueError(f'field "{name}" is neither a text nor a whole number, and the run groups pairs by it')
    return str(value)


def _mixed(row: Mapping[str, Any], name: str, weights: Mapping[str, float]) -> float:
    scores = row.get(name)
    if not isinstance(scores, Mapping):
        raise ValueError(f'field "{name}" is missing, and --eval_mixture reads it; build the pairs again, --overwrite=true')
    for objective in weights:
        if scores.get(objective) is None:
            known = ", ".join(key for key, score in scores.items() if score is not None) or "none"
            raise ValueError(f'field "{name}" lacks {objective}, and --eval_mixture reads it; it has {known}')
        if not _is_number(scores[objective]):
            raise ValueError(f'field "{name}": {objective} is no finite number (of float32), and --eval_mixture reads it')
    return float(sum(weight * scores[objective] for objective, weight in weights.items()))


def _rows(data: DataSettings, split: str) -> tuple[str, Iterable[tuple[int, dict[str, Any]]]]:
    """The name of a split for messages, and its rows with their numbers from 1."""
    named, folder = getattr(data, f"{split}_split"), Path(data.path)
    names = SPLIT_NAMES[split] if named is None else (named,)
    if folder.is_dir() and data.config is not None:
        raise DataError(f"{folder}: a folder has no configurations; omit --dataset_config={data.config}")
    if folder.is_dir() and not (folder / "dataset_dict.json").is_file():
        file = folder / f"{names[0]}.jsonl"
        if not file.is_file():
            raise DataError(f"{file}: no such file{_ways_on(split, [other.stem for other in folder.glob('*.jsonl')])}")
        return str(file), read_rows(file)
    splits = _stored_splits(data)
    for name in names:
        if name in splits:
            return f"{data.path} [{name}]", enumerate(splits[name], start=1)
    raise DataError(f"{data.path}: no split {' or '.join(names)}{_ways_on(split, list(splits))}")


def _ways_on(split: str, found: list[str]) -> str:
    """What to pass instead of a split that is missing."""
    if not found:
        return ""
    share = ", or --test_share=0.05 to hold out training prompts" if split == "test" else ""
    return f" (there is {', '.join(sorted(found))}); pass --{split}_split=NAME for another{share}"


def _stored_splits(data: DataSettings) -> Mapping[str, Any]:
    import datasets

    try:
        if Path(data.path).is_dir():
            return datasets.load_from_disk(data.path)
        return datasets.load_dataset(data.path, data.config)
    except Exception as error:
        # The hub client raises errors of a dozen libraries; all of them mean that there is no data.
        which = "; pass --dataset_config=NAME" if "onfig name is missing" in str(error) else ""
        raise DataError(
            f"{data.path}: neither a folder of preferences nor a data set of the hub ({reason(error)}){which}"
        ) from error

"""Records: what is refused, with which words; what is written comes back."""

import json
from pathlib import Path
from typing import Any

import pytest

from drdpo.errors import DataError
from drdpo.records import Completion, Preference, Prompt, check_unique, read_records, read_rows, to_row, write_records

USER = [{"role": "user", "content": "Hi — 你好"}]
ANSWER = [{"role": "assistant", "content": "Hello."}]


def completion_row(**changes: Any) -> dict[str, Any]:
    row = to_row(Completion(3, 1, USER, ANSWER, [5, 2], "stop")) | changes
    return {name: value for name, value in row.items() if value != "left out"}


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_what_is_written_comes_back(tmp_path):
    records = [
        Prompt(1, USER),
        Completion(1, 0, USER, ANSWER, [5, 2], "stop", {"ArmoRM": 0.25}), Completion(1, 0, USER, ANSWER, [], "length"),
        Preference(1, USER, ANSWER, [{"role": "assistant", "content": ""}], 1.5, -1.0, [1], [2]),
        Preference(1, USER, ANSWER, ANSWER),
    ]  # fmt: skip
    for record in records:
        write_records(tmp_path / "x.jsonl", [record, record])
        assert read_records(tmp_path / "x.jsonl", type(record).from_row) == [record, record]
    row = json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])
    assert list(row) == ["prompt_id", "prompt", "chosen", "rejected"], "fields that are not set are left out"
    with pytest.raises(ValueError):
        write_records(tmp_path / "out.jsonl", [Completion(1, 0, USER, ANSWER, [1], "stop", {"ArmoRM": float("inf")})])
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_id", "left out"), ("prompt_id", "3"), ("prompt_id", True), ("sample_id", 1.5), ("prompt", "Hi"),
        ("prompt", []), ("prompt", ANSWER), ("prompt", [{"role": "user"}]),
        ("prompt", [{"role": "human", "content": "Hi"}]), ("completion", USER), ("token_ids", [1, "2"]),
        ("token_ids", [-1]), ("token_ids", "left out"), ("finish_reason", "abort"), ("finish_reason", "left out"),
        ("scores", {"ArmoRM": "high"}), ("scores", [1.0]), ("", float("nan")), ("", "a cut row"), ("", "[1, 2]"), ("", "no"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_row_and_field(tmp_path, field, value):
    """Without a field: a number that JSON does not have, and lines that are no object."""
    bad = completion_row(**{field: value}) if field else value
    if value != value:
        bad = completion_row(scores={"ArmoRM": value})
    elif value == "a cut row":
        bad = json.dumps(completion_row())[:-2]
    path = written(tmp_path / "test.jsonl", completion_row(), "", bad)
    with pytest.raises(DataError) as caught:
        read_records(path, Completion.from_row)
    assert str(caught.value).startswith(f"{path}, row 3: ") and "\n" not in str(caught.value)
    assert not field or f'"{field}"' in str(caught.value)


@pytest.mark.parametrize("name", ["chosen_score", "rejected_score"])
@pytest.mark.parametrize("value", ["x", True, [1.0], float("nan"), float("inf"), 10**400])
def test_the_score_of_a_pair_is_a_finite_number_or_absent(tmp_path, name, value):
    row = {"prompt_id": 1, "prompt": USER, "chosen": ANSWER, "rejected": ANSWER}
    path = written(tmp_path / "train.jsonl", {**row, name: 2}, {**row, name: None}, row, {**row, name: value})
    with pytest.raises(DataError, match=f'row 4: field "{name}"'):
        read_records(path, Preference.from_row)
    written(path, {**row, name: 2}, {**row, name: None}, row)
    assert [getattr(pair, name) for pair in read_records(path, Preference.from_row)] == [2.0, None, None]


def test_missing_empty_and_binary_files_are_data_errors(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_records(tmp_path / "none.jsonl", Prompt.from_row)
    with pytest.raises(DataError, match="the file has no rows"):
        read_records(written(tmp_path / "empty.jsonl", "", " "), Prompt.from_row)
    (tmp_path / "binary.jsonl").write_bytes(b'{"a": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_rows(tmp_path / "binary.jsonl"))


def test_a_key_that_comes_twice_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}\n\n{}\n{}\n")
    check_unique(tmp_path / "x.jsonl", [(1, 0), (1, 1), (2, 0)], "(prompt_id, sample_id)")
    with pytest.raises(DataError, match=r"x\.jsonl, row 4: field \(prompt_id, sample_id\) repeats \(1, 0\)"):
        check_unique(tmp_path / "x.jsonl", [(1, 0), (1, 1), (1, 0)], "(prompt_id, sample_id)")

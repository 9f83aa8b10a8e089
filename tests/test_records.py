"""Records: what is refused, with which words; what is written comes back."""

import json
from pathlib import Path
from typing import Any

import pytest

from drdpo.errors import DataError
from drdpo.records import Completion, Preference, Prompt, check_unique, read_records, read_rows, write_records

USER = [{"role": "user", "content": "Hi — 你好"}]
ANSWER = [{"role": "assistant", "content": "Hello."}]


def completion_row(**changes: Any) -> dict[str, Any]:
    row = {
        "prompt_id": 3, "sample_id": 1, "prompt": USER, "completion": ANSWER, "token_ids": [5, 2], "finish_reason": "stop",
    }  # fmt: skip
    return {name: value for name, value in {**row, **changes}.items() if value != "left out"}


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    records: list[tuple[Any, Any]] = [
        (Prompt(1, USER), Prompt.from_row),
        (Completion(1, 0, USER, ANSWER, [5, 2], "stop", {"ArmoRM": 0.25}), Completion.from_row),
        (Completion(1, 0, USER, ANSWER, [], "length"), Completion.from_row),
        (Preference(1, USER, ANSWER, [{"role": "assistant", "content": ""}], 1.5, -1.0, [1], [2]), Preference.from_row),
        (Preference(1, USER, ANSWER, ANSWER), Preference.from_row),
    ]
    for record, from_row in records:
        assert write_records(tmp_path / "x.jsonl", [record, record]) == 2
        assert read_records(tmp_path / "x.jsonl", from_row) == [record, record]


def test_fields_that_are_not_set_are_left_out(tmp_path: Path) -> None:
    write_records(tmp_path / "x.jsonl", [Preference(1, USER, ANSWER, ANSWER)])
    assert list(json.loads((tmp_path / "x.jsonl").read_text())) == ["prompt_id", "prompt", "chosen", "rejected"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt_id": "left out"}, "prompt_id"),
        ({"prompt_id": "3"}, "prompt_id"),
        ({"prompt_id": True}, "prompt_id"),
        ({"sample_id": 1.5}, "sample_id"),
        ({"prompt": "Hi"}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ANSWER}, "prompt"),
        ({"prompt": [{"role": "user"}]}, "prompt"),
        ({"prompt": [{"role": "human", "content": "Hi"}]}, "prompt"),
        ({"completion": USER}, "completion"),
        ({"token_ids": [1, "2"]}, "token_ids"),
        ({"token_ids": [-1]}, "token_ids"),
        ({"token_ids": "left out"}, "token_ids"),
        ({"finish_reason": "abort"}, "finish_reason"),
        ({"finish_reason": "left out"}, "finish_reason"),
        ({"scores": {"ArmoRM": "high"}}, "scores"),
        ({"scores": [1.0]}, "scores"),
    ],
)
def test_a_bad_row_is_named_by_file_row_and_field(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    path = written(tmp_path / "test.jsonl", completion_row(), "", completion_row(**changes))
    with pytest.raises(DataError) as caught:
        read_records(path, Completion.from_row)
    assert str(caught.value).startswith(f"{path}, row 3: ")
    assert f'"{field}"' in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["chosen_score", "rejected_score"])
@pytest.mark.parametrize("value", ["x", True, [1.0], float("nan"), float("inf"), 10**400])
def test_the_score_of_a_pair_is_a_finite_number_or_absent(tmp_path: Path, name: str, value: Any) -> None:
    row = {"prompt_id": 1, "prompt": USER, "chosen": ANSWER, "rejected": ANSWER}
    path = written(tmp_path / "train.jsonl", {**row, name: 2}, {**row, name: None}, row, {**row, name: value})
    with pytest.raises(DataError, match=f'row 4: field "{name}"'):
        read_records(path, Preference.from_row)
    written(path, {**row, name: 2}, {**row, name: None}, row)
    assert [getattr(pair, name) for pair in read_records(path, Preference.from_row)] == [2.0, None, None]


def test_numbers_that_json_does_not_have_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "test.jsonl", json.dumps(completion_row(scores={"ArmoRM": float("nan")})))
    with pytest.raises(DataError, match="row 1"):
        read_records(path, Completion.from_row)
    with pytest.raises(ValueError):
        write_records(tmp_path / "out.jsonl", [Completion(1, 0, USER, ANSWER, [1], "stop", {"ArmoRM": float("inf")})])
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("line", ['{"prompt_id": 7, "prompt": [{"ro', "[1, 2]", "nothing"])
def test_a_line_that_is_not_an_object_is_named(tmp_path: Path, line: str) -> None:
    path = written(tmp_path / "train.jsonl", {"prompt_id": 1, "prompt": USER}, line)
    with pytest.raises(DataError, match=r"train\.jsonl, row 2"):
        read_records(path, Prompt.from_row)


def test_missing_empty_and_binary_files_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_records(tmp_path / "none.jsonl", Prompt.from_row)
    with pytest.raises(DataError, match="the file has no rows"):
        read_records(written(tmp_path / "empty.jsonl", "", " "), Prompt.from_row)
    (tmp_path / "binary.jsonl").write_bytes(b'{"a": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_rows(tmp_path / "binary.jsonl"))


def test_a_key_that_comes_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{}\n\n{}\n{}\n")
    check_unique(tmp_path / "x.jsonl", [(1, 0), (1, 1), (2, 0)], "(prompt_id, sample_id)")
    with pytest.raises(DataError, match=r"x\.jsonl, row 4: field \(prompt_id, sample_id\) repeats \(1, 0\)"):
        check_unique(tmp_path / "x.jsonl", [(1, 0), (1, 1), (1, 0)], "(prompt_id, sample_id)")

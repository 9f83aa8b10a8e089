"""Ratings and preference files: scale, masks, pairs, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drdpo.errors import DataError
from drdpo.records import write_rows
from drdpo.rewards.labels import LabelColumn, Scale
from drdpo.rewards.rated_pairs import read_rated_pairs
from drdpo.rewards.ratings import prompt_numbers, rating_pairs, read_ratings, unseen

HELPSTEER, ULTRAFEEDBACK = Scale(4, 0.5), Scale(10, 0)


def ratings(path: Path, rows: list[dict[str, Any]], columns: list[str], quality: tuple[str, ...] = ()) -> Any:
    write_rows(path, rows)
    return read_ratings(path, columns, quality or columns[:1], HELPSTEER)


def preferences(path: Path, rows: list[dict[str, Any]], labelled: bool = True) -> Any:
    write_rows(path, rows)
    return read_rated_pairs(path, ULTRAFEEDBACK, 3, labelled)


def test_the_scales_are_armorms() -> None:
    # ArmoRM's card: HelpSteer's heads map to 0-4 by 5 x - 0.5.
    assert [HELPSTEER.label(rating) for rating in (0, 1, 4)] == pytest.approx([0.1, 0.3, 0.9])
    assert 5 * HELPSTEER.label(3) - 0.5 == pytest.approx(3)
    assert HELPSTEER.points == 5
    assert HELPSTEER.meaning == "5 x - 0.5, from 0 to 4"
    assert ULTRAFEEDBACK.label(8.5) == 0.85
    assert ULTRAFEEDBACK.meaning == "10 x, from 0 to 10"


def test_ratings_scale_masks_and_pairs(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "response": "a", "good": 4, "short": None},
        {"prompt": "q", "response": "b", "good": 0, "short": 2},
        {"prompt": "p ", "response": "c", "good": 1},
        {"prompt": "p", "response": "d", "good": 4},
    ]
    found = ratings(tmp_path / "ratings.jsonl", rows, ["good", "short"])
    np.testing.assert_allclose(found.labels_NK[:, 0], [0.9, 0.1, 0.3, 0.9])
    np.testing.assert_allclose(found.labels_NK[:, 1], [np.nan, 0.5, np.nan, np.nan])
    assert prompt_numbers(found.prompts()).tolist() == [0, 1, 0, 0]
    assert found.pairs_P2.tolist() == [[0, 2], [3, 2]]
    assert found.notes == ("ratings.jsonl: masked short: 3 missing",)
    assert rating_pairs(np.array([0, 1, 0, 0]), found.labels_NK[:, 1]).shape == (0, 2)
    kept = found.keep([2, 3])
    assert kept.pairs_P2.tolist() == [[1, 0]]
    assert [messages[-1]["content"] for messages in kept.conversations] == ["c", "d"]


def test_wrong_ratings_are_masked_and_counted_by_reason(tmp_path: Path) -> None:
    wrong = [{"good": 5}, {"good": -1}, {"good": "4"}, {"good": None}, {"good": True}, {"good": math.nan}, {"good": 10**400}]
    rows = [{"prompt": f"p{number}", "response": "a", "good": number % 5} for number in range(70)]
    for row, change in zip(rows[::10], wrong, strict=True):
        row.update(change)
    path = tmp_path / "ratings.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = read_ratings(path, ["good"], ["good"], HELPSTEER)
    assert np.flatnonzero(np.isnan(found.labels_NK[:, 0])).tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert found.notes == ("ratings.jsonl: masked good: 1 missing, 3 not a number, 3 out of range",)


def test_a_tenth_of_wrong_values_is_another_scale() -> None:
    def column(wrong: int, missing: int = 0) -> LabelColumn:
        read = LabelColumn("good", HELPSTEER)
        for row in range(20):
            read.read(row + 1, 9 if row < wrong else 3)
        for _ in range(missing):
            read.read(99, None)
        return read

    column(2).check(Path("file"))
    column(2, missing=500).check(Path("file"))  # missing is not wrong
    message = 'file: 3 of 20 values of the field "good" are no ratings from 0 to 4 .the first: row 1 has 9.; more than 10%'
    with pytest.raises(DataError, match=message):
        column(3).check(Path("file"))
    with pytest.raises(DataError, match="3 of 20 values"):
        column(3, missing=500).check(Path("file"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": " "}, "row 2: field \"response\" is ' ', not a text"),
        ({"prompt": None}, 'row 2: field "prompt" is None, not a text'),
        ({"prompt": "a\n<extra_id_1>Assistant\nb"}, "row 2: the prompt does not end in a user turn"),
        ({"warm": 5}, '1 of 2 values of the field "warm" are no ratings from 0 to 4'),
    ],
)
def test_bad_ratings_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    row = {"prompt": "p", "response": "a", "warm": 1}
    with pytest.raises(DataError, match=message):
        ratings(tmp_path / "ratings.jsonl", [row, row | change], ["warm"])
    with pytest.raises(DataError, match='no row has a rating in the field "cold"'):
        ratings(tmp_path / "ratings.jsonl", [row], ["warm", "cold"])


def test_every_form_of_a_preference_is_read(tmp_path: Path) -> None:
    user, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "g"), ("assistant", "b"))
    )
    rows: list[dict[str, Any]] = [
        {"prompt": "q", "chosen": "g", "rejected": "b", "score_chosen": 9, "score_rejected": 2.5},
        {"prompt": "q", "chosen": "g", "rejected": "b", "metadata": {"score_chosen": 8, "score_rejected": 7}},
        {"prompt": [user], "chosen": [good], "rejected": [bad], "score_chosen": 6, "score_rejected": 5},
        {"chosen": [user, good], "rejected": [user, bad], "score_chosen": 4, "score_rejected": 1},
    ]
    found = preferences(tmp_path / "pairs.jsonl", rows)
    assert found.conversations == [[user, good], [user, bad]] * 4
    np.testing.assert_allclose(found.labels_NK[:, 2], [0.9, 0.25, 0.8, 0.7, 0.6, 0.5, 0.4, 0.1])
    assert np.isnan(found.labels_NK[:, :2]).all()
    assert found.pairs_P2.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert found.notes == ()
    unlabelled = preferences(tmp_path / "pairs.jsonl", rows, labelled=False)
    assert np.isnan(unlabelled.labels_NK).all()
    assert unlabelled.pairs_P2.tolist() == found.pairs_P2.tolist()


def test_what_makes_no_pair_is_counted(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "g", "rejected": "b", "score_chosen": 9, "score_rejected": 2}
    rows: list[dict[str, Any]] = [
        *[row] * 30,
        row | {"score_rejected": 9},
        row | {"score_chosen": 1},
        row | {"rejected": "g "},
        row | {"chosen": " "},
        row | {"score_chosen": 11},  # masked; the pair stays as the file says it
        row | {"score_chosen": None},
    ]
    found = preferences(tmp_path / "pairs.jsonl", rows)
    assert len(found) == 2 * 35
    assert found.pairs_P2.tolist() == [[2 * row, 2 * row + 1] for row in (*range(30), 33, 34)]
    assert found.notes == (
        "pairs.jsonl: masked score_chosen: 1 missing, 1 out of range",
        "pairs.jsonl: rows that make no pair, an empty answer: 1",
        "pairs.jsonl: rows that make no pair, equal scores: 1",
        "pairs.jsonl: rows that make no pair, the rejected answer scored higher: 1",
        "pairs.jsonl: rows that make no pair, equal texts: 1",
    )


def test_bad_preferences_are_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "q", "chosen": "g", "rejected": "b"}
    with pytest.raises(DataError, match=r'pairs\.jsonl: no row has a rating in the field "score_chosen"'):
        preferences(path, [row])
    assert len(preferences(path, [row], labelled=False).pairs_P2) == 1
    with pytest.raises(DataError, match='1 of 1 values of the field "score_chosen" are no ratings from 0 to 10'):
        preferences(path, [row | {"score_chosen": 95, "score_rejected": 5}])
    with pytest.raises(DataError, match=r'pairs\.jsonl, row 2: field "rejected" is missing'):
        preferences(path, [row, {"prompt": "q", "chosen": "g"}], labelled=False)
    with pytest.raises(DataError, match="no rows with two answers"):
        preferences(path, [row | {"chosen": ""}])


def test_held_out_prompts_are_new_across_files(tmp_path: Path) -> None:
    train = ratings(tmp_path / "train.jsonl", [{"prompt": "Seen ", "response": "a", "good": 1}], ["good"])
    rows = [
        {"prompt": prompt, "chosen": "g", "rejected": "b", "score_chosen": 9, "score_rejected": 2}
        for prompt in ("Seen", "New")
    ]
    held_out = unseen(preferences(tmp_path / "test.jsonl", rows), set(train.prompts()), tmp_path / "test.jsonl")
    assert [messages[0]["content"] for messages in held_out.conversations] == ["New", "New"]
    assert held_out.pairs_P2.tolist() == [[0, 1]]
    assert held_out.notes == ("test.jsonl: 2 answers left out, whose prompt is also among those of training",)
    with pytest.raises(DataError, match="every held-out prompt is also among those of training"):
        unseen(train, set(train.prompts()), tmp_path / "train.jsonl")

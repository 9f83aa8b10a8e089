"""inspect_data on fabricated folders: numbers by hand, shared prompts, rejected rows, errors that name the row."""

import pytest

from drdpo.config.evaluation import InspectConfig
from drdpo.errors import DataError
from drdpo.evaluation.inspection import inspect_data
from drdpo.records import write_rows


def user(text):
    return [{"role": "user", "content": text}]


def completion(prompt_id, sample_id, answer, tokens, score, **more):
    row = {
        "prompt_id": prompt_id, "sample_id": sample_id, "prompt": user(f"question {prompt_id}"),
        "completion": [{"role": "assistant", "content": answer}], "token_ids": [7] * tokens, "finish_reason": "stop",
    }  # fmt: skip
    return row | ({} if score is None else {"scores": {"helpsteer-coherence": score}}) | more


COMPLETION_ROWS = [
    completion(1, 0, "an answer", 1, 1.0),
    completion(1, 1, "another", 2, 2.0, finish_reason="length"),
    completion(2, 0, "", 3, 3.0, prompt=[{"role": "system", "content": "be brief"}, *user("question 2")]),
    completion(3, 0, "c", 14, 6.0),
]


def look(path, capsys, **flags):
    inspect_data(InspectConfig(str(path), **flags))
    return capsys.readouterr().out


def cells(printed, name):
    (line,) = [line for line in printed.splitlines() if line.startswith(name)]
    return line.removeprefix(name).split()


def test_completions_by_hand(tmp_path, capsys):
    write_rows(tmp_path / "sampled" / "train.jsonl", COMPLETION_ROWS)
    write_rows(tmp_path / "sampled" / "test.jsonl", [completion(9, 0, "x", 5, None)])
    printed = look(tmp_path, capsys)
    assert "train.jsonl: 4 completions" in printed and "test.jsonl: 1 completions" in printed
    assert "3 distinct prompts; rows of each, min / median / max: 1 / 1 / 2" in printed
    assert "25.0% have a system message or several turns" in printed
    assert "finish_reason: stop 3, length 1" in printed and "empty answers: 1" in printed
    # Of 1 2 3 6: mean 3, sd sqrt(14 / 3), p10 0.3 of the way from 1 to 2, p90 0.7 from 3 to 6, p99 0.97 from 3 to 6.
    assert cells(printed, "score helpsteer-coherence") == ["3.0", "2.1602", "1.0", "1.3", "2.5", "5.1", "5.91", "6.0"]
    assert printed.count("--- train.jsonl, row ") == 3 and printed.count("--- test.jsonl, row ") == 1
    assert printed == look(tmp_path, capsys), "the same seed, the same rows"
    assert "--- " not in look(tmp_path, capsys, samples=0)


def said(text):
    return [{"role": "assistant", "content": text}]


def test_pairs_by_hand_in_trls_forms_too(tmp_path, capsys):
    rows = [
        {"prompt_id": 1, "prompt": user("q"), "chosen": said("aaaa"), "rejected": said("b"),
         "chosen_score": 2.0, "rejected_score": 1.0},
        {"prompt": "r", "chosen": "same", "rejected": "same ", "chosen_score": 0.0, "rejected_score": 2.0},
        {"chosen": [*user("s"), *said("x")], "rejected": [*user("s"), *said("yy")]},
    ]  # fmt: skip
    write_rows(tmp_path / "train.jsonl", rows)
    printed = look(tmp_path / "train.jsonl", capsys)
    assert "3 preference pairs" in printed and "chosen is longer in 33.3% of the pairs (in characters)" in printed
    assert "equal texts: 1" in printed and "chosen scored lower: 1" in printed
    assert float(cells(printed, "score margin")[0]) == -0.5
    # Pairs that training drops.
    answers = [("a", "b"), ("", "b"), ("a", " \n"), ("", "")]
    write_rows(tmp_path / "train.jsonl", ({"prompt": "x", "chosen": one, "rejected": other} for one, other in answers))
    assert "empty answers: 3 (such pairs are not trained on)" in look(tmp_path / "train.jsonl", capsys, samples=0)


def test_shared_prompts_and_rejected_rows(tmp_path, capsys):
    write_rows(tmp_path / "train.jsonl", [{"prompt_id": 1, "prompt": user("a  b")}, {"prompt_id": 2, "prompt": user("c")}])
    write_rows(tmp_path / "test.jsonl", [{"prompt_id": 7, "prompt": user("a b")}])
    write_rows(tmp_path / "rejects.jsonl", [{"file": "x", "row": 3, "reason": "too\x1b[31m long"}] * 2)
    printed = look(tmp_path, capsys)
    assert "note: train.jsonl and test.jsonl share 1 prompts" in printed
    assert "2  too\\x1b[31m long" in printed and "\x1b" not in printed


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": 1}], "row 1: a row of unknown kind; its fields are question"),
        ([COMPLETION_ROWS[0], {"prompt_id": 4, "prompt": user("x")}], "row 2: rows of two kinds"),
        ([COMPLETION_ROWS[0] | {"finish_reason": "tired"}], "row 1: field .*finish_reason"),
    ],
)
def test_bad_rows_are_named(rows, message, tmp_path):
    with pytest.raises(DataError, match="no JSON-lines file"):
        inspect_data(InspectConfig(str(tmp_path)))
    write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError, match=message):
        inspect_data(InspectConfig(str(tmp_path)))

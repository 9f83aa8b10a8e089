"""HelpSteer2's rows as prompts: hand-made rows with every way to be dropped, and real rows where ../shared has them."""

import json
from pathlib import Path

import pytest

from drdpo.assets.helpsteer2 import FIRST_TEST_ID, convert_rows, parse_lines, write_prompts
from drdpo.errors import DataError
from drdpo.folder import read_manifest
from drdpo.records import Prompt, read_records, read_rows

ASSISTANT, USER = "\n<extra_id_1>Assistant\n", "\n<extra_id_1>User\n"


def _rows(*texts: str) -> list[dict[str, str]]:
    return [{"prompt": text, "response": "r"} for text in texts]


def test_each_prompt_once_and_turns_split() -> None:
    rows = _rows(" Hi ", "Hi", f"A{ASSISTANT}B\n{USER}\nC", f"A{ASSISTANT}B{USER}C", "Bye")
    result = convert_rows(rows, first_id=10)
    assert result.prompts == [
        Prompt(10, [{"role": "user", "content": "Hi"}]),
        Prompt(
            11,
            [
                {"role": "user", "content": "A"},
                {"role": "assistant", "content": "B"},
                {"role": "user", "content": "C"},
            ],
        ),
        Prompt(12, [{"role": "user", "content": "Bye"}]),
    ]
    assert result.counts() == {
        "rows": 5, "prompts": 3, "multi_turn": 1,
        "dropped_repeated": 2, "dropped_broken_turns": 0, "dropped_also_in_test": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        f"A{ASSISTANT}B",  # ends in the assistant's turn
        f"A{USER}B",  # two user turns
        f"A{ASSISTANT} {USER}C",  # an empty turn
        f"A{ASSISTANT}B{USER}",  # an empty last turn
        "  \n ",
        "A <extra_id_1>assistant B",  # a marker in another form
    ],
)
def test_broken_turns_are_dropped_and_counted(text: str) -> None:
    result = convert_rows(_rows("fine", text))
    assert [prompt.prompt[0]["content"] for prompt in result.prompts] == ["fine"]
    assert result.broken_turns == 1


def test_a_row_without_a_prompt_is_named() -> None:
    with pytest.raises(DataError, match='row 2: field "prompt"'):
        convert_rows([{"prompt": "A"}, {"prompt": None}])
    with pytest.raises(DataError, match=r"train\.jsonl\.gz, row 2: not JSON"):
        list(parse_lines(['{"prompt": "A"}', '{"prompt": "'], "train.jsonl.gz"))


def test_train_prompts_of_the_test_split_are_left_out(tmp_path: Path) -> None:
    counts = write_prompts(tmp_path / "p", {"train": _rows("A", "A", "B"), "test": _rows("B", "B")}, {"revision": "r1"})
    assert counts["train"]["dropped_also_in_test"] == 1
    assert [p.prompt[0]["content"] for p in read_records(tmp_path / "p" / "train.jsonl", Prompt.from_row)] == ["A"]
    test = read_records(tmp_path / "p" / "test.jsonl", Prompt.from_row)
    assert [p.prompt_id for p in test] == [FIRST_TEST_ID]
    manifest = read_manifest(tmp_path / "p")["assets"]
    assert manifest["made_by"] == {"revision": "r1"}
    assert manifest["count"] == counts
    assert manifest["licence"].startswith("CC-BY-4.0")


def test_a_split_without_prompts_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the validation split holds no usable prompt"):
        write_prompts(tmp_path / "p", {"train": _rows("A"), "test": []}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("split", "prompts", "multi_turn"), [("train", 500, 52), ("validation", 350, 52)])
def test_real_rows(root: Path, split: str, prompts: int, multi_turn: int) -> None:
    path = root.parent / "shared" / "data" / "helpsteer2" / f"{split}.jsonl"
    if not path.is_file():
        pytest.skip("../shared is not there")
    rows = [row for _, row in read_rows(path)]
    result = convert_rows(rows)
    counts = result.counts()
    assert counts["rows"] == len(rows) == 2 * prompts
    assert counts["prompts"] + counts["dropped_broken_turns"] // 2 == prompts
    marked = {row["prompt"] for row in rows if "<extra_id_1>" in row["prompt"]}
    assert len(marked) == multi_turn
    assert counts["multi_turn"] + counts["dropped_broken_turns"] // 2 == multi_turn
    text = json.dumps([prompt.prompt for prompt in result.prompts])
    assert "extra_id" not in text

"""Preference rows in every accepted form, and their token ids."""

import json
from pathlib import Path

import pytest

from drdpo import chat
from drdpo.errors import DataError
from drdpo.records import Preference
from drdpo.training.data import load_preferences, tokenise

PROMPT = [{"role": "user", "content": "Name a colour."}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def tokenizer(smollm):
    return chat.load_tokenizer(str(smollm))


def folder_with(tmp_path: Path, *rows, split: str = "train") -> str:
    folder = tmp_path / "my pairs"
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(folder)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt_id": 1, "prompt": PROMPT, "chosen": said("Red."), "rejected": said("No.")},
        {"prompt": PROMPT, "chosen": said("Red."), "rejected": said("No.")},
        {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "No."},
        {"chosen": PROMPT + said("Red."), "rejected": PROMPT + said("No.")},
        {"prompt": PROMPT, "chosen": said("Red."), "rejected": said("No."), "chosen_score": 1.0, "more": "x"},
        {"prompt_id": "3ff1", "prompt": "Name a colour.", "chosen": PROMPT + said("Red."), "rejected": PROMPT + said("No.")},
    ],
    ids=["ours", "no id", "texts", "prompt inside", "further fields", "prompt twice"],
)
def test_every_form_gives_the_same_pair(row, tmp_path):
    (preference,) = load_preferences(folder_with(tmp_path, row), "train")
    assert preference.prompt == PROMPT
    assert preference.chosen == said("Red.")
    assert preference.rejected == said("No.")


def test_the_shared_prompt_inside_may_have_several_turns(tmp_path):
    turns = [*PROMPT, *said("Red."), {"role": "user", "content": "Another."}]
    (preference,) = load_preferences(
        folder_with(tmp_path, {"chosen": turns + said("Blue."), "rejected": turns + said("Red.")}), "train"
    )
    assert preference.prompt == turns


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": PROMPT, "chosen": said("Red.")}, r'row 2: field "rejected" is missing'),
        ({"prompt": PROMPT, "chosen": said("Red."), "rejected": said("a") + said("b")}, r'row 2: field "rejected"'),
        ({"prompt": said("x"), "chosen": said("a"), "rejected": said("b")}, r'row 2: field "prompt" ends in'),
        ({"chosen": "a", "rejected": "b"}, r'row 2: field "prompt" is missing'),
        (
            {"prompt": PROMPT, "chosen": said("a"), "rejected": [{"role": "bot", "content": "b"}]},
            r'row 2: .*"rejected".*bot',
        ),
        ('{"prompt": [{"role": "us', r"row 2: not a whole JSON object"),
        ("[1, 2]", r"row 2: a JSON list"),
    ],
)
def test_a_bad_row_is_named(row, message, tmp_path):
    good = {"prompt": PROMPT, "chosen": said("Red."), "rejected": said("No.")}
    with pytest.raises(DataError, match=message):
        load_preferences(folder_with(tmp_path, good, row), "train")


def test_missing_and_empty_splits_are_named(tmp_path):
    folder = folder_with(tmp_path)
    with pytest.raises(DataError, match=r"train\.jsonl: the data set has no rows"):
        load_preferences(folder, "train")
    with pytest.raises(DataError, match=r"test\.jsonl: no such file"):
        load_preferences(folder, "test")


def test_a_saved_data_set_loads(tmp_path):
    from datasets import Dataset, DatasetDict

    row = {"prompt": PROMPT, "chosen": said("Red."), "rejected": said("No.")}
    DatasetDict({"train": Dataset.from_list([row]), "validation": Dataset.from_list([row])}).save_to_disk(tmp_path / "saved")
    for split in ("train", "test"):
        assert load_preferences(str(tmp_path / "saved"), split)[0].chosen == said("Red.")


def test_a_saved_data_set_without_test_part_is_refused(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])}).save_to_disk(
        tmp_path / "saved"
    )
    with pytest.raises(DataError, match="no split test or validation"):
        load_preferences(str(tmp_path / "saved"), "test")


def preference(chosen="Red.", rejected="No.", **ids) -> Preference:
    return Preference(0, PROMPT, said(chosen), said(rejected), **ids)


def test_encoded_answers_end_the_turn(tokenizer):
    ((pair,), counts) = tokenise([preference()], tokenizer, 100)
    assert tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(pair.chosen) == "Red.<|im_end|>"
    assert counts["text encoded"] == 2
    conversation = chat.conversation_token_ids(tokenizer, PROMPT + said("Red."))
    assert conversation[: len(pair.prompt) + len(pair.chosen)] == pair.prompt + pair.chosen


def test_sampled_ids_are_used_as_they_are(tokenizer):
    # Letter by letter: another tokenisation of the same text; cut by length, so without an end token.
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "Red."]
    ((pair,), counts) = tokenise([preference(chosen_token_ids=letters)], tokenizer, 100)
    assert pair.chosen == letters
    assert counts["text encoded"] == 1, "the rejected answer has no ids"


@pytest.mark.parametrize("ids", [[10**6, 3], [5, 6, 7]], ids=["not in the vocabulary", "another text"])
def test_ids_of_another_tokenizer_are_not_trusted(ids, tokenizer):
    ((pair,), counts) = tokenise([preference(chosen_token_ids=ids)], tokenizer, 100)
    assert tokenizer.decode(pair.chosen) == "Red.<|im_end|>"
    assert counts["text encoded"] == 2


def test_a_row_that_the_template_refuses_is_counted(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system turn') }}")
    pairs, counts = tokenise([preference()], tokenizer, 100)
    assert (pairs, counts["template refuses"]) == ([], 1)


def test_what_is_left_out_is_counted(tokenizer):
    room = len(chat.prompt_token_ids(tokenizer, PROMPT))
    long = preference(chosen="word " * 50)
    pairs, counts = tokenise([long, preference(rejected="Red.")], tokenizer, room + 10)
    assert [len(pair.chosen) for pair in pairs] == [10]
    assert pairs[0].chosen[-1] != chat.end_of_turn_id(tokenizer), "an answer that was cut does not end"
    assert (counts["answer cut"], counts["equal answers"]) == (1, 1)
    assert tokenise([preference()], tokenizer, room)[1]["prompt too long"] == 1

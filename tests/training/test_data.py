"""Preference rows in every accepted form, and their token ids."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from drdpo import chat
from drdpo.config.training import DataSettings
from drdpo.errors import DataError
from drdpo.records import Preference
from drdpo.training.data import tokenise
from drdpo.training.rows import load_split

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
    (preference,) = load_split(DataSettings(folder_with(tmp_path, row)), "train")[0]
    assert (preference.prompt, preference.chosen, preference.rejected) == (PROMPT, said("Red."), said("No."))


@pytest.mark.parametrize("text", [None, "Another.", "Name a colour.", "a title"])
def test_whole_conversations_have_the_prompt_also_beside_a_text(text, tmp_path):
    """With system and earlier turns, which the text lacks. TRL takes the turns that both share, too."""
    turns = [{"role": "system", "content": "Be brief."}, *PROMPT, *said("Red."), {"role": "user", "content": "Another."}]
    row = {"chosen": turns + said("Blue."), "rejected": turns + said("Red."), **({"prompt": text} if text else {})}
    (preference,) = load_split(DataSettings(folder_with(tmp_path, row)), "train")[0]
    assert (preference.prompt, preference.chosen, preference.rejected) == (turns, said("Blue."), said("Red."))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": PROMPT, "chosen": said("Red.")}, r'row 2: field "rejected" is missing'),
        ({"prompt": PROMPT, "chosen": said("Red."), "rejected": said("a") + said("b")}, r'row 2: field "rejected"'),
        ({"prompt": said("x"), "chosen": said("a"), "rejected": said("b")}, r'row 2: field "prompt" ends in'),
        ({"chosen": "a", "rejected": "b"}, r'row 2: field "prompt" is missing'),
        ({"prompt": "x", "chosen": said("a"), "rejected": [{"role": "bot", "content": "b"}]}, r'row 2: .*"rejected".*bot'),
    ],
)
def test_a_bad_row_is_named(row, message, tmp_path):
    good = {"prompt": PROMPT, "chosen": said("Red."), "rejected": said("No.")}
    with pytest.raises(DataError, match=message):
        load_split(DataSettings(folder_with(tmp_path, good, row)), "train")


def test_missing_and_empty_splits_are_named(tmp_path):
    folder = folder_with(tmp_path)
    for data, split, message in (
        (DataSettings(folder), "train", r"train\.jsonl: the data set has no rows"),
        (DataSettings(folder), "test", r"test\.jsonl: no such file"),
        (DataSettings(folder, "b"), "train", "omit --dataset_config=b"),  # a folder has no configurations
    ):
        with pytest.raises(DataError, match=message):
            load_split(data, split)


def rows_of(*numbers: int) -> list[dict]:
    return [{"prompt": f"Number {number // 2}?", "chosen": f"It is {number}.", "rejected": "No."} for number in numbers]


@pytest.fixture(params=["files", "saved"])
def stored(request, tmp_path) -> Callable[..., str]:
    """Writes splits as files, or as datasets.save_to_disk does, which load as those of the hub do."""

    def write(**splits: list[dict]) -> str:
        if request.param == "saved":
            saved = DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})
            saved.save_to_disk(str(tmp_path / "saved"))
            return str(tmp_path / "saved")
        for name, rows in splits.items():
            folder = folder_with(tmp_path, *rows, split=name)
        return folder

    return write


def chosen_of(data: DataSettings, split: str) -> list[str]:
    return [preference.chosen[0]["content"] for preference in load_split(data, split)[0]]


def test_splits_by_name(stored):
    path = stored(train_prefs=rows_of(1, 2), test_prefs=rows_of(3), test_gen=rows_of(4))
    named = DataSettings(path, train_split="train_prefs", test_split="test_prefs")
    assert chosen_of(named, "train") == ["It is 1.", "It is 2."]
    assert chosen_of(named, "test") == ["It is 3."]
    for split in ("train", "test"):
        words = rf"\b{split}\b.*\(there is test_gen, test_prefs, train_prefs\); pass --{split}_split=NAME"
        with pytest.raises(DataError, match=words):
            load_split(DataSettings(path), split)


def test_a_share_of_the_prompts_is_held_out(stored):
    path = stored(train=rows_of(*range(40)))
    with pytest.raises(DataError, match=r"\btest\b.*there is train.*--test_split=NAME.*or --test_share=0\.05"):
        load_split(DataSettings(path), "test")
    data = DataSettings(path, test_share=0.15, seed=3)
    train, test = (chosen_of(data, split) for split in ("train", "test"))
    assert sorted(train + test) == sorted(f"It is {number}." for number in range(40))
    prompts = [{row[0]["content"] for row in (p.prompt for p in load_split(data, split)[0])} for split in ("train", "test")]
    assert (len(prompts[0]), len(prompts[1])) == (17, 3), "15% of 20 prompts, with both their rows"
    assert not prompts[0] & prompts[1]
    assert chosen_of(data, "test") == test != chosen_of(replace(data, seed=4), "test")
    with pytest.raises(DataError, match=r"--test_share=0\.99 of 20 distinct prompts leaves none to train on"):
        load_split(replace(data, test_share=0.99), "train")


def test_a_validation_split_of_the_hub_is_the_test_side(monkeypatch):
    asked = []

    def load(path, config):
        asked.append((path, config))
        if config is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']")
        return {"train": rows_of(1), "validation": rows_of(2)}

    monkeypatch.setattr("datasets.load_dataset", load)
    assert chosen_of(DataSettings("owner/name", "b"), "test") == ["It is 2."]
    assert asked == [("owner/name", "b")]
    with pytest.raises(DataError, match=r"owner/name: .*Please pick one among .*'b'.*; pass --dataset_config=NAME"):
        load_split(DataSettings("owner/name"), "test")


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


def test_a_row_that_the_template_refuses_is_counted_and_one_that_renders_nothing_is_quoted(tokenizer, monkeypatch):
    broken = "{% if messages[0]['role'] == 'system' %}{{ messages + 1 }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", broken + tokenizer.chat_template)
    two = Preference(0, [{"role": "system", "content": "x"}, *PROMPT], said("a"), said("b"))
    pairs, counts = tokenise([preference(), two], tokenizer, 100)
    assert (len(pairs), counts["template refuses"]) == (1, 1)
    with pytest.raises(DataError, match=r"template renders no pair; the last: .*can only concatenate"):
        tokenise([two], tokenizer, 100)


def test_what_is_left_out_is_counted(tokenizer):
    room = len(chat.prompt_token_ids(tokenizer, PROMPT))
    long = preference(chosen="word " * 50)
    pairs, counts = tokenise([long, preference(rejected="Red.")], tokenizer, room + 10)
    assert [len(pair.chosen) for pair in pairs] == [10]
    assert pairs[0].chosen[-1] != chat.end_of_turn_id(tokenizer), "an answer that was cut does not end"
    assert (counts["answer cut"], counts["equal answers"]) == (1, 1)
    assert tokenise([preference()], tokenizer, room)[1]["prompt too long"] == 1

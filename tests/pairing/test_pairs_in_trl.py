"""TRL's own DPO preparation reads the pairs, and makes of them the token ids that our trainer makes of their text."""

from types import SimpleNamespace

import datasets
import pytest

from drdpo import chat
from drdpo.config.data import PreferencesConfig
from drdpo.config.training import DataSettings
from drdpo.pairing import generate_preferences
from drdpo.records import Completion, to_row, write_rows
from drdpo.training.data import Pair, collate, tokenise
from drdpo.training.rows import load_split

pytestmark = pytest.mark.slow  # TRL's import alone takes ten seconds

PROMPTS = [
    [{"role": "user", "content": "What is 17 * 23?"}],
    [{"role": "system", "content": "Answer in French."}, {"role": "user", "content": "Good morning!"}],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Green."},
        {"role": "user", "content": "Another one?\n\nIn capitals."},
    ],
]
ANSWERS = [
    ["391.", "17 * 23 = 391, as 17 * 20 = 340 and 17 * 3 = 51.", "About 400"],
    ["Bonjour !", "Bonjour, ça va ? 😀", "Good morning"],
    ["BLUE", "RED\n\n```python\nprint('RED')\n```", "green"],
]
CUT = (2, 2)  # prompt and answer that was cut by length: its ids have no end token


@pytest.fixture(scope="module")
def tokenizer(smollm):
    return chat.load_tokenizer(str(smollm))


def paired(source, train, test, **flags):
    for split, rows in (("train", train), ("test", test)):
        write_rows(source / f"{split}.jsonl", rows)
    config = PreferencesConfig(completions=str(source), output_path=str(source / "pairs"), ArmoRM=1.0, **flags)
    generate_preferences(config)
    return source / "pairs"


def completion(tokenizer, prompt_id, sample_id, prompt, text, ids=slice(None), reason="stop"):
    answer = [{"role": "assistant", "content": text}]
    token_ids = chat.answer_token_ids(tokenizer, answer)[ids]
    return to_row(Completion(prompt_id, sample_id, prompt, answer, token_ids, reason, {"ArmoRM": float(sample_id)}))


@pytest.fixture(scope="module", params=["top_bottom", "all_pairs"])
def pairs(request, tmp_path_factory, tokenizer):
    rows = [
        completion(tokenizer, n, k, PROMPTS[n], text, *((slice(-1), "length") if (n, k) == CUT else ()))
        for n, answers in enumerate(ANSWERS)
        for k, text in enumerate(answers)
    ]
    return paired(tmp_path_factory.mktemp("completions"), rows, rows, selection=request.param)


def load(folder, split="train"):
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    return datasets.load_dataset("json", data_files=files, cache_dir=str(folder / "cache"))[split]


def prepared(rows, tokenizer, folder):
    """What DPOTrainer makes of a data set before it trains."""
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(output_dir=str(folder / "trl"), bf16=False, use_cpu=True, report_to=[], max_length=None)
    return DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, config, "train")


def test_trl_and_our_trainer_read_the_same_tokens(pairs, tokenizer):
    from trl.data_utils import is_conversational

    rows = load(pairs)
    assert is_conversational(rows[0])
    theirs = prepared(rows, tokenizer, pairs)
    ours, counts = tokenise(load_split(DataSettings(str(pairs)), "train")[0], tokenizer, 2048)
    assert len(theirs) == len(ours) == (3 if "top_bottom" in (pairs / "manifest.json").read_text() else 9)
    assert counts["text encoded"] == 0
    # SmolLM2's template ends a turn by <|im_end|> and a line feed. TRL trains on both, we on what the policy samples.
    end, line_feed = chat.end_of_turn_id(tokenizer), tokenizer("\n", add_special_tokens=False)["input_ids"]
    cut = 0
    for row, own in zip(theirs, ours, strict=True):
        assert row["prompt_ids"] == own.prompt
        for side, answer in (("chosen", own.chosen), ("rejected", own.rejected)):
            if row[side][0]["content"] == ANSWERS[CUT[0]][CUT[1]]:
                assert end not in answer, "an answer cut by length is trained without an end; TRL would teach one"
                answer, cut = [*answer, end], cut + 1
            assert row[f"{side}_ids"] == answer + line_feed
    assert cut == len([pair for pair in theirs if pair["prompt_id"] == CUT[0] and pair["chosen"][0]["content"] == "green"])
    assert cut >= 1


def test_trl_collates_them_as_we_do(pairs, tokenizer):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = list(prepared(load(pairs), tokenizer, pairs))
    theirs = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)(rows)
    same = [Pair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
    ours = collate(same, range(len(same)), tokenizer.pad_token_id)
    assert theirs["input_ids"].tolist() == ours.input_ids_ST.tolist()
    assert theirs["attention_mask"].tolist() == ours.attention_mask_ST.tolist()
    assert theirs["completion_mask"].bool().tolist() == ours.answer_mask_ST.tolist()


def test_columns_have_one_type_without_nulls(pairs):
    for split in ("train", "test"):
        rows = load(pairs, split)
        assert rows.column_names == [
            "prompt_id", "prompt", "chosen", "rejected", "chosen_score", "rejected_score", "chosen_token_ids",
            "rejected_token_ids", "chosen_scores", "rejected_scores",
        ]  # fmt: skip
        assert str(rows.features["chosen_score"].dtype) == "float64"
        assert str(rows.features["chosen_token_ids"].feature.dtype) == "int64"
        assert {str(feature.dtype) for feature in rows.features["chosen_scores"].values()} == {"float64"}
        for name in rows.column_names:
            assert all(value is not None for value in rows[name])


def test_completions_without_token_ids_open_too(tmp_path, tokenizer):
    """Completions of another program: some or all have no ids; the trainer then encodes the text."""
    rows = [
        completion(tokenizer, prompt_id, k, PROMPTS[0], text, slice(None) if prompt_id == 2 else slice(0))
        for prompt_id in (1, 2)
        for k, text in enumerate(ANSWERS[0][:2])
    ]
    target = paired(tmp_path, rows, rows[:2])
    theirs = prepared(load(target), tokenizer, target)
    ours, counts = tokenise(load_split(DataSettings(str(target)), "train")[0], tokenizer, 2048)
    assert counts["text encoded"] == 2 and ours[0] == ours[1]
    assert [row["chosen_ids"][:-1] for row in theirs] == [own.chosen for own in ours]

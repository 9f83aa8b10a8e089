"""Prompts are found, read, rendered or rejected; stop tokens; the context of the model."""

import json
from pathlib import Path
from typing import Any

import pytest

from drdpo import chat
from drdpo.errors import DataError, UsageError
from drdpo.models import check_model
from drdpo.records import Prompt
from drdpo.sampling.prompts import check_context, find_dataset, read_prompts, render, stop_token_ids


@pytest.fixture(scope="module")
def tokenizer(tiny_policy: Path) -> Any:
    return chat.load_tokenizer(str(tiny_policy))


def user(prompt_id: int, content: str) -> Prompt:
    return Prompt(prompt_id, [{"role": "user", "content": content}])


def test_auto_prefers_helpsteer_and_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "datasets" / "embedded_prompts").mkdir(parents=True)
    assert find_dataset("auto", tmp_path).name == "embedded_prompts"
    (tmp_path / "datasets" / "helpsteer2_prompts").mkdir()
    found = find_dataset("auto", tmp_path)
    assert found.name == "helpsteer2_prompts"
    assert capsys.readouterr().out.splitlines()[-1] == f"prompts: {found} (--dataset=auto)"


def test_no_prompts_is_an_error_that_helps(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"setup\.sh"):
        find_dataset("auto", tmp_path)
    with pytest.raises(DataError, match="no such folder of prompts"):
        find_dataset(str(tmp_path / "none"), tmp_path)


def test_test_comes_first_and_train_only_if_wanted(prompts: Path) -> None:
    assert list(read_prompts(prompts, only_test=False, max_prompts=None)) == ["test", "train"]
    (prompts / "train.jsonl").unlink()
    assert len(read_prompts(prompts, only_test=True, max_prompts=3)["test"]) == 3
    with pytest.raises(DataError, match=r"train\.jsonl: no such file"):
        read_prompts(prompts, only_test=False, max_prompts=None)


def test_a_prompt_id_that_comes_twice_is_an_error(prompts: Path) -> None:
    path = prompts / "test.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[2]]) + "\n")
    with pytest.raises(DataError, match=r"test\.jsonl, row 11: field prompt_id repeats"):
        read_prompts(prompts, only_test=True, max_prompts=2)


def test_a_long_prompt_is_rejected_with_the_reason(tokenizer: Any) -> None:
    prompts = [user(3, "short"), user(4, "word " * 200), user(8, "also short")]
    rendered, rejects = render(tokenizer, prompts, Path("d/test.jsonl"), 64)
    assert [(prompt.row, prompt.prompt.prompt_id) for prompt in rendered] == [(1, 3), (3, 8)]
    (reject,) = rejects
    assert (reject["file"], reject["row"], reject["prompt_id"]) == ("d/test.jsonl", 2, 4)
    assert reject["reason"].endswith("tokens, more than --prompt_max_len=64")


def test_a_prompt_that_just_fits_is_kept(tokenizer: Any) -> None:
    prompt = user(0, "What is rain?")
    length = len(chat.prompt_token_ids(tokenizer, prompt.prompt))
    assert render(tokenizer, [prompt], Path("test.jsonl"), length)[1] == []
    with pytest.raises(DataError, match="none of its 1 prompts can be used; row 1: "):
        render(tokenizer, [prompt], Path("test.jsonl"), length - 1)


def test_prompts_that_the_template_rejects_are_rejects(tiny_policy: Path) -> None:
    strict = chat.load_tokenizer(str(tiny_policy))
    strict.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{{ bos_token }}{{ messages[0].content }}"
    )
    system = Prompt(1, [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}])
    rendered, rejects = render(strict, [system, user(2, "Hi")], Path("test.jsonl"), 64)
    assert [prompt.prompt.prompt_id for prompt in rendered] == [2]
    assert rejects == [
        {"file": "test.jsonl", "row": 1, "prompt_id": 1, "reason": "the chat template rejects it (no system turns)"}
    ]


def test_an_answer_ends_at_the_turn_or_at_any_end_the_model_names(tiny_policy: Path, tmp_path: Path, tokenizer: Any) -> None:
    import shutil

    assert stop_token_ids(str(tiny_policy), tokenizer) == (2,)
    folder = tmp_path / "model"
    shutil.copytree(tiny_policy, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2, 17]}))
    assert stop_token_ids(str(folder), tokenizer) == (2, 0, 17)
    (folder / "generation_config.json").unlink()
    assert stop_token_ids(str(folder), tokenizer) == (2,)


def test_prompt_and_completion_must_fit_the_model(tiny_policy: Path) -> None:
    model = check_model(str(tiny_policy))
    assert check_context(model, 1024, 1024) == 2048
    with pytest.raises(UsageError, match=r"need 2049 tokens, but .* has a context of 2048"):
        check_context(model, 1024, 1025)

"""Step 1b on a small random reward model: right scores, nothing lost, nothing overwritten, one process or two."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.forks import Forks

from drdpo.chat import conversation_token_ids, load_tokenizer
from drdpo.config import CompletionsConfig
from drdpo.errors import DataError, UsageError
from drdpo.records import Completion, read_records, read_rows, write_rows
from drdpo.scoring import score
from drdpo.scoring.armorm import load_armorm, pad_right
from drdpo.scoring.score import Scorer, score_completions

Row = dict[str, Any]


def row(prompt_id: int, sample_id: int, prompt: list[dict[str, str]], answer: str) -> Row:
    return {
        "prompt_id": prompt_id, "sample_id": sample_id, "prompt": prompt,
        "completion": [{"role": "assistant", "content": answer}], "token_ids": [5], "finish_reason": "stop",
    }  # fmt: skip


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


ROWS = [
    row(4, 1, user("Name a colour."), "Blue."),
    row(4, 0, user("Name a colour."), "Red, because I say so, and because it is the colour of the sun at dusk."),
    row(2, 0, [{"role": "system", "content": "Be kind."}, *user("Hi")], "Hello <|im_end|>\n<|im_start|>assistant\nthere"),
    row(2, 1, [{"role": "system", "content": "Be kind."}, *user("Hi")], ""),
    row(9, 0, [*user("One"), {"role": "assistant", "content": "Two"}, *user("Three")], "Four five six seven eight."),
]


@pytest.fixture
def save_path(tmp_path: Path) -> Path:
    folder = tmp_path / "my completions"
    write_rows(folder / "sampled" / "train.jsonl", ROWS)
    write_rows(folder / "sampled" / "test.jsonl", ROWS[:2])
    return folder


@pytest.fixture
def config(save_path: Path, embedded_like: Path) -> Callable[..., CompletionsConfig]:
    def make(**fields: Any) -> CompletionsConfig:
        given = {"save_path": str(save_path), "model_path": "unused", "reward_model": str(embedded_like), "dtype": "float32"}
        return CompletionsConfig(**(given | fields))

    return make


def scores_of(path: Path) -> list[dict[str, float]]:
    return [completion.scores for completion in read_records(path, Completion.from_row)]


def test_scores_equal_those_of_one_conversation_at_a_time(
    config: Callable[..., CompletionsConfig], save_path: Path, embedded_like: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score_completions(config())
    rows = [one for _, one in read_rows(save_path / "train.jsonl")]
    assert [{name: one[name] for name in ROWS[0]} for one in rows] == ROWS
    model, tokenizer = load_armorm(embedded_like, "cpu", torch.float32), load_tokenizer(str(embedded_like))
    for one in rows:
        ids = conversation_token_ids(tokenizer, [*one["prompt"], *one["completion"]])
        rewards = model(*pad_right([ids], 0, torch.device("cpu")))
        expected = dict(zip(("kind", "right", "short"), rewards.stage1[0].tolist(), strict=True))
        assert one["scores"] == pytest.approx(expected | {"ArmoRM": rewards.stage2.item()}, abs=1e-4)
    printed = capsys.readouterr().out
    assert "train: 5 completions" in printed
    assert "test: 2 completions" in printed
    mean = sum(one["scores"]["right"] for one in rows) / 5
    assert f"{mean:.4f}" in next(line for line in printed.splitlines() if line.strip().startswith("right"))
    assert sorted(file.name for file in save_path.iterdir()) == ["manifest.json", "sampled", "test.jsonl", "train.jsonl"]
    assert [one for _, one in read_rows(save_path / "sampled" / "train.jsonl")] == ROWS
    manifest = json.loads((save_path / "manifest.json").read_text())["score_train"]
    assert (manifest["made_by"]["dtype"], manifest["dtype_reason"]) == ("float32", "asked for by --dtype")
    counts = manifest["counts"]
    assert counts == {"in": 5, "out": 5, "dropped": 0, "why": {}}


def test_scores_do_not_depend_on_the_batches(config: Callable[..., CompletionsConfig], save_path: Path) -> None:
    score_completions(config())
    together = scores_of(save_path / "train.jsonl")
    (save_path / "train.jsonl").unlink()
    score_completions(config(score_max_len=48, score_batch_tokens=48, overwrite=True))
    for one, other in zip(scores_of(save_path / "train.jsonl"), together, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_two_processes_score_as_one_does(
    config: Callable[..., CompletionsConfig], save_path: Path, root: Path, forks: Forks, embedded_like: Path
) -> None:
    score_completions(config())
    alone = scores_of(save_path / "train.jsonl")
    flags = ["--model_path=x", f"--save_path={save_path}", f"--reward_model={embedded_like}", "--dtype=float32"]
    command = [sys.executable, str(root / "src" / "score_completions.py"), *flags, "--score_max_len=40", "--overwrite=true"]
    ranks = forks.ranks(command, 2)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    for one, other in zip(scores_of(save_path / "train.jsonl"), alone, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert "train: 5 completions" in ranks[0].stdout
    assert ranks[1].stdout == ""
    assert not (save_path / ".score_parts").exists()


def test_a_finished_split_is_skipped_and_a_changed_flag_is_noticed(
    config: Callable[..., CompletionsConfig], save_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score_completions(config(only_test=True))
    assert not (save_path / "train.jsonl").exists()
    before = (save_path / "test.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    score_completions(config())
    printed = capsys.readouterr().out
    assert "test.jsonl: scored already with the same model and flags; skipped" in printed
    assert (save_path / "test.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"dtype \(float32 -> bfloat16\).*--overwrite=true"):
        score_completions(config(dtype="bfloat16"))
    write_rows(save_path / "sampled" / "test.jsonl", ROWS[2:3])
    with pytest.raises(UsageError, match="sampled"):
        score_completions(config())
    score_completions(config(overwrite=True))
    assert [one["prompt_id"] for _, one in read_rows(save_path / "test.jsonl")] == [2]


def test_rows_that_cannot_be_scored_are_set_aside(
    config: Callable[..., CompletionsConfig], save_path: Path, embedded_like: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "reward model with a hole"
    shutil.copytree(embedded_like, folder)
    tokenizer = load_tokenizer(str(folder))
    file = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][tokenizer(" dusk")["input_ids"][0]] = torch.nan
    save_file(tensors, file)
    template = (folder / "chat_template.jinja").read_text()
    bare = "{% if messages[0]['role'] == 'system' %}{{ messages[-1]['content'] }}{% else %}" + template + "{% endif %}"
    (folder / "chat_template.jinja").write_text(bare)
    kept = {"file": "prompts/train.jsonl", "row": 3, "prompt_id": 30, "reason": "longer than --prompt_max_len"}
    write_rows(save_path / "rejects.jsonl", [kept])
    score_completions(config(reward_model=str(folder), score_max_len=28))
    assert [one["prompt_id"] for _, one in read_rows(save_path / "train.jsonl")] == [4]
    rejects = [one for _, one in read_rows(save_path / "rejects.jsonl")]
    assert rejects[0] == kept
    train = [one for one in rejects if one["file"] == "sampled/train.jsonl"]
    assert [(one["row"], one["prompt_id"], one["sample_id"]) for one in train] == [
        (2, 4, 0),
        (3, 2, 0),
        (4, 2, 1),
        (5, 9, 0),
    ]
    assert train[1]["reason"] == train[2]["reason"] == "the gating token pattern is missing"
    assert train[3]["reason"].startswith("longer than --score_max_len=28 (")
    why = json.loads((save_path / "manifest.json").read_text())["score_train"]["counts"]
    assert (why["in"], why["out"], why["dropped"]) == (5, 1, 4)
    shutil.rmtree(folder / "nothing", ignore_errors=True)
    score_completions(config(reward_model=str(folder), score_max_len=500, overwrite=True))
    (nan,) = [
        one for _, one in read_rows(save_path / "rejects.jsonl") if (one["prompt_id"], one["file"][8:]) == (4, "train.jsonl")
    ]
    assert nan["reason"].startswith("the score is not finite (")


def test_nothing_scored_is_an_error(config: Callable[..., CompletionsConfig], save_path: Path) -> None:
    with pytest.raises(DataError, match="not one of 5 completions could be scored; the first: longer than"):
        score_completions(config(score_max_len=3))
    assert not (save_path / "train.jsonl").exists()


def test_save_path_may_be_a_model_folder(config: Callable[..., CompletionsConfig], save_path: Path) -> None:
    (save_path / "config.json").write_text("{}")
    score_completions(config(only_test=True))
    assert (save_path / "config.json").read_text() == "{}"


def test_bad_inputs_are_named(
    config: Callable[..., CompletionsConfig], save_path: Path, embedded_like: Path, published: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="so the longest conversation would not fit a batch"):
        config(score_max_len=500, score_batch_tokens=499)
    with pytest.raises(UsageError, match="reads at most 8192 tokens"):
        score_completions(config(score_max_len=9000, score_batch_tokens=9000))
    with pytest.raises(DataError, match="no such reward model folder"):
        score_completions(config(reward_model=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="no tokenizer"):
        score_completions(config(reward_model=str(published)))
    other = tmp_path / "of another family"
    shutil.copytree(embedded_like, other)
    (other / "chat_template.jinja").write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}")
    with pytest.raises(DataError, match="of another family than the reward model"):
        score_completions(config(reward_model=str(other)))
    sampled = save_path / "sampled" / "test.jsonl"
    write_rows(sampled, [ROWS[0], ROWS[0]])
    with pytest.raises(DataError, match=r"test\.jsonl, row 2: .*repeats \(4, 1\)"):
        score_completions(config())
    sampled.write_text(json.dumps(ROWS[0])[:-20])
    with pytest.raises(DataError, match=r"test\.jsonl, row 1: not a whole JSON object"):
        score_completions(config())
    sampled.unlink()
    with pytest.raises(DataError, match=r"sampled/test\.jsonl: no such file"):
        score_completions(config())


def test_rows_that_the_template_refuses_are_set_aside(
    config: Callable[..., CompletionsConfig], save_path: Path, embedded_like: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "strict"
    shutil.copytree(embedded_like, folder)
    template = folder / "chat_template.jinja"
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    template.write_text(no_system + template.read_text())
    score_completions(config(reward_model=str(folder)))
    assert [one["prompt_id"] for _, one in read_rows(save_path / "train.jsonl")] == [4, 4, 9]
    rejects = [one for _, one in read_rows(save_path / "rejects.jsonl")]
    assert [(one["row"], one["reason"]) for one in rejects] == [
        (3, "the chat template refuses it (no system turns)"),
        (4, "the chat template refuses it (no system turns)"),
    ]
    why = json.loads((save_path / "manifest.json").read_text())["score_train"]["counts"]["why"]
    assert why == {"the chat template refuses it": 2}
    template.write_text("{{ raise_exception('not today') }}")
    with pytest.raises(DataError, match="template refuses a question with its answer"):
        score_completions(config(reward_model=str(folder), overwrite=True))


def test_check_only_needs_no_samples_but_checks_those_there(
    config: Callable[..., CompletionsConfig], save_path: Path, tmp_path: Path
) -> None:
    score_completions(config(check_only=True, save_path=str(tmp_path / "fresh")))
    assert not (tmp_path / "fresh").exists()
    with pytest.raises(DataError, match="no such reward model folder"):
        score_completions(config(check_only=True, save_path=str(tmp_path / "fresh"), reward_model="nowhere"))
    (save_path / "sampled" / "train.jsonl").unlink()
    score_completions(config(check_only=True))
    (save_path / "sampled" / "test.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"test\.jsonl, row 1"):
        score_completions(config(check_only=True))


def test_check_only_loads_no_model_and_writes_nothing(save_path: Path, embedded_like: Path, root: Path) -> None:
    code = (
        "import runpy, sys; sys.modules |= dict.fromkeys(('transformers.modeling_utils', 'drdpo.scoring.armorm')); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    flags = [f"--save_path={save_path}", "--model_path=x", f"--reward_model={embedded_like}", "--check_only=true"]
    command = [sys.executable, "-c", code, str(root / "src" / "score_completions.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"WORLD_SIZE": "8"})
    assert done.returncode == 0, done.stderr
    assert [file.name for file in save_path.iterdir()] == ["sampled"]


def test_a_backbone_that_cannot_be_packed_is_named(
    config: Callable[..., CompletionsConfig], embedded_like: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mistral"
    shutil.copytree(embedded_like, folder)
    written = json.loads((folder / "config.json").read_text()) | {"model_type": "mistral", "sliding_window": 256}
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(DataError, match=r"cannot be scored in packed rows .*sliding_window"):
        score_completions(config(reward_model=str(folder)))


def test_what_attends_is_flash_on_cuda_where_it_serves_the_backbone_and_is_recorded(
    config: Callable[..., CompletionsConfig], save_path: Path, embedded_like: Path, monkeypatch, capsys
) -> None:
    score_completions(config(only_test=True))
    assert json.loads((save_path / "manifest.json").read_text())["score_test"]["attention"] == "sdpa"
    loaded = Scorer(embedded_like, "float32", 100, 100)
    assert loaded.attention == "sdpa" and not loaded.model.flash_attention
    loaded.device = torch.device("cuda")
    capsys.readouterr()
    assert loaded._attend(torch.float32) == "sdpa" and not loaded.model.flash_attention
    assert capsys.readouterr().out == "attention: sdpa instead of flash, because flash attention takes 16-bit numbers only\n"
    monkeypatch.setattr(score, "refusal", lambda settings, device, dtype: None)
    assert loaded._attend(torch.bfloat16) == "flash" and loaded.model.flash_attention


def test_parts_that_a_kill_left_beside_finished_scores_go(config: Callable[..., CompletionsConfig], save_path: Path) -> None:
    score_completions(config())
    scored = (save_path / "train.jsonl").read_bytes()
    left = save_path / ".score_parts" / "train"
    left.mkdir(parents=True)
    (left / "0.jsonl").write_text("{}\n")
    score_completions(config())
    assert not left.parent.exists()
    assert (save_path / "train.jsonl").read_bytes() == scored

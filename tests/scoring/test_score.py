"""Step 1b on a small random reward model: right scores, one process or two, nothing lost, resuming after a kill."""

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
from harness.reward_models import apart

from drdpo.chat import conversation_token_ids, load_tokenizer
from drdpo.config.data import CompletionsConfig
from drdpo.errors import DataError, UsageError
from drdpo.records import Completion, read_records, read_rows, write_rows
from drdpo.scoring import score
from drdpo.scoring.armorm import ArmoRM, load_armorm
from drdpo.scoring.score import Reading, Scorer, score_completions

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
        rewards = apart(model, [ids])
        expected = dict(zip(("kind", "right", "short"), rewards.stage1[0].tolist(), strict=True))
        assert one["scores"] == pytest.approx(expected | {"ArmoRM": rewards.stage2.item()}, abs=1e-4)
    printed = capsys.readouterr().out
    assert "train: 5 completions" in printed
    assert "test: 2 completions" in printed
    mean = sum(one["scores"]["right"] for one in rows) / 5
    assert f"{mean:.4f}" in next(line for line in printed.splitlines() if line.strip().startswith("right"))
    assert sorted(file.name for file in save_path.iterdir()) == [
        "manifest.json", "rejects.jsonl", "sampled", "test.jsonl", "train.jsonl",
    ]  # fmt: skip
    assert [one for _, one in read_rows(save_path / "sampled" / "train.jsonl")] == ROWS
    manifest = json.loads((save_path / "manifest.json").read_text())["score_train"]
    assert (manifest["made_by"]["dtype"], manifest["dtype_reason"]) == ("float32", "asked for by --dtype")
    counts = manifest["counts"]
    assert counts == {"in": 5, "out": 5, "dropped": 0, "why": {}}


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
    assert not list(save_path.glob(".*"))


def test_a_finished_split_is_skipped_and_a_changed_flag_is_noticed(
    config: Callable[..., CompletionsConfig], save_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score_completions(config(only_test=True))
    assert not (save_path / "train.jsonl").exists()
    before = (save_path / "test.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    score_completions(config())
    printed = capsys.readouterr().out
    assert f"{save_path / 'test.jsonl'}: already scored" in printed
    assert (save_path / "test.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"dtype \(float32 -> bfloat16\).*--overwrite=true"):
        score_completions(config(dtype="bfloat16"))
    write_rows(save_path / "sampled" / "test.jsonl", ROWS[2:3])
    with pytest.raises(UsageError, match="sampled"):
        score_completions(config())
    score_completions(config(overwrite=True))
    assert [one["prompt_id"] for _, one in read_rows(save_path / "test.jsonl")] == [2]


def test_completions_that_cannot_be_scored_are_rejects(
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
    kept = {"file": "sampled/other.jsonl", "row": 3, "prompt_id": 30, "sample_id": 0, "reason": "longer"}
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
    with pytest.raises(DataError, match="none of 5 completions could be scored; the first: longer than"):
        score_completions(config(score_max_len=3))
    assert not (save_path / "train.jsonl").exists()


def test_save_path_may_be_a_model_folder(config: Callable[..., CompletionsConfig], save_path: Path) -> None:
    (save_path / "config.json").write_text("{}")
    score_completions(config(only_test=True))
    assert (save_path / "config.json").read_text() == "{}"


def test_bad_inputs_are_named(
    config: Callable[..., CompletionsConfig], save_path: Path, embedded_like: Path, published: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="longest conversation would not fit"):
        config(score_max_len=500, score_batch_tokens=499)
    with pytest.raises(UsageError, match="reads at most 8192 tokens"):
        score_completions(config(score_max_len=9000, score_batch_tokens=9000))
    with pytest.raises(DataError, match="no such reward model folder"):
        score_completions(config(reward_model=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="no tokenizer"):
        score_completions(config(reward_model=str(published)))
    other = tmp_path / "another family"
    shutil.copytree(embedded_like, other)
    (other / "chat_template.jinja").write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}")
    with pytest.raises(DataError, match="does not belong to this reward model"):
        score_completions(config(reward_model=str(other)))
    sampled = save_path / "sampled" / "test.jsonl"
    write_rows(sampled, [ROWS[0], ROWS[0]])
    with pytest.raises(DataError, match=r"test\.jsonl, row 2: .*repeats \(4, 1\)"):
        score_completions(config())
    sampled.unlink()
    with pytest.raises(DataError, match=r"sampled/test\.jsonl: no such file"):
        score_completions(config())


def test_completions_that_the_template_rejects_are_rejects(
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
        (3, "the chat template rejects it (no system turns)"),
        (4, "the chat template rejects it (no system turns)"),
    ]
    why = json.loads((save_path / "manifest.json").read_text())["score_train"]["counts"]["why"]
    assert why == {"the chat template rejects it": 2}
    template.write_text("{{ raise_exception('not today') }}")
    with pytest.raises(DataError, match=r"a question with its answer.* rejects it .not today.;"):
        score_completions(config(reward_model=str(folder), overwrite=True))


def test_check_only_loads_no_model_writes_nothing_and_needs_no_samples_but_checks_those_there(
    config: Callable[..., CompletionsConfig], save_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # and waits for no other process
    monkeypatch.setattr(score, "Scorer", lambda *_: pytest.fail("a model was loaded"))
    score_completions(config(check_only=True, save_path=str(tmp_path / "fresh")))
    assert not (tmp_path / "fresh").exists()
    (save_path / "sampled" / "train.jsonl").unlink()
    score_completions(config(check_only=True))
    assert [file.name for file in save_path.iterdir()] == ["sampled"]
    (save_path / "sampled" / "test.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"test\.jsonl, row 1"):
        score_completions(config(check_only=True))


def test_a_backbone_that_cannot_be_packed_is_named(
    config: Callable[..., CompletionsConfig], embedded_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mistral"
    shutil.copytree(embedded_like, folder)
    written = json.loads((folder / "config.json").read_text()) | {"model_type": "mistral", "sliding_window": 256}
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(UsageError, match=r"--score_max_len=300: .* reads at most 256 tokens"):  # its sliding window
        score_completions(config(reward_model=str(folder), score_max_len=300, check_only=True))
    score_completions(config(reward_model=str(folder), score_max_len=256, check_only=True))

    def capped(*_: Any) -> None:
        raise ValueError("capped logits")

    monkeypatch.setattr(ArmoRM, "score_packed", capped)
    with pytest.raises(DataError, match=r"mistral: its backbone cannot score packed rows \(capped logits\)"):
        score_completions(config(reward_model=str(folder), score_max_len=256))


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
    assert "sdpa instead of flash, because flash attention takes 16-bit" in capsys.readouterr().out
    monkeypatch.setattr(score, "refusal", lambda settings, device, dtype: None)
    assert loaded._attend(torch.bfloat16) == "flash" and loaded.model.flash_attention


def test_parts_that_a_kill_left_beside_finished_scores_are_removed(
    config: Callable[..., CompletionsConfig], save_path: Path
) -> None:
    score_completions(config())
    scored = (save_path / "train.jsonl").read_bytes()
    (save_path / ".train.parts").mkdir()
    score_completions(config())
    assert not (save_path / ".train.parts").exists()
    assert (save_path / "train.jsonl").read_bytes() == scored


def test_only_what_is_missing_is_scored(
    config: Callable[..., CompletionsConfig], save_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    flags, broken = {"score_max_len": 48, "score_batch_tokens": 48}, tmp_path / "broken"
    shutil.copytree(save_path, broken)
    score_completions(config(**flags))
    score, scored, most = Scorer.score, [], 2

    def stopping(self: Scorer, reading: Reading, number: int) -> dict[int, dict[str, Any]]:
        if len(scored) == most:
            raise KeyboardInterrupt
        scored.append((len(reading.batches), number))
        return score(self, reading, number)

    monkeypatch.setattr(Scorer, "score", stopping)
    with pytest.raises(KeyboardInterrupt):
        score_completions(config(save_path=str(broken), **flags))
    part = broken / ".train.parts" / "0.0.jsonl"
    with part.open("ab") as stream:
        stream.write(part.read_bytes().splitlines()[0][:-9])  # a line cut by the kill
    assert not (broken / "train.jsonl").exists()
    most = 100
    score_completions(config(save_path=str(broken), **flags))
    batches = scored[0][0]
    assert batches > 2 and [number for of, number in scored if of == batches] == list(range(batches)), "each once"
    for name in ("train.jsonl", "test.jsonl"):
        assert (broken / name).read_bytes() == (save_path / name).read_bytes()
    assert not (broken / ".train.parts").exists()
    assert "train: resuming; " in capsys.readouterr().out


def test_flushed_denormals_cause_no_warning_of_numpy(root):
    """Libraries that are loaded later ask numpy for the limits of its types."""
    script = (
        "import numpy, torch; from drdpo.scoring.score import use_cpu_well; use_cpu_well(torch.device('cpu')); "
        "print(numpy.finfo(numpy.float32).smallest_subnormal, numpy.finfo(numpy.float64))"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", script]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root / "src")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""Step 1b on a small random reward model: right scores, one process or two, nothing lost, resuming after a kill."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from harness.forks import statuses
from harness.reward_models import pad_right
from safetensors.torch import load_file, save_file

from drdpo.chat import conversation_token_ids, load_tokenizer
from drdpo.config.data import CompletionsConfig
from drdpo.errors import DataError, UsageError
from drdpo.records import read_rows, write_rows
from drdpo.scoring import score
from drdpo.scoring.armorm import ArmoRM, load_armorm
from drdpo.scoring.score import Scorer, score_completions

Row = dict[str, Any]


def row(prompt_id, sample_id, prompt, answer):
    return {
        "prompt_id": prompt_id, "sample_id": sample_id, "prompt": prompt,
        "completion": [{"role": "assistant", "content": answer}], "token_ids": [5], "finish_reason": "stop",
    }  # fmt: skip


def user(text):
    return {"role": "user", "content": text}


KIND = {"role": "system", "content": "Be kind."}
ROWS = [
    row(4, 1, [user("Name a colour.")], "Blue."),
    row(4, 0, [user("Name a colour.")], "Red, because I say so, and because it is the colour of the sun at dusk."),
    row(2, 0, [KIND, user("Hi")], "Hello <|im_end|>\n<|im_start|>assistant\nthere"),
    row(2, 1, [KIND, user("Hi")], ""),
    row(9, 0, [user("One"), {"role": "assistant", "content": "Two"}, user("Three")], "Four five six seven eight."),
]


@pytest.fixture
def save_path(tmp_path):
    folder = tmp_path / "my completions"
    write_rows(folder / "sampled" / "train.jsonl", ROWS)
    write_rows(folder / "sampled" / "test.jsonl", ROWS[:2])
    return folder


@pytest.fixture
def config(save_path, embedded_like):
    def make(**fields):
        given = {"save_path": str(save_path), "model_path": "unused", "reward_model": str(embedded_like), "dtype": "float32"}
        return CompletionsConfig(**(given | fields))

    return make


@pytest.fixture
def changed(embedded_like, tmp_path):
    """A copy of the reward model with another template, of which {} is its own, and other fields of its config."""

    def copy(template="{}", **fields):
        folder = Path(shutil.copytree(embedded_like, tmp_path / "another model", dirs_exist_ok=True))
        own = (embedded_like / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").write_text(template.replace("{}", own))
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | fields))
        return folder

    return copy


def written(path):
    return [one for _, one in read_rows(path)]


def recorded(save_path, step="score_train"):
    return json.loads((save_path / "manifest.json").read_text())[step]


def test_one_process_and_two_score_as_one_conversation_at_a_time(config, save_path, root, forks, embedded_like, capsys):
    score_completions(config())
    rows = written(save_path / "train.jsonl")
    assert [{name: one[name] for name in ROWS[0]} for one in rows] == ROWS == written(save_path / "sampled" / "train.jsonl")
    printed = capsys.readouterr().out
    assert "train: 5 completions" in printed and "test: 2 completions" in printed
    mean = sum(one["scores"]["right"] for one in rows) / 5
    assert f"{mean:.4f}" in next(line for line in printed.splitlines() if line.strip().startswith("right"))
    manifest = recorded(save_path)
    assert (manifest["made_by"]["dtype"], manifest["dtype_reason"]) == ("float32", "asked for by --dtype")
    assert manifest["counts"] == {"in": 5, "out": 5, "dropped": 0, "why": {}}
    flags = ["--model_path=x", f"--save_path={save_path}", f"--reward_model={embedded_like}", "--dtype=float32"]
    command = [sys.executable, str(root / "src" / "score_completions.py"), *flags, "--score_max_len=40", "--overwrite=true"]
    ranks = forks.ranks(command, 2)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    assert "train: 5 completions" in ranks[0].stdout and ranks[1].stdout == ""
    model, tokenizer = load_armorm(embedded_like, "cpu", torch.float32), load_tokenizer(str(embedded_like))
    for one, other in zip(rows, written(save_path / "train.jsonl"), strict=True):
        rewards = model(*pad_right([conversation_token_ids(tokenizer, [*one["prompt"], *one["completion"]])], 0))
        expected = dict(zip(("kind", "right", "short"), rewards.stage1[0].tolist(), strict=True))
        expected["ArmoRM"] = rewards.stage2.item()
        assert one["scores"] == pytest.approx(expected, abs=1e-4) and other["scores"] == pytest.approx(expected, abs=1e-4)
    names = {"manifest.json", "rejects.jsonl", "sampled", "test.jsonl", "train.jsonl"}
    assert {file.name for file in save_path.iterdir()} == names
    # What only rank 0 does, and fails in: it says why, and the other rank, which waits for it, says nothing.
    ranks = forks.ranks([*command, "--score_max_len=1"], 2)
    assert [rank.returncode for rank in ranks] == [1, 1] and ranks[1].stderr == ""
    (line,) = [line for line in ranks[0].stderr.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert "none of 5 completions could be scored" in line
    full = {"folder": f"{save_path}/.train.parts/", "error": "ENOSPC", "call": 1, "rank": 0}
    ranks = forks.start_ranks([*command, "--dtype=bfloat16"], 2, faults=[full])
    assert statuses(ranks) == [1, 1] and ranks[1].said()[1] == ""
    assert "error: the disk is full while writing" in ranks[0].said()[1] and "Traceback" not in ranks[0].said()[1]


def test_a_finished_split_is_skipped_and_a_changed_flag_is_noticed(config, save_path, capsys):
    score_completions(config(only_test=True))
    assert not (save_path / "train.jsonl").exists()
    before = (save_path / "test.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    score_completions(config())
    assert f"{save_path / 'test.jsonl'}: already scored" in capsys.readouterr().out
    assert (save_path / "test.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"dtype \(float32 -> bfloat16\).*--overwrite=true"):
        score_completions(config(dtype="bfloat16"))
    write_rows(save_path / "sampled" / "test.jsonl", ROWS[2:3])
    with pytest.raises(UsageError, match="sampled"):
        score_completions(config())
    score_completions(config(overwrite=True))
    assert [one["prompt_id"] for one in written(save_path / "test.jsonl")] == [2]


def test_completions_that_cannot_be_scored_are_rejects(config, save_path, changed):
    folder = changed("{% if messages[0]['role'] == 'system' %}{{ messages[-1]['content'] }}{% else %}{}{% endif %}")
    file = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][load_tokenizer(str(folder))(" dusk")["input_ids"][0]] = torch.nan
    save_file(tensors, file)
    kept = {"file": "sampled/other.jsonl", "row": 3, "prompt_id": 30, "sample_id": 0, "reason": "longer"}
    write_rows(save_path / "rejects.jsonl", [kept])
    score_completions(config(reward_model=str(folder), score_max_len=28))
    assert [one["prompt_id"] for one in written(save_path / "train.jsonl")] == [4]
    rejects = written(save_path / "rejects.jsonl")
    assert rejects[0] == kept
    train = [one for one in rejects if one["file"] == "sampled/train.jsonl"]
    where = [(one["row"], one["prompt_id"], one["sample_id"]) for one in train]
    assert where == [(2, 4, 0), (3, 2, 0), (4, 2, 1), (5, 9, 0)]
    assert train[1]["reason"] == train[2]["reason"] == "the gating token pattern is missing"
    assert train[3]["reason"].startswith("longer than --score_max_len=28 (")
    counts = recorded(save_path)["counts"]
    assert (counts["in"], counts["out"], counts["dropped"]) == (5, 1, 4)
    score_completions(config(reward_model=str(folder), score_max_len=500, overwrite=True))
    rejects = {(one["file"], one["prompt_id"]): one["reason"] for one in written(save_path / "rejects.jsonl")}
    assert rejects["sampled/train.jsonl", 4].startswith("the score is not finite (")


def test_bad_inputs_are_named(config, save_path, changed, tmp_path):
    with pytest.raises(UsageError, match="longest conversation would not fit"):
        config(score_max_len=500, score_batch_tokens=499)
    with pytest.raises(DataError, match="no such reward model folder"):
        score_completions(config(reward_model=str(tmp_path / "nowhere")))
    other = changed("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}")
    with pytest.raises(DataError, match="does not belong to this reward model"):
        score_completions(config(reward_model=str(other)))
    with pytest.raises(DataError, match="none of 5 completions could be scored; the first: longer than"):
        score_completions(config(score_max_len=3))
    assert not (save_path / "train.jsonl").exists()
    sampled = save_path / "sampled" / "test.jsonl"
    write_rows(sampled, [ROWS[0], ROWS[0]])
    with pytest.raises(DataError, match=r"test\.jsonl, row 2: .*repeats \(4, 1\)"):
        score_completions(config())
    sampled.unlink()
    with pytest.raises(DataError, match=r"sampled/test\.jsonl: no such file"):
        score_completions(config())


def test_completions_that_the_template_rejects_are_rejects(config, save_path, changed):
    strict = changed("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}{}")
    score_completions(config(reward_model=str(strict)))
    assert [one["prompt_id"] for one in written(save_path / "train.jsonl")] == [4, 4, 9]
    why = "the chat template rejects it"
    rejects = [(one["row"], one["reason"]) for one in written(save_path / "rejects.jsonl")]
    assert rejects == [(3, f"{why} (no system turns)"), (4, f"{why} (no system turns)")]
    assert recorded(save_path)["counts"]["why"] == {why: 2}
    with pytest.raises(DataError, match=r"a question with its answer.* rejects it .not today.;"):
        score_completions(config(reward_model=str(changed("{{ raise_exception('not today') }}")), overwrite=True))


def test_check_only_loads_no_model_writes_nothing_and_needs_no_samples_but_checks_those_there(
    config, save_path, tmp_path, monkeypatch
):
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


def test_a_backbone_that_cannot_be_packed_is_named(config, changed, monkeypatch):
    folder = str(changed(model_type="mistral", sliding_window=256))
    with pytest.raises(UsageError, match=r"--score_max_len=300: .* reads at most 256 tokens"):
        score_completions(config(reward_model=folder, score_max_len=300, check_only=True))
    score_completions(config(reward_model=folder, score_max_len=256, check_only=True))
    monkeypatch.setattr(ArmoRM, "score_packed", Mock(side_effect=ValueError("capped logits")))
    with pytest.raises(DataError, match=r"another model: its backbone cannot score packed rows \(capped logits\)"):
        score_completions(config(reward_model=folder, score_max_len=256))


def test_what_attends_is_flash_on_cuda_where_it_serves_the_backbone_and_is_recorded(
    config, save_path, embedded_like, monkeypatch, capsys
):
    score_completions(config(only_test=True))
    assert recorded(save_path, "score_test")["attention"] == "sdpa"
    loaded = Scorer(embedded_like, "float32", 100, 100)
    assert loaded.attention == "sdpa" and not loaded.model.flash_attention
    loaded.device = torch.device("cuda")
    capsys.readouterr()
    assert loaded._attend(torch.float32) == "sdpa" and not loaded.model.flash_attention
    assert "sdpa instead of flash, because flash attention takes 16-bit" in capsys.readouterr().out
    monkeypatch.setattr(score, "refusal", lambda settings, device, dtype: None)
    assert loaded._attend(torch.bfloat16) == "flash" and loaded.model.flash_attention


def test_only_what_is_missing_is_scored(config, save_path, tmp_path, monkeypatch, capsys):
    flags, broken = {"score_max_len": 48, "score_batch_tokens": 48}, tmp_path / "broken"
    shutil.copytree(save_path, broken)
    score_completions(config(**flags))
    score, scored, most = Scorer.score, [], 2

    def stopping(self, reading, number):
        if len(scored) == most:
            raise KeyboardInterrupt
        scored.append((len(reading.batches), number))
        return score(self, reading, number)

    monkeypatch.setattr(Scorer, "score", stopping)
    with pytest.raises(KeyboardInterrupt):
        score_completions(config(save_path=str(broken), **flags))
    parts = broken / ".train.parts"
    with (parts / "0.0.jsonl").open("ab") as stream:
        stream.write((parts / "0.0.jsonl").read_bytes().splitlines()[0][:-9])  # a line cut by the kill
    assert not (broken / "train.jsonl").exists()
    most = 100
    score_completions(config(save_path=str(broken), **flags))
    batches = scored[0][0]
    assert batches > 2 and [number for of, number in scored if of == batches] == list(range(batches)), "each once"
    assert not parts.exists() and "train: resuming; " in capsys.readouterr().out
    parts.mkdir()  # as a kill leaves them beside finished scores
    score_completions(config(save_path=str(broken), **flags))
    assert not parts.exists()
    for name in ("train.jsonl", "test.jsonl"):
        assert (broken / name).read_bytes() == (save_path / name).read_bytes()


def test_flushed_denormals_cause_no_warning_of_numpy():
    """Libraries that are loaded later ask numpy for the limits of its types."""
    script = (
        "import numpy, torch; from drdpo.scoring.score import use_cpu_well; use_cpu_well(torch.device('cpu')); "
        "print(numpy.finfo(numpy.float32).smallest_subnormal, numpy.finfo(numpy.float64))"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

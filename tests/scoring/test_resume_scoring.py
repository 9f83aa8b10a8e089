"""Scoring that is killed: the same command again scores what is missing and ends with the identical file."""

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.forks import Fork, Forks

from drdpo.config import CompletionsConfig
from drdpo.errors import UsageError
from drdpo.records import write_rows
from drdpo.scoring.score import Reading, Scorer, score_completions

PROMPTS, SAMPLES = 60, 3


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": prompt, "sample_id": sample,
            "prompt": [{"role": "user", "content": f"Count to {prompt}, then say why " + "it matters " * (prompt % 7)}],
            "completion": [{"role": "assistant", "content": " ".join(map(str, range(prompt % 11 + 5 * sample)))}],
            "token_ids": [5], "finish_reason": "stop",
        }
        for prompt in range(PROMPTS)
        for sample in range(SAMPLES)
    ]  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, rows: list[dict[str, Any]], embedded_like: Path) -> Callable[..., CompletionsConfig]:
    def make(name: str, **fields: Any) -> CompletionsConfig:
        folder = tmp_path / name
        for split in ("train", "test"):
            if not (folder / "sampled" / f"{split}.jsonl").exists():
                write_rows(folder / "sampled" / f"{split}.jsonl", rows)
        given = {"save_path": str(folder), "model_path": "unused", "reward_model": str(embedded_like), "dtype": "float32"}
        return CompletionsConfig(**(given | {"only_test": True, "score_max_len": 90, "score_batch_tokens": 90} | fields))

    return make


def broken_off_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let scoring stop as by Ctrl-C after so many batches; the list collects which batches are scored."""
    score, scored = Scorer.score, []

    def stopping(self: Scorer, reading: Reading, number: int) -> dict[int, dict[str, Any]]:
        if len(scored) == batches:
            raise KeyboardInterrupt
        scored.append(number)
        return score(self, reading, number)

    monkeypatch.setattr(Scorer, "score", stopping)
    return scored


def test_only_what_is_missing_is_scored(
    config: Callable[..., CompletionsConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    score_completions(config("whole"))
    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        first = broken_off_after(7, patch)
        with pytest.raises(KeyboardInterrupt):
            score_completions(config("broken"))
    part = folder / ".score_parts" / "test" / "0.jsonl"
    with part.open("ab") as stream:
        stream.write(part.read_bytes().splitlines()[0][:-9])  # a line that the kill cut
    assert not (folder / "test.jsonl").exists()
    with monkeypatch.context() as patch:
        second = broken_off_after(10_000, patch)
        score_completions(config("broken"))
    assert len(first) == 7
    assert not set(first) & set(second)
    assert sorted(first + second) == list(range(len(first) + len(second)))
    assert (folder / "test.jsonl").read_bytes() == (tmp_path / "whole" / "test.jsonl").read_bytes()
    assert not (folder / ".score_parts").exists()
    assert "completions are scored already, by a run that was broken off" in capsys.readouterr().out


def test_unfinished_scores_of_other_flags_are_refused_or_dropped(
    config: Callable[..., CompletionsConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_completions(config("whole", dtype="bfloat16"))
    with monkeypatch.context() as patch:
        broken_off_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            score_completions(config("broken"))
    with pytest.raises(UsageError, match=r"unfinished scores made otherwise: dtype \(float32 -> bfloat16\); give "):
        score_completions(config("broken", dtype="bfloat16"))
    with pytest.raises(UsageError, match=r"score_batch_tokens \(90 -> 91\)"):
        score_completions(config("broken", score_batch_tokens=91))
    score_completions(config("broken", dtype="bfloat16", overwrite=True))
    assert (tmp_path / "broken" / "test.jsonl").read_bytes() == (tmp_path / "whole" / "test.jsonl").read_bytes()


def test_another_plan_of_batches_starts_anew(
    config: Callable[..., CompletionsConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_completions(config("whole"))
    with monkeypatch.context() as patch:
        broken_off_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            score_completions(config("broken"))
    plan = tmp_path / "broken" / ".score_parts" / "test" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"batches": "of an older version"}))
    with monkeypatch.context() as patch:
        scored = broken_off_after(10_000, patch)
        score_completions(config("broken"))
    assert scored == list(range(len(scored)))
    assert (tmp_path / "broken" / "test.jsonl").read_bytes() == (tmp_path / "whole" / "test.jsonl").read_bytes()


def run(forks: Forks, root: Path, folder: Path, reward_model: Path, ranks: int) -> list[Fork]:
    flags = [f"--save_path={folder}", "--model_path=x", f"--reward_model={reward_model}", "--dtype=float32"]
    flags += ["--score_max_len=90", "--score_batch_tokens=90"]
    return forks.start_ranks([sys.executable, root / "src" / "score_completions.py", *flags], ranks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks_after", [1, 2])
def test_sigkill_in_the_middle_then_the_same_command(
    ranks_after: int,
    config: Callable[..., CompletionsConfig],
    tmp_path: Path,
    root: Path,
    forks: Forks,
    embedded_like: Path,
) -> None:
    config("whole"), config("killed")
    (whole,) = run(forks, root, tmp_path / "whole", embedded_like, 1)
    (killed,) = run(forks, root, tmp_path / "killed", embedded_like, 1)
    part = tmp_path / "killed" / ".score_parts" / "train" / "0.jsonl"
    deadline = time.monotonic() + 240
    while not (part.is_file() and part.stat().st_size > 0):
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert whole.wait(240) == 0, whole.communicate()
    assert not (tmp_path / "killed" / "test.jsonl").exists(), "it was killed in the middle"
    again = run(forks, root, tmp_path / "killed", embedded_like, ranks_after)
    outputs = [process.communicate(timeout=240) for process in again]
    assert [process.returncode for process in again] == [0] * ranks_after, outputs
    assert "scored already, by a run that was broken off" in outputs[0][0]
    for split in ("train", "test"):
        for name in (f"{split}.jsonl", f"sampled/{split}.jsonl"):
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

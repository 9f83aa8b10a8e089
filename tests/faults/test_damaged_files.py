"""Files that were cut or damaged before a step reads them: one line that names the file, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from drdpo.config.data import CompletionsConfig, PreferencesConfig
from drdpo.config.evaluation import EvaluateConfig
from drdpo.config.training import TrainConfig
from drdpo.errors import DataError
from drdpo.evaluation.compare import evaluate_armorm
from drdpo.pairing import generate_preferences
from drdpo.records import Completion, Preference, Prompt, to_row
from drdpo.sampling.sample import sample_completions
from drdpo.scoring.score import score_completions
from drdpo.training.losses import method_of
from drdpo.training.reference import stored_logprobs
from drdpo.training.run import check_inputs

QUESTION = [{"role": "user", "content": "Why is it late, and how late is it?"}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def completion(row: int) -> Completion:
    said = answer(f"It rained over {row} hills, so the train stood.")
    return Completion(row // 2, row % 2, QUESTION, said, [5], "stop", {"ArmoRM": 0.5 * row})


def write(folder: Path, step: Callable[..., None], cut: str = "") -> Path:
    """Both splits; the second line of one of them cut in two by a line feed. Returns that one's file."""
    folder = folder / "sampled" if step is score else folder
    for split in ("train", "test"):
        lines = [json.dumps(to_row(READERS[step](row))) for row in range(4)]
        if split == cut:
            middle = len(lines[1]) // 2
            lines[1] = lines[1][:middle] + "\n" + lines[1][middle:]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder / f"{cut}.jsonl"


def sample(given: Path, out: Path, model: Path, reward_model: Path) -> None:
    sample_completions(CompletionsConfig(str(out), str(model), dataset=str(given), engine="transformers", dtype="float32"))


def score(given: Path, out: Path, model: Path, reward_model: Path) -> None:
    flags = {"reward_model": str(reward_model), "dtype": "float32", "score_max_len": 128}
    score_completions(CompletionsConfig(str(given), "unused", **flags))


def pair(given: Path, out: Path, model: Path, reward_model: Path) -> None:
    generate_preferences(PreferencesConfig(completions=str(given), output_path=str(out), ArmoRM=1.0))


def train(given: Path, out: Path, model: Path, reward_model: Path) -> None:
    config = TrainConfig(str(model), str(given), str(out), train_batch_size=2, micro_batch_size=1)
    check_inputs(config, method_of(config))


def evaluate(given: Path, out: Path, model: Path, reward_model: Path) -> None:
    evaluate_armorm(EvaluateConfig([f"base={given}"], str(out)))


READERS = {
    sample: lambda row: Prompt(row, QUESTION), score: completion, pair: completion,
    train: lambda row: Preference(row, QUESTION, answer("It rained."), answer("No.")), evaluate: completion,
}  # fmt: skip
"""Step -> a record that it reads."""
SPLITS_READ = [(step, split) for step in READERS for split in ("train", "test") if (step, split) != (evaluate, "train")]


@pytest.mark.parametrize(("step", "split"), SPLITS_READ)
def test_a_line_cut_in_two_is_refused_and_nothing_is_written(step, split, tiny_policy, fault_reward_model, tmp_path):
    cut = write(tmp_path / "given", step, split)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"row 2: not a whole JSON object") as refused:
        step(tmp_path / "given", tmp_path / "out", tiny_policy, fault_reward_model)
    assert str(cut) in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def header_length(content: bytes) -> int:
    return int.from_bytes(content[:8], "little")


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut in the header": lambda content: content[: header_length(content) // 2],
    "cut in half": lambda content: content[: len(content) // 2],
    "last byte missing": lambda content: content[:-1],
    "a byte too many": lambda content: content + b"\0",
    "length of the header": lambda content: (2**62).to_bytes(8, "little") + content[8:],
    "text of the header": lambda content: content[:8] + b"\xff" * 40 + content[48:],
    "header is a list": lambda content: (
        content[:8] + b"[]".ljust(header_length(content)) + content[8 + header_length(content) :]
    ),
}  # fmt: skip


@pytest.fixture(params=DAMAGES)
def damage(request) -> Callable[[bytes], bytes]:
    return DAMAGES[request.param]


@pytest.mark.parametrize("step", [sample, train, score])
def test_a_damaged_model_is_refused(step, damage, tiny_policy, fault_reward_model, tmp_path):
    model = shutil.copytree(fault_reward_model if step is score else tiny_policy, tmp_path / "model")
    file = model / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    write(tmp_path / "given", step)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"model\.safetensors: (cut short|its header is damaged|has \d+ bytes)"):
        step(tmp_path / "given", tmp_path / "out", model, model)
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_or_incomplete_reference_log_probs_are_refused(damage, tmp_path):
    path = tmp_path / "reference_train.safetensors"
    save_file({"logprobs": torch.tensor([[1.0, 2.0], [3.0, torch.nan]])}, path, metadata={"key": "key"})
    with pytest.raises(DataError, match=r"reference_train\.safetensors.* incomplete"):
        stored_logprobs(path, "key", (2, 2), pytest.fail, "-")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"reference_train\.safetensors: not a readable safetensors file .*; delete it"):
        stored_logprobs(path, "key", (2, 2), pytest.fail, "-")


def test_a_cut_manifest_and_cut_rejects_are_named(fault_reward_model, tmp_path):
    write(tmp_path, score)
    done = json.dumps(to_row(completion(0))) + "\n"
    (tmp_path / "test.jsonl").write_text(done)
    (tmp_path / "manifest.json").write_text('{"score_test": {"made_')
    with pytest.raises(DataError, match=r"manifest\.json: not JSON .*delete it"):
        score(tmp_path, tmp_path, tmp_path, fault_reward_model)
    assert (tmp_path / "test.jsonl").read_text() == done
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "rejects.jsonl").write_text('{"file": "prompts/te')
    with pytest.raises(DataError, match=r"rejects\.jsonl, row 1: not a whole JSON object"):
        score(tmp_path, tmp_path, tmp_path, fault_reward_model)

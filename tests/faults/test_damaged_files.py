"""Files that were cut or damaged before a step reads them: one line that names the file, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from drdpo.config.data import CompletionsConfig, PreferencesConfig
from drdpo.config.evaluation import EvaluateConfig
from drdpo.config.training import TrainConfig
from drdpo.errors import DataError
from drdpo.evaluation.compare import evaluate_armorm
from drdpo.pairing import generate_preferences
from drdpo.sampling.sample import sample_completions
from drdpo.scoring.score import score_completions
from drdpo.training.losses import method_of
from drdpo.training.reference import stored_logprobs
from drdpo.training.run import check_inputs


def check_training(config: TrainConfig) -> None:
    check_inputs(config, method_of(config))


MESSAGES = {
    "prompt": [{"role": "user", "content": "Why is it late, and how late is it?"}],
    "completion": [],
    "chosen": [{"role": "assistant", "content": "It rained."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


def rows_of(*fields: str) -> list[dict[str, Any]]:
    """Four records with messages of these names: four prompts, or two completions of two."""
    rows = []
    for row in range(4):
        messages = {name: MESSAGES[name] for name in fields}
        if "completion" in fields:
            messages["completion"] = [{"role": "assistant", "content": f"It rained over {row} hills, so the train stood."}]
            scored = {"token_ids": [5], "finish_reason": "stop", "scores": {"ArmoRM": 0.5 * row}}
            rows.append({"prompt_id": row // 2, "sample_id": row % 2, **messages, **scored})
        else:
            rows.append({"prompt_id": row, **messages})
    return rows


def write_cut(folder: Path, split: str, rows: list[dict[str, Any]]) -> Path:
    """Both splits, whole; then the second line of one of them cut in two by a line feed. Returns its file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [json.dumps(row) for row in rows]
    middle = len(lines[1]) // 2
    lines[1] = lines[1][:middle] + "\n" + lines[1][middle:]
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder / f"{split}.jsonl"


def sample(model: Path, given: Path, out: Path) -> None:
    sample_completions(CompletionsConfig(str(out), str(model), dataset=str(given), engine="transformers", dtype="float32"))


def score(reward_model: Path, out: Path) -> None:
    score_completions(
        CompletionsConfig(str(out), "unused", reward_model=str(reward_model), dtype="float32", score_max_len=128)
    )


READERS: dict[str, tuple[tuple[str, ...], str, Callable[[Path, Path, Path, Path], None]]] = {
    # name: (messages of a record, subfolder of `given`, the step)
    "sample": (("prompt",), "", lambda given, out, model, _: sample(model, given, out)),
    "score": (("prompt", "completion"), "sampled", lambda given, out, _, reward_model: score(reward_model, given)),
    "pair": (
        ("prompt", "completion"), "", lambda given, out, *_: generate_preferences(
            PreferencesConfig(completions=str(given), output_path=str(out), ArmoRM=1.0)
        ),
    ),
    "train": (
        ("prompt", "chosen", "rejected"), "", lambda given, out, model, _: check_training(
            TrainConfig(str(model), str(given), str(out), train_batch_size=2, micro_batch_size=1)
        ),
    ),
    "evaluate": (
        ("prompt", "completion"), "",
        lambda given, out, *_: evaluate_armorm(EvaluateConfig([f"base={given}"], str(out))),
    ),
}  # fmt: skip


SPLITS_READ = [(name, split) for name in READERS for split in ("train", "test") if (name, split) != ("evaluate", "train")]


@pytest.mark.parametrize(("name", "split"), SPLITS_READ)
def test_a_line_cut_in_two_is_refused_and_nothing_is_written(name, split, tiny_policy, fault_reward_model, tmp_path):
    fields, below, step = READERS[name]
    cut = write_cut(tmp_path / "given" / below, split, rows_of(*fields))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"row 2: not a whole JSON object") as refused:
        step(tmp_path / "given", tmp_path / "out", tiny_policy, fault_reward_model)
    assert str(cut) in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def cut_to(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(share * len(content))]


def header_length(content: bytes) -> int:
    return int.from_bytes(content[:8], "little")


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut in the header": lambda content: content[: header_length(content) // 2],
    "cut in half": cut_to(0.5),
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


def damaged(model: Path, target: Path, damage: Callable[[bytes], bytes]) -> Path:
    shutil.copytree(model, target)
    file = target / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    return target


def test_a_damaged_checkpoint_is_refused_as_model_path(damage, tiny_policy, tmp_path):
    model = damaged(tiny_policy, tmp_path / "model", damage)
    for name in ("sample", "train"):
        fields, _, step = READERS[name]
        folder = tmp_path / name
        write_cut(folder, "test", rows_of(*fields))
        (folder / "test.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
        with pytest.raises(DataError, match=r"model\.safetensors: (cut short|its header is damaged|has \d+ bytes)"):
            step(folder, tmp_path / "out", model, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_damaged_reward_model_is_refused(damage, fault_reward_model, tmp_path):
    model = damaged(fault_reward_model, tmp_path / "model", damage)
    fields, below, step = READERS["score"]
    write_cut(tmp_path / "given" / below, "test", rows_of(*fields))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"model\.safetensors"):
        step(tmp_path / "given", tmp_path / "out", tmp_path, model)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_reference_file_is_refused(damage, tmp_path):
    path = tmp_path / "reference_train.safetensors"
    stored_logprobs(path, "key", (3, 2), lambda: torch.arange(6.0).view(3, 2), "-")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"reference_train\.safetensors: not a readable safetensors file .*; delete it"):
        stored_logprobs(path, "key", (3, 2), pytest.fail, "-")


def test_reference_log_probs_with_holes_are_refused(tmp_path):
    path = tmp_path / "reference_train.safetensors"
    save_file({"logprobs": torch.tensor([[1.0, 2.0], [3.0, torch.nan]])}, path, metadata={"key": "key"})
    with pytest.raises(DataError, match=r"reference_train\.safetensors.* incomplete"):
        stored_logprobs(path, "key", (2, 2), pytest.fail, "-")


def test_a_cut_manifest_and_cut_rejects_are_named(fault_reward_model, tmp_path):
    fields, below, step = READERS["score"]
    write_cut(tmp_path / below, "test", rows_of(*fields))
    (tmp_path / below / "test.jsonl").write_bytes((tmp_path / below / "train.jsonl").read_bytes())
    rows = rows_of(*fields)
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "manifest.json").write_text('{"score_test": {"made_')
    with pytest.raises(DataError, match=r"manifest\.json: not JSON .*delete it"):
        step(tmp_path, tmp_path, tmp_path, fault_reward_model)
    assert (tmp_path / "test.jsonl").read_text() == json.dumps(rows[0]) + "\n"
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "rejects.jsonl").write_text('{"file": "prompts/te')
    with pytest.raises(DataError, match=r"rejects\.jsonl, row 1: not a whole JSON object"):
        step(tmp_path, tmp_path, tmp_path, fault_reward_model)

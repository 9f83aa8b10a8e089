"""Bad pairs and bad caches through the real command: one line, the right exit status, nothing saved over what was good."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.runs import refuse, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from drdpo import chat
from drdpo.records import write_rows
from drdpo.training.data import step_indices

pytestmark = pytest.mark.slow

PROMPT = "name the colour of the sky"
Command = Callable[..., Any]


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def row(number: int, chosen: str, rejected: str, prompt: str = PROMPT, **ids: list[int]) -> dict:
    return {"prompt_id": number, "prompt": said("user", prompt), "chosen": said("assistant", chosen),
            "rejected": said("assistant", rejected), "chosen_score": 1.0, "rejected_score": 0.0, **ids}  # fmt: skip


def written(folder: Path, train: list[dict], test: list[dict] | None = None) -> Path:
    folder.mkdir(parents=True)
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "test.jsonl", test or train)
    return folder


GOOD = [row(70 + number, f"blue {number}", f"the sky is green, {number} times") for number in range(4)]


@pytest.fixture(scope="module")
def command(forks) -> Command:
    """src/train_alignment.py on one process, for two steps."""
    usual = {"dtype": "float32", "train_batch_size": 2, "micro_batch_size": 1, "learning_rate": 1e-3, "beta": 0.5,
             "max_steps": 2, "save_steps": 1, "warmup_ratio": 0}  # fmt: skip

    def run(model: Path, data: Path, save: Path, **flags):
        return train(forks, {"model_path": model, "dataset_path": data, "save_path": save, **usual, **flags})

    return run


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("pairs") / "good", GOOD)


@pytest.fixture(scope="module")
def finished(command, tiny_policy, good, tmp_path_factory) -> Path:
    """Two steps on good pairs."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    done = command(tiny_policy, good, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def key_of(path: Path) -> str:
    with safe_open(path, framework="pt") as stored:
        return stored.metadata()["key"]


def tampered(source: Path, save: Path, change: Callable[[torch.Tensor], None]) -> None:
    """A run's reference log-probs, changed under their right key, in the folder of a run to come."""
    save.mkdir(parents=True)
    shutil.copy(source / "reference_test.safetensors", save)
    path = source / "reference_train.safetensors"
    logprobs_M2 = load_file(path)["logprobs"]
    change(logprobs_M2)
    save_file({"logprobs": logprobs_M2}, save / path.name, metadata={"key": key_of(path)})


def test_unusable_pairs_are_omitted_counted_and_reported(command, tiny_policy, tmp_path):
    tokenizer = chat.load_tokenizer(str(tiny_policy))
    longest = len(chat.prompt_token_ids(tokenizer, said("user", PROMPT))) + 10
    rows = [
        *GOOD[:2],
        row(1, "blue " * 50, "green"),  # cut to ten tokens, the prompt kept
        row(2, "blue " * 50 + "x", "blue " * 50 + "y"),  # equal once they are cut
        row(3, "blue", "green", prompt="sky " * 60),  # no room for an answer
        row(4, "", "green", chosen_token_ids=[]),  # nothing was sampled
    ]
    data, out = written(tmp_path / "data", rows, GOOD), tmp_path / "out"
    done = command(tiny_policy, data, out, max_len=longest, max_steps=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train: 3 of 6 pairs (1 prompt too long, 1 empty answer, 1 equal answers, " in done.stdout
    counts = json.loads((out / "manifest.json").read_text())["train"]["counts"]["train"]
    assert {name: count for name, count in counts.items() if name not in ("text encoded", "answer cut")} == {
        "in": 6, "out": 3, "prompt too long": 1, "template refuses": 0, "empty answer": 1, "equal answers": 1,
    }  # fmt: skip
    # Of the third row one answer, of the fourth both; of the first two rows none.
    assert counts["answer cut"] == 3
    assert json.loads((out / "metrics.jsonl").read_text())["loss"] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize(
    ("test", "flags", "words"),
    [(GOOD, {"max_len": 5}, "train pairs of 4 (4 prompt too long), fewer than"),
     ([row(1, "blue", " blue ")], {}, "test pairs of 1 (1 equal answers")],
)  # fmt: skip
def test_no_pair_left_ends_in_one_line(test, flags, words, command, tiny_policy, tmp_path):
    data = written(tmp_path / "data", GOOD, test)
    refuse(command(tiny_policy, data, tmp_path / "out", **flags), 1, str(data), f"0 usable {words}")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_names_its_pair_and_keeps_the_checkpoint_before(
    command, tiny_policy, good, finished, tmp_path
):
    """A margin beyond float32 in one pair of the second step, by way of its reference."""
    out, index = tmp_path / "out", step_indices(4, 2, 42, 1)[0]

    tampered(finished, out, lambda logprobs_M2: logprobs_M2[index].copy_(torch.tensor([3e38, -3e38])))
    refuse(command(tiny_policy, good, out), 1, "step 2: ", f"prompt_id {GOOD[index]['prompt_id']};")
    assert sorted(path.name for path in out.glob("global_step_*")) == ["global_step_1"]
    ours, theirs = (load_file(folder / "global_step_1" / "model.safetensors") for folder in (out, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [path.name for path in (out / "resume").glob("step_*")] == ["step_1"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1


def test_reference_log_probs_that_give_another_first_loss_are_refused(command, tiny_policy, good, finished, tmp_path):
    out = tmp_path / "out"
    tampered(finished, out, lambda logprobs_M2: logprobs_M2[:, 0].add_(0.1))
    refuse(command(tiny_policy, good, out), 1, "0.7185, not 0.6931", "reference_train.safetensors", "--resume=never")
    assert not list(out.glob("global_step_*")) and not (out / "resume").exists()
    done = command(tiny_policy, good, out, resume="never")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("what", ["data", "model", "dtype", "max_len", "attention"])
def test_reference_log_probs_of_another_config_are_never_used(what, command, tiny_policy, good, finished, tmp_path):
    """In the same folder the run is refused; elsewhere they are computed again."""
    model, data, flags = tiny_policy, good, {}
    if what == "data":
        data = written(tmp_path / "data", [*GOOD[:3], row(99, "blue", "grey")], GOOD)
    elif what == "model":
        model = tmp_path / "model"
        shutil.copytree(tiny_policy, model)
        weights = load_file(model / "model.safetensors")
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    elif what == "max_len":
        tokenizer = chat.load_tokenizer(str(tiny_policy))
        flags = {"max_len": len(chat.prompt_token_ids(tokenizer, said("user", PROMPT))) + 4}
    else:
        flags = {"dtype": "bfloat16"} if what == "dtype" else {"attn": "eager", "packing": False}
    name = {"attention": "attn", "data": "dataset_path"}.get(what, what)
    refuse(command(model, data, finished, **flags), 2, f"{name} (")
    out, path = tmp_path / "out", "reference_train.safetensors"
    tampered(finished, out, lambda logprobs_M2: logprobs_M2.add_(torch.tensor([5.0, 0.0])))
    done = command(model, data, out, max_steps=1, **flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "metrics.jsonl").read_text())["loss"] == pytest.approx(0.6931, abs=2e-3)
    assert key_of(out / path) != key_of(finished / path)


def test_changed_rows_in_the_same_folder_are_refused(command, tiny_policy, tmp_path):
    data, out = written(tmp_path / "data", GOOD), tmp_path / "out"
    assert command(tiny_policy, data, out, max_steps=1).returncode == 0
    shutil.rmtree(data)
    written(data, [*GOOD[:3], row(99, "blue", "grey")], GOOD)
    refuse(command(tiny_policy, data, out, max_steps=1), 2, "pairs (")

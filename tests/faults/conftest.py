"""One pipeline on tiny random models and its undisturbed results."""

import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness.forks import Forks
from harness.reward_models import write_embedded_like
from harness.steps import STEPS, Step, contents

WORDS = ("rain", "a cat", "the sky", "two and two", "old towns", "a mat", "stone", "rivers", "hills", "why it is late")


class Undisturbed(NamedTuple):
    """What a step leaves that nobody disturbs, how long it takes, and how often it changes its folder."""

    folder: Path
    contents: dict[str, Any]
    seconds: float
    changes: int


@pytest.fixture(scope="session")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults of steps")


@pytest.fixture(scope="session")
def fault_reward_model(smollm: Path, room: Path) -> Path:
    """A random reward model with the embedded model's tokenizer."""
    return write_embedded_like(room / "reward model", smollm, ["kind", "right"], shards=1)


@pytest.fixture(scope="session")
def fault_prompts(room: Path) -> Path:
    folder = room / "prompts"
    folder.mkdir()
    for split, count in (("train", 24), ("test", 12)):
        rows = [
            {"prompt_id": row, "prompt": [{"role": "user", "content": f"Say {row} words of {WORDS[row % len(WORDS)]}."}]}
            for row in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def steps(root: Path, room: Path, tiny_policy: Path, fault_reward_model: Path, fault_prompts: Path) -> dict[str, Step]:
    """Every step; each reads what the undisturbed one before it left in `room`/<name>."""
    src, results = root / "src", room / "undisturbed"
    out = {name: room / f"out of {name}" for name in STEPS}
    completions = (f"--model_path={tiny_policy}", f"--reward_model={fault_reward_model}", "--dtype=float32")
    training = (
        "--train_batch_size=4", "--micro_batch_size=4", "--max_steps=4", "--eval_steps=2", "--save_steps=1", "--beta=0.1",
        "--dtype=float32", "--learning_rate=1e-3", "--gradient_checkpointing=false",
    )  # fmt: skip
    return {
        "sample": Step(
            "sample", src / "generate_completions.py",
            (f"--save_path={out['sample']}", *completions, f"--dataset={fault_prompts}", "--best_of_n=4",
             "--temperature=1.0", "--max_new_tokens=6", "--engine=transformers"),
            out["sample"], settings={"drdpo.sampling.sample:CPU_BLOCK": 16},
        ),
        "score": Step(
            "score", src / "score_completions.py",
            (f"--save_path={out['score']}", *completions, "--score_max_len=128", "--score_batch_tokens=200"),
            out["score"], given=results / "sample",
        ),
        "pair": Step(
            "pair", src / "generate_preferences.py",
            (f"--completions={results / 'score'}", f"--output_path={out['pair']}", "--ArmoRM=1.0"), out["pair"],
        ),
        "train": Step(
            "train", src / "train_alignment.py",
            (f"--model_path={tiny_policy}", f"--dataset_path={results / 'pair'}", f"--save_path={out['train']}", *training),
            out["train"],
        ),
        "evaluate": Step(
            "evaluate", src / "evaluate_armorm.py",
            ("--runs", f"base={results / 'score'}", f"other={results / 'score'}", f"--output_path={out['evaluate']}",
             "--bootstrap=100"),
            out["evaluate"],
        ),
    }  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(forks: Forks, steps: dict[str, Step], room: Path) -> Any:
    """A step's undisturbed run, made with those before it when it is first asked for."""
    made: dict[str, Undisturbed] = {}
    needs = {"score": "sample", "pair": "score", "train": "pair", "evaluate": "score"}

    def run(name: str) -> Undisturbed:
        if name in needs:
            run(needs[name])
        if name not in made:
            step = steps[name]
            step.prepare()
            started = time.monotonic()
            status, said = step.run(forks)
            assert status == 0, said
            seconds, folder = time.monotonic() - started, room / "undisturbed" / name
            shutil.copytree(step.out, folder)
            made[name] = Undisturbed(folder, contents(folder), seconds, step.changes())
        return made[name]

    return run

"""One pipeline on tiny random models and its undisturbed results."""

import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness.forks import Forks
from harness.reward_models import write_embedded_like
from harness.steps import Step, contents

from drdpo.records import Prompt, write_records

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
def steps(root: Path, room: Path, tiny_policy: Path, fault_reward_model: Path) -> dict[str, Step]:
    """Every step; each reads what the undisturbed one before it left in `room`/<name>."""
    for split, count in (("train", 24), ("test", 12)):
        said = [f"Say {row} words of {WORDS[row % len(WORDS)]}." for row in range(count)]
        prompts = [Prompt(row, [{"role": "user", "content": text}]) for row, text in enumerate(said)]
        write_records(room / "prompts" / f"{split}.jsonl", prompts)
    done = room / "undisturbed"
    models = f"--model_path={tiny_policy}", f"--reward_model={fault_reward_model}", "--dtype=float32"

    def step(name: str, script: str, place: str, *flags: str, words: str = "", **more: Any) -> Step:
        out = room / f"out of {name}"
        return Step(name, root / "src" / f"{script}.py", (f"--{place}={out}", *words.split(), *flags), out, **more)

    steps = [
        step("sample", "generate_completions", "save_path", *models, f"--dataset={room / 'prompts'}",
             words="--best_of_n=4 --temperature=1.0 --max_new_tokens=6 --engine=transformers",
             settings={"drdpo.sampling.sample:CPU_BLOCK": 16}),
        step("score", "score_completions", "save_path", *models, words="--score_max_len=128 --score_batch_tokens=200",
             given=done / "sample"),
        step("pair", "generate_preferences", "output_path", f"--completions={done / 'score'}", "--ArmoRM=1.0"),
        step("train", "train_alignment", "save_path", f"--model_path={tiny_policy}", f"--dataset_path={done / 'pair'}",
             words="--train_batch_size=4 --micro_batch_size=4 --max_steps=4 --eval_steps=2 --save_steps=1 --beta=0.1 "
                   "--dtype=float32 --learning_rate=1e-3 --gradient_checkpointing=false"),
        step("evaluate", "evaluate_armorm", "output_path", f"base={done / 'score'}", f"other={done / 'score'}",
             words="--bootstrap=100 --runs"),
    ]  # fmt: skip
    return {step.name: step for step in steps}


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

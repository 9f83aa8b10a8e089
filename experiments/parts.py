"""What the experiments share: flags, commands, and parts that run in turn, or with --slurm as jobs.

A job waits for those of the parts that it needs and runs its experiment again with --part=NAME. Every command skips what it
finished before, so a rerun continues.
"""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from drdpo.cli import flag, parse, require
from drdpo.errors import STOPPED, DataError, one_line_errors

ROOT = Path(__file__).absolute().parents[1]
Command = list[str]


@dataclass(frozen=True)
class Experiment:
    """The flags of every experiment; a text of several values has spaces between them."""

    output_path: str = flag("folder of everything", "outputs/experiment")
    slurm: bool = flag("submit a job per part, with dependencies", False)
    sbatch: str = flag("options of the jobs", "--gres=gpu:8 --cpus-per-task=64 --time=24:00:00")
    part: str | None = flag("run this part alone, as a job does", None)

    def given(self, names: str) -> Command:
        """--NAME=VALUE of every flag of these that has a value."""
        return [f"--{name}={getattr(self, name)}" for name in names.split() if getattr(self, name) is not None]


@dataclass(frozen=True)
class SampledExperiment(Experiment):
    """Flags of those that sample and score completions, with the paper's settings."""

    model_path: str | None = flag("policy, a Hugging Face folder or hub id", f"{ROOT}/models/Llama1b")
    reward_model: str = flag("ArmoRM, or a model of its layout", f"{ROOT}/models/ArmoRM")
    dataset: str = flag("prompts", f"{ROOT}/datasets/helpsteer2_prompts")
    best_of_n: int = flag("answers of a prompt", 2)
    temperature: float = flag("of their sampling", 0.7)
    max_new_tokens: int = flag("longest answer in tokens", 1024)
    prompt_max_len: int = flag("longest prompt in tokens", 1024)
    prompts: int | None = flag("sample at most this many prompts per split", None)
    beta: float = flag("KL penalty coefficient", 0.01)
    learning_rate: float = flag("of AdamW", 5e-7)
    train_batch_size: int = flag("pairs of an optimizer step", 128)
    tiny: bool = flag("run on the embedded models at small sizes: no GPU, no hub", False)

    def sample(self, folder: Path | str, model: str, *flags: str) -> Command:
        """Sample and score completions."""
        limit = [] if self.prompts is None else [f"--max_prompts={self.prompts}"]
        shared = self.given("dataset reward_model max_new_tokens prompt_max_len")
        return wrapper("generate_completions.sh", f"--save_path={folder}", f"--model_path={model}", *shared, *flags, *limit)

    def train(self, folder: Path, model: str, pairs: Path, seed: str | int, method: str) -> Command:
        """Train by METHOD or METHOD=STRENGTH at the paper's settings."""
        name, _, strength = method.partition("=")
        flags = self.given("beta learning_rate train_batch_size max_epochs max_len")
        flags += {"DPO": [], "KLDPO": [f"--kldpo_tau={strength}"], "WDPO": [f"--wdpo_rho={strength}"]}[name]
        if self.tiny:
            flags += ["--micro_batch_size=2", "--gradient_checkpointing=false", "--save_resume=false"]
        paths = f"--model_path={model}", f"--dataset_path={pairs}", f"--save_path={folder}"
        return wrapper("train_alignment.sh", *paths, f"--seed={seed}", *flags)


TINY = [
    f"--model_path={ROOT}/models/SmolLM2-135M", f"--reward_model={ROOT}/models/ArmoRM-SmolLM2",
    f"--dataset={ROOT}/datasets/embedded_prompts", "--max_new_tokens=32", "--prompt_max_len=256", "--prompts=16",
    "--beta=0.1", "--learning_rate=2e-5", "--train_batch_size=4", "--max_epochs=1", "--max_len=512",
]  # fmt: skip
"""Of the paper's experiments."""
Config = TypeVar("Config", bound=Experiment)


class Part(NamedTuple):
    name: str
    needs: list[str]
    """Names of the parts that must end before this one begins."""
    commands: Iterable[Command | Callable[[], object]]
    """Or functions. Each is run before the next is asked for, so that one can depend on files of those before it."""


def wrapper(name: str, *flags: str) -> Command:
    return ["bash", str(ROOT / name), *flags]


def step(name: str, *flags: str) -> Command:
    return [sys.executable, str(ROOT / "src" / name), *flags]


def borrow(folder: Path, lenders: Iterable[Path]) -> None:
    """Link the reference's log-probs of other runs into a run's folder if that is new; one that continues has its own. A
    file that does not match is ignored."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for path in (path for lender in lenders for path in lender.glob("reference_*.safetensors")):
            with suppress(OSError):  # It is there already, or cannot be linked.
                (folder / path.name).hardlink_to(path)


def checkpoint(folder: Path, number: str) -> Path:
    """The checkpoint of a step, or the last one for "last"."""
    steps = [path.name.removeprefix("global_step_") for path in folder.glob("global_step_*")]
    steps = sorted(filter(str.isdecimal, steps), key=int)  # A user's folder, e.g. global_step_316_merged, is none.
    chosen = steps[-1] if number == "last" and steps else number
    if chosen not in steps:
        raise DataError(f"{folder} has no checkpoint of step {number}; found: {', '.join(steps) or 'none'}")
    return folder / f"global_step_{chosen}"


def run_experiment(
    config_class: type[Config], parts_of: Callable[[Config, Command], Iterable[Part]], tiny: Iterable[str] = ()
) -> None:
    """Run the parts, or one of them, or submit them; what follows "--" on the command line goes to the trainings.

    Args:
        tiny: the flags that --tiny sets.
    """
    words, started = sys.argv[1:], time.monotonic()
    end = words.index("--") if "--" in words else len(words)
    with one_line_errors():
        small = not {"--tiny", "--tiny=true"}.isdisjoint(words[:end])
        config = parse(config_class, str(config_class.__doc__), [*(tiny if small else ()), *words[:end]])
        require(small == getattr(config, "tiny", False), "--tiny: pass true or false")
        parts = list(parts_of(config, words[end + 1 :]))
        if config.part is not None:
            parts = [part for part in parts if part.name == config.part]
            require(bool(parts), f"--part={config.part}: no such part")
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, _pass_on)
        elif config.slurm:
            require(bool(shutil.which("sbatch")), "--slurm: sbatch is not installed; omit it to run here")
        if small and config.part is None:
            _run(wrapper("setup.sh", "--models=embedded", "--datasets=embedded"))
        if config.slurm and config.part is None:
            _submit(config, parts)
            return
        for part in parts:
            print(f"\n== {part.name} ({time.monotonic() - started:.0f} s)", flush=True)
            for command in part.commands:
                command() if callable(command) else _run(command)


def _submit(config: Experiment, parts: list[Part]) -> None:
    logs = Path(config.output_path) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    jobs: dict[str, str] = {}
    for part in parts:
        words = ["bash", str(Path(sys.argv[0]).absolute().with_suffix(".sh")), f"--part={part.name}", *sys.argv[1:]]
        after = [f"--dependency=afterok:{':'.join(jobs[need] for need in part.needs)}"] if part.needs else []
        options = ["--parsable", f"--job-name=drdpo-{part.name.replace('/', '-')}", "--nodes=1", "--requeue",
                   "--signal=B:USR1@300", "--open-mode=append", f"--output={logs}/%x-%j.log", *after,
                   *shlex.split(config.sbatch), "--wrap", f"exec {shlex.join(words)}"]  # fmt: skip
        done = subprocess.run(["sbatch", *options], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        jobs[part.name] = done.stdout.strip().partition(";")[0]
        print(f"submitted {jobs[part.name]}: {part.name}{', after ' + ' '.join(part.needs) if part.needs else ''}")
    print(f"after the last job, the results are in {config.output_path}")


_children: list[subprocess.Popen[bytes]] = []
_signals: list[int] = []


def _pass_on(number: int, _: object) -> None:
    """A job's signal goes on to the command that runs; none begins after it."""
    _signals.append(number)
    for child in _children:
        child.send_signal(number)


def _run(command: Command) -> None:
    print(f"+ {shlex.join(command)}", file=sys.stderr, flush=True)
    if _signals:
        sys.exit(STOPPED)
    _children.append(subprocess.Popen(command))
    for number in _signals:  # one that came before the child was known
        _children[-1].send_signal(number)
    if status := _children[-1].wait():
        sys.exit(status if status > 0 else 128 - status)

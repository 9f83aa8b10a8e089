"""The paper's leaderboard experiment."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parts import ROOT, TINY, Command, Part, SampledExperiment, checkpoint, run_experiment, step, wrapper

from drdpo.cli import flag, require

LLAMA = {"1B": "Llama1b", "3B": "Llama3b", "8B": "Llama8b"}
PAPER = {
    "1B": "DPO KLDPO=0.05 WDPO=0.01", "3B": "DPO KLDPO=0.005 WDPO=0.005", "8B": "DPO KLDPO=0.005 KLDPO=0.01",
}  # fmt: skip
"""Its methods; those of your own model are 1B's."""
SMALL = [
    *TINY, "--output_path=outputs/openllm_leaderboard_tiny", "--sizes=tiny", "--steps=last", "--best_of_n=4",
    "--batch_size=4", "--max_gen_toks=16", "--tasks=stand_in_choice,stand_in_generation",
]  # fmt: skip
"""With two stand-in tasks of a few questions, because the leaderboard's data is on the hub."""


@dataclass(frozen=True)
class LeaderboardConfig(SampledExperiment):
    """The paper's leaderboard experiment: best against worst of ten by ArmoRM's gated score, then the Open LLM Leaderboard
    v2. What follows "--" goes to train_alignment.sh. Ends in <output_path>/report.md; a rerun skips finished steps."""

    output_path: str = flag("folder of everything", "outputs/openllm_leaderboard")
    sizes: str = flag("of Llama: models/Llama1b, models/Llama3b, models/Llama8b", "1B 3B 8B")
    model_path: str | None = flag("your own model instead; --sizes is then its name in the tables", None)
    methods: str | None = flag(
        f'for every size, with tau or rho, e.g. "{PAPER["1B"]}" (default: the paper\'s, {PAPER})', None
    )
    steps: str = flag("checkpoints to evaluate (2, 4 and 6 epochs of HelpSteer2), or last", "158 316 474")
    best_of_n: int = flag("answers of a prompt", 10)
    seed: int = flag("of training and evaluation", 42)
    tasks: str = flag("of the evaluation, as --backend, --batch_size and the following", "leaderboard")
    include_path: str | None = flag("folder of your own tasks", None)
    backend: str = flag("hf or vllm", "hf")
    batch_size: str = flag("of hf", "auto")
    limit: str | None = flag("samples per task, for a trial", None)
    max_length: int | None = flag("the authors used 2048, which truncates contexts", None)
    max_gen_toks: int | None = flag("the authors used 1024", None)
    max_epochs: int = flag("epochs", 8)
    max_len: int = flag("longest conversation in tokens", 2048)

    def __post_init__(self) -> None:
        own = self.model_path is not None
        require(not own or " " not in self.sizes, "--model_path is one model: pass its name as --sizes, e.g. --sizes=mine")
        for size in self.sizes.split():
            require(own or size in LLAMA, f"unknown size {size}: pass 1B, 3B or 8B, or your own --model_path")
            for word in self.methods_of(size):
                name, _, strength = word.partition("=")
                known = word == "DPO" or (name in ("KLDPO", "WDPO") and strength)
                require(bool(known), f"method {word}: pass DPO, or KLDPO or WDPO with its tau or rho, e.g. KLDPO=0.05")

    def methods_of(self, size: str) -> list[str]:
        """METHOD or METHOD=STRENGTH."""
        return (self.methods or PAPER.get(size, PAPER["1B"])).split()


def write_stand_ins(folder: Path) -> None:
    """Tasks for lm-eval, which needs the absolute path of their questions."""
    questions = str(ROOT / "experiments" / "stand_in_questions.jsonl")
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": questions}}, "test_split": "test"}
    shared["doc_to_text"] = "{{question}}"
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "label",
              "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}  # fmt: skip
    word = [{"function": "regex", "regex_pattern": "([A-Za-z]+)"}, {"function": "take_first"}]
    generation = {"output_type": "generate_until", "doc_to_target": "{{choices[label]}}",
                  "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 16},
                  "filter_list": [{"name": "first_word", "filter": word}],
                  "metric_list": [{"metric": "exact_match", "ignore_case": True}]}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in {"stand_in_choice": choice, "stand_in_generation": generation}.items():  # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **task}), encoding="utf-8")


def parts_of(config: LeaderboardConfig, further: Command) -> Iterator[Part]:
    output, tasks = Path(config.output_path), config.given("include_path")
    if "stand_in_" in config.tasks and not tasks:
        tasks = [f"--include_path={output / 'tasks'}"]
        if config.part is None:
            write_stand_ins(output / "tasks")

    def leaderboard(model: str | Path, folder: Path) -> Command:
        flags = config.given("tasks backend batch_size seed limit max_length max_gen_toks")
        return wrapper("openllm_eval.slurm", f"--model_path={model}", f"--output_path={folder}", *flags, *tasks)

    def evaluate(folder: Path, word: str) -> Iterator[Command]:
        for number in config.steps.split():
            yield leaderboard(checkpoint(folder / word, number), folder / "leaderboard" / word / number)

    needs, runs = [], []
    for size in config.sizes.split():
        model, folder = config.model_path or f"{ROOT}/models/{LLAMA[size]}", output / size
        sample = config.sample(folder / "completions", model, *config.given("best_of_n temperature"))
        paths = f"--completions={folder / 'completions'}", f"--output_path={folder / 'preferences'}"
        yield Part(f"data/{size}", [], [sample, step("generate_preferences.py", *paths, "--ArmoRM=1.0")])
        yield Part(f"evaluate/{size}/base", [], [leaderboard(model, folder / "leaderboard" / "base")])
        needs.append(f"evaluate/{size}/base")
        runs.append(f"{size}/base={folder / 'leaderboard' / 'base'}")
        for word in config.methods_of(size):
            train = config.train(folder / word, model, folder / "preferences", config.seed, word)
            yield Part(f"train/{size}/{word}", [f"data/{size}"], [[*train, *further]])
            yield Part(f"evaluate/{size}/{word}", [f"train/{size}/{word}"], evaluate(folder, word))
            needs.append(f"evaluate/{size}/{word}")
            shown = word.replace("KLDPO=", "KLDPO tau=").replace("WDPO=", "WDPO rho=")  # As in the published tables.
            runs += [
                f"{size}/{shown} step {number}={folder / 'leaderboard' / word / number}" for number in config.steps.split()
            ]
    yield Part("report", needs, [step("compare_openllm.py", "--runs", *runs, f"--output_path={output}")])


if __name__ == "__main__":
    run_experiment(LeaderboardConfig, parts_of, SMALL)

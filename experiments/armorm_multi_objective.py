"""The paper's ArmoRM experiment."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parts import TINY, Command, Part, SampledExperiment, checkpoint, run_experiment, step

from drdpo.cli import flag, require

OBJECTIVES = {
    "truthfulness_complexity": ("ultrafeedback_truthfulness", "helpsteer_complexity"),
    "helpfulness_coherence": ("ultrafeedback_helpfulness", "helpsteer_coherence"),
    "correctness_helpfulness": ("helpsteer_correctness", "helpsteer_helpfulness"),
    "overall_complexity": ("ultrafeedback_overall_score", "helpsteer_complexity"),
    "overall_coherence": ("ultrafeedback_overall_score", "helpsteer_coherence"),
}
"""Each mixture weighs its two objectives equally."""
SMALL = [
    *TINY, "--output_path=outputs/armorm_multi_objective_tiny", "--step=last", "--eval_best_of_n=2",
    "--eval_temperature=0.7", "--mixtures=overall_complexity overall_coherence correctness_helpfulness",
]  # fmt: skip
"""With other objectives where the embedded reward model lacks the paper's."""


@dataclass(frozen=True)
class MixturesConfig(SampledExperiment):
    """The paper's ArmoRM experiment: train on mixtures of two objectives, evaluate on all. What follows "--" goes to
    train_alignment.sh. Ends in <output_path>/report.md; a rerun skips finished steps."""

    output_path: str = flag("folder of everything", "outputs/armorm_multi_objective")
    mixtures: str = flag(f"of {', '.join(OBJECTIVES)}", " ".join([*OBJECTIVES][:3]))
    methods: str = flag("DPO, WDPO or KLDPO", "DPO WDPO KLDPO")
    seeds: str = flag('training seeds, e.g. "42 43 44"; the report pools them', "42")
    step: str = flag("checkpoint to evaluate (316: 4 epochs of HelpSteer2), or last", "316")
    kldpo_tau: str = flag("of KLDPO", "0.05")
    wdpo_rho: str = flag("of WDPO", "0.01")
    eval_best_of_n: int = flag("answers of a prompt for the evaluation, of the base model too", 10)
    eval_temperature: float = flag("of their sampling", 0.1)
    max_epochs: int = flag("epochs", 8)
    max_len: int = flag("longest conversation in tokens", 2048)

    def __post_init__(self) -> None:
        for name in self.mixtures.split():
            require(name in OBJECTIVES, f"unknown mixture {name}: choose from {', '.join(OBJECTIVES)}")
        for name in self.methods.split():
            require(name in ("DPO", "KLDPO", "WDPO"), f"unknown method {name}: pass DPO, KLDPO or WDPO")


def parts_of(config: MixturesConfig, further: Command) -> Iterator[Part]:
    output, model, mixtures = Path(config.output_path), str(config.model_path), config.mixtures.split()
    strengths = {"DPO": "DPO", "KLDPO": f"KLDPO={config.kldpo_tau}", "WDPO": f"WDPO={config.wdpo_rho}"}

    def answer(folder: Path, policy: str) -> Command:
        sampling = f"--best_of_n={config.eval_best_of_n}", f"--temperature={config.eval_temperature}"
        return config.sample(folder, policy, "--only_test=true", *sampling)

    def make_data() -> Iterator[Command]:
        yield config.sample(output / "base", model, *config.given("best_of_n temperature"))
        yield answer(output / "base_test", model)
        for mixture in mixtures:
            paths = f"--completions={output / 'base'}", f"--output_path={output / mixture / 'preferences'}"
            yield step("generate_preferences.py", *paths, *(f"--{name}=0.5" for name in OBJECTIVES[mixture]))

    def align(mixture: str, method: str, seed: str) -> Iterator[Command]:
        folder = output / mixture / f"{method}_seed_{seed}"
        yield [*config.train(folder, model, output / mixture / "preferences", seed, strengths[method]), *further]
        yield answer(folder / "completions", str(checkpoint(folder, config.step)))

    yield Part("data", [], make_data())
    reports = []
    for mixture in mixtures:
        needs, runs = [], [f"base={output / 'base_test'}"]
        for method in config.methods.split():
            for seed in config.seeds.split():
                needs.append(f"{mixture}/{method}/{seed}")
                runs.append(f"{method}={output / mixture / f'{method}_seed_{seed}' / 'completions'}")
                yield Part(needs[-1], ["data"], align(mixture, method, seed))
        folder = output / mixture / "report"
        reports.append(f"{mixture}={folder}")
        yield Part(mixture, needs, [step("evaluate_armorm.py", "--runs", *runs, f"--output_path={folder}")])
    compare = step("compare_mixtures.py", "--reports", *reports, f"--output_path={output}")
    yield Part("report", mixtures, [compare])


if __name__ == "__main__":
    run_experiment(MixturesConfig, parts_of, SMALL)

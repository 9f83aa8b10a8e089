"""Preference shift as in section 7.1 of the paper (2502.01930), on a policy's own answers: labels, choices, results.

Two objectives r1 and r2 of a scored completions folder become rewards u1, u2 in (0, 1): the sigmoid of an answer's deviation
from its prompt's mean score, in standard deviations of such deviations. The preference of a person at alpha is one of

    linear     r(alpha) = alpha u1 + (1 - alpha) u2
    geometric  r(alpha) = u1^alpha u2^(1 - alpha)

A pair is the best and the worst at alpha_o of six answers to one prompt, labelled by a Bradley-Terry draw,
P(first is chosen) = sigmoid(scale (r_first - r_second)). A trained policy's value at any alpha is its expected reward over
the fixed candidates of held-out prompts (drdpo.candidates), minus the base model's, in standard deviations of the rewards of
all sampled answers. The same pairs, labels and data order serve every method of a seed, so differences between methods are
paired over prompts and seeds.

Shapes: N prompts, K candidates, S seeds, A values of alpha.
"""

import itertools
import json
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from parts import ROOT, Command, Part, SampledExperiment, borrow, run_experiment, wrapper
from safetensors.numpy import load_file
from tabulate import tabulate

from drdpo.candidates import values
from drdpo.cli import flag, require
from drdpo.errors import DataError, UsageError
from drdpo.evaluation.statistics import Estimate, Observations, estimate, resample
from drdpo.folder import atomic_file
from drdpo.objectives import objective_from_flag
from drdpo.records import Completion, Preference, read_records, write_records

ALPHAS = tuple(step / 10 for step in range(11))
FORMS = ("linear", "geometric")
PARTS = ("pairs", "validation", "test")
"""What a prompt is for: the first prompts of the train split, the next ones, and then those of the test split too."""
DRAWN = 6
"""Answers of a prompt that a seed draws; its pair is the best and the worst of them."""
DRAWS = 2000
MIDDLE, FAR = 0.5, 1.0
"""Where the table looks, beside alpha_o."""
METHODS: dict[str, tuple[str, ...]] = {
    "DPO": (), "cDPO": ("0.1", "0.3"), "DrDPO": ("1", "4"), "KLDPO": ("0.3", "1"), "KLDPO-2": ("0.3", "1"),
    "WDPO": ("2e-5", "1e-4"), "CVaR": ("0.5", "0.75"),
}  # fmt: skip
"""Two strengths each, both tried. DPO has none: beta, which all share, limits how far a policy moves."""
FLAGS = {
    "DPO": "", "cDPO": "--label_smoothing={}", "DrDPO": "--drdpo_beta={}", "KLDPO": "--kldpo_tau={}",
    "KLDPO-2": "--kldpo_tau={} --kldpo_normalize=true", "WDPO": "--wdpo_rho={} --wdpo_prompt=once",
    "CVaR": "--method=cvar:{}",
}  # fmt: skip
SMALL = [
    "--output_path=outputs/preference_shift_tiny", "--methods=DPO WDPO", "--geometric_methods=DPO", "--seeds=42 43",
    "--best_of_n=4", "--prompts=24", "--pairs=16", "--validation=8", "--test=16", "--candidates=4", "--max_steps=2",
    "--eval_steps=1",
]  # fmt: skip


@dataclass(frozen=True)
class PreferenceShiftConfig(SampledExperiment):
    """Preference shift as in the paper's section 7.1: pairs labelled at one mixture of two objectives, values at all. What
    follows "--" goes to train_alignment.sh. Ends in <output_path>/report.md; a rerun skips finished runs."""

    output_path: str = flag("folder of everything", "outputs/preference_shift")
    model_path: str = flag("policy, a Hugging Face folder or hub id", f"{ROOT}/models/SmolLM2-135M")
    reward_model: str = flag("ArmoRM, or a model of its layout", f"{ROOT}/models/ArmoRM-SmolLM2")
    dataset: str = flag("prompts", f"{ROOT}/datasets/embedded_prompts")
    objectives: str = flag("r1 and r2", "ultrafeedback_overall_score helpsteer_complexity")
    alpha: float = flag("0, 0.1, ... or 1: pairs are Bradley-Terry draws from scale * r(alpha)", 0.1)
    scale: float = flag("see --alpha", 8.0)
    forms: str = flag("linear (alpha r1 + (1 - alpha) r2), geometric (r1^alpha r2^(1 - alpha))", "linear geometric")
    methods: str = flag("KLDPO-2 is the paper's Algorithm 2", " ".join(METHODS))
    geometric_methods: str = flag("those that are also trained on the geometric form", "DPO KLDPO WDPO")
    seeds: str = flag("of labels, data order and adapters", "42 43 44 45 46")
    trial_seed: int = flag("of the trials that choose the strengths", 7)
    best_of_n: int = flag("answers of a prompt", 12)
    temperature: float = flag("of their sampling", 1.0)
    max_new_tokens: int = flag("longest answer in tokens", 16)
    prompt_max_len: int = flag("longest prompt in tokens", 80)
    pairs: int = flag("prompts for the pairs", 48)
    validation: int = flag("prompts for the choice of strengths", 32)
    test: int = flag("prompts for the test", 80)
    candidates: int = flag("answers of a held-out prompt", 12)
    beta: float = flag("KL penalty coefficient", 1.0)
    learning_rate: float = flag("of the adapters", 1e-3)
    lora_rank: int = flag("0 trains all weights", 16)
    train_batch_size: int = flag("pairs of an optimizer step", 8)
    micro_batch_size: int = flag("pairs of a forward pass", 8)
    gradient_checkpointing: str = flag("true, false or auto", "false")
    max_steps: int = flag("optimizer steps", 12)
    curves: str = flag("seeds whose values are also taken in the middle of training, every --eval_steps", "42")
    eval_steps: int = flag("see --curves", 3)
    sbatch: str = flag("options of the jobs", "--gres=gpu:1 --time=4:00:00")

    def __post_init__(self) -> None:
        methods, geometric = self.methods.split(), self.geometric_methods.split()
        for name in methods + geometric:
            require(name in METHODS, f"unknown method {name}: choose from {' '.join(METHODS)}")
            require(name in methods, f"--geometric_methods has {name}, which --methods lacks: add it there")
        require("DPO" in geometric, "DPO is what the others are compared with: add it to both lists of methods")
        require(self.alpha in ALPHAS, f"--alpha={self.alpha:g}: pass 0, 0.1, ... or 1")
        for form in self.forms.split():
            require(form in FORMS, f"unknown form {form}: pass linear, geometric or both")

    @property
    def trials(self) -> list[str]:
        """METHOD=STRENGTH, folders in trials/."""
        return [f"{method}={strength}" for method in self.methods.split() for strength in METHODS[method]]


class Study:
    """The base model's scored answers in a folder, and what each prompt is for."""

    def __init__(
        self, folder: Path, objectives: Sequence[str], prompts: Sequence[int], candidates: int | None = None
    ) -> None:
        self.folder = folder
        by_prompt: dict[tuple[int, int], list[Completion]] = defaultdict(list)
        for place, split in enumerate(("train", "test")):
            for record in read_records(folder / "base" / f"{split}.jsonl", Completion.from_row):
                by_prompt[place, record.prompt_id].append(record)
        # Prompt ids of the two splits may be the same: they are numbered anew.
        self.answers = [sorted(by_prompt[key], key=lambda record: record.sample_id) for key in sorted(by_prompt)]
        counts = {len(answers) for answers in self.answers}
        if len(counts) > 1 or min(counts) < 2 or len(self.answers) < sum(prompts):
            raise DataError(f"{folder / 'base'}: needs {sum(prompts)} prompts or more, each with the same number of answers")
        edges = np.cumsum([0, *prompts])
        self.rows = {part: range(edges[i], edges[i + 1]) for i, part in enumerate(PARTS)}
        names = [objective_from_flag(name) for name in objectives]
        missing = [name for name in names if name not in self.answers[0][0].scores]
        if missing:
            raise UsageError(
                f"{folder / 'base'} has no scores of {', '.join(missing)}; it has {', '.join(self.answers[0][0].scores)}"
            )
        scores_NK2 = np.array([[[record.scores[name] for name in names] for record in answers] for answers in self.answers])
        within_NK2 = scores_NK2 - scores_NK2.mean(1, keepdims=True)
        self.u_NK2 = 1 / (1 + np.exp(-within_NK2 / within_NK2.std((0, 1))))
        self.candidates = min(counts.pop(), candidates or sys.maxsize)
        self.facts = {
            "objectives": names, "candidates": self.candidates,
            "prompts": {part: len(rows) for part, rows in self.rows.items()},
            "correlation": float(np.corrcoef(scores_NK2.reshape(-1, 2).T)[0, 1]),
            "correlation_within_prompts": float(np.corrcoef(within_NK2.reshape(-1, 2).T)[0, 1]),
        }  # fmt: skip

    def reward(self, form: str, alpha: float) -> np.ndarray:
        """[N, K] r(alpha) of every answer."""
        u1_NK, u2_NK = self.u_NK2[..., 0], self.u_NK2[..., 1]
        return alpha * u1_NK + (1 - alpha) * u2_NK if form == "linear" else u1_NK**alpha * u2_NK ** (1 - alpha)

    def gains(self, run: Path, form: str, step: int | None = None) -> tuple[np.ndarray, float]:
        """[N, A] value minus the base model's in sd of all answers' rewards, and the mean effective sample size.

        Args:
            run: a training run's folder.
            step: the last one by default.
        """
        steps = _steps_of(run)
        if not steps:
            raise DataError(
                f"{run} has no candidates/step_*.safetensors: it has not ended, or ran without --eval_candidates"
            )
        tensors = load_file(run / "candidates" / f"step_{steps[-1] if step is None else step}.safetensors")
        chosen, there = tensors["prompt_id"], slice(tensors["log_ratio"].shape[1])
        rewards_NKA = np.stack([self.reward(form, alpha) for alpha in ALPHAS], -1)
        sd_A, rewards_NKA = rewards_NKA.std((0, 1)), rewards_NKA[chosen, there]
        value_NA, ess_N = values(tensors["log_ratio"].astype(np.float64), rewards_NKA)
        return (value_NA - rewards_NKA.mean(1)) / sd_A, float(ess_N.mean())


def _steps_of(run: Path) -> list[int]:
    return sorted(int(path.stem.split("_")[1]) for path in (run / "candidates").glob("step_*.safetensors"))


def label(study: Study, seeds: Sequence[int], forms: Sequence[str], alpha_o: float, scale: float) -> None:
    """Write the candidates and every seed's pairs; print what was drawn."""
    for part in PARTS[1:]:
        records = [record for row in study.rows[part] for record in _numbered(study, row)[: study.candidates]]
        write_records(study.folder / "candidates" / part / "test.jsonl", records)
    print(json.dumps(study.facts))
    for form in forms:
        reward_NK, agreed = study.reward(form, alpha_o), []
        for seed in seeds:
            draw = np.random.default_rng([seed, zlib.crc32(form.encode())])
            folder = study.folder / "pairs" / f"{form}_{seed}"
            for part, split in (("pairs", "train"), ("validation", "test")):
                pairs = []
                for row in study.rows[part]:
                    answers = _numbered(study, row)
                    drawn = draw.choice(len(answers), min(DRAWN, len(answers)), replace=False)
                    places = [drawn[reward_NK[row, drawn].argmax()], drawn[reward_NK[row, drawn].argmin()]]
                    gap = reward_NK[row, places[0]] - reward_NK[row, places[1]]
                    if draw.random() >= 1 / (1 + np.exp(-scale * gap)):
                        places = places[::-1]
                    chosen, rejected = (answers[place] for place in places)
                    scores = [float(reward_NK[row, place]) for place in places]
                    agreed.append(scores[0] > scores[1])
                    pairs.append(Preference(
                        row, chosen.prompt, chosen.completion, rejected.completion, *scores,
                        chosen.token_ids, rejected.token_ids, chosen.scores, rejected.scores,
                    ))  # fmt: skip
                write_records(folder / f"{split}.jsonl", pairs)
        print(f"{form}: {np.mean(agreed):.0%} of the labels prefer the answer of the larger reward")


def _numbered(study: Study, row: int) -> list[Completion]:
    return [Completion(row, number, one.prompt, one.completion, one.token_ids, one.finish_reason, one.scores)
            for number, one in enumerate(study.answers[row])]  # fmt: skip


def trials_of(study: Study, form: str, alpha_o: float, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """{method: {strength: value at alpha_o on the validation prompts}} of trials/METHOD=STRENGTH."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name in names:
        method, _, strength = name.partition("=")
        gains_NA, _ = study.gains(study.folder / "trials" / name, form)
        found[method][strength] = float(gains_NA[:, ALPHAS.index(alpha_o)].mean())
    return found


def best_of(trials: dict[str, dict[str, float]]) -> dict[str, str]:
    """{method: the strength with the largest value}."""
    return {method: max(values, key=lambda one: values[one]) for method, values in trials.items()}


def _runs_of(study: Study, form: str) -> dict[str, np.ndarray]:
    """{method: [N, S, A] gains on the test prompts}, DPO first; every method must have the same seeds."""
    found: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for run in sorted((study.folder / "runs" / form).iterdir()):
        method, _, seed = run.name.rpartition("_")
        found[method][int(seed)] = study.gains(run, form)[0]
    seeds = sorted(found["DPO"])
    uneven = [method for method, by_seed in found.items() if sorted(by_seed) != seeds]
    if uneven or not seeds:
        raise DataError(
            f"{study.folder}/runs/{form}: {', '.join(uneven) or 'DPO'} lacks seeds that the others have; run again"
        )
    order = ["DPO", *(method for method in found if method != "DPO")]
    return {method: np.stack([found[method][seed] for seed in seeds], 1) for method in order}


def results(study: Study, form: str) -> dict[str, Any]:
    """Gains and differences from DPO at every alpha and in the worst of them, with intervals; and DPO's curve over steps."""
    runs = _runs_of(study, form)
    seeds = next(iter(runs.values())).shape[1]
    tables = {(method, place): Observations(gains_NSA[..., place], ("seed",))
              for method, gains_NSA in runs.items() for place in range(len(ALPHAS))}  # fmt: skip
    found, layout = resample(tables, {"seed": seeds}, DRAWS, 0)
    by_method = {method: np.stack([found[method, place] for place in range(len(ALPHAS))]) for method in runs}

    dpo, others = by_method["DPO"], {name: entries for name, entries in by_method.items() if name != "DPO"}

    def told(entries: np.ndarray) -> list[float | None]:
        one: Estimate = estimate(entries, layout)
        return [one.value, one.low, one.high]

    folders = {method: sorted((study.folder / "runs" / form).glob(f"{method}_*")) for method in runs}
    ess = {method: float(np.mean([study.gains(run, form)[1] for run in group])) for method, group in folders.items()}
    # Some seeds have values in the middle of training, the same seeds of every method.
    steps = max((_steps_of(run) for run in folders["DPO"]), key=len)
    curves = {}
    for method, group in folders.items():
        whole = [run for run in group if _steps_of(run) == steps]
        curves[method] = [np.mean([study.gains(run, form, step)[0].mean(0) for run in whole], 0).tolist() for step in steps]
    return {
        "seeds": seeds, "steps": steps, "ess": ess, "curves": curves,
        "gain": {name: [told(row) for row in entries] for name, entries in by_method.items()},
        "worst": {name: told(entries.min(0)) for name, entries in by_method.items()},
        "difference": {name: [told(row) for row in entries - dpo] for name, entries in others.items()},
        "worst_difference": {name: told(entries.min(0) - dpo.min(0)) for name, entries in others.items()},
    }  # fmt: skip


def table(stored: dict[str, Any], form: str) -> str:
    """The results of one form as a Markdown table."""
    found, alpha_o = stored["results"][form], stored["settings"]["alpha"]

    def cell(numbers: Sequence[float]) -> str:
        value, low, high = numbers
        text = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
        return f"**{text}**" if low > 0 or high < 0 else text

    places = [ALPHAS.index(alpha) for alpha in (alpha_o, MIDDLE, FAR)]
    rows = []
    for method, gains in found["gain"].items():
        others = found["difference"].get(method)
        compared = [others[places[0]], others[places[2]], found["worst_difference"][method]] if others else []
        rows.append([
            method, stored["strengths"].get(method, ""), *(cell(gains[place]) for place in places),
            cell(found["worst"][method]),
            *(map(cell, compared) if others else [""] * 3), f"{found['ess'][method]:.1f}",
        ])  # fmt: skip
    heads = [f"at {ALPHAS[place]:g}" for place in places]
    names = ["method", "strength", *heads, "worst", f"{heads[0]} - DPO's", f"{heads[2]} - DPO's", "worst - DPO's", "ESS"]
    return tabulate(rows, names, "github", disable_numparse=True)


def draw(stored: dict[str, Any], picture: Path) -> None:
    """Left: value over alpha, a line a method, bands. Right: DPO's and the others' value over the steps, at both ends."""
    from matplotlib.figure import Figure

    forms = list(stored["results"])
    figure = Figure(figsize=(11, 4.2 * len(forms)), layout="constrained")
    axes = figure.subplots(len(forms), 2, squeeze=False)
    ends = {stored["settings"]["alpha"]: "-", FAR: "--"}
    for (left, right), form in zip(axes, forms, strict=True):
        found = stored["results"][form]
        for number, (method, gains) in enumerate(found["gain"].items()):
            color = "#000000" if method == "DPO" else f"C{number}"
            value_A, low_A, high_A = np.array(gains).T
            left.plot(ALPHAS, value_A, label=method, color=color, linewidth=2.5 if method == "DPO" else 1.5)
            left.fill_between(ALPHAS, low_A, high_A, color=color, alpha=0.08, linewidth=0)
            for alpha, style in ends.items():
                right.plot(found["steps"], [row[ALPHAS.index(alpha)] for row in found["curves"][method]], style, color=color)
        left.axvline(stored["settings"]["alpha"], color="grey", linewidth=0.8, linestyle=":")
        left.set(
            title=f"{form}: value over alpha, {found['seeds']} seeds", xlabel="alpha", ylabel="value - base model's [sd]"
        )
        right.set(
            title="over the steps: at alpha_o (line) and 1 (dashed)",
            xlabel="optimizer step",
            ylabel="value - base model's [sd]",
        )
        left.legend(fontsize=8)
        for axis in (left, right):
            axis.axhline(0, color="grey", linewidth=0.8)
    figure.savefig(picture, dpi=110, format="png")


def report(config: PreferenceShiftConfig, study: Study) -> None:
    """Write report.json, report.png and report.md, and print the tables."""
    forms = config.forms.split()
    trials = trials_of(study, forms[0], config.alpha, config.trials)
    stored = {
        "settings": {"alpha": config.alpha, "scale": config.scale, **study.facts}, "trials": trials,
        "strengths": best_of(trials), "results": {form: results(study, form) for form in forms},
    }  # fmt: skip
    with atomic_file(study.folder / "report.json") as file:
        file.write(json.dumps(stored, indent=1) + "\n")
    with atomic_file(study.folder / "report.png", "wb") as file:
        draw(stored, file)
    text = "\n\n".join(f"**{form}**\n\n{table(stored, form)}" for form in forms)
    with atomic_file(study.folder / "report.md") as file:
        file.write(text + "\n")
    print(f"{text}\n\nreport: {study.folder / 'report.md'}")


def parts_of(config: PreferenceShiftConfig, further: Command) -> Iterator[Part]:
    output, forms, seeds = Path(config.output_path), config.forms.split(), config.seeds.split()

    def study() -> Study:
        sizes = config.pairs, config.validation, config.test
        return Study(output, config.objectives.split(), sizes, config.candidates)

    def align(folder: Path, lenders: list[Path], pairs: str, method: str, strength: str, part: str) -> Command:
        """Train, and judge on the candidates of a part."""
        borrow(folder, lenders)
        seed = pairs.rpartition("_")[2]
        flags = config.given(
            "model_path beta learning_rate lora_rank train_batch_size max_steps micro_batch_size gradient_checkpointing"
        )
        flags += ["--lora_merge=false"] if config.lora_rank else []
        flags += [f"--eval_steps={config.eval_steps}"] if part == "test" and seed in config.curves.split() else []
        paths = f"--dataset_path={output / 'pairs' / pairs}", f"--save_path={folder}", f"--seed={seed}"
        judged = f"--eval_candidates={output / 'candidates' / part}", "--max_test_pairs=4"
        fixed = "--save_resume=false", "--log=none", "--warmup_ratio=0"
        own = FLAGS[method].format(strength).split()
        return wrapper("train_alignment.sh", *paths, *judged, *fixed, *flags, *own, *further)

    def try_out(trial: str) -> Iterator[Command]:
        folders = [output / "trials" / each for each in (trial, config.trials[0])]
        yield align(folders[0], folders[1:], f"{forms[0]}_{config.trial_seed}", *trial.split("="), "validation")

    def choose() -> None:
        trials = trials_of(study(), forms[0], config.alpha, config.trials)
        with atomic_file(output / "strengths.json") as file:
            json.dump(best_of(trials), file)
        print(json.dumps(trials, indent=1))

    def run(form: str, method: str, seed: str) -> Iterator[Command]:
        folder, strengths = output / "runs" / form, json.loads((output / "strengths.json").read_text(encoding="utf-8"))
        lenders = [folder / f"DPO_{seed}", output / "runs" / forms[0] / f"DPO_{seeds[0]}"]
        yield align(folder / f"{method}_{seed}", lenders, f"{form}_{seed}", method, strengths.get(method, ""), "test")

    sample = config.sample(output / "base", config.model_path, *config.given("best_of_n temperature"))
    drawn = [config.trial_seed, *map(int, seeds)]
    yield Part("data", [], [sample, lambda: label(study(), drawn, forms, config.alpha, config.scale)])
    for trial in config.trials:
        yield Part(f"trials/{trial}", ["data"], try_out(trial))
    yield Part("choose", [f"trials/{trial}" for trial in config.trials] or ["data"], [choose])
    needs = []
    for form, methods in zip(FORMS, (config.methods, config.geometric_methods), strict=True):
        for seed, method in itertools.product(seeds, methods.split()):
            if form in forms:
                needs.append(f"{form}/{method}/{seed}")
                yield Part(needs[-1], ["choose"], run(form, method, seed))
    yield Part("report", needs, [lambda: report(config, study())])


if __name__ == "__main__":
    run_experiment(PreferenceShiftConfig, parts_of, SMALL)

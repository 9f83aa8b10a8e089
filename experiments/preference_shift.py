"""Preference shift as in section 7.1 of the paper (2502.01930), on a policy's own answers: labels, power, results.

Two objectives r1 and r2 of a scored completions folder become rewards u1, u2 in (0, 1): the sigmoid of an answer's deviation
from its prompt's mean score, in standard deviations of such deviations. The preference of a person at alpha is one of

    linear     r(alpha) = alpha u1 + (1 - alpha) u2
    geometric  r(alpha) = u1^alpha u2^(1 - alpha)

A pair is the best and the worst at alpha_o of six answers to one prompt, labelled by a Bradley-Terry draw,
P(first is chosen) = sigmoid(scale (r_first - r_second)). A trained policy's value at any alpha is its expected reward over
the fixed candidates of held-out prompts (drdpo.candidates), minus the base model's, in standard deviations of the rewards of
all sampled answers. The same pairs, labels and data order serve every method of a seed, so differences between methods are
paired over prompts and seeds.

    label   write candidates/PART/ and pairs/FORM_SEED/ of a folder made by preference_shift.sh
    choose  write the strength of each method with the largest value at alpha_o on the validation prompts
    plan    from the runs of a pilot: spread of the paired differences, and what the study can detect
    report  tables and pictures from all runs

Shapes: N prompts, K candidates, S seeds, A values of alpha.
"""

import argparse
import json
import sys
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from scipy.stats import norm
from tabulate import tabulate

from drdpo.candidates import values
from drdpo.errors import DataError, UsageError, one_line_errors
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
POWER = norm.ppf(0.975) + norm.ppf(0.8)
"""A difference of so many standard errors is found in 80% of studies, two-sided at 5%."""


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


def plan(study: Study, form: str, alpha_o: float) -> str:
    """The pilot's table: sd of the paired difference from DPO over prompts and seeds, and the smallest difference that
    a study of these test prompts and of 5 or 10 seeds finds with a power of 80%."""
    runs = _runs_of(study, form)
    table = []
    for method in [name for name in runs if name != "DPO"]:
        for alpha in (alpha_o, FAR):
            difference_NS = runs[method][..., ALPHAS.index(alpha)] - runs["DPO"][..., ALPHAS.index(alpha)]
            over_prompts, over_seeds = difference_NS.mean(1).std(ddof=1), difference_NS.mean(0).std(ddof=1)
            errors = [np.hypot(over_prompts / len(difference_NS) ** 0.5, over_seeds / seeds**0.5) for seeds in (5, 10)]
            table.append([method, alpha, over_prompts, over_seeds, *(POWER * error for error in errors)])
    names = ["method", "alpha", "sd over prompts", "sd over seeds", "detectable, 5 seeds", "detectable, 10 seeds"]
    return tabulate(table, names, "github", floatfmt=".3f")


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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    forms = list(stored["results"])
    figure, axes = plt.subplots(len(forms), 2, figsize=(11, 4.2 * len(forms)), squeeze=False, constrained_layout=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("label", "choose", "plan", "report"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--objectives", nargs=2, required=True, help="r1 and r2")
    parser.add_argument("--prompts", nargs=3, type=int, required=True, help="for pairs, for validation and for the test")
    parser.add_argument("--candidates", type=int, help="answers of a held-out prompt, all by default")
    parser.add_argument("--alpha", type=float, default=0.1, help="alpha_o, of ALPHAS")
    parser.add_argument("--scale", type=float, default=8.0, help="of the Bradley-Terry draws")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="label: of the pairs")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--trials", nargs="*", default=[], help="choose, report: METHOD=STRENGTH, folders in trials/")
    parser.add_argument("--output", type=Path, help="report: write OUTPUT.json and OUTPUT.png")
    given = parser.parse_args()
    if given.alpha not in ALPHAS:
        raise UsageError(f"--alpha={given.alpha:g}: pass one of {', '.join(f'{alpha:g}' for alpha in ALPHAS)}")
    study = Study(given.folder, given.objectives, given.prompts, given.candidates)
    if given.what == "label":
        label(study, given.seeds, given.forms, given.alpha, given.scale)
    elif given.what == "choose":
        trials = trials_of(study, given.forms[0], given.alpha, given.trials)
        with atomic_file(study.folder / "strengths") as file:
            file.writelines(f"{method}={strength}\n" for method, strength in best_of(trials).items())
        print(json.dumps(trials, indent=1))
    elif given.what == "plan":
        print("\n\n".join(plan(study, form, given.alpha) for form in given.forms))
    else:
        trials = trials_of(study, given.forms[0], given.alpha, given.trials)
        stored = {
            "settings": {"alpha": given.alpha, "scale": given.scale, **study.facts}, "trials": trials,
            "strengths": best_of(trials), "results": {form: results(study, form) for form in given.forms},
        }  # fmt: skip
        output = given.output or study.folder / "report"
        with atomic_file(output.with_suffix(".json")) as file:
            file.write(json.dumps(stored, indent=1) + "\n")
        with atomic_file(output.with_suffix(".png"), "wb") as file:
            draw(stored, file)
        text = "\n\n".join(f"**{form}**\n\n{table(stored, form)}" for form in given.forms)
        with atomic_file(study.folder / "report.md") as file:
            file.write(text + "\n")
        print(text)


if __name__ == "__main__":
    with one_line_errors():
        main()

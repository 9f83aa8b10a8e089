"""The figures of preference_shift.sh: what every method gains on all objectives and on the worst one, under each shift.

    python experiments/shift_report.py OUTPUT_PATH

reads the runs in OUTPUT_PATH and its `settings`; writes report.md, results.json, gains.png and curves.png there and
prints the tables. A gain is that of src/evaluate_armorm.py: the mean over prompts of (score - the base model's), in
standard deviations of the base's scores, mean over seeds. "mean" and "worst" are over all objectives but the gated score.
95% intervals: bootstrap over prompts and seeds, the same prompts for every method, so that a difference from DPO has an
interval of its own. The worst of several noisy gains lies below the truth; compare it between methods, not with the mean.

Shape suffixes: P prompts, S seeds, N steps.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from shift_choice import choose, read_settings, validation
from shift_pictures import SHOWN, draw_curves, draw_gains

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from drdpo.errors import DataError, UsageError, one_line_errors
from drdpo.evaluation.resampling import Figure, Resampled, Table, resample, worst
from drdpo.evaluation.runs import Run, common_prompts, load_run, pool_seeds, sort_objectives
from drdpo.evaluation.statistics import scores, spread
from drdpo.evaluation.tables import markdown_table
from drdpo.files import atomic_file
from drdpo.manifest import git_commit, versions
from drdpo.objectives import GATED_SCORE, flag_name
from drdpo.records import read_rows

ROOT = Path(__file__).resolve().parents[1]
DRAWS = 4000
BASELINE = "DPO"


def groups(objectives: list[str], trained_on: list[str]) -> dict[str, list[str]]:
    """{summary: its objectives, at least one}: the gated score, itself a mixture, is in none."""
    single = [name for name in objectives if name != GATED_SCORE]
    seen = [name for name in single if flag_name(name) in map(flag_name, trained_on)]
    found = {"all": single, "trained": seen, "unseen": [name for name in single if name not in seen]}
    return {label: names for label, names in found.items() if names}


def summaries(gains: dict[str, Resampled], of: dict[str, list[str]]) -> dict[str, Resampled]:
    """{"mean of all": , "worst of all": , ...} of one method's gains."""
    found = {}
    for label, names in of.items():
        total = gains[names[0]]
        for name in names[1:]:
            total = total + gains[name]
        found[f"mean of {label}"] = total * (1 / len(names))
        found[f"worst of {label}"] = worst([gains[name] for name in names])
    return found


def arm_figures(base: Run, runs: list[Run], trained_on: list[str]) -> dict[str, dict[str, dict[str, Figure]]]:
    """{method: {"gain": {summary or objective: figure}, "over DPO": {the same: figure}}} of one arm."""
    common = common_prompts([base, *runs])
    objectives = sort_objectives(set.intersection(*(set(run.scores_P) for run in [base, *runs])))
    objectives = [name for name in objectives if spread(base, name) > 0]
    if len(common) < 2 or not objectives:
        raise DataError(f"{base.folder}: {len(common)} prompts in all runs; an interval needs two, and scores that differ")
    tables = {
        (run.name, name): Table(scores(run, name, common), (run.name,)) for run in [base, *runs] for name in objectives
    }
    found = resample(tables, {run.name: len(run.members) for run in [base, *runs]}, DRAWS, seed=0)
    of = groups(objectives, trained_on)
    every = {}
    for run in runs:
        gains = {name: (found[run.name, name] - found[base.name, name]) * (1 / spread(base, name)) for name in objectives}
        every[run.name] = summaries(gains, of) | {flag_name(name): gain for name, gain in gains.items()}
    return {
        method: {
            "gain": {name: gain.figure for name, gain in figures.items()},
            "over DPO": {name: (gain - every[BASELINE][name]).figure for name, gain in figures.items()},
        }
        for method, figures in every.items()
    }


def curves(folders: list[Path]) -> dict[str, list[float]]:
    """{figure of metrics.jsonl: [N] its mean over the runs}, of the figures that their first rows have."""
    runs = [[row for _, row in read_rows(folder / "metrics.jsonl")] for folder in folders]
    names = [
        name
        for name in ("loss", "accuracy", "margin", "effective_sample_size", "penalty", "objective")
        if name in runs[0][0]
    ]
    return {name: np.mean([[row[name] for row in run] for run in runs], axis=0).tolist() for name in names}


def collect(folder: Path) -> dict[str, Any]:
    """Everything that the pictures and the tables show, as JSON."""
    settings = read_settings(folder)
    values = {word.split("=")[0]: word.split("=")[1].split(",") for word in settings["methods"].split()}
    if BASELINE not in values:
        raise UsageError(f"{folder}: no {BASELINE} among the methods {' '.join(values)}; every method is compared with it")
    seeds, trained_on = settings["seeds"].split(), [settings["first"], settings["second"]]
    choices = {
        method: {"chosen": choose(folder, method, of_method)}
        | {"validation": {value: validation(folder, f"{method}_{value}", trained_on) for value in of_method}}
        for method, of_method in values.items()
    }
    base = load_run("base", folder / "base", "test")
    arms = {}
    for arm in settings["arms"].split():
        places = {method: [folder / arm / f"{method}_seed_{seed}" for seed in seeds] for method in values}
        runs = [
            pool_seeds(method, [load_run(method, place / "completions", "test") for place in of_method])
            for method, of_method in places.items()
        ]
        figures = arm_figures(base, runs, trained_on)
        arms[arm] = {
            "figures": {
                method: {kind: {name: [f.value, f.low, f.high] for name, f in row.items()} for kind, row in kinds.items()}
                for method, kinds in figures.items()
            },
            "curves": {method: curves(of_method) for method, of_method in places.items()},
            "tokens": {run.name: float(run.tokens_P.mean()) for run in [base, *runs]},
        }
    made_by = {"commit": git_commit(), "versions": versions(), "prompts": len(base.prompts)}
    # Where the clone lies is nobody's business.
    settings = {name: value.removeprefix(f"{ROOT}/") for name, value in settings.items()}
    return {"settings": settings, "made_by": made_by, "choices": choices, "arms": arms}


def interval(figure: list[float]) -> str:
    """`+0.12 [-0.03, +0.27]`, in bold where the interval leaves zero out."""
    value, low, high = figure
    text = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
    return text if low <= 0 <= high else f"**{text}**"


def choice_table(results: dict[str, Any]) -> str:
    """Validation gain of every strength, the chosen one in bold."""
    rows = []
    for method, choice in results["choices"].items():
        cells = [
            f"**{value}: {gain:+.2f}**" if value == choice["chosen"] else f"{value}: {gain:+.2f}"
            for value, gain in choice["validation"].items()
        ]
        rows.append([method, ", ".join(cells)])
    return markdown_table(["method", "strength: gain on the validation prompts [sd]"], rows, left=2)


def arm_table(results: dict[str, Any], arm: str) -> str:
    """Gains of every method under one shift, and their differences from DPO's."""
    of_baseline = results["arms"][arm]["figures"][BASELINE]["gain"]
    names = [name for name in SHOWN if name in of_baseline]
    header = ["method", *names, *(f"{name} - {BASELINE}'s" for name in names[:2])]
    rows = []
    for method, kinds in results["arms"][arm]["figures"].items():
        over = ["", ""] if method == BASELINE else [interval(kinds["over DPO"][name]) for name in names[:2]]
        rows.append([method, *(interval(kinds["gain"][name]) for name in names), *over])
    return markdown_table(header, rows)


def weight_table(results: dict[str, Any]) -> str:
    """What the robust terms did: their own figure over the second half of the steps."""
    rows = []
    for method in results["choices"]:
        cells = []
        for arm in results["arms"].values():
            curve = arm["curves"][method]
            half = slice(len(curve["loss"]) // 2, None)
            own = next((name for name in ("effective_sample_size", "penalty") if name in curve), None)
            cells.append(f"{np.mean(curve[own][half]):.2f}" if own else "")
        if any(cells):
            rows.append([method, "penalty" if own == "penalty" else "effective sample size", *cells])
    return markdown_table(["method", "figure", *results["arms"]], rows, left=2)


def report(results: dict[str, Any]) -> str:
    """report.md."""
    settings = results["settings"]
    parts = [
        "# A preference shift, small",
        f"{results['made_by']['prompts']} test prompts, training seeds {settings['seeds']}.",
    ]
    parts += ["## Strengths that were chosen", choice_table(results)]
    for arm in results["arms"]:
        parts += [f"## {arm}", arm_table(results, arm)]
    parts += ["![Gains](gains.png)", "## Training", weight_table(results), "![Curves](curves.png)"]
    parts += ["## Settings", "\n".join(f"    {name}={value}" for name, value in settings.items() if value)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    if len(sys.argv) != 2:
        raise UsageError("give the --output_path of preference_shift.sh")
    folder = Path(sys.argv[1])
    results = collect(folder)
    with atomic_file(folder / "results.json") as stream:
        json.dump(results, stream, indent=1)
    for name, draw in (("gains", draw_gains), ("curves", draw_curves)):
        with atomic_file(folder / f"{name}.png", "wb") as picture:
            draw(results).savefig(picture, dpi=130, format="png", metadata={"Software": None})
    text = report(results)
    with atomic_file(folder / "report.md") as stream:
        stream.write(text)
    print(text)


if __name__ == "__main__":
    with one_line_errors():
        main()

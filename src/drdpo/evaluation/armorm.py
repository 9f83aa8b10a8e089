"""Step 4a: averages of the reward model's objectives over one or more runs, with gains over the first."""

import os
from dataclasses import asdict
from pathlib import Path

from drdpo.cli import as_dict, require
from drdpo.config.evaluation import EvaluateConfig
from drdpo.errors import DataError
from drdpo.evaluation.csv_files import write_answers, write_pairs, write_scores, write_sweep
from drdpo.evaluation.provenance import Provenance, differences, read_provenance
from drdpo.evaluation.report import report, terminal_table
from drdpo.evaluation.runs import Run, choose_objectives, common_prompts, load_run, parse_runs, pool_seeds
from drdpo.evaluation.statistics import MIXTURE, Comparison, compare, spread
from drdpo.folder import atomic_file, atomic_folder, lock_folder, refuse_if_locked, sweep, write_manifest
from drdpo.models import fingerprint
from drdpo.objectives import flag_name, objective_from_flag

MAY_BE_LEFT_OUT = {"pairs.csv", "alpha.csv", "alpha.png", "alpha.svg"}
"""Files that a report has or has not, by its flags: an older one's must not stay beside a newer one that lacks them."""


def evaluate_armorm(config: EvaluateConfig) -> None:
    """Write report.md, spider.png and .svg, scores.csv, pairs.csv and answers.csv to the output folder and print the table;
    with --sweep also alpha.csv, alpha.png and .svg.

    Runs are joined by prompt_id. Means are over all prompts of a run, gains and win rates over those that every run has.

    Args:
        config: the flags; the first run is the base.

    Raises:
        UsageError: a --runs word that is not NAME=FOLDER, a name given twice, an objective that a run lacks, or another
            run that is writing to the output folder.
        DataError: a missing folder or split, unscored or broken rows, no common objective or prompt.
    """
    folders = parse_runs(config.runs)
    loaded = {name: [load_run(name, place, config.split) for place in places] for name, places in folders.items()}
    runs = [pool_seeds(name, seeds) for name, seeds in loaded.items()]
    swept = _swept(config, runs)
    objectives = list(dict.fromkeys([*choose_objectives(runs, config.objectives), *swept]))
    provenances = {
        name if len(places) == 1 else f"{name}, seed {number}": read_provenance(place, config.split)
        for name, places in folders.items()
        for number, place in enumerate(places, start=1)
    }
    trained_on = _trained_on(config, runs, provenances)
    mixture = _mixture(provenances)
    comparison = compare(
        runs, objectives, common_prompts(runs), config.bootstrap, config.seed, trained_on, swept or None, mixture
    )
    output = Path(config.output_path)
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: --output_path is a file, not a folder")
    refuse_if_locked(output)
    made_by = as_dict(config) | {
        "inputs": {
            name: [fingerprint(place / f"{config.split}.jsonl") for place in places] for name, places in folders.items()
        }
    }
    counts = {run.name: {"completions": run.completions, "prompts": len(run.prompts)} for run in runs}
    with lock_folder(output):
        sweep(output)
        _write(config, output, runs, comparison, provenances, trained_on, mixture)
        facts = {"counts": counts, "paired_prompts": len(comparison.common)}
        if gains := {run: asdict(figures[MIXTURE]) for run, figures in comparison.summaries.items() if MIXTURE in figures}:
            facts["trained_mixture"] = {"weights": mixture, "gains_sd": gains}
        write_manifest(output, "evaluate_armorm", made_by, **facts)
    print(terminal_table(runs, comparison))
    for line in [*differences(provenances), *(note for p in provenances.values() for note in p.notes)]:
        print(f"note: {line}")
    print(f"report: {output / 'report.md'}")


def _write(
    config: EvaluateConfig,
    output: Path,
    runs: list[Run],
    comparison: Comparison,
    provenances: dict[str, Provenance],
    trained_on: list[str],
    mixture: dict[str, float],
) -> None:
    """Drawn aside as a whole first: an error leaves an earlier report as it was."""
    with atomic_folder(output / ".report.tmp") as aside:
        from drdpo.evaluation.spider import draw_pictures

        draw_pictures(aside, runs, comparison, trained_on)
        tables = {"scores.csv": write_scores, "answers.csv": write_answers}
        tables |= {"pairs.csv": write_pairs} if len(runs) > 1 else {}
        if comparison.sweep:
            from drdpo.evaluation.sweep import draw_sweep

            draw_sweep(aside, comparison, config.sweep, config.sweep_trained_at, runs[0].name)
            tables |= {"alpha.csv": write_sweep}
        for name, write in tables.items():
            with atomic_file(aside / name) as stream:
                write(stream, runs, comparison)
        with atomic_file(aside / "report.md") as stream:
            stream.write(report(config, runs, comparison, provenances, trained_on, mixture))
    made = sorted((output / ".report.tmp").iterdir())
    for name in MAY_BE_LEFT_OUT - {path.name for path in made}:
        (output / name).unlink(missing_ok=True)
    for path in made:
        os.replace(path, output / path.name)
    (output / ".report.tmp").rmdir()


def _swept(config: EvaluateConfig, runs: list[Run]) -> list[str]:
    """The two objectives of --sweep by their names, none without it.

    Raises:
        UsageError: there is one run only, the two are one objective, or the base's scores of one are all equal.
        DataError: a run lacks one of them.
    """
    if not config.sweep:
        return []
    require(len(runs) > 1, "--sweep compares runs with a base; give two --runs or more")
    names = choose_objectives(runs, config.sweep)
    require(len(names) == 2, f"--sweep {' '.join(config.sweep)} names one objective twice")
    for name in names:
        require(spread(runs[0], name) > 0, f"--sweep: all scores of {runs[0].name} are equal in {name}: it has no z-score")
    return names


def _trained_on(config: EvaluateConfig, runs: list[Run], provenances: dict[str, Provenance]) -> list[str]:
    """The objectives that training saw: those of the flag, else those that any run's record tells; none where none does."""
    if config.trained_on:
        known = {flag_name(name): name for run in runs for name in run.scores_P}
        return [known.get(flag_name(word)) or objective_from_flag(word) for word in config.trained_on]
    return list(dict.fromkeys(name for p in provenances.values() for name in p.mixture))


def _mixture(provenances: dict[str, Provenance]) -> dict[str, float]:
    """The {objective: weight} that the runs were trained on; empty where none is recorded or they differ."""
    found = [p.mixture for p in provenances.values() if p.mixture]
    return found[0] if found and all(mixture == found[0] for mixture in found) else {}

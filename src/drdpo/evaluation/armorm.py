"""Step 4a: averages of the reward model's objectives over one or more runs, with gains over the first."""

import os
from pathlib import Path

from drdpo.config.evaluation import EvaluateConfig
from drdpo.errors import DataError
from drdpo.evaluation.provenance import Provenance, differences, read_provenance
from drdpo.evaluation.report import report, report_paths, terminal_table, write_csv
from drdpo.evaluation.runs import Run, choose_objectives, common_prompts, load_run, parse_runs
from drdpo.evaluation.statistics import Comparison, compare
from drdpo.files import atomic_file, atomic_folder, sweep
from drdpo.flags import as_dict
from drdpo.lock import lock_folder, refuse_if_locked
from drdpo.manifest import fingerprint, write_manifest


def evaluate_armorm(config: EvaluateConfig) -> None:
    """Write scores.csv, report.md, spider.png and spider.svg to the output folder and print the table.

    Runs are joined by prompt_id. Means are over all prompts of a run, gains and win rates over those that every run has.

    Args:
        config: the flags; the first run is the base.

    Raises:
        UsageError: a --runs word that is not NAME=FOLDER, a name given twice, an objective that a run lacks, or another
            run that is writing to the output folder.
        DataError: a missing folder or split, unscored or broken rows, no common objective or prompt.
    """
    folders = parse_runs(config.runs)
    runs = [load_run(name, folder, config.split) for name, folder in folders.items()]
    objectives = choose_objectives(runs, config.objectives)
    comparison = compare(runs, objectives, common_prompts(runs), config.bootstrap, config.seed)
    provenances = {run.name: read_provenance(run.folder, config.split) for run in runs}
    output = Path(config.output_path)
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: --output_path is a file, not a folder")
    refuse_if_locked(output)
    made_by = as_dict(config) | {
        "inputs": {name: fingerprint(folder / f"{config.split}.jsonl") for name, folder in folders.items()}
    }
    counts = {run.name: {"completions": run.completions, "prompts": len(run.prompts)} for run in runs}
    with lock_folder(output):
        sweep(output)
        _write(output, config, runs, comparison, provenances)
        write_manifest(output, "evaluate_armorm", made_by, counts=counts, paired_prompts=len(comparison.common))
    print(terminal_table(runs, comparison))
    for line in [*differences(provenances), *(note for p in provenances.values() for note in p.notes)]:
        print(f"note: {line}")
    print(f"report: {output / 'report.md'}")


def _write(
    output: Path, config: EvaluateConfig, runs: list[Run], comparison: Comparison, provenances: dict[str, Provenance]
) -> None:
    """Put the report's files in place. All are made aside first: an error leaves an earlier report as it was."""
    with atomic_folder(output / ".report.tmp") as aside:
        from drdpo.evaluation.spider import draw_pictures

        draw_pictures(aside, runs, comparison)
        with atomic_file(aside / "scores.csv") as stream:
            write_csv(stream, runs, comparison)
        with atomic_file(aside / "report.md") as stream:
            stream.write(report(config, runs, comparison, provenances))
    for path in report_paths(output):
        os.replace(output / ".report.tmp" / path.name, path)
    (output / ".report.tmp").rmdir()

"""The ArmoRM experiment as one report: gains of every training mixture, and the authors' spider plots beside ours."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

from drdpo.cli import as_dict
from drdpo.config.comparison import CompareMixturesConfig
from drdpo.errors import DataError, UsageError
from drdpo.evaluation.csv_files import SCORES
from drdpo.evaluation.published import MIXTURES, SPOKES
from drdpo.evaluation.report_sections import interval
from drdpo.evaluation.resampling import Figure
from drdpo.evaluation.runs import parse_runs, sort_objectives
from drdpo.evaluation.tables import markdown_table
from drdpo.folder import atomic_file, atomic_folder, lock_folder, read_manifest, refuse_if_locked, sweep, write_manifest
from drdpo.models import fingerprint
from drdpo.objectives import flag_name


@dataclass(frozen=True)
class MixtureResult:
    """The gains after training on one mixture."""

    name: str
    folder: Path
    """Of evaluate_armorm's report."""
    objectives: list[str]
    runs: list[str]
    """Without the base."""
    gains: dict[tuple[str, str], Figure]
    """{(run, objective): gain over the base in its sd}; without objectives whose base scores are all equal."""
    published: dict[str, tuple[float, ...]]
    """{method: values in the order of SPOKES}; empty where nothing is published."""

    @property
    def spokes(self) -> list[str]:
        """The paper's five as far as they have gains; all that have where those are fewer than a spider needs."""
        have = [name for name in self.objectives if all((run, name) in self.gains for run in self.runs)]
        paper = [name for name in SPOKES if name in have]
        return paper if len(paper) >= 3 else have


def compare_mixtures(config: CompareMixturesConfig) -> None:
    """Write report.md, and spiders.png and spiders.svg where there are three objectives or more.

    Args:
        config: the flags.

    Raises:
        UsageError: a --reports word that is not NAME=FOLDER, a name given twice, or another run that is writing to the
            output folder.
        DataError: a folder without a scores.csv of evaluate_armorm, or with one of a single run.
    """
    results = [_read(name, folders, config.published) for name, folders in parse_runs(config.reports).items()]
    output = Path(config.output_path)
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: --output_path is a file, not a folder")
    refuse_if_locked(output)
    with lock_folder(output):
        sweep(output)
        # Drawn aside as a whole first: an error leaves an earlier report as it was.
        with atomic_folder(output / ".report.tmp") as aside:
            from drdpo.evaluation.spiders import draw_spiders

            pictured = draw_spiders(aside, results)
            with atomic_file(aside / "report.md") as stream:
                stream.write(report(results, output, pictured))
        if not pictured:
            for name in ("spiders.png", "spiders.svg"):
                (output / name).unlink(missing_ok=True)
        for path in sorted((output / ".report.tmp").iterdir()):
            os.replace(path, output / path.name)
        (output / ".report.tmp").rmdir()
        inputs = {result.name: fingerprint(result.folder / "scores.csv") for result in results}
        write_manifest(output, "compare_mixtures", as_dict(config) | {"inputs": inputs})
    print(f"report: {output / 'report.md'}")


def _read(name: str, folders: list[Path], published: bool) -> MixtureResult:
    if len(folders) > 1:
        raise UsageError(f"--reports: the name {name} is given twice; every mixture has one report")
    (folder,) = folders
    path = folder / "scores.csv"
    if not path.is_file():
        raise DataError(f"mixture {name}: {path}: no such file; src/evaluate_armorm.py writes it")
    runs: list[str] = []
    objectives: set[str] = set()
    gains: dict[tuple[str, str], Figure] = {}
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != SCORES:
            raise DataError(f"{path}, row 1: not the columns that src/evaluate_armorm.py writes ({', '.join(SCORES)})")
        for number, row in enumerate(reader, start=2):
            if row["run"] not in runs:
                runs.append(row["run"])
            objectives.add(row["objective"])
            if row["gain_sd"]:
                try:
                    low, high = (float(row[end]) if row[end] else None for end in ("ci_low", "ci_high"))
                    gains[row["run"], row["objective"]] = Figure(float(row["gain_sd"]), low, high)
                except ValueError as error:
                    raise DataError(f"{path}, row {number}: a gain is not a number") from error
    if len(runs) < 2:
        raise DataError(f"mixture {name}: {path} has one run only; a gain needs a base and a run")
    theirs = MIXTURES[name].published if published and name in MIXTURES else {}
    return MixtureResult(name, folder, sort_objectives(objectives), runs[1:], gains, theirs)


def report(results: list[MixtureResult], output: Path, pictured: bool) -> str:
    """The Markdown report.

    Args:
        results: one a mixture.
        output: where it will stand, for the links.
        pictured: is there a picture?
    """
    parts = [
        "# Training on one mixture of objectives, evaluated on others",
        "Gains over the base model in standard deviations of its completion scores, with 95% paired bootstrap intervals. "
        "Published: values read off the spider plots of arXiv 2502.01930 (± 0.01). The paper does not say their unit; "
        "a gain in standard deviations is the likeliest, so the two columns may differ by their unit.",
    ]
    if pictured:
        parts.append("![Spider plots, ours above the published](spiders.png)")
    for result in results:
        parts += _sections(result, output)
    return "\n\n".join(parts) + "\n"


def _sections(result: MixtureResult, output: Path) -> list[str]:
    theirs = {name.upper(): dict(zip(SPOKES, values, strict=True)) for name, values in result.published.items()}
    header = ["objective"]
    for run in result.runs:
        header += [run] + ([f"{run}, published"] if run.upper() in theirs else [])
    rows = []
    for objective in result.objectives:
        row = [f"`{flag_name(objective)}`"]
        for run in result.runs:
            gain = result.gains.get((run, objective))
            row.append("n/a" if gain is None else interval(gain, "{:+.3f}"))
            if run.upper() in theirs:
                value = theirs[run.upper()].get(objective)
                row.append("" if value is None else f"{value:+.2f}")
        rows.append(row)
    link = os.path.relpath(result.folder / "report.md", output)
    made_by = read_manifest(result.folder).get("evaluate_armorm", {}).get("made_by", {})
    trained = ", ".join(f"`{flag_name(name)}`" for name in made_by.get("trained_on") or ())
    text = f"Trained on {trained}. " if trained else ""
    text += f"The whole comparison, with win rates, every two runs and answer lengths: [{link}](<{link}>)."
    return [f"## {result.name.replace('_', ' + ')}", text, markdown_table(header, rows)]

"""The ArmoRM experiment in one report: gains of every training mixture, next to the published ones."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from drdpo.config.evaluation import CompareMixturesConfig
from drdpo.errors import DataError, UsageError
from drdpo.evaluation import spider
from drdpo.evaluation.compare import SCORES
from drdpo.evaluation.report import STYLE, interval, markdown_table, save_picture, write_report
from drdpo.evaluation.runs import parse_runs, section, sort_objectives
from drdpo.evaluation.statistics import Estimate
from drdpo.folder import read_manifest
from drdpo.models import fingerprint
from drdpo.objectives import flag_name

SPOKES = (
    "helpsteer-helpfulness", "helpsteer-correctness", "helpsteer-coherence", "ultrafeedback-honesty", "ArmoRM",
)  # fmt: skip
"""The spokes of the paper's spider plots: Helpfulness, Correctness, Coherence, Honesty and ArmoRM."""

PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "truthfulness_complexity": {
        "DPO": (0.20, 0.20, 0.19, 0.23, 0.07),
        "KLDPO": (0.33, 0.33, 0.31, 0.34, 0.15),
        "WDPO": (0.37, 0.37, 0.37, 0.37, 0.16),
    },
    "helpfulness_coherence": {
        "DPO": (0.31, 0.29, 0.31, 0.29, 0.15),
        "KLDPO": (0.37, 0.36, 0.36, 0.34, 0.17),
        "WDPO": (0.41, 0.40, 0.44, 0.39, 0.20),
    },
    "correctness_helpfulness": {
        "DPO": (0.22, 0.20, 0.17, 0.18, 0.07),
        "KLDPO": (0.36, 0.34, 0.32, 0.34, 0.17),
        "WDPO": (0.42, 0.41, 0.41, 0.38, 0.21),
    },
}
"""{training mixture: {method: values in the order of SPOKES}}, read from the spider plots of arXiv 2502.01930, ± 0.01."""

_PANEL, _ROW, _DISC, _BELOW, _FOOT = 5.3, 4.8, 2.95, 0.7, 0.6
"""Inches: a panel's width and height, its disc, the labels below the disc, and the legend."""

_SMALLEST_RIM = 0.05
"""Standard deviations: on a smaller scale, negligible gains would look large."""

Values = dict[str, Sequence[float]]
"""{method: one value per spoke}"""


@dataclass(frozen=True)
class MixtureResult:
    """The gains after training on one mixture."""

    name: str
    folder: Path
    """Of evaluate_armorm's report."""
    objectives: list[str]
    runs: list[str]
    """Without the base."""
    gains: dict[tuple[str, str], Estimate]
    """{(run, objective): gain over the base in its sd}, without objectives in which all base scores are equal."""

    @property
    def published(self) -> dict[str, tuple[float, ...]]:
        """{method: values in the order of SPOKES}; empty if nothing is published."""
        return PUBLISHED.get(self.name, {})

    @property
    def spokes(self) -> list[str]:
        """Those of the paper's five that have gains; if fewer than three, all objectives that have gains."""
        have = [name for name in self.objectives if all((run, name) in self.gains for run in self.runs)]
        paper = [name for name in SPOKES if name in have]
        return paper if len(paper) >= 3 else have


def compare_mixtures(config: CompareMixturesConfig) -> None:
    """Write report.md, and spiders.png and spiders.svg if there are at least three objectives.

    Raises:
        UsageError: a --reports argument that is not NAME=FOLDER, a repeated name, or a locked output folder.
        DataError: a folder without the scores.csv of evaluate_armorm, or with that of a single run.
    """
    results = [_read(name, folders) for name, folders in parse_runs(config.reports, "--reports").items()]
    output = Path(config.output_path)
    pictures: dict[str, str | bytes] = {}
    if all(len(result.spokes) >= 3 for result in results):
        with rc_context(STYLE):
            pictures |= save_picture(spiders(results), "spiders", dpi=120)
    files = pictures | {"report.md": mixtures_report(results, output, pictured=bool(pictures))}
    inputs = {result.name: fingerprint(result.folder / "scores.csv") for result in results}
    write_report(output, "compare_mixtures", config, inputs, files, optional=("spiders.png", "spiders.svg"))
    print(f"report: {output / 'report.md'}")


def _read(name: str, folders: list[Path]) -> MixtureResult:
    if len(folders) > 1:
        raise UsageError(f"--reports: the name {name} is given twice; pass one report per mixture")
    (folder,) = folders
    path = folder / "scores.csv"
    if not path.is_file():
        raise DataError(f"mixture {name}: {path}: no such file; src/evaluate_armorm.py writes it")
    runs: dict[str, None] = {}
    objectives: set[str] = set()
    gains: dict[tuple[str, str], Estimate] = {}
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != SCORES:
            raise DataError(f"{path}, row 1: not the columns that src/evaluate_armorm.py writes ({', '.join(SCORES)})")
        for number, row in enumerate(reader, start=2):
            runs[row["run"]] = None
            objectives.add(row["objective"])
            if row["gain_sd"]:
                try:
                    low, high = (float(row[end]) if row[end] else None for end in ("ci_low", "ci_high"))
                    gains[row["run"], row["objective"]] = Estimate(float(row["gain_sd"]), low, high)
                except ValueError as error:
                    raise DataError(f"{path}, row {number}: a gain is not a number") from error
    if len(runs) < 2:
        raise DataError(f"mixture {name}: {path} has only one run; gains need a base and a run")
    return MixtureResult(name, folder, sort_objectives(objectives), list(runs)[1:], gains)


def mixtures_report(results: list[MixtureResult], output: Path, pictured: bool) -> str:
    """The Markdown report.

    Args:
        results: one per mixture.
        output: the report's folder, for relative links.
        pictured: whether to show spiders.png.
    """
    parts = [
        "# Training on one mixture of objectives, evaluated on others",
        "Gains over the base model in standard deviations of its completion scores, with 95% paired bootstrap intervals. "
        "Published values are read from the spider plots of arXiv 2502.01930 (± 0.01). The paper does not state their unit, "
        "which may differ from ours.",
    ]
    if pictured:
        parts.append("![Spider plots, ours above the published ones](spiders.png)")
    for result in results:
        parts += _mixture_section(result, output)
    return "\n\n".join(parts) + "\n"


def _mixture_section(result: MixtureResult, output: Path) -> list[str]:
    theirs = {name.upper(): dict(zip(SPOKES, values, strict=True)) for name, values in result.published.items()}
    header, columns = ["objective"], [[f"`{flag_name(name)}`" for name in result.objectives]]
    for run in result.runs:
        header.append(run)
        columns.append([interval(result.gains.get((run, name)), "{:+.3f}") for name in result.objectives])
        if published := theirs.get(run.upper()):
            header.append(f"{run}, published")
            columns.append([f"{published[name]:+.2f}" if name in published else "" for name in result.objectives])
    link = os.path.relpath(result.folder / "report.md", output)
    trained_on = section(read_manifest(result.folder), "evaluate_armorm", "trained_mixture", "weights")
    text = f"Trained on {', '.join(f'`{flag_name(name)}`' for name in trained_on)}. " if trained_on else ""
    text += f"Full report, with win rates and answer lengths: [{link}](<{link}>)."
    table = markdown_table(header, list(zip(*columns, strict=True)))
    return [f"## {result.name.replace('_', ' + ')}", text, table]


def spiders(results: list[MixtureResult]) -> Figure:
    """Spider plots as in the paper: a panel per mixture, a polygon per method; ours above, the published ones below.

    Our panels share one scale, the published ones another. A published method has the style of our run of the same name,
    ignoring case.
    """
    ours: list[Values] = [
        {run: [result.gains[run, name].value for name in result.spokes] for run in result.runs} for result in results
    ]
    theirs: list[Values] = [dict(result.published) for result in results]
    rows, columns = 2 if any(theirs) else 1, len(results)
    names = {name.upper(): name for values in [*theirs, *ours] for name in values}
    order = list(dict.fromkeys(name.upper() for values in [*ours, *theirs] for name in values))
    looks = spider.run_styles(["base", *order])
    figure = Figure(figsize=(_PANEL * columns, _ROW * rows + _FOOT))
    for column, result in enumerate(results):
        title = result.name.replace("_", " + ")
        axes = _panel(figure, rows - 1, column)
        _spider(axes, f"{title}\nours: gain in sd of the base", result.spokes, ours[column], looks, _limits(ours))
        if theirs[column]:
            axes = _panel(figure, 0, column)
            _spider(axes, f"{title}\npublished", SPOKES, theirs[column], looks, _limits(theirs))
    labels = ["base (0)", *(names[name] for name in order)]
    spider.legend(figure, labels, list(looks.values()), min(len(labels), 2 * columns + 1))
    return figure


def _panel(figure: Figure, row: int, column: int) -> Any:
    """Polar axes in row `row`, counted from the bottom; the labels around the disc fit into its panel."""
    width, height = figure.get_size_inches()
    left, bottom = (column + 0.5) * _PANEL - _DISC / 2, _FOOT + row * _ROW + _BELOW
    return figure.add_axes((left / width, bottom / height, _DISC / width, _DISC / height), projection="polar")


def _limits(panels: list[Values]) -> tuple[float, float]:
    """Values at the centre and rim of every panel."""
    values = [value for panel in panels for row in panel.values() for value in row]
    return spider.gain_limits(min(values), max(_SMALLEST_RIM, *values))


def _spider(
    axes: Any,
    title: str,
    spokes: Sequence[str],
    values: Values,
    styles: dict[str, spider.Style],
    limits: tuple[float, float],
) -> None:
    angles = spider.web(axes, len(spokes), limits)
    for angle, name in zip(angles, spokes, strict=True):
        spider.spoke_label(axes, angle, spider.axis_label(name), len(spokes))
    axes.tick_params(axis="y", labelsize=8, labelcolor="#555555")
    axes.set_rlabel_position(180 / len(spokes))
    spider.zero_ring(axes, 1.2)
    for name, row in values.items():
        spider.polygon(axes, angles, row, styles[name.upper()])
    axes.set_title(title, fontsize=11, pad=48)

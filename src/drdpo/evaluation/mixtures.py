"""The ArmoRM experiment in one report: gains of every training mixture, next to the published ones."""

import os
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from drdpo.config.evaluation import CompareMixturesConfig
from drdpo.errors import DataError, UsageError, reason
from drdpo.evaluation import spider
from drdpo.evaluation.compare import SCORES
from drdpo.evaluation.report import STYLE, interval, markdown_table, save_picture, write_report
from drdpo.evaluation.runs import parse_runs, sort_objectives
from drdpo.evaluation.statistics import Estimate
from drdpo.folder import read_manifest, section
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

_SMALLEST_RIM = 0.05
"""Standard deviations: on a smaller scale, negligible gains would look large."""


def compare_mixtures(config: CompareMixturesConfig) -> None:
    """Write report.md, and spiders.png and spiders.svg if there are at least three objectives.

    Raises:
        UsageError: a --reports argument that is not NAME=FOLDER, a repeated name, or a locked output folder.
        DataError: a folder without the scores.csv of evaluate_armorm, or with that of a single run.
    """
    folders: dict[str, Path] = {}
    for name, (folder, *more) in parse_runs(config.reports, "--reports").items():
        if more:
            raise UsageError(f"--reports: the name {name} is given twice; pass one report per mixture")
        folders[name] = folder
    results = {name: read_gains(name, folder) for name, folder in folders.items()}
    output = Path(config.output_path)
    files: dict[str, str | bytes] = {}
    if all(len(_spokes(gains)) >= 3 for gains in results.values()):
        with rc_context(STYLE):
            files |= save_picture(spiders(results), "spiders", dpi=120)
    parts = [
        "# Training on one mixture of objectives, evaluated on others",
        "Gains over the base model in standard deviations of its completion scores, with 95% paired bootstrap intervals. "
        "Published values are read from the spider plots of arXiv 2502.01930 (± 0.01). The paper does not state their unit, "
        "which may differ from ours.",
        *(["![Spider plots, ours above the published ones](spiders.png)"] if files else []),
    ]
    for name, gains in results.items():
        parts += _section(name, folders[name], gains, output)
    files["report.md"] = "\n\n".join(parts) + "\n"
    inputs = {name: fingerprint(folder / "scores.csv") for name, folder in folders.items()}
    write_report("compare_mixtures", config, inputs, files, optional=("spiders.png", "spiders.svg"))


def read_gains(name: str, folder: Path) -> pd.DataFrame:
    """[objectives, runs but the base]: the gains in a report of evaluate_armorm, None where all base scores are equal.

    Raises:
        DataError: no scores.csv, or not one that evaluate_armorm writes, or of a single run.
    """
    path = folder / "scores.csv"
    if not path.is_file():
        raise DataError(f"mixture {name}: {path}: no such file; src/evaluate_armorm.py writes it")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:
        raise DataError(f"{path}: not a CSV file ({reason(error)})") from error
    if tuple(table) != SCORES:
        raise DataError(f"{path}, row 1: not the columns that src/evaluate_armorm.py writes ({', '.join(SCORES)})")
    numbers = table[["gain_sd", "ci_low", "ci_high"]].apply(pd.to_numeric, errors="coerce")
    odd = (numbers.isna() & (table[numbers.columns] != "")).any(axis=1)
    if odd.any():
        raise DataError(f"{path}, row {odd.idxmax() + 2}: a gain is not a number")
    runs = list(table["run"].unique())[1:]
    if not runs:
        raise DataError(f"mixture {name}: {path} has only one run; gains need a base and a run")
    ends = numbers.astype(object).where(numbers.notna(), None)
    table["gain"] = [None if row[0] is None else Estimate(*row) for row in ends.itertuples(index=False)]
    gains = table.drop_duplicates(["run", "objective"], keep="last").pivot(index="objective", columns="run", values="gain")
    return gains.loc[sort_objectives(set(gains.index)), runs]


def _spokes(gains: pd.DataFrame) -> list[str]:
    """Those of the paper's five that have gains; if fewer than three, all objectives that have gains."""
    have = list(gains.dropna().index)
    paper = [name for name in SPOKES if name in have]
    return paper if len(paper) >= 3 else have


def _section(name: str, folder: Path, gains: pd.DataFrame, output: Path) -> list[str]:
    theirs = {method.upper(): dict(zip(SPOKES, values, strict=True)) for method, values in PUBLISHED.get(name, {}).items()}
    columns = {"objective": [f"`{flag_name(objective)}`" for objective in gains.index]}
    for run in gains:
        columns[run] = [interval(gain) for gain in gains[run]]
        if published := theirs.get(run.upper()):
            columns[f"{run}, published"] = [f"{published[of]:+.2f}" if of in published else "" for of in gains.index]
    link = os.path.relpath(folder / "report.md", output)
    trained_on = section(read_manifest(folder), "evaluate_armorm", "trained_mixture", "weights")
    text = f"Trained on {', '.join(f'`{flag_name(objective)}`' for objective in trained_on)}. " if trained_on else ""
    text += f"Full report, with win rates and answer lengths: [{link}](<{link}>)."
    table = markdown_table(list(columns), list(zip(*columns.values(), strict=True)))
    return [f"## {name.replace('_', ' + ')}", text, table]


def spiders(results: dict[str, pd.DataFrame]) -> Figure:
    """Spider plots as in the paper: a panel per mixture, a polygon per method; ours above, the published ones below.

    Our panels share one scale, the published ones another. A published method has the style of our run of the same name,
    ignoring case.

    Args:
        results: {mixture: gains, see read_gains}.
    """
    ours = {name: gains.loc[_spokes(gains)] for name, gains in results.items()}
    theirs = {
        name: pd.DataFrame(PUBLISHED[name], SPOKES).map(lambda value: Estimate(value, None, None))
        for name in results
        if name in PUBLISHED
    }
    labels = {method.upper(): method for rows in (theirs, ours) for gains in rows.values() for method in gains}
    order = dict.fromkeys(method.upper() for rows in (ours, theirs) for gains in rows.values() for method in gains)
    looks = spider.run_styles(["base (0)", *(labels[method] for method in order)])
    figure, axes_RC = spider.panels(2 if theirs else 1, len(results))
    for axes_C, rows, what in zip(axes_RC, (ours, theirs), ("ours: gain in sd of the base", "published"), strict=False):
        limits = spider.gain_limits((gain for gains in rows.values() for gain in gains.to_numpy().flat), _SMALLEST_RIM)
        for axes, name in zip(axes_C, results, strict=True):
            if name not in rows:
                axes.remove()
                continue
            values = {labels[method.upper()]: list(rows[name][method]) for method in rows[name]}
            spider.draw_gains(axes, [spider.axis_label(spoke) for spoke in rows[name].index], values, looks, limits)
            axes.set_title(f"{name.replace('_', ' + ')}\n{what}", pad=48)
    spider.legend(figure, looks, columns=2 * len(results) + 1)
    return figure

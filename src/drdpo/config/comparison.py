"""Flags of src/compare_openllm.py and src/compare_mixtures.py, the last steps of the experiments."""

from dataclasses import dataclass
from typing import Literal

from drdpo.cli import flag


@dataclass(frozen=True)
class CompareOpenllmConfig:
    """Leaderboard results of several models, side by side and beside the published ones."""

    runs: list[str] = flag(
        "NAME=FOLDER words, output folders of openllm_eval.slurm; GROUP/NAME=FOLDER puts a run into a table of its group, "
        "e.g. 1B/base=outputs/openllm/base"
    )
    output_path: str = flag("folder for report.md, leaderboard.csv, heatmap.png and heatmap.svg")
    published: Literal["auto", "none", "1B", "3B", "8B"] = flag(
        "the authors' numbers to show beside ours; auto is those of the size that a GROUP names", "auto"
    )


@dataclass(frozen=True)
class CompareMixturesConfig:
    """Gains of several training mixtures, beside the published ones."""

    reports: list[str] = flag("NAME=FOLDER words, output folders of evaluate_armorm.py, one for each training mixture")
    output_path: str = flag("folder for report.md, spiders.png and spiders.svg")
    published: bool = flag("show the authors' numbers beside the mixtures that bear one of their names", True)

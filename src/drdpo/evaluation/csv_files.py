"""The CSV files of a report: the figures at full precision, one line each."""

import csv
from typing import IO

from drdpo.evaluation.resampling import Figure
from drdpo.evaluation.runs import Run
from drdpo.evaluation.statistics import ALPHAS, ANSWERS, Comparison, mean, spread

SCORES = ("run", "objective", "prompts", "mean", "sd", "paired_prompts", "gain_sd", "ci_low", "ci_high")
PAIRS = (
    "run", "against", "objective", "paired_prompts", "difference_sd", "ci_low", "ci_high", "win_rate", "win_low", "win_high",
)  # fmt: skip
ANSWERS_OF_RUN = ("run", "seed", "folder", "answers", "tokens", "repeated", "cut")


def write_scores(stream: IO[str], runs: list[Run], comparison: Comparison) -> None:
    """One line a run and objective; the gain's columns are empty for the first run and where there is no gain."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(SCORES)
    for run in runs:
        for objective in comparison.objectives:
            gain = comparison.gains.get(run.name, {}).get(objective)
            paired = [len(comparison.common), *_numbers(gain)] if gain else ["", "", "", ""]
            writer.writerow([run.name, objective, len(run.prompts), mean(run, objective), spread(run, objective), *paired])


def write_pairs(stream: IO[str], runs: list[Run], comparison: Comparison) -> None:
    """One line a pair of runs and objective, differences in the first run's standard deviations."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(PAIRS)
    for (run, against), by_name in comparison.pairs.items():
        for objective, pair in by_name.items():
            difference = _numbers(pair.difference) if pair.difference else ["", "", ""]
            line = [run, against, objective, len(comparison.common), *difference, *_numbers(pair.win_rate)]
            writer.writerow(line)


def write_answers(stream: IO[str], runs: list[Run], comparison: Comparison) -> None:
    """One line a run and seed: mean tokens of an answer, share of repeated 4-grams, share of answers cut by length."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(ANSWERS_OF_RUN)
    for run in runs:
        for number, member in enumerate(run.members, start=1):
            means = [float(getattr(member, f"{name}_P").mean()) for name in ANSWERS]
            writer.writerow([run.name, number, member.folder, member.completions, *means])


def write_sweep(stream: IO[str], runs: list[Run], comparison: Comparison) -> None:
    """One line a run and alpha: the gain in the mixture alpha r1 + (1 - alpha) r2 of z-scores."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("run", "alpha", "gain", "ci_low", "ci_high"))
    for run, figures in comparison.sweep.items():
        for alpha, figure in zip(ALPHAS, figures, strict=True):
            writer.writerow([run, alpha, *_numbers(figure)])


def _numbers(figure: Figure) -> list[float | None]:
    return [figure.value, figure.low, figure.high]

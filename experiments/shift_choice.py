"""Which strength of a method preference_shift.sh goes on with: that of the largest gain on the validation prompts.

    python experiments/shift_choice.py OUTPUT_PATH METHOD VALUE...

compares the answers of OUTPUT_PATH/choice/METHOD_VALUE to the validation prompts, for every value, with the base model's,
and prints the value of the largest gain in the training objective: the mean over --first and --second of the mean over
prompts of (score - the base's), in standard deviations of the base's scores. The first of equals. No other objective is
looked at.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from drdpo.errors import DataError, UsageError, one_line_errors
from drdpo.evaluation.runs import choose_objectives, common_prompts, load_run
from drdpo.evaluation.statistics import scores, spread


def read_settings(folder: Path) -> dict[str, str]:
    """{flag: value} of the file that the script writes.

    Raises:
        DataError: it is missing.
    """
    path = folder / "settings"
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the --output_path of preference_shift.sh")
    return dict(line.split("=", 1) for line in path.read_text(encoding="utf-8").splitlines() if "=" in line)


def validation(folder: Path, run: str, trained_on: list[str]) -> float:
    """Gain of a run in the training objective on the validation prompts, in standard deviations of the base's scores.

    Args:
        folder: the script's output folder.
        run: name of the run's folder in choice/.
        trained_on: the objectives that training saw, of equal weight.
    """
    base = load_run("base", folder / "data" / "completions", "test")
    trained = load_run(run, folder / "choice" / run / "validation", "test")
    common = common_prompts([base, trained])
    names = choose_objectives([base, trained], trained_on)
    for name in names:
        if spread(base, name) == 0:
            raise DataError(f"{base.folder}: all scores of {name} are equal, so there is no gain in it; sample more prompts")
    gains = [(scores(trained, name, common) - scores(base, name, common)).mean() / spread(base, name) for name in names]
    return float(sum(gains) / len(gains))


def choose(folder: Path, method: str, values: list[str]) -> str:
    """The value whose run is best by `validation`; the first of equals."""
    settings = read_settings(folder)
    return max(values, key=lambda value: validation(folder, f"{method}_{value}", [settings["first"], settings["second"]]))


def main() -> None:
    if len(sys.argv) < 4:
        raise UsageError("give OUTPUT_PATH METHOD VALUE...")
    print(choose(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Which strength of a method preference_shift.sh goes on with: that of the highest accuracy on validation pairs.

    python experiments/shift_choice.py FOLDER METHOD VALUE...

reads metrics.jsonl and config.json in FOLDER/METHOD_VALUE of every value and prints the chosen one. Validation accuracy
is the one figure that means the same under every loss and beta. Where two runs have the same, the larger mean margin in
nats counts, h = (reward of chosen - reward of rejected) / beta, then the first of the values given.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from drdpo.errors import DataError, UsageError, one_line_errors
from drdpo.records import read_rows


def validation(folder: Path) -> tuple[float, float]:
    """Accuracy on the validation pairs at the end of a run, and their mean margin in nats.

    Raises:
        DataError: the run was not evaluated at its end, or has no config.json.
    """
    rows = [row for _, row in read_rows(folder / "metrics.jsonl")]
    last: dict[str, Any] = rows[-1] if rows else {}
    if "eval_accuracy" not in last:
        raise DataError(f"{folder / 'metrics.jsonl'}: the last row has no eval_accuracy; did the run end?")
    try:
        beta = json.loads((folder / "config.json").read_text(encoding="utf-8"))["beta"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder / 'config.json'}: no beta to be read ({error})") from error
    return float(last["eval_accuracy"]), float(last["eval_margin"]) / float(beta)


def choose(folder: Path, method: str, values: list[str]) -> str:
    """The value whose run is best by `validation`; the first of equals."""
    return max(values, key=lambda value: validation(folder / f"{method}_{value}"))


def main() -> None:
    if len(sys.argv) < 4:
        raise UsageError("give FOLDER METHOD VALUE...")
    print(choose(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))


if __name__ == "__main__":
    with one_line_errors():
        main()

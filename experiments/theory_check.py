"""The sample-size scaling of DPO's robust estimators on a log-linear toy policy, beside the paper's rate.

The error is |theta_n - theta_infinity|, each estimator against its own target, the minimiser of its objective on the whole
population. The paper (2502.01930) proves for WDPO and KLDPO an upper bound of order n^(-1/4) on it. A bound does not say
whether it is tight; this script measures the exponent.

    PYTHONPATH=src python experiments/theory_check.py [--output=docs/theory_check] [--populations=5] [--replicates=400]

writes <output>.json and <output>.png and prints the table of docs/theory_check.md.

Shape suffixes: N sample sizes, P populations, R replicates.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import toy_estimators as toy

from drdpo.errors import UsageError, one_line_errors
from drdpo.folder import atomic_file

ROOT = Path(__file__).resolve().parents[1]

SIZES = tuple(2**k for k in range(9, 18))
DRAWS = 1000
"""Bootstrap draws of an interval."""
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7")
COLUMNS = (
    "estimator",
    "exponent [95%]",
    "least and largest of the populations",
    "error / delta method [95%]",
    "target moved by",
)


def measure(populations: int, replicates: int) -> dict[str, dict[str, Any]]:
    """Per estimator: `errors` [P, N, R], the delta method's `constants` [P], `targets` [P][width]."""
    found: dict[str, dict[str, Any]] = {name: {"errors": [], "constants": [], "targets": []} for name in toy.ESTIMATORS}
    for seed in range(populations):
        population = toy.draw_population(seed)
        numbers = np.random.default_rng([seed, 1])
        samples = [numbers.multinomial(n, population.shares_A, size=replicates) / n for n in SIZES]
        for name, estimator in toy.ESTIMATORS.items():
            start_1D = toy.start_of(estimator, 1)
            (target_D,) = toy.minimise(estimator, population.shares_A[None], start_1D, population.features_AD)
            start_RD = np.repeat(target_D[None], replicates, 0)
            ends = [toy.minimise(estimator, shares_RA, start_RD, population.features_AD) for shares_RA in samples]
            errors_NR = [np.linalg.norm((end_RD - target_D)[:, : toy.WIDTH], axis=1) for end_RD in ends]
            found[name]["errors"].append(errors_NR)
            found[name]["constants"].append(toy.asymptotic_rms(estimator, population, target_D))
            found[name]["targets"].append(target_D[: toy.WIDTH].tolist())
    return found


def exponents(errors_PNR: np.ndarray) -> np.ndarray:
    """[P] least-squares slope of log root-mean-square error over log n."""
    rms_PN = np.sqrt((errors_PNR**2).mean(axis=2))
    return np.polyfit(np.log(SIZES), np.log(rms_PN).T, 1)[0]


def summarise(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Exponents, the ratio to the delta method at the largest n, and their 95% intervals over replicates (bootstrap).

    The populations are fixed: the intervals are for their mean.
    """
    base_PD = np.array(found["DPO"]["targets"])
    numbers, rows = np.random.default_rng(0), {}
    for name, figures in found.items():
        errors_PNR, constants_P = np.array(figures["errors"]), np.array(figures["constants"])
        slopes, ratios, rms = [], [], []
        for _ in range(DRAWS):
            # Each size has its own samples, so replicates are resampled per size and population.
            rows_PNR = numbers.integers(0, errors_PNR.shape[2], size=errors_PNR.shape)
            drawn_PNR = np.take_along_axis(errors_PNR, rows_PNR, axis=2)
            slopes.append(exponents(drawn_PNR).mean())
            ratios.append(_ratios(drawn_PNR, constants_P)[-1])
            rms.append(np.sqrt((drawn_PNR**2).mean(axis=(0, 2))))
        shift_P = np.linalg.norm(np.array(figures["targets"]) - base_PD, axis=1) / np.linalg.norm(base_PD, axis=1)
        rows[name] = {
            "exponent": float(exponents(errors_PNR).mean()),
            "exponent_interval": _interval(slopes),
            "exponents": exponents(errors_PNR).tolist(),
            "ratio": float(_ratios(errors_PNR, constants_P)[-1]),
            "ratios": _ratios(errors_PNR, constants_P).tolist(),
            "ratio_interval": _interval(ratios),
            "target_shift": float(shift_P.mean()),
            "rms": np.sqrt((errors_PNR**2).mean(axis=(0, 2))).tolist(),
            "rms_intervals": [_interval(column) for column in zip(*rms, strict=True)],
        }
    return rows


def _ratios(errors_PNR: np.ndarray, constants_P: np.ndarray) -> np.ndarray:
    """[N] sqrt(n) rms error over the delta method's constant, mean over populations."""
    rms_PN = np.sqrt((errors_PNR**2).mean(axis=2))
    return (np.sqrt(SIZES) * rms_PN / constants_P[:, None]).mean(axis=0)


def _interval(values: Any) -> list[float]:
    return np.percentile(np.array(values), [2.5, 97.5]).tolist()


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name, row in rows.items():
        (low, high), (small, large) = row["exponent_interval"], row["ratio_interval"]
        lines.append(
            f"| {name} | {row['exponent']:.3f} [{low:.3f}, {high:.3f}] | {min(row['exponents']):.3f}, "
            f"{max(row['exponents']):.3f} | {row['ratio']:.2f} [{small:.2f}, {large:.2f}] | {row['target_shift']:.0%} |"
        )
    return "\n".join(lines)


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Left: error over n with the two rates. Right: exponents with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    sizes = np.array(SIZES)
    top = 1.6 * max(row["rms"][0] for row in rows.values())
    rates = ((-0.25, "--", "order n$^{-1/4}$, the paper's bound"), (-0.5, ":", "order n$^{-1/2}$"))
    for rate, style, label in rates:
        left.plot(sizes, top * (sizes / sizes[0]) ** rate, style, color="#777777", label=f"{label} (height is arbitrary)")
        right.axvline(rate, linestyle=style, color="#777777")
    for number, ((name, row), color) in enumerate(zip(rows.items(), COLORS, strict=True)):
        low, high = np.array(row["rms_intervals"]).T
        left.fill_between(sizes, low, high, color=color, alpha=0.25, linewidth=0)
        left.plot(sizes, row["rms"], "o-", markersize=3, linewidth=1, color=color, label=name)
        start, end = row["exponent_interval"]
        right.plot([start, end], [number, number], color=color, linewidth=2)
        right.plot(row["exponent"], number, "o", color=color)
        right.plot(row["exponents"], [number + 0.25] * len(row["exponents"]), "|", color=color, markersize=7)
    left.set(xscale="log", yscale="log", xlabel="pairs n", ylabel="root mean square of |theta_n - theta_infinity|")
    left.set_ylim(bottom=min(row["rms"][-1] for row in rows.values()) / 15)
    left.legend(fontsize=7.5, loc="lower left")
    right.set(xlabel="measured exponent", yticks=range(len(rows)), yticklabels=list(rows), xlim=(-0.6, -0.2))
    right.set_xticks([-0.6, -0.5, -0.4, -0.3, -0.2])
    right.invert_yaxis()
    right.set_title("dot and bar: mean, 95%; ticks: each population", fontsize=9)
    with atomic_file(path, "wb") as stream:
        figure.savefig(stream, dpi=130, format="png", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "theory_check", help="path without extension")
    parser.add_argument("--populations", type=int, default=5, help="each with its own features and annotators")
    parser.add_argument("--replicates", type=int, default=400, help="samples per size and population")
    given = parser.parse_args()
    if given.populations < 1:
        raise UsageError(f"--populations={given.populations} must be at least 1")
    if given.replicates < 2:
        raise UsageError(f"--replicates={given.replicates} must be at least 2 for an interval")
    if not given.output.parent.is_dir():
        raise UsageError(f"--output={given.output}: no folder {given.output.parent}")
    rows = summarise(measure(given.populations, given.replicates))
    with atomic_file(given.output.with_name(given.output.name + ".json")) as stream:
        settings = {"populations": given.populations, "replicates": given.replicates, "sizes": SIZES, "beta": toy.BETA,
                    "tau": toy.TAU, "kl_radius": toy.KL_RADIUS, "rho": toy.RHO}  # fmt: skip
        json.dump({"settings": settings, "estimators": rows}, stream, indent=1)
    draw(rows, given.output.with_name(given.output.name + ".png"))
    print(table(rows))


if __name__ == "__main__":
    with one_line_errors():
        main()

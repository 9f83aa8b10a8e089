"""The plot of the r*(alpha) sweep: trained on one mixture of two objectives, evaluated on all of them.

As in the appendix of arXiv 2502.01930: r*(alpha) = alpha r1 + (1 - alpha) r2, training at one alpha, evaluation from 0 to 1.
"""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas

from drdpo.evaluation.statistics import ALPHAS, Comparison
from drdpo.evaluation.style import BASE_STYLE, RC, run_styles
from drdpo.folder import atomic_file
from drdpo.objectives import flag_name


def draw_sweep(folder: Path, comparison: Comparison, sweep: list[str], trained_at: float, base: str) -> None:
    """Write alpha.png and alpha.svg.

    Args:
        folder: where to.
        comparison: with a sweep.
        sweep: r1 and r2.
        trained_at: the alpha that training used.
        base: name of the first run, the line at zero.
    """
    styles = run_styles([base, *comparison.sweep])
    with rc_context(RC):
        canvas = Canvas(figsize=(7.6, 5.2), layout="constrained")
        axes = canvas.add_subplot()
        axes.axhline(0, color=BASE_STYLE.color, linestyle=BASE_STYLE.line, linewidth=1.4, label=base)
        axes.axvline(trained_at, color="#999999", linestyle=":", linewidth=1.4)
        axes.annotate(
            " trained here", (trained_at, 0.01), xycoords=("data", "axes fraction"), fontsize=9, color="#666666", va="bottom"
        )
        for run, figures in comparison.sweep.items():
            look = styles[run]
            axes.plot(
                ALPHAS, [figure.value for figure in figures], color=look.color, marker=look.marker, markersize=5, label=run
            )
            ends = [(figure.low, figure.high) for figure in figures if figure.low is not None and figure.high is not None]
            if len(ends) == len(ALPHAS):
                low, high = zip(*ends, strict=True)
                axes.fill_between(ALPHAS, low, high, color=look.color, alpha=0.13, linewidth=0)
        r1, r2 = (flag_name(name) for name in sweep)
        axes.set_xlabel(f"alpha: all {r2} at 0, all {r1} at 1")
        axes.set_ylabel(f"gain over {base} in r*(alpha), z-scores\n(bands: 95% confidence)")
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        canvas.legend(loc="outside lower center", ncols=min(1 + len(comparison.sweep), 6), frameon=False)
        for suffix in ("png", "svg"):
            with atomic_file(folder / f"alpha.{suffix}", "wb") as stream:
                canvas.savefig(stream, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)

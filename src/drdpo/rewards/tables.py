"""Tables of fitted heads' figures, in markdown, aligned so that they read well in a terminal too."""

from drdpo.rewards.baselines import Claim, Comparison
from drdpo.rewards.choice import Candidate
from drdpo.rewards.heldout import FileFigures, ObjectiveFigures


def choice_table(candidates: list[Candidate], chosen: Candidate, objectives: list[str]) -> str:
    """The layers and poolings that were compared on the training answers, with shares of variance over their folds."""
    rows = [
        [
            f"{candidate.layer}", candidate.pooling + (" (chosen)" if candidate.place == chosen.place else ""),
            f"{candidate.score:.3f}", f"{candidate.behind:.3f} ({candidate.standard_error:.3f})",
            *(f"{value:.3f}" for value in candidate.explained_K),
        ]
        for candidate in candidates
    ]  # fmt: skip
    return _table(["layer", "pooling", "mean", "behind the best (standard error)", *objectives], rows, left=(1,))


def claim_table(claims: list[Claim]) -> str:
    """Objectives against the trivial baselines, over the folds of the training prompts."""
    head = [
        "objective", "rows", "Spearman", "length's", "error", "constant's error", "length's error",
        "lead in Spearman (standard error)", "earns a head",
    ]  # fmt: skip
    rows = [
        [*_comparison(claim.against)[:-1], f"{claim.lead:.3f} ({claim.standard_error:.3f})", "yes" if claim.holds else "no"]
        for claim in claims
    ]
    return _table(head, rows, left=(0, 8))


def objective_table(figures: list[ObjectiveFigures]) -> str:
    """Objectives on the held-out answers."""
    head = [
        "objective", "rows", "ridge alpha", "Pearson (95% interval)", "Spearman (95% interval)", "length's Spearman",
        "error", "constant's error", "length's error", "beats both",
    ]  # fmt: skip
    rows = []
    for f in figures:
        name, count, rank, *rest = _comparison(f.against)
        intervals = [f"{f.pearson:.3f} {_interval(f.pearson_interval)}", f"{rank} {_interval(f.spearman_interval)}"]
        rows.append([name, count, f"{f.alpha:.4g}", *intervals, *rest])
    return _table(head, rows, left=(0, 9))


def pair_table(figures: FileFigures) -> str:
    """Pair accuracies and correlations with quality in one held-out file."""
    rows = [[f.name, f"{f.accuracy:.3f} {_interval(f.interval)}", f"{f.spearman:.3f}"] for f in figures.scores]
    return _table(["score", "pair accuracy (95% interval)", "Spearman over all answers"], rows, left=(0,))


def _comparison(found: Comparison) -> list[str]:
    figures = (found.spearman, found.length_spearman, found.error, found.constant_error, found.length_error)
    return [found.objective, str(found.rows), *(f"{x:.3f}" for x in figures), "yes" if found.beats_baselines else "no"]


def _interval(interval: tuple[float, float]) -> str:
    return f"({interval[0]:.3f} to {interval[1]:.3f})"


def _table(head: list[str], rows: list[list[str]], left: tuple[int, ...]) -> str:
    """A markdown table whose columns are aligned to the right but for `left`."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    sides = ["<" if column in left else ">" for column in range(len(head))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)) + " |"

    rule = ["-" * w if s == "<" else "-" * (w - 1) + ":" for s, w in zip(sides, widths, strict=True)]
    return "\n".join([line(head), "| " + " | ".join(rule) + " |", *map(line, rows)])

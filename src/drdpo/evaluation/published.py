"""What the paper's authors published, for the column beside ours: arXiv 2502.01930 and the README of its repository."""

from dataclasses import dataclass

LEADERBOARD: dict[str, dict[str, tuple[float, ...]]] = {
    "1B": {
        "SFT": (0.56, 0.35, 0.08, 0.24, 0.33, 0.17),
        "DPO epoch 2": (0.48, 0.35, 0.08, 0.26, 0.35, 0.17),
        "DPO epoch 4": (0.48, 0.33, 0.08, 0.25, 0.33, 0.17),
        "DPO epoch 6": (0.48, 0.33, 0.06, 0.26, 0.33, 0.17),
        "KLDPO tau=0.05": (0.56, 0.35, 0.09, 0.25, 0.32, 0.18),
        "WDPO rho=0.01": (0.52, 0.35, 0.10, 0.25, 0.34, 0.19),
    },
    "3B": {
        "DPO": (0.55, 0.45, 0.08, 0.24, 0.36, 0.30),
        "KLDPO tau=0.005": (0.74, 0.46, 0.19, 0.26, 0.35, 0.32),
        "WDPO rho=0.005": (0.62, 0.45, 0.06, 0.25, 0.36, 0.30),
    },
    "8B": {
        "DPO": (0.62, 0.50, 0.03, 0.29, 0.44, 0.33),
        "KLDPO tau=0.005": (0.72, 0.51, 0.24, 0.29, 0.34, 0.37),
        "KLDPO tau=0.01": (0.75, 0.51, 0.22, 0.31, 0.36, 0.37),
    },
}
"""{size: {method: raw values, 0 to 1, in the order of leaderboard_scores.COLUMNS}}: size-weighted means of the harness."""

SPOKES = (
    "helpsteer-helpfulness", "helpsteer-correctness", "helpsteer-coherence", "ultrafeedback-honesty", "ArmoRM",
)  # fmt: skip
"""The spokes of the paper's spider plots, labelled there Helpfulness, Correctness, Coherence, Honesty and ArmoRM."""


@dataclass(frozen=True)
class Mixture:
    """One of the paper's spider plots."""

    weights: dict[str, float]
    """{objective: its weight in the training reward}."""
    published: dict[str, tuple[float, ...]]
    """{method: values in the order of SPOKES}, read off the picture, +-0.01."""


MIXTURES: dict[str, Mixture] = {
    "truthfulness_complexity": Mixture(
        {"ultrafeedback-truthfulness": 0.5, "helpsteer-complexity": 0.5},
        {
            "DPO": (0.20, 0.20, 0.19, 0.23, 0.07),
            "KLDPO": (0.33, 0.33, 0.31, 0.34, 0.15),
            "WDPO": (0.37, 0.37, 0.37, 0.37, 0.16),
        },
    ),
    "helpfulness_coherence": Mixture(
        {"ultrafeedback-helpfulness": 0.5, "helpsteer-coherence": 0.5},
        {
            "DPO": (0.31, 0.29, 0.31, 0.29, 0.15),
            "KLDPO": (0.37, 0.36, 0.36, 0.34, 0.17),
            "WDPO": (0.41, 0.40, 0.44, 0.39, 0.20),
        },
    ),
    "correctness_helpfulness": Mixture(
        {"helpsteer-correctness": 0.5, "helpsteer-helpfulness": 0.5},
        {
            "DPO": (0.22, 0.20, 0.17, 0.18, 0.07),
            "KLDPO": (0.36, 0.34, 0.32, 0.34, 0.17),
            "WDPO": (0.42, 0.41, 0.41, 0.38, 0.21),
        },
    ),
}
"""{name: the mixtures of the paper's three spider plots}."""

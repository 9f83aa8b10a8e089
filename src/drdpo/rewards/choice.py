"""Which layer of the backbone stage 1 reads, and how it pools the answer, decided on the training answers alone.

The rule: a candidate's score is the mean over the objectives of the share of the ratings' variance that ridge regressions
explain for prompts that they were not fitted on, which is what ridge regression minimises, and what counts where scores are
mixed by value. Of the candidates whose score is within one standard error of the best one's (of the difference, by
resampling prompts), the shallowest is taken: it costs the least to score with. Of two poolings of this layer, the better.
"""

from dataclasses import dataclass, replace

import numpy as np

from drdpo.rewards.ridge import fit_ridges
from drdpo.rewards.scores import Floats
from drdpo.rewards.statistics import bootstrap

SAMPLES = 200
"""Bootstrap samples for a standard error."""


@dataclass(frozen=True)
class Candidate:
    """A layer and a pooling, with how well heads on it predict the ratings of other prompts."""

    layer: int
    pooling: str
    explained_K: tuple[float, ...]
    """Per objective the share of the variance, over the folds of the training prompts."""
    behind: float = 0.0
    """The best candidate's mean less this one's."""
    standard_error: float = 0.0
    """Of `behind`."""

    @property
    def place(self) -> tuple[int, str]:
        """Layer and pooling."""
        return self.layer, self.pooling

    @property
    def score(self) -> float:
        """The mean share."""
        return float(np.mean(self.explained_K))


def choose(
    features: dict[tuple[int, str], Floats], labels_NK: Floats, prompt_N: np.ndarray, fold_N: np.ndarray, seed: int
) -> tuple[Candidate, list[Candidate]]:
    """The layer and pooling by the rule above, and all candidates in the order of `features`.

    Args:
        features: {(layer, pooling): [N, D]}.
        labels_NK: on ArmoRM's scale; NaN where there is none.
        prompt_N: prompt of each row; whole prompts are resampled.
        fold_N: from heads.prompt_folds.
        seed: of the resampling.
    """
    predicted = {
        place: np.stack([ridge.held_out_N for ridge in fit_ridges(features_ND, labels_NK, fold_N)], axis=1)
        for place, features_ND in features.items()
    }

    def explained(place: tuple[int, str], rows: np.ndarray) -> list[float]:
        return [_explained(predicted[place][rows, column], labels_NK[rows, column]) for column in range(labels_NK.shape[1])]

    every = np.arange(len(prompt_N))
    found = [Candidate(*place, tuple(explained(place, every))) for place in features]
    best = max(found, key=lambda candidate: candidate.score)

    def measured(candidate: Candidate) -> Candidate:
        def behind(rows: np.ndarray) -> float:
            return float(np.mean(explained(best.place, rows)) - np.mean(explained(candidate.place, rows)))

        error = 0.0 if candidate is best else float(np.std(bootstrap(behind, prompt_N, seed, SAMPLES)))
        return replace(candidate, behind=best.score - candidate.score, standard_error=error)

    candidates = [measured(candidate) for candidate in found]
    near = [candidate for candidate in candidates if candidate.behind <= candidate.standard_error]
    return min(near, key=lambda candidate: (candidate.layer, candidate.behind)), candidates


def _explained(predicted_N: Floats, label_N: Floats) -> float:
    """1 - error / variance; 0 for the mean of the labels, and where they do not vary."""
    there = ~np.isnan(label_N)
    variance = float(label_N[there].var()) if there.any() else 0.0
    return 1 - float(np.square(predicted_N[there] - label_N[there]).mean()) / variance if variance > 0 else 0.0

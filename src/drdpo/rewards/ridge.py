"""Ridge regression without intercept, several labels on one set of features, validated over folds of the prompts.

Shape suffixes: N answers, D width, K objectives.
"""

from typing import NamedTuple

import numpy as np

from drdpo.rewards.scores import Floats

ALPHAS = tuple(float(alpha) for alpha in np.logspace(-4, 4, 17))
"""The paper's grid of ridge penalties (arXiv 2406.12845)."""


class Ridge(NamedTuple):
    """One objective's linear head."""

    weight_D: Floats
    alpha: float
    error: float
    """Mean squared error over the validation folds."""
    held_out_N: Floats
    """Predictions over the validation folds, each by a fit without the row's fold; NaN where there is no label."""


class RidgeFolds:
    """Ridge regressions on features whose rows lie in folds.

    X'X is decomposed once for each set of folds that is left out, whatever the number of labels and penalties.

    Args:
        features_ND: float64.
        fold_N: fold of each row, from heads.prompt_folds.
    """

    def __init__(self, features_ND: Floats, fold_N: np.ndarray) -> None:
        self.features_ND = features_ND
        self.fold_N = fold_N
        self.folds = [int(fold) for fold in np.unique(fold_N)]
        self._grams = {fold: features_ND[fold_N == fold].T @ features_ND[fold_N == fold] for fold in self.folds}
        self._spectra: dict[frozenset[int], tuple[Floats, Floats]] = {}

    def fit(self, labels_N: Floats, without: int | None = None) -> Ridge:
        """A head fitted on all folds but `without`, its penalty chosen by the error over these folds.

        The grid is 1e-4 ... 1e4; where the best penalty is at an end, the grid goes on there.
        """
        outer = frozenset() if without is None else frozenset({without})
        folds = [fold for fold in self.folds if fold not in outer]
        projected = {fold: self._project(outer | {fold}, labels_N) for fold in folds}
        rows_N = np.isin(self.fold_N, folds)

        def predict(alpha: float) -> Floats:
            held_out_N = np.full(len(labels_N), np.nan)
            for fold in folds:
                there = self.fold_N == fold
                held_out_N[there] = self.features_ND[there] @ self._solve(outer | {fold}, projected[fold], alpha)
            return held_out_N

        def error(alpha: float) -> float:
            return float(np.square(labels_N - predict(alpha))[rows_N].mean())

        errors = {alpha: error(alpha) for alpha in ALPHAS}
        while (best := min(errors, key=lambda alpha: errors[alpha])) in (min(errors), max(errors)) and 1e-12 < best < 1e12:
            further = best / 10**0.5 if best == min(errors) else best * 10**0.5
            errors[further] = error(further)
        weight_D = self._solve(outer, self._project(outer, labels_N), best)
        return Ridge(weight_D, best, errors[best], predict(best))

    def _solve(self, left_out: frozenset[int], projected_D: Floats, alpha: float) -> Floats:
        values_D, vectors_DD = self._spectrum(left_out)
        return np.asarray(vectors_DD @ (projected_D / (values_D + alpha)))

    def _project(self, left_out: frozenset[int], labels_N: Floats) -> Floats:
        """X'y of the folds that are not left out, in the basis of their X'X: every penalty is then a division."""
        rows = ~np.isin(self.fold_N, list(left_out))
        return np.asarray(self._spectrum(left_out)[1].T @ (self.features_ND[rows].T @ labels_N[rows]))

    def _spectrum(self, left_out: frozenset[int]) -> tuple[Floats, Floats]:
        if left_out not in self._spectra:
            gram_DD = sum(gram for fold, gram in self._grams.items() if fold not in left_out)
            values_D, vectors_DD = np.linalg.eigh(gram_DD)
            self._spectra[left_out] = np.clip(values_D, 0.0, None), vectors_DD
        return self._spectra[left_out]


def fit_ridges(features_ND: Floats, labels_NK: Floats, fold_N: np.ndarray) -> list[Ridge]:
    """One head per objective, each fitted on the rows that have its label.

    Args:
        features_ND: what stage 1 reads.
        labels_NK: ratings on ArmoRM's scale; NaN where there is none.
        fold_N: from heads.prompt_folds.
    """
    ridges = []
    for there_N, folds, label_N in _by_label(features_ND, labels_NK, fold_N):
        ridge = folds.fit(label_N[there_N])
        held_out_N = np.full(len(label_N), np.nan)
        held_out_N[there_N] = ridge.held_out_N
        ridges.append(ridge._replace(held_out_N=held_out_N))
    return ridges


def cross_fitted(features_ND: Floats, labels_NK: Floats, fold_N: np.ndarray) -> Floats:
    """[N, K] rewards, each by a head that never saw the row's prompt, nor chose its penalty by it."""
    rewards_NK = np.full(labels_NK.shape, np.nan)
    for column, (there_N, folds, label_N) in enumerate(_by_label(features_ND, labels_NK, fold_N)):
        for fold in np.unique(fold_N):
            weight_D = folds.fit(label_N[there_N], without=int(fold)).weight_D
            rewards_NK[fold_N == fold, column] = features_ND[fold_N == fold] @ weight_D
    return rewards_NK


def _by_label(features_ND: Floats, labels_NK: Floats, fold_N: np.ndarray) -> list[tuple[np.ndarray, RidgeFolds, Floats]]:
    """Per objective: which rows have its label, the folds of these rows (shared where they are the same), its labels."""
    shared: dict[bytes, RidgeFolds] = {}
    found = []
    for label_N in labels_NK.T:
        there_N = ~np.isnan(label_N)
        if there_N.tobytes() not in shared:
            shared[there_N.tobytes()] = RidgeFolds(features_ND[there_N], fold_N[there_N])
        found.append((there_N, shared[there_N.tobytes()], label_N))
    return found

"""Both stages of a reward model, fitted on the training answers' features.

    stage 1   per objective a ridge regression without intercept; an objective that does not beat a constant, and the
              answer's length by more than two standard errors, is dropped
    stage 2   the verbosity-debiased transform, and a gate fitted by Bradley-Terry on answers to the same prompt

Everything is decided over folds of the training prompts. The comparison with the baselines and both parts of stage 2 see
CROSS-FITTED stage-1 rewards (each predicted by heads that were fitted, and their penalty chosen, without its prompt):
rewards of the very answers that a head was fitted on are too good, and a gate would trust them.
"""

from dataclasses import dataclass

import numpy as np
import torch

from drdpo.config import FitHeadsConfig
from drdpo.errors import DataError
from drdpo.rewards.armorm import GatingNetwork
from drdpo.rewards.baselines import Claim, claim, folded_baselines
from drdpo.rewards.heads import FOLDS, GatePairs, choose_gate_steps, debiasing_transform, fit_gate
from drdpo.rewards.rated import Answers, scales
from drdpo.rewards.ridge import Ridge, cross_fitted, fit_ridges
from drdpo.rewards.scores import Floats
from drdpo.rewards.tables import claim_table


@dataclass(frozen=True)
class Heads:
    """Everything that is fitted, K objectives."""

    objectives: list[str]
    columns: list[int]
    """[K] which of the fitted objectives they are."""
    ridges: list[Ridge]
    transform_KK: Floats
    gate: GatingNetwork
    gate_steps: int
    """After how many steps the gate's fit stopped; 0 leaves equal weights."""
    debiased: bool
    """Was the rank correlation with verbosity taken out?"""

    def stage1(self, answer_ND: Floats) -> Floats:
        """[N, K] rewards."""
        return answer_ND @ np.stack([ridge.weight_D for ridge in self.ridges], axis=1)

    def stage2(self, answer_ND: Floats, gate_ND: torch.Tensor) -> Floats:
        """[N] gated scores."""
        with torch.inference_mode():
            gate_NK = self.gate(gate_ND).double().numpy()
        return np.asarray((gate_NK * (self.stage1(answer_ND) @ self.transform_KK)).sum(axis=1))


def fit_heads(
    config: FitHeadsConfig, train: Answers, answer_ND: Floats, gate_ND: torch.Tensor, fold_N: np.ndarray
) -> tuple[Heads, list[Claim]]:
    """Fit both stages, and compare every objective with the trivial baselines.

    Args:
        train: rated answers, all objectives.
        answer_ND: what stage 1 reads of them.
        gate_ND: what the gate reads of them.
        fold_N: their folds.

    Raises:
        DataError: no objective beats the baselines, or no pair of answers with different quality.
    """
    names = config.objective_names()
    crossed_NK = cross_fitted(answer_ND, train.labels_NK, fold_N)
    claims = [
        claim(
            name, scale.points, crossed_NK[:, column], label_N, folded_baselines(train.length_N, label_N, fold_N),
            train.prompt_N, config.seed,
        )
        for column, (name, scale, label_N) in enumerate(zip(names, scales(config), train.labels_NK.T, strict=True))
    ]  # fmt: skip
    print(f"over {FOLDS} folds of the training prompts:\n{claim_table(claims)}", flush=True)
    kept = [column for column, made in enumerate(claims) if made.holds or not config.drop_weak]
    if not kept:
        raise DataError(
            f"{train.source}: over the folds of training no objective clearly beats a constant and the answer's length; "
            "give more ratings, or --drop_weak=false"
        )
    objectives = [names[column] for column in kept]
    for name in names:
        if name not in objectives:
            print(
                f"dropped: {name} does not clearly beat a constant and the answer's length over the folds of training",
                flush=True,
            )
    verbosity = objectives.index(config.verbosity) if config.verbosity in objectives else None
    if config.verbosity and verbosity is None:
        print(f"{config.verbosity} is no head, so nothing is taken out of the others", flush=True)
    transform_KK = debiasing_transform(crossed_NK[:, kept], verbosity)
    if len(train.pairs_P2) == 0:
        raise DataError(f"{train.source}: no two answers to one prompt differ in {' + '.join(config.quality)}")
    better_P, worse_P = train.pairs_P2.T
    margin_PK = (crossed_NK[better_P] - crossed_NK[worse_P])[:, kept] @ transform_KK
    pairs = GatePairs(gate_ND[torch.from_numpy(better_P.copy())], torch.from_numpy(margin_PK).float())
    gate, gate_steps = _fit_gate(config, pairs, fold_N[better_P])
    ridges = fit_ridges(answer_ND, train.labels_NK[:, kept], fold_N)
    return Heads(objectives, kept, ridges, transform_KK, gate, gate_steps, verbosity is not None), claims


def _fit_gate(config: FitHeadsConfig, pairs: GatePairs, fold_P: np.ndarray) -> tuple[GatingNetwork, int]:
    """A gate fitted on all pairs, for as many steps as help on held-out prompts, and these steps."""
    width, heads = pairs.prompt_PD.shape[1], pairs.margin_PK.shape[1]

    def new_gate() -> GatingNetwork:
        torch.manual_seed(config.seed)
        return GatingNetwork(width, heads, config.gating_hidden_dim, config.gating_n_hidden, config.gating_temperature)

    stop, loss, unfitted = choose_gate_steps(new_gate, pairs, fold_P, config.gate_steps)
    print(
        f"gate: {len(fold_P)} pairs; Bradley-Terry loss over the folds {unfitted:.4f} with equal weights, "
        f"{loss:.4f} after {stop} steps, the best of {config.gate_steps}",
        flush=True,
    )
    gate = new_gate()
    fit_gate(gate, pairs, config.gate_steps, stop)
    return gate, stop

"""Fit the reward heads of a multi-objective reward model on human ratings, with a frozen backbone.

    stage 1   per objective a ridge regression without intercept on the last token's hidden state
    stage 2   the verbosity-debiased transform, and a gate fitted by Bradley-Terry on answers to the same prompt

Both parts of stage 2 see CROSS-FITTED stage-1 rewards of the training answers (each predicted by heads that were fitted
without its prompt): rewards of the very answers that a head was fitted on are too good, and a gate would trust them.
The held-out file serves for the printed figures and for nothing else.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from drdpo.chat import load_tokenizer
from drdpo.config import FitHeadsConfig
from drdpo.errors import DataError, UsageError
from drdpo.files import atomic_files
from drdpo.rewards.armorm import GatingNetwork
from drdpo.rewards.card import model_card
from drdpo.rewards.features import gating_pattern
from drdpo.rewards.heads import (
    FOLDS,
    GatePairs,
    Ridge,
    choose_gate_steps,
    debiasing_transform,
    fit_gate,
    fit_ridge,
    prompt_folds,
)
from drdpo.rewards.heldout import (
    ObjectiveFigures,
    PairFigures,
    objective_figures,
    objective_table,
    pair_figures,
    pair_table,
)
from drdpo.rewards.rated import RatedFeatures, rated_features
from drdpo.rewards.scores import Floats

HEADS, CONFIG, CARD, TEMPLATE = "heads.safetensors", "config.json", "README.md", "chat_template.jinja"


@dataclass(frozen=True)
class Heads:
    """Everything that is fitted."""

    ridges: list[Ridge]
    transform_KK: Floats
    gate: GatingNetwork
    gate_steps: int
    """After how many steps its fit stopped; 0 leaves equal weights."""
    pattern: list[int]

    def stage1(self, last_ND: Floats) -> Floats:
        """[N, K] rewards."""
        return last_ND @ np.stack([ridge.weight_D for ridge in self.ridges], axis=1)

    def stage2(self, last_ND: Floats, gate_ND: torch.Tensor) -> Floats:
        """[N] gated scores."""
        with torch.inference_mode():
            gate_NK = self.gate(gate_ND).double().numpy()
        return np.asarray((gate_NK * (self.stage1(last_ND) @ self.transform_KK)).sum(axis=1))


def fit_reward_heads(config: FitHeadsConfig) -> None:
    """Fit, print the held-out figures, and write heads.safetensors, config.json, chat_template.jinja and README.md.

    Raises:
        DataError: a file is missing or malformed, the backbone cannot be loaded, or there are too few prompts or pairs.
        UsageError: the output folder holds a model.
    """
    target = Path(config.output_path)
    if any(target.glob("*.safetensors.index.json")) or (target / "model.safetensors").exists():
        raise UsageError(
            f"--output_path={target} holds a model, whose config.json would be overwritten; give another folder"
        )
    tokenizer = load_tokenizer(config.backbone)
    if config.chat_template is not None:
        tokenizer.chat_template = _read_text(Path(config.chat_template))
    pattern = gating_pattern(tokenizer)
    train, held_out = rated_features(config, tokenizer, pattern)
    heads = fit_heads(config, train, pattern)
    objectives, pairs = figures(config, heads, train, held_out)
    print(objective_table(objectives) + "\n\n" + pair_table(pairs), flush=True)
    card = model_card(
        config, objectives, pairs, heads.gate_steps,
        rows=(len(train.ratings.prompt_N), len(held_out.ratings.prompt_N)), left_out=(train.left_out, held_out.left_out),
    )  # fmt: skip
    write_heads(target, config, heads, card, str(tokenizer.chat_template))


def fit_heads(config: FitHeadsConfig, train: RatedFeatures, pattern: list[int]) -> Heads:
    """Fit both stages on the training answers.

    Raises:
        DataError: fewer prompts than validation folds, or no pair of answers with different quality.
    """
    columns = config.objective_columns()
    labels_NK, prompt_N, last_ND = train.ratings.labels_NK, train.ratings.prompt_N, train.last_ND
    if len(np.unique(prompt_N)) < 2 * FOLDS:
        raise DataError(f"{config.ratings}: {len(np.unique(prompt_N))} prompts; fitting needs at least {2 * FOLDS}")
    fold_N = prompt_folds(prompt_N, FOLDS, config.seed)
    ridges, crossed = [], []
    for column in range(len(columns)):
        there = ~np.isnan(labels_NK[:, column])
        ridges.append(fit_ridge(last_ND[there], labels_NK[there, column], fold_N[there]))
        crossed.append(_cross_fitted(last_ND, labels_NK[:, column], fold_N))
    crossed_NK = np.stack(crossed, axis=1)
    verbosity = list(columns).index(config.verbosity) if config.verbosity else None
    transform_KK = debiasing_transform(crossed_NK, verbosity)
    pairs_P2 = train.pairs(_quality_columns(config))
    if len(pairs_P2) == 0:
        raise DataError(f"{config.ratings}: no two answers to one prompt differ in {' + '.join(config.quality)}")
    margin_PK = (crossed_NK[pairs_P2[:, 0]] - crossed_NK[pairs_P2[:, 1]]) @ transform_KK
    better_P = torch.from_numpy(pairs_P2[:, 0].copy())
    pairs = GatePairs(train.gate_ND[better_P], torch.from_numpy(margin_PK).float())
    gate, gate_steps = _fit_gate(config, pairs, fold_N[pairs_P2[:, 0]])
    return Heads(ridges, transform_KK, gate, gate_steps, pattern)


def figures(
    config: FitHeadsConfig, heads: Heads, train: RatedFeatures, held_out: RatedFeatures
) -> tuple[list[ObjectiveFigures], list[PairFigures]]:
    """Held-out figures of every objective, and pair accuracies of the gated score, every objective and length."""
    ratings, columns = held_out.ratings, config.objective_columns()
    pairs_P2 = held_out.pairs(_quality_columns(config))
    if len(pairs_P2) == 0:
        raise DataError(f"{config.validation}: no two answers to one prompt differ in {' + '.join(config.quality)}")
    stage1_NK = heads.stage1(held_out.last_ND)
    objectives = [
        objective_figures(
            name, heads.ridges[k].alpha, stage1_NK[:, k], ratings.labels_NK[:, k], held_out.length_N,
            (train.length_N, train.ratings.labels_NK[:, k]), ratings.prompt_N, config.seed,
        )
        for k, name in enumerate(columns)
    ]  # fmt: skip
    scores = {"ArmoRM (gated)": heads.stage2(held_out.last_ND, held_out.gate_ND)}
    scores |= {name: stage1_NK[:, k] for k, name in enumerate(columns)} | {"longer answer": held_out.length_N}
    quality_N = ratings.labels_NK[:, _quality_columns(config)].sum(axis=1)
    return objectives, [
        pair_figures(name, score_N, quality_N, pairs_P2, ratings.prompt_N, config.seed) for name, score_N in scores.items()
    ]


def write_heads(target: Path, config: FitHeadsConfig, heads: Heads, card: str, chat_template: str) -> None:
    """Write the four files, all or none: tensors under the published names, float32."""
    columns = config.objective_columns()
    tensors = {
        "regression_layer.weight": torch.from_numpy(np.stack([ridge.weight_D for ridge in heads.ridges])).float(),
        "reward_transform_matrix": torch.from_numpy(heads.transform_KK).float(),
    }
    tensors |= {f"gating.{name}": tensor.detach().clone() for name, tensor in heads.gate.state_dict().items()}
    fields = {
        "num_objectives": len(columns),
        "objectives": list(columns),
        "gating_token_pattern": heads.pattern,
        "gating_temperature": config.gating_temperature,
        "gating_hidden_dim": config.gating_hidden_dim,
        "gating_n_hidden": config.gating_n_hidden,
    }
    with atomic_files(*(target / name for name in (HEADS, CONFIG, CARD, TEMPLATE))) as asides:
        save_file(tensors, asides[0])
        asides[1].write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        asides[2].write_text(card, encoding="utf-8")
        asides[3].write_text(chat_template, encoding="utf-8")


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


def _cross_fitted(last_ND: Floats, label_N: Floats, fold_N: np.ndarray) -> Floats:
    """[N] rewards, each by a ridge that never saw its prompt, nor chose its penalty by it."""
    reward_N = np.empty(len(label_N))
    for fold in np.unique(fold_N):
        fit = (fold_N != fold) & ~np.isnan(label_N)
        reward_N[fold_N == fold] = last_ND[fold_N == fold] @ fit_ridge(last_ND[fit], label_N[fit], fold_N[fit]).weight_D
    return reward_N


def _quality_columns(config: FitHeadsConfig) -> list[int]:
    columns = list(config.objective_columns().values())
    return [columns.index(name) for name in config.quality]


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return path.read_text(encoding="utf-8")

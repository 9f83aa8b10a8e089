"""Fit the reward heads of a multi-objective reward model on human ratings, with a frozen backbone.

    stage 1   per objective a ridge regression without intercept on the last token's hidden state
    stage 2   the verbosity-debiased transform, and a gate fitted by Bradley-Terry on answers to the same prompt

Both parts of stage 2 see CROSS-FITTED stage-1 rewards of the training answers (each predicted by heads that were fitted
without its prompt): rewards of the very answers that a head was fitted on are too good, and a gate would trust them.
The held-out file serves for the printed figures and for nothing else.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from drdpo import distributed
from drdpo.chat import conversation_token_ids, load_tokenizer
from drdpo.config import FitHeadsConfig
from drdpo.errors import DataError, UsageError
from drdpo.files import atomic_files
from drdpo.manifest import fingerprint
from drdpo.rewards.armorm import GatingNetwork
from drdpo.rewards.card import model_card
from drdpo.rewards.features import Features, cached_features, gating_pattern
from drdpo.rewards.heads import FOLDS, Ridge, debiasing_transform, fit_gate, fit_ridge, prompt_folds
from drdpo.rewards.heldout import (
    ObjectiveFigures,
    PairFigures,
    objective_figures,
    objective_table,
    pair_figures,
    pair_table,
)
from drdpo.rewards.ratings import Ratings, rating_pairs, read_ratings
from drdpo.rewards.scorer import DTYPES, use_cpu_well
from drdpo.rewards.scores import Floats

HEADS, CONFIG, CARD, TEMPLATE = "heads.safetensors", "config.json", "README.md", "chat_template.jinja"


@dataclass(frozen=True)
class RatedFeatures:
    """Ratings of N answers and the backbone's features of them."""

    ratings: Ratings
    last_ND: Floats
    """Hidden states of the last token."""
    gate_ND: torch.Tensor
    """Hidden states at the gate position."""
    length_N: Floats
    """Log of the answers' lengths in characters."""
    left_out: int
    """Rows longer than max_len."""

    @classmethod
    def build(cls, ratings: Ratings, features: Features, left_out: int) -> "RatedFeatures":
        """Put ratings and features together; the ridge is solved in double precision."""
        length_N = np.log([len(messages[-1]["content"]) for messages in ratings.conversations])
        return cls(ratings, features.last_ND.double().numpy(), features.gate_ND, length_N, left_out)

    def pairs(self, columns: Sequence[int]) -> np.ndarray:
        """[P, 2] (better, worse) by the sum of some labels."""
        return rating_pairs(self.ratings.prompt_N, self.ratings.labels_NK[:, columns].sum(axis=1))


@dataclass(frozen=True)
class Heads:
    """Everything that is fitted."""

    ridges: list[Ridge]
    transform_KK: Floats
    gate: GatingNetwork
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
    train, held_out = _rated_features(config, tokenizer, pattern)
    heads = fit_heads(config, train, pattern)
    objectives, pairs = figures(config, heads, train, held_out)
    print(objective_table(objectives) + "\n\n" + pair_table(pairs), flush=True)
    card = model_card(
        config, objectives, pairs,
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
    torch.manual_seed(config.seed)
    gate = GatingNetwork(
        last_ND.shape[1], len(columns), config.gating_hidden_dim, config.gating_n_hidden, config.gating_temperature
    )
    debiased_NK = torch.from_numpy(crossed_NK @ transform_KK).float()
    better_P, worse_P = (torch.from_numpy(pairs_P2[:, side].copy()) for side in (0, 1))
    losses = fit_gate(gate, train.gate_ND[better_P], debiased_NK[better_P], debiased_NK[worse_P], config.gate_steps)
    print(f"gate: {len(pairs_P2)} pairs, Bradley-Terry loss {losses[0]:.4f} -> {losses[-1]:.4f}", flush=True)
    return Heads(ridges, transform_KK, gate, pattern)


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
    return objectives, [
        pair_figures(name, score_N, pairs_P2, ratings.prompt_N, config.seed) for name, score_N in scores.items()
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


def _rated_features(config: FitHeadsConfig, tokenizer: Any, pattern: list[int]) -> tuple[RatedFeatures, RatedFeatures]:
    """Training and held-out answers; the backbone is loaded once."""
    from transformers import AutoModel

    columns = list(config.objective_columns().values())
    train, held_out = (read_ratings(Path(path), columns) for path in (config.ratings, config.validation))
    files = [train, _unseen(config, train, held_out)]
    device = distributed.device()
    use_cpu_well(device)
    try:
        backbone = AutoModel.from_pretrained(config.backbone, dtype=DTYPES[config.dtype], trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{config.backbone}: the backbone cannot be loaded ({error})") from error
    backbone = backbone.to(device).eval().requires_grad_(False)
    key = f"{fingerprint(config.backbone)} {config.dtype}"
    made = []
    for ratings in files:
        token_ids = [conversation_token_ids(tokenizer, messages) for messages in ratings.conversations]
        kept = [row for row, ids in enumerate(token_ids) if len(ids) <= config.max_len]
        cache = Path(config.cache) if config.cache is not None else None
        features = cached_features(backbone, [token_ids[row] for row in kept], pattern, config.batch_tokens, cache, key)
        made.append(RatedFeatures.build(ratings.keep(kept), features, len(token_ids) - len(kept)))
    return made[0], made[1]


def _unseen(config: FitHeadsConfig, train: Ratings, held_out: Ratings) -> Ratings:
    """The held-out rows whose prompt, white space aside, is not in the training file."""
    seen = {json.dumps(messages[:-1]) for messages in train.conversations}
    kept = [row for row, messages in enumerate(held_out.conversations) if json.dumps(messages[:-1]) not in seen]
    if not kept:
        raise DataError(f"{config.validation}: every held-out prompt is also in {config.ratings}")
    if seen_too := len(held_out.conversations) - len(kept):
        print(f"{config.validation}: {seen_too} rows left out, whose prompt is also in {config.ratings}", flush=True)
    return held_out.keep(kept)


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

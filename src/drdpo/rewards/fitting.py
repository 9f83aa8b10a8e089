"""Fit the reward heads of a multi-objective reward model on human ratings, with a frozen backbone.

At which depth the backbone is read and how stage 1 pools the answer is decided in choice.py, both stages are fitted in
stages.py, on the training files alone. The held-out files serve for the printed figures; no choice made here reads them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from drdpo.chat import load_tokenizer
from drdpo.config import FitHeadsConfig
from drdpo.errors import DataError, UsageError
from drdpo.files import atomic_files
from drdpo.machine import announce, settle
from drdpo.manifest import fingerprint
from drdpo.rewards.baselines import baselines, compare
from drdpo.rewards.card import Report, model_card
from drdpo.rewards.choice import Candidate, choose
from drdpo.rewards.features import Features, gating_pattern
from drdpo.rewards.heads import FOLDS, prompt_folds
from drdpo.rewards.heldout import GATED, LONGER, FileFigures, ObjectiveFigures, file_figures, objective_figures
from drdpo.rewards.layout import POOLINGS
from drdpo.rewards.rated import Answers, Backbone, Files, read_files, scales
from drdpo.rewards.scorer import check_tokenizer
from drdpo.rewards.stages import Heads, fit_heads
from drdpo.rewards.tables import choice_table

HEADS, CONFIG, CARD, TEMPLATE = "heads.safetensors", "config.json", "README.md", "chat_template.jinja"


def fit_reward_heads(config: FitHeadsConfig) -> None:
    """Fit, print the held-out figures, and write heads.safetensors, config.json, chat_template.jinja and README.md.

    Raises:
        DataError: a file is missing or malformed, the backbone cannot be loaded, there are too few prompts or pairs, or no
            objective is worth a head.
        UsageError: the output folder holds a model, or the backbone has no such layer.
    """
    target = Path(config.output_path)
    if any(target.glob("*.safetensors.index.json")) or (target / "model.safetensors").exists():
        raise UsageError(
            f"--output_path={target} holds a model, whose config.json would be overwritten; give another folder"
        )
    config, precision = settle(config)
    announce(precision)
    tokenizer = load_tokenizer(config.backbone)
    if config.chat_template is not None:
        tokenizer.chat_template = _read_text(Path(config.chat_template))
    pattern = gating_pattern(tokenizer)
    check_tokenizer(Path(config.backbone), tokenizer, tuple(pattern), vocabulary=sys.maxsize)
    train_files, held_out_files = read_files(config, tokenizer)
    notes = [*train_files.notes(), *held_out_files.notes()]
    print("\n".join(notes), flush=True)
    train, held_out = train_files.together(), held_out_files.together()
    _check_enough(config, train, held_out_files)
    backbone = Backbone(config, pattern)
    fold_N = prompt_folds(train.prompt_N, FOLDS, config.seed)
    features = backbone.features(train_files, backbone.layers())
    chosen, candidates = choose_reading(config, features, train, fold_N)
    read = features[chosen.layer]
    heads, claims = fit_heads(config, train, read.answer(chosen.pooling).double().numpy(), read.gate_ND, fold_N)
    read = backbone.features(held_out_files, [chosen.layer])[chosen.layer]
    objectives, files = figures(config, heads, train, held_out, held_out_files, read, chosen.pooling)
    report = Report(
        config, heads, chosen, candidates, claims, objectives, files, notes, backbone.depth,
        rows=(len(train_files), len(held_out_files)), left_out=(train_files.left_out, held_out_files.left_out),
    )  # fmt: skip
    print("\n" + report.figures(), flush=True)
    write_heads(target, config, heads, chosen, pattern, model_card(report), str(tokenizer.chat_template))


def choose_reading(
    config: FitHeadsConfig, features: dict[int, Features], train: Answers, fold_N: np.ndarray
) -> tuple[Candidate, list[Candidate]]:
    """The layer and pooling that stage 1 reads, and all candidates; the table is printed where there are several."""
    poolings = POOLINGS if config.pooling == "auto" else (config.pooling,)
    places = {
        (layer, pooling): features[layer].answer(pooling).double().numpy() for layer in features for pooling in poolings
    }
    chosen, candidates = choose(places, train.labels_NK, train.prompt_N, fold_N, config.seed)
    if len(candidates) > 1:
        print(choice_table(candidates, chosen, config.objective_names()), flush=True)
    return chosen, candidates


def figures(
    config: FitHeadsConfig, heads: Heads, train: Answers, held_out: Answers, files: Files, read: Features, pooling: str
) -> tuple[list[ObjectiveFigures], list[FileFigures]]:
    """Held-out figures of every objective, and of the pairs of every file.

    Args:
        held_out, files: the held-out answers, together and file by file.
        read: their features.
        pooling: of stage 1.
    """
    answer_ND = read.answer(pooling).double().numpy()
    stage1_NK = heads.stage1(answer_ND)
    objectives = []
    for k, (name, column) in enumerate(zip(heads.objectives, heads.columns, strict=True)):
        label_N, points = held_out.labels_NK[:, column], scales(config)[column].points
        trivial_N2 = baselines(held_out.length_N, train.length_N, train.labels_NK[:, column])
        against = compare(name, points, stage1_NK[:, k], label_N, trivial_N2)
        alpha = heads.ridges[k].alpha
        objectives.append(objective_figures(against, alpha, stage1_NK[:, k], label_N, held_out.prompt_N, config.seed))
    scores = {GATED: heads.stage2(answer_ND, read.gate_ND)}
    scores |= {name: stage1_NK[:, k] for k, name in enumerate(heads.objectives)} | {LONGER: held_out.length_N}
    by_file = []
    for name, rows, pairs_P2 in files.parts():
        quality_N = np.where(np.isin(np.arange(len(held_out.quality_N)), rows), held_out.quality_N, np.nan)
        by_file.append(file_figures(name, scores, quality_N, pairs_P2, held_out.prompt_N, config.seed))
    return objectives, by_file


def write_heads(
    target: Path, config: FitHeadsConfig, heads: Heads, chosen: Candidate, pattern: list[int], card: str, template: str
) -> None:
    """Write the four files, all or none: tensors under the published names, float32.

    config.json says how much of the backbone belongs to the heads: its first num_hidden_layers layers.
    """
    tensors = {
        "regression_layer.weight": torch.from_numpy(np.stack([ridge.weight_D for ridge in heads.ridges])).float(),
        "reward_transform_matrix": torch.from_numpy(heads.transform_KK).float(),
    }
    tensors |= {f"gating.{name}": tensor.detach().clone() for name, tensor in heads.gate.state_dict().items()}
    fields = {
        "backbone_fingerprint": fingerprint(config.backbone),
        "num_hidden_layers": chosen.layer,
        "pooling": chosen.pooling,
        "num_objectives": len(heads.objectives),
        "objectives": heads.objectives,
        "gating_token_pattern": pattern,
        "gating_temperature": config.gating_temperature,
        "gating_hidden_dim": config.gating_hidden_dim,
        "gating_n_hidden": config.gating_n_hidden,
    }
    with atomic_files(*(target / name for name in (HEADS, CONFIG, CARD, TEMPLATE))) as asides:
        save_file(tensors, asides[0])
        asides[1].write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        asides[2].write_text(card, encoding="utf-8")
        asides[3].write_text(template, encoding="utf-8")


def _check_enough(config: FitHeadsConfig, train: Answers, held_out: Files) -> None:
    """Raise DataError where a fold would hold too few prompts of an objective, or a held-out file has no pair."""
    for name, label_N in zip(config.objective_names(), train.labels_NK.T, strict=True):
        if (count := len(np.unique(train.prompt_N[~np.isnan(label_N)]))) < 2 * FOLDS:
            raise DataError(f"{train.source}: {count} prompts with {name}; fitting needs at least {2 * FOLDS}")
    for name, rows, pairs_P2 in held_out.parts():
        if len(pairs_P2) == 0:
            raise DataError(f"{name}: no two answers to one prompt differ in quality, of {len(rows)} held-out answers")
    for name, label_N in zip(config.objective_names(), held_out.together().labels_NK.T, strict=True):
        if (~np.isnan(label_N)).sum() < 2:
            raise DataError(f"{' and '.join(held_out.names)}: fewer than two held-out answers with {name}")


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return path.read_text(encoding="utf-8")

"""Rated answers of every file together with the backbone's features of them: training, and held out file by file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from drdpo import distributed
from drdpo.chat import Tokenizer, conversation_token_ids
from drdpo.config import FitHeadsConfig
from drdpo.errors import DataError, UsageError
from drdpo.manifest import fingerprint
from drdpo.records import Message
from drdpo.rewards.features import Features, cached_features, depth
from drdpo.rewards.labels import Scale
from drdpo.rewards.rated_pairs import read_rated_pairs
from drdpo.rewards.ratings import Rated, prompt_numbers, read_ratings, unseen
from drdpo.rewards.scorer import DTYPES, UNRENDERABLE, use_cpu_well
from drdpo.rewards.scores import Floats


@dataclass(frozen=True)
class Answers:
    """N rated answers of one or several files, K objectives, P pairs."""

    source: str
    """Name of the file, or of the files."""
    labels_NK: Floats
    quality_N: Floats
    prompt_N: np.ndarray
    """[N] number of the prompt; equal prompts have one number, whatever file they are in."""
    length_N: Floats
    """Log of the answers' lengths in characters."""
    pairs_P2: np.ndarray
    """[P, 2] (better, worse)."""


@dataclass(frozen=True)
class Files:
    """The rated answers of one side, training or held out, file by file, with the token ids of their conversations."""

    names: list[str]
    rated: list[Rated]
    token_ids: list[list[list[int]]]
    left_out: int
    """Answers whose conversation is longer than max_len."""

    def __len__(self) -> int:
        return sum(map(len, self.rated))

    def notes(self) -> list[str]:
        """What was masked or left out in the files."""
        return [note for rated in self.rated for note in rated.notes]

    def together(self) -> Answers:
        """The answers of all files as one; rows of the second follow those of the first."""
        return Answers(
            source=" and ".join(self.names),
            labels_NK=np.concatenate([rated.labels_NK for rated in self.rated]),
            quality_N=np.concatenate([rated.quality_N for rated in self.rated]),
            prompt_N=prompt_numbers([key for rated in self.rated for key in rated.prompts()]),
            length_N=np.log([len(messages[-1]["content"]) for rated in self.rated for messages in rated.conversations]),
            pairs_P2=np.concatenate([pairs_P2 for _, _, pairs_P2 in self.parts()]),
        )

    def parts(self) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Per file: its name, its rows of `together`, and its pairs [P, 2] of these rows."""
        starts = np.cumsum([0, *map(len, self.rated)])
        return [
            (name, np.arange(start, start + len(rated)), rated.pairs_P2 + start)
            for name, rated, start in zip(self.names, self.rated, starts[:-1], strict=True)
        ]


def scales(config: FitHeadsConfig) -> list[Scale]:
    """Per objective, in head order, how ratings become labels: HelpSteer's 0-4 is (r + 0.5) / 5, UltraFeedback's r / 10."""
    ratings = len(config.objective_columns())
    both = [Scale(config.highest_rating, 0.5)] * ratings + [Scale(config.highest_score, 0.0)]
    return both[: len(config.objective_names())]


def read_files(config: FitHeadsConfig, tokenizer: Tokenizer) -> tuple[Files, Files]:
    """Training and held-out answers, no longer than max_len; held-out prompts that are trained on are left out.

    Raises:
        DataError: a file is malformed, or nothing is left of one.
    """
    columns = list(config.objective_columns().values())
    heads = len(config.objective_names())
    read: list[tuple[str, str | None, Callable[[Path], Rated]]] = [
        (config.ratings, config.validation, lambda path: _widen(
            read_ratings(path, columns, config.quality, Scale(config.highest_rating, 0.5)), heads)),
    ]  # fmt: skip
    if config.preferences is not None:
        scale, labelled = Scale(config.highest_score, 0.0), bool(config.preferences_objective)
        read.append(
            (config.preferences, config.preferences_validation, lambda path: read_rated_pairs(path, scale, heads, labelled))
        )
    train = [reader(Path(path)) for path, _, reader in read]
    seen = {key for rated in train for key in rated.prompts()}
    held_out = [unseen(reader(Path(str(path))), seen, Path(str(path))) for _, path, reader in read]
    return (
        _short(config, tokenizer, [Path(path) for path, _, _ in read], train),
        _short(config, tokenizer, [Path(str(path)) for _, path, _ in read], held_out),
    )


class Backbone:
    """The frozen backbone with its cache of features.

    Raises:
        DataError: it cannot be loaded, or is not of the Llama family.
    """

    def __init__(self, config: FitHeadsConfig, pattern: list[int]) -> None:
        from transformers import AutoModel

        self.config, self.pattern = config, pattern
        device = distributed.device()
        use_cpu_well(device)
        try:
            model = AutoModel.from_pretrained(
                config.backbone, dtype=DTYPES[config.dtype], use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise DataError(f"{config.backbone}: the backbone cannot be loaded ({error})") from error
        self.model: nn.Module = model.to(device).eval().requires_grad_(False)
        self.depth = depth(self.model)
        self.key = f"{fingerprint(config.backbone)} {config.dtype}"

    def layers(self) -> list[int]:
        """The candidate layers: those of --layers, or the last one.

        Raises:
            UsageError: the backbone has fewer.
        """
        if deepest := [layer for layer in self.config.layers if layer > self.depth]:
            raise UsageError(f"--layers {deepest[0]}: the backbone {self.config.backbone} has {self.depth} layers")
        return sorted(set(self.config.layers)) or [self.depth]

    def features(self, files: Files, layers: Sequence[int]) -> dict[int, Features]:
        """{layer: features} of the answers of all files, in the order of Files.together."""
        cache = Path(self.config.cache) if self.config.cache is not None else None
        parts = [
            cached_features(self.model, layers, ids, self.pattern, self.config.batch_tokens, cache, self.key)
            for ids in files.token_ids
        ]
        return {layer: Features(*map(torch.cat, zip(*(part[layer] for part in parts), strict=True))) for layer in layers}


def _widen(rated: Rated, heads: int) -> Rated:
    """With columns without labels for the objectives of other files."""
    rows, columns = rated.labels_NK.shape
    labels_NK = np.concatenate([rated.labels_NK, np.full((rows, heads - columns), np.nan)], axis=1)
    return Rated(**{**vars(rated), "labels_NK": labels_NK})


def _short(config: FitHeadsConfig, tokenizer: Tokenizer, paths: list[Path], files: list[Rated]) -> Files:
    """The answers whose conversations have at most max_len tokens."""
    kept, token_ids, too_long = [], [], 0
    for path, rated in zip(paths, files, strict=True):
        ids = [_token_ids(tokenizer, messages) for messages in rated.conversations]
        rows = [row for row in range(len(ids)) if 0 < len(ids[row]) <= config.max_len]
        if not rows:
            raise DataError(f"{path}: no conversation can be rendered within --max_len={config.max_len} tokens")
        part = rated.keep(rows)
        if refused := sum(not one for one in ids):
            note = f"{path.name}: {refused} answers left out, which the chat template or the tokenizer refuses"
            part = Rated(**{**vars(part), "notes": (*part.notes, note)})
        too_long += sum(len(one) > config.max_len for one in ids)
        kept.append(part)
        token_ids.append([ids[row] for row in rows])
    names = [f"{path.name} ({kind})" for path, kind in zip(paths, ("ratings", "preferences"), strict=False)]
    return Files(names, kept, token_ids, too_long)


def _token_ids(tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    """Of a conversation; empty where it cannot be rendered."""
    try:
        return conversation_token_ids(tokenizer, messages)
    except UNRENDERABLE:
        return []

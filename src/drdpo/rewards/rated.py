"""Ratings together with the backbone's features of the rated answers, for training and held out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from drdpo import distributed
from drdpo.chat import Tokenizer, conversation_token_ids
from drdpo.config import FitHeadsConfig
from drdpo.errors import DataError
from drdpo.manifest import fingerprint
from drdpo.rewards.features import Features, cached_features
from drdpo.rewards.ratings import Ratings, rating_pairs, read_ratings
from drdpo.rewards.scorer import DTYPES, use_cpu_well
from drdpo.rewards.scores import Floats


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


def rated_features(config: FitHeadsConfig, tokenizer: Tokenizer, pattern: list[int]) -> tuple[RatedFeatures, RatedFeatures]:
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

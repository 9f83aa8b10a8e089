"""Rotary positions that depend on a micro-batch's longest sequence: refused where that would change log-probs.

Of transformers' kinds, "dynamic" (dynamic NTK) and "longrope" choose their frequencies anew in every forward pass, by the
largest position in it: beyond a length that the model's config.json gives, a sequence's log-prob depends on what stands
beside it, and for "dynamic" on what was run before. Up to that length the frequencies are those of the start, in
packed rows, whose
positions restart with every pair, as in padded ones. All other kinds are fixed.
"""

from typing import Any

from drdpo.config import TrainConfig
from drdpo.errors import UsageError
from drdpo.training.data import Pair
from drdpo.training.policy import Policy


def check_rotary(policy: Policy, pairs: list[Pair], config: TrainConfig) -> None:
    """Refuse pairs so long that the frequencies of the policy's rotary positions change with the batch.

    Args:
        policy: as loaded, or on the meta device.
        pairs: of the run.
        config: of the run.

    Raises:
        UsageError: there are such pairs.
    """
    longest = max(map(len, pairs), default=0)
    for module in policy.language_model.modules():
        for kind, limit in _limits(module):
            if longest > limit:
                raise UsageError(
                    f"{config.model_path}: beyond {limit} tokens the model's rotary positions ({kind}) are those of the "
                    f"longest sequence in a "
                    f"batch, so a pair's log-probs, packed or padded, would depend on the pairs beside it; "
                    f"the longest pair has {longest}: give --max_len={limit}"
                )


def fix_rotary(policy: Policy) -> None:
    """Keep the frequencies of the start, which are right for what check_rotary has passed: a policy on the meta device has
    no positions to choose by."""
    for module in policy.language_model.modules():
        if _limits(module):
            kinds = module.rope_type
            module.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"


def _limits(module: Any) -> list[tuple[str, int]]:
    """[(kind, longest sequence with the frequencies of the start)] of a module of rotary positions."""
    kinds = getattr(module, "rope_type", None)
    settings = getattr(getattr(module, "config", None), "rope_parameters", None)
    # Gemma 3 and others have one kind for each type of layer.
    by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
    found = []
    for layer, kind in by_layer.items():
        if kind == "longrope" and settings is not None:
            own = settings if layer is None else settings[layer]
            found.append((kind, int(own["original_max_position_embeddings"])))
        elif isinstance(kind, str) and "dynamic" in kind:
            found.append((kind, int(module.original_max_seq_len)))
    return found

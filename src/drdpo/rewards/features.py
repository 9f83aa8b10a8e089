"""Features of a frozen backbone for the reward heads: the hidden state at the last token and at the gate position."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from drdpo.chat import Tokenizer, prompt_token_ids
from drdpo.errors import DataError
from drdpo.files import atomic_folder
from drdpo.rewards.armorm import last_hidden_states
from drdpo.rewards.batching import batches_by_length, last_occurrence, pad_right


class Features(NamedTuple):
    """Hidden states after the final norm, float32."""

    last_ND: Tensor
    gate_ND: Tensor


def gating_pattern(tokenizer: Tokenizer) -> list[int]:
    """The template's token ids between a user's text and the answer: what two different prompts end in alike."""
    first, second = (prompt_token_ids(tokenizer, [{"role": "user", "content": text}]) for text in ("apple", "seven"))
    size = 0
    while first[-size - 1] == second[-size - 1]:
        size += 1
    if not size:
        raise DataError("the chat template writes nothing between a prompt and its answer, so a gate has nowhere to read")
    return first[-size:]


def read_positions(token_ids: Sequence[int], pattern: Sequence[int]) -> tuple[int, int]:
    """Where ArmoRM reads a conversation: its last token, and the first token of the last gating pattern.

    Raises:
        ValueError: the pattern is not there.
    """
    gate = last_occurrence(token_ids, pattern)
    if gate is None:
        raise ValueError("the conversation does not hold the gating token pattern")
    return len(token_ids) - 1, gate


def hidden_states_at(
    backbone: nn.Module, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], batch_tokens: int
) -> Tensor:
    """Hidden states of N sequences at K positions each.

    Args:
        backbone: a frozen transformers model without a head.
        sequences: [N] token ids.
        positions: [N][K] indices into each sequence.
        batch_tokens: most tokens of a batch, padding included.

    Returns:
        [N, K, D] float32, on the CPU.
    """
    device = next(backbone.parameters()).device
    parts: dict[int, Tensor] = {}
    progress = tqdm(total=sum(map(len, sequences)), unit="tokens", unit_scale=True, desc="features")
    for batch in batches_by_length([len(sequence) for sequence in sequences], batch_tokens):
        ids_BT, mask_BT = pad_right([sequences[index] for index in batch], 0, device)
        with torch.inference_mode():
            hidden_BTD = last_hidden_states(backbone, ids_BT, mask_BT)
        for row, index in enumerate(batch):
            parts[index] = hidden_BTD[row, list(positions[index])].float().cpu()
        progress.update(sum(len(sequences[index]) for index in batch))
    progress.close()
    return torch.stack([parts[index] for index in range(len(sequences))])


def cached_features(
    backbone: nn.Module,
    sequences: Sequence[Sequence[int]],
    pattern: Sequence[int],
    batch_tokens: int,
    cache: Path | None,
    key: str,
) -> Features:
    """Features of N conversations, from the cache where it holds them.

    Args:
        backbone: a frozen transformers model without a head.
        sequences: [N] token ids of whole conversations.
        pattern: the gating token pattern.
        batch_tokens: most tokens of a batch, padding included.
        cache: folder for features, or None for no cache.
        key: what identifies backbone and precision; the token ids are added to it.

    Raises:
        ValueError: a conversation without the gating pattern.
    """
    positions = [read_positions(sequence, pattern) for sequence in sequences]
    file = cache / cache_name(key, sequences, pattern) / "features.safetensors" if cache else None
    if file is not None and file.is_file():
        stored = load_file(file)
        print(f"features: {len(sequences)} conversations from {file.parent}")
        return Features(stored["last"], stored["gate"])
    hidden_NKD = hidden_states_at(backbone, sequences, positions, batch_tokens)
    features = Features(hidden_NKD[:, 0].contiguous(), hidden_NKD[:, 1].contiguous())
    if file is not None:
        with atomic_folder(file.parent) as aside:
            save_file({"last": features.last_ND, "gate": features.gate_ND}, aside / file.name)
    return features


def cache_name(key: str, sequences: Sequence[Sequence[int]], pattern: Sequence[int]) -> str:
    """A folder name that differs for another backbone, pattern or text."""
    digest = hashlib.sha256(f"{key} {list(pattern)}".encode())
    for sequence in sequences:
        digest.update(f"{list(sequence)}\n".encode())
    return digest.hexdigest()[:24]

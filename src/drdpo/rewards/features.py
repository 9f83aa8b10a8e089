"""Features of a frozen backbone for the reward heads, after any of its layers.

A backbone cut to its first k layers applies its FINAL norm to the output of layer k: config.json's num_hidden_layers = k.
So the features of layer k are normed by the final norm too, whatever the depth at which they are read.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drdpo.chat import Tokenizer, prompt_token_ids
from drdpo.errors import DataError
from drdpo.files import atomic_folder
from drdpo.progress import progress
from drdpo.rewards.armorm import last_hidden_states
from drdpo.rewards.batching import Span, batches_by_length, find_span, pad_right
from drdpo.rewards.layout import POOLINGS


class Features(NamedTuple):
    """Of N conversations after one layer and the final norm, float32 on the CPU."""

    last_ND: Tensor
    """Hidden states of the last token."""
    mean_ND: Tensor
    """Means over the answer: from the first token after the gating pattern to the last token."""
    gate_ND: Tensor
    """Hidden states at the gate position, the first token of the last gating pattern."""

    def answer(self, pooling: str) -> Tensor:
        """[N, D] what stage 1 reads with this pooling."""
        return dict(zip(POOLINGS, (self.last_ND, self.mean_ND), strict=True))[pooling]


def gating_pattern(tokenizer: Tokenizer) -> list[int]:
    """The template's token ids between a user's text and the answer: what two different prompts end in alike."""
    first, second = (prompt_token_ids(tokenizer, [{"role": "user", "content": text}]) for text in ("apple", "seven"))
    size = 0
    while first[-size - 1] == second[-size - 1]:
        size += 1
    if not size:
        raise DataError("the chat template writes nothing between a prompt and its answer, so a gate has nowhere to read")
    return first[-size:]


def depth(backbone: nn.Module) -> int:
    """How many layers a backbone has.

    Raises:
        DataError: it is none of the Llama family: a list of `layers`, then a `norm`.
    """
    layers: Any = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(getattr(backbone, "norm", None), nn.Module):
        raise DataError(f"the backbone is a {type(backbone).__name__}, not of the Llama family (layers, then a norm)")
    return len(layers)


def layer_features(
    backbone: nn.Module, layers: Sequence[int], sequences: Sequence[Sequence[int]], pattern: Sequence[int], batch_tokens: int
) -> dict[int, Features]:
    """Features of N conversations after each of some layers, in one pass.

    Args:
        backbone: a frozen transformers model of the Llama family, without a head.
        layers: counted from 1; layer k is the output of the k-th.
        sequences: [N] token ids of whole conversations.
        pattern: the gating token pattern.
        batch_tokens: most tokens of a batch, padding included.

    Raises:
        ValueError: a conversation without the gating pattern.
        DataError: a feature is not finite.
    """
    spans = [_span(sequence, pattern) for sequence in sequences]
    device = next(backbone.parameters()).device
    rows: dict[int, list[Features | None]] = {layer: [None] * len(sequences) for layer in layers}
    bar = progress(total=sum(map(len, sequences)), unit="token", unit_scale=True, desc="features")
    with _captured(backbone, layers) as captured, torch.inference_mode():
        for batch in batches_by_length([len(sequence) for sequence in sequences], batch_tokens):
            last_hidden_states(backbone, *pad_right([sequences[index] for index in batch], 0, device))
            for layer, hidden_BTD in captured.items():
                for place, index in enumerate(batch):
                    rows[layer][index] = _read(hidden_BTD[place], spans[index])
            bar.update(sum(len(sequences[index]) for index in batch))
    bar.close()
    found = {}
    for layer, parts in rows.items():
        features = Features(*(torch.stack(tensors) for tensors in zip(*(part for part in parts if part), strict=True)))
        if not all(bool(tensor.isfinite().all()) for tensor in features):
            raise DataError(f"the backbone's hidden states after layer {layer} are not finite; try --dtype=float32")
        found[layer] = features
    return found


def cached_features(
    backbone: nn.Module, layers: Sequence[int], sequences: Sequence[Sequence[int]], pattern: Sequence[int],
    batch_tokens: int, cache: Path | None, key: str,
) -> dict[int, Features]:  # fmt: skip
    """Features as layer_features gives them, from the cache where it holds them; only missing layers are computed.

    Args:
        backbone, layers, sequences, pattern, batch_tokens: as for layer_features.
        cache: folder for features, or None for no cache.
        key: what identifies backbone and precision; the token ids are added to it.
    """
    if cache is None:
        return layer_features(backbone, layers, sequences, pattern, batch_tokens)
    name = cache_name(key, sequences, pattern)
    files = {layer: cache / f"{name}-layer{layer}" / "features.safetensors" for layer in layers}
    missing = [layer for layer, file in files.items() if not file.is_file()]
    found = layer_features(backbone, missing, sequences, pattern, batch_tokens) if missing else {}
    for layer, features in found.items():
        with atomic_folder(files[layer].parent) as aside:
            save_file({name: tensor.contiguous() for name, tensor in features._asdict().items()}, aside / files[layer].name)
    if stored := [layer for layer in layers if layer not in found]:
        print(f"features: {len(sequences)} conversations, layers {', '.join(map(str, stored))}, from {cache}", flush=True)
    return {layer: found[layer] if layer in found else Features(**load_file(files[layer])) for layer in layers}


def cache_name(key: str, sequences: Sequence[Sequence[int]], pattern: Sequence[int]) -> str:
    """A name that differs for another backbone, pattern or text."""
    digest = hashlib.sha256(f"{key} {list(pattern)}".encode())
    for sequence in sequences:
        digest.update(f"{list(sequence)}\n".encode())
    return digest.hexdigest()[:24]


@contextmanager
def _captured(backbone: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Cut the backbone behind the deepest of `layers`; after each pass the dict holds their normed outputs [B, T, D]."""
    found: dict[int, Tensor] = {}
    whole: Any = backbone.layers
    norm: Any = backbone.norm
    config: Any = backbone.config

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[layer] = norm(output if isinstance(output, Tensor) else output[0])

        return hook

    hooks = [whole[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
    backbone.layers, config.num_hidden_layers = whole[: max(layers)], max(layers)
    try:
        yield found
    finally:
        backbone.layers, config.num_hidden_layers = whole, len(whole)
        for hook in hooks:
            hook.remove()


def _span(sequence: Sequence[int], pattern: Sequence[int]) -> Span:
    span = find_span(sequence, pattern)
    if span is None:
        raise ValueError("the conversation does not hold the gating token pattern")
    return span


def _read(hidden_TD: Tensor, span: Span) -> Features:
    mean_D = hidden_TD[span.first : span.last + 1].float().mean(dim=0)
    return Features(hidden_TD[span.last].float().cpu(), mean_D.cpu(), hidden_TD[span.gate].float().cpu())

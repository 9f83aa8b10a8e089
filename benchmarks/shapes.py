"""Models with random weights and pairs of drawn lengths, for gpu_counts.py and gpu_lease.py."""

import random
from typing import Any

from transformers import LlamaConfig

from drdpo.training.data import Pair

_LLAMA: dict[str, Any] = {"num_key_value_heads": 8, "num_attention_heads": 32, "vocab_size": 128256}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {**_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
                     "tie_word_embeddings": True},
    "Llama-3.1-8B": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
                     "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
}  # fmt: skip


def settings_of(name: str, **changes: Any) -> LlamaConfig:
    """transformers' settings of a model of SHAPES."""
    settings = LlamaConfig(rope_theta=500_000.0, max_position_embeddings=131_072, **{**SHAPES[name], **changes})
    settings.architectures = ["LlamaForCausalLM"]
    return settings


def pairs_of(count: int, prompt: int = 200, answer: int = 300, spread: float = 0.5, draw: int = 0) -> list[Pair]:
    """Pairs whose prompt and answers are drawn within a share `spread` of these lengths."""
    drawn = random.Random(draw)

    def ids(of: int) -> list[int]:
        return [10 + number % 400 for number in range(max(2, int(of * drawn.uniform(1 - spread, 1 + spread))))]

    return [Pair(ids(prompt), ids(answer), ids(answer), number) for number in range(count)]

"""Fixtures that several rooms share: small models in real Hugging Face folders, with the embedded model's tokenizer."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as src/env.sh; must be there before torch is imported


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The embedded policy, a real language model of 135M parameters."""
    path = ROOT / "models" / "SmolLM2-135M"
    assert (path / "config.json").is_file(), "the embedded model is missing; run: bash setup.sh --models=embedded"
    return path


@pytest.fixture(scope="session")
def tiny_policy(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers and width 32 with the embedded model's tokenizer, in float32."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "tiny policy"
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked gpu run where torch sees one."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no NVIDIA GPU here")

"""Small reward models in ArmoRM's layout, in float32, with random weights."""

import pytest
from harness.reward_models import PUBLISHED_CONFIG, SMALL, write_embedded_like, write_reward_model


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A small model in the 8B's exact config form: 19 heads, Llama-3's own pattern ids, four shards. Has no tokenizer."""
    folder = tmp_path_factory.mktemp("published") / "Armo RM"
    write_reward_model(folder, PUBLISHED_CONFIG | SMALL | {"num_hidden_layers": 2, "gating_hidden_dim": 12}, shards=4)
    return folder


@pytest.fixture(scope="session")
def embedded_like(smollm, tmp_path_factory):
    """A small model with the embedded model's tokenizer, template, pattern and three objectives of its own."""
    folder = tmp_path_factory.mktemp("embedded") / "reward model"
    return write_embedded_like(folder, smollm, ["kind", "right", "short"], shards=2)

"""Small reward models in ArmoRM's layout, in float32, with random weights."""

import json

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


@pytest.fixture
def broken(published, tmp_path):
    """A copy of `published` in one file, after a change to its config and tensors."""

    def make(change):
        from safetensors.torch import load_file, save_file

        tensors = {}
        for file in published.glob("*.safetensors"):
            tensors |= load_file(file)
        config = json.loads((published / "config.json").read_text())
        change(config, tensors)
        folder = tmp_path / "broken model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make

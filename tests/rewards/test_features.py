"""Features of a backbone at several depths, against the plain model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from drdpo.chat import load_tokenizer
from drdpo.errors import DataError
from drdpo.rewards.features import cached_features, depth, gating_pattern, layer_features

PATTERN = [2, 198, 1, 520, 9531, 198]
SEQUENCES = [[1, 5, *PATTERN, 9, 2], [1, 7, 8, 9, *PATTERN, 4, 4, *PATTERN, 6, 6, 6, 2], [1, *PATTERN]]


def backbone(folder: Path, layers: int | None = None) -> Any:
    """The plain model, cut by its own config where `layers` says so."""
    from transformers import AutoModel

    cut = {} if layers is None else {"num_hidden_layers": layers}
    return AutoModel.from_pretrained(folder, dtype=torch.float32, **cut).eval()


def test_features_are_those_of_a_backbone_that_is_cut_there(tiny_policy: Path) -> None:
    model = backbone(tiny_policy)
    assert gating_pattern(load_tokenizer(str(tiny_policy))) == PATTERN
    found = layer_features(model, [1, 2], SEQUENCES, PATTERN, 1000)
    for layer, features in found.items():
        plain = backbone(tiny_policy, layer)
        assert len(plain.layers) == layer
        for row, (ids, gate, first) in enumerate(zip(SEQUENCES, (2, 12, 1), (8, 18, 6), strict=True)):
            with torch.no_grad():
                hidden_TD = plain(torch.tensor([ids])).last_hidden_state[0]
            torch.testing.assert_close(features.last_ND[row], hidden_TD[-1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(features.gate_ND[row], hidden_TD[gate], atol=1e-4, rtol=1e-4)
            # An empty answer has nothing after the pattern: its last token stands for it.
            torch.testing.assert_close(features.mean_ND[row], hidden_TD[first:].mean(dim=0), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[1].last_ND, found[2].last_ND, atol=0.1)
    alone = layer_features(model, [1], SEQUENCES, PATTERN, 8)[1]  # the second layer is not run; batches of one
    torch.testing.assert_close(alone.mean_ND, found[1].mean_ND, atol=1e-4, rtol=1e-4)
    assert len(model.layers) == model.config.num_hidden_layers == 2


def test_only_missing_layers_are_computed(tiny_policy: Path, tmp_path: Path) -> None:
    model, cache = backbone(tiny_policy), tmp_path / "cache"
    first = cached_features(model, [1], SEQUENCES, PATTERN, 1000, cache, "key")
    both = cached_features(model, [1, 2], SEQUENCES, PATTERN, 1000, cache, "key")
    assert len(list(cache.iterdir())) == 2
    stored = cached_features(torch.nn.Identity(), [2, 1], SEQUENCES, PATTERN, 1000, cache, "key")
    for name, tensor in stored[1]._asdict().items():
        assert torch.equal(tensor, getattr(first[1], name))
        assert torch.equal(tensor, getattr(both[1], name))
    assert torch.equal(stored[2].gate_ND, both[2].gate_ND)
    for key, sequences in (("other", SEQUENCES), ("key", SEQUENCES[:2])):  # another backbone, other texts
        with pytest.raises((AttributeError, TypeError, StopIteration)):
            cached_features(torch.nn.Identity(), [1], sequences, PATTERN, 1000, cache, key)


def test_what_cannot_be_read_is_refused(tiny_policy: Path) -> None:
    model = backbone(tiny_policy)
    with pytest.raises(ValueError, match="does not hold the gating token pattern"):
        layer_features(model, [1], [[1, 2, 3]], PATTERN, 1000)
    with pytest.raises(DataError, match="Identity, not of the Llama family"):
        depth(torch.nn.Identity())
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight.fill_(torch.inf)
    with pytest.raises(DataError, match="after layer 2 are not finite"):
        layer_features(model, [1, 2], SEQUENCES, PATTERN, 1000)

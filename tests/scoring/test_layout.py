"""Strict loading of the published layout: a missing, unknown or wrongly shaped tensor is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.reward_models import apart

from drdpo.errors import DataError
from drdpo.models import read_tensors
from drdpo.scoring.armorm import (
    LLAMA3_GATING_PATTERN,
    ArmoRM,
    check_folder,
    load_armorm,
    read_layout,
)

Change = Callable[[dict[str, Any], dict[str, Any]], None]
Broken = Callable[[Change], Path]


def test_head_shapes_are_those_of_the_published_inventory(root: Path, tmp_path: Path) -> None:
    data = root.parent / "shared" / "data" / "armorm"
    if not data.is_dir():
        pytest.skip("the published tensor inventory is not here")
    shutil.copyfile(data / "config.json", tmp_path / "config.json")
    layout = read_layout(tmp_path)
    made = {name: tuple(tensor.shape) for name, tensor in ArmoRM(torch.nn.Identity(), layout).state_dict().items()}
    inventory = json.loads((data / "tensor_inventory.json").read_text())["armorm"]["non_layer_tensors"]
    published = {name: tuple(facts["shape"]) for name, facts in inventory.items() if not name.startswith("model.")}
    assert made == published
    assert layout.gating_token_pattern == LLAMA3_GATING_PATTERN
    assert list(layout.objectives) == json.loads((data / "published_example.json").read_text())["attributes"]


def test_single_file_and_shards_load_alike(published: Path, broken: Broken) -> None:
    assert len({stored.file for stored in read_tensors(published).values()}) == 4
    single = broken(lambda config, tensors: None)
    ids = [[128000, 9, 8, 128009, 128006, 78191, 128007, 271, 5, 6, 128009]]
    scores = [apart(load_armorm(folder, "cpu", torch.float32), ids) for folder in (published, single)]
    torch.testing.assert_close(scores[0].stage1, scores[1].stage1)
    torch.testing.assert_close(scores[0].stage2, scores[1].stage2)


def without(name: str) -> Change:
    return lambda config, tensors: tensors.__delitem__(name)


def with_tensor(name: str, *shape: int) -> Change:
    return lambda config, tensors: tensors.update({name: torch.zeros(*shape)})


def with_config(**fields: Any) -> Change:
    return lambda config, tensors: config.update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("gating.layers.2.weight"), r"Missing.*gating\.layers\.2\.weight"),
        (without("gating.logit_scale"), r"Missing.*gating\.logit_scale"),
        (without("regression_layer.weight"), r"Missing.*regression_layer\.weight"),
        (without("reward_transform_matrix"), r"Missing.*reward_transform_matrix"),
        (without("model.layers.1.mlp.up_proj.weight"), r"Missing.*model\.layers\.1\.mlp\.up_proj\.weight"),
        (with_tensor("regression_layer.weight", 18, 16), r"mismatch for regression_layer\.weight.*\[18, 16\].*\[19, 16\]"),
        (with_tensor("gating.layers.3.bias", 5), r"mismatch for gating\.layers\.3\.bias.*\[5\]"),
        (with_tensor("model.norm.weight", 17), r"mismatch for model\.norm\.weight"),
        (with_tensor("score.weight", 1, 16), r"Unexpected.*score\.weight"),
        (with_tensor("lm_head.weight", 4, 16), r"Unexpected.*lm_head\.weight"),
        (
            with_tensor("model.layers.9.mlp.up_proj.weight", 2, 2),
            r"Unexpected.*model\.layers\.9\.mlp\.up_proj\.weight",
        ),
        (
            lambda config, tensors: tensors.update({"regression_layer.weight": torch.full((19, 16), torch.nan)}),
            r"regression_layer\.weight contains NaN",
        ),
        (
            lambda config, tensors: tensors.update({"regression_layer.weight": torch.ones(19, 16, dtype=torch.int8)}),
            r"regression_layer\.weight is torch\.int8",
        ),
        (with_config(num_objectives=5), r'"num_objectives" is 5, but "objectives" is absent.*19'),
        (with_config(objectives=["a"] * 19), r'"objectives" repeats a name'),
        (with_config(objectives=["a", "b"]), r'"num_objectives" is 19, but "objectives" lists 2'),
        (with_config(objectives="helpful"), "Expected `array`.*objectives"),
        (with_config(gating_token_pattern=[]), "length >= 1.*gating_token_pattern"),
        (with_config(gating_token_pattern=[128257]), r"outside the vocabulary"),
        (with_config(gating_temperature=0), "> 0.*gating_temperature"),
        (with_config(gating_hidden_dim=None), "Expected `int`.*gating_hidden_dim"),
        (with_config(model_type="nonesuch"), r"the backbone cannot be built"),
    ],
)
def test_a_wrong_folder_is_refused(broken: Broken, change: Change, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_armorm(broken(change), "cpu")


def test_missing_and_cut_files(published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(published, folder)
    shard = folder / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"model-00002-of-00004\.safetensors: has \d+ bytes where"):
        load_armorm(folder, "cpu")
    shard.unlink()
    with pytest.raises(DataError, match=r"not complete: model-00002-of-00004\.safetensors is missing"):
        load_armorm(folder, "cpu")
    (folder / "model.safetensors.index.json").unlink()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(DataError, match="no weights"):
        load_armorm(folder, "cpu")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match=r"pickled \(pytorch_model\.bin\)"):
        load_armorm(folder, "cpu")
    (folder / "config.json").write_text('{"num_objectives": 1')
    with pytest.raises(DataError, match=r"config\.json: not JSON"):
        load_armorm(folder, "cpu")
    with pytest.raises(DataError, match="no such reward model folder"):
        load_armorm(tmp_path / "nowhere", "cpu")


def test_the_check_before_loading_finds_missing_parts(published: Path, embedded_like: Path, broken: Broken) -> None:
    assert check_folder(embedded_like).objectives == ("kind", "right", "short")
    with pytest.raises(DataError, match="no tokenizer"):
        check_folder(published)
    with pytest.raises(DataError, match=r"Missing.*model\.norm\.weight"):
        check_folder(broken(without("model.norm.weight")))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("LlamaForCausalLM", r"a language model \(LlamaForCausalLM\) where --reward_model needs ArmoRM's heads"),
        ("LlamaForSequenceClassification", r"no such model \(LlamaForSequenceClassification\) where --reward_model needs"),
    ],
)
def test_another_kind_of_model_is_named(published: Path, tmp_path: Path, architecture: str, message: str) -> None:
    config = {
        name: value for name, value in json.loads((published / "config.json").read_text()).items() if "gating" not in name
    }
    del config["num_objectives"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    with pytest.raises(DataError, match=message):
        check_folder(tmp_path)

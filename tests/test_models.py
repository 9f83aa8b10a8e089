"""Model folders that no step could use are refused before anything slow."""

import json
import shutil
from pathlib import Path

import pytest

from drdpo.errors import DataError
from drdpo.models import check_model_folder, fingerprint


@pytest.fixture
def folder(tmp_path: Path, tiny_policy: Path) -> Path:
    return Path(shutil.copytree(tiny_policy, tmp_path / "a model"))


def test_whole_folders_and_hub_ids_pass(folder: Path) -> None:
    for path in (str(folder), "meta-llama/Llama-3.2-1B-Instruct", "gpt2"):
        check_model_folder(path)


@pytest.mark.parametrize(
    "path", ["models/none", "outputs/x/global_step_9", "/no/such/model", "./none", "../none", "a/b/c", "~/m", ""]
)
def test_a_missing_folder_is_not_taken_for_a_hub_id(path: str) -> None:
    with pytest.raises(DataError, match="no such model folder"):
        check_model_folder(path)


def test_a_file_is_no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match="no such model folder"):
        check_model_folder("config.json")


def test_what_is_missing_is_named(folder: Path) -> None:
    for name, words in (
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no weights"),
        ("config.json", r"no config\.json"),
    ):
        (folder / name).unlink()
        with pytest.raises(DataError, match=words):
            check_model_folder(str(folder))


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"the weights are pickled \(pytorch_model.bin\).*safetensors"):
        check_model_folder(str(folder))


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(DataError, match=r"model-00002-of-00002\.safetensors is missing"):
        check_model_folder(str(folder))


def test_a_config_that_is_cut_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(DataError, match=r"config\.json: not JSON"):
        check_model_folder(str(folder))


def test_results_beside_a_model_do_not_change_its_fingerprint(folder: Path) -> None:
    before = fingerprint(folder)
    for name in ("manifest.json", "train.jsonl", "rejects.jsonl", "scores.csv", "report.md", "spider.png"):
        (folder / name).write_text("results")
    (folder / "sampled").mkdir()
    assert fingerprint(folder) == before
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert fingerprint(folder) != before


def test_every_byte_of_a_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(bytes(6 << 20))
    before = fingerprint(path)
    for place in (1, (5 << 20) + 70001, (6 << 20) - 1):
        content = bytearray(6 << 20)
        content[place] = 1
        path.write_bytes(content)
        assert fingerprint(path) != before


def test_heads_fitted_anew_change_a_fingerprint(tmp_path: Path) -> None:
    """Large weights are sampled, but a head is small: a change of one number in it must show."""
    import numpy as np
    from safetensors.numpy import save_file

    tensors = {f"model.layer{number}": np.full((1 << 20,), number, dtype=np.float32) for number in range(3)}
    tensors |= {"regression_layer.weight": np.zeros((5, 576), dtype=np.float32), "model.z": np.zeros(1 << 20, np.float32)}
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    before = fingerprint(tmp_path)
    for place in (0, 1234, 2879):
        changed = tensors["regression_layer.weight"].copy()
        changed.flat[place] = 1e-3
        save_file(tensors | {"regression_layer.weight": changed}, tmp_path / "model.safetensors")
        assert fingerprint(tmp_path) != before
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * (5 << 20))  # no header: still a fingerprint
    assert fingerprint(tmp_path) != before

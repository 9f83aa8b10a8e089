"""Which assets setup makes, and how the failure of one affects the others and the exit status."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from drdpo.asset_names import HUB_MODELS, select_models
from drdpo.assets import embedded, hub
from drdpo.assets.download import download_assets
from drdpo.config.data import AssetsConfig
from drdpo.errors import DataError, UsageError


@pytest.fixture
def fake_hub(monkeypatch):
    """Models by hub id -> what their download raises; {"answers": ...} for the probe."""
    behaviour = {}

    def model(repo, folder):
        if error := behaviour.get(repo):
            raise error
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    def dataset(repo, folder):
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text("{}")

    def answers():
        behaviour["asked"] = None
        return "silent" not in behaviour

    monkeypatch.setattr(hub, "download_model", model)
    monkeypatch.setattr(hub, "download_helpsteer2", dataset)
    monkeypatch.setattr(hub, "hub_answers", answers)
    return behaviour


@pytest.fixture
def quick_embedded(monkeypatch):
    """Stand-ins for the embedded models, which have their own tests."""

    def make(folder, *rest):
        folder.mkdir(parents=True)

    for name in ("policy", "reward_model"):
        monkeypatch.setattr(embedded, f"make_{name}", make)
        monkeypatch.setattr(embedded, f"{name}_is_made", lambda folder, *rest: folder.is_dir())


def _states(config: AssetsConfig, root: Path) -> dict[str, str]:
    return {outcome.name: outcome.state for outcome in download_assets(config, root)}


@pytest.mark.usefixtures("quick_embedded")
def test_auto_without_a_hub_is_the_embedded_set(fake_hub, tmp_path, capsys):
    fake_hub["silent"] = None
    config = AssetsConfig()
    names = {"SmolLM2-135M", "ArmoRM-SmolLM2", "embedded_prompts"}
    assert _states(config, tmp_path) == dict.fromkeys(names, "made")
    assert capsys.readouterr().out.count("The hub does not answer") == 1
    assert _states(config, tmp_path) == dict.fromkeys(names, "present"), "a second run makes nothing"


@pytest.mark.usefixtures("quick_embedded")
def test_auto_with_a_hub_is_everything_and_a_missing_login_is_no_error(fake_hub, tmp_path, capsys):
    fake_hub[HUB_MODELS["Llama1b"]] = hub.NeedsLoginError("gated: accept the licence")
    states = _states(AssetsConfig(), tmp_path)
    assert states.pop("Llama1b") == "needs a login"
    assert set(states.values()) == {"made"}
    assert re.search(r"^Llama1b +needs a login +gated: accept the licence$", capsys.readouterr().out, re.MULTILINE)
    del fake_hub[HUB_MODELS["Llama1b"]]
    assert _states(AssetsConfig(), tmp_path)["Llama1b"] == "made"
    del fake_hub["asked"]
    assert set(_states(AssetsConfig(), tmp_path).values()) == {"present"}
    assert "asked" not in fake_hub, "the hub is not asked if nothing is missing"


@pytest.mark.parametrize(
    ("error", "state"), [(hub.NeedsLoginError("gated"), "needs a login"), (DataError("failed"), "failed")]
)
def test_a_named_model_that_fails_is_an_error_after_the_others_are_made(fake_hub, tmp_path, capsys, error, state):
    fake_hub[HUB_MODELS["Llama1b"]] = error
    with pytest.raises(DataError, match=r"1 of 3 .*: Llama1b"):
        download_assets(AssetsConfig(models="Llama1b,ArmoRM", datasets="embedded"), tmp_path)
    assert (tmp_path / "models" / "ArmoRM" / "config.json").is_file()
    assert (tmp_path / "datasets" / "embedded_prompts" / "train.jsonl").is_file()
    assert state in capsys.readouterr().out


def test_a_named_asset_without_a_hub_is_an_error(fake_hub, tmp_path):
    fake_hub["silent"] = None
    with pytest.raises(DataError, match=r"1 of 2 .* helpsteer2_prompts"):
        download_assets(AssetsConfig(models="none", datasets="all"), tmp_path)
    assert (tmp_path / "datasets" / "embedded_prompts" / "test.jsonl").is_file()


@pytest.mark.usefixtures("quick_embedded", "fake_hub")
def test_the_reward_model_brings_its_backbone(tmp_path):
    states = _states(AssetsConfig(models="ArmoRM-SmolLM2", datasets="none"), tmp_path)
    assert list(states) == ["SmolLM2-135M", "ArmoRM-SmolLM2"]


def test_names_are_selected_once_in_a_fixed_order():
    assert select_models("embedded,Llama1b").hub == ("Llama1b",)
    assert select_models("ArmoRM,Llama1b,ArmoRM").hub == ("Llama1b", "ArmoRM")
    assert select_models("auto").automatic
    assert not select_models("all").automatic
    assert (select_models("none").embedded, select_models("none").hub) == ((), ())
    for value in ("llama1b", "", "Llama1b,", "auto,Llama1b", "none,embedded"):
        with pytest.raises(UsageError, match="choose from SmolLM2-135M, ArmoRM-SmolLM2, Llama1b"):
            AssetsConfig(models=value)


def test_the_entrypoint_imports_no_torch(root):
    """A second setup does not import torch."""
    code = (
        "import runpy, sys; sys.argv = ['x', '--models=none', '--datasets=none'];"
        f"runpy.run_path('{root}/src/download_assets.py', run_name='__main__');"
        "from drdpo.assets.embedded import policy_is_made; from pathlib import Path;"
        "assert policy_is_made(Path('models/SmolLM2-135M'));"
        "assert not {'torch', 'gguf'} & set(sys.modules)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, env=environment, timeout=120)

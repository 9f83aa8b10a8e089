"""Model cards and uploads."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi, ModelCard

from drdpo.config.training import TrainConfig
from drdpo.training.losses import method_of
from drdpo.training.model_card import model_card, push_to_hub

METRICS = {"step": 4, "epoch": 2.0, "loss": 0.5, "accuracy": 0.75, "margin": 1.25, "eval_loss": 0.625}


def card(model: str, data: str, folder: Path, **flags: Any) -> ModelCard:
    config = TrainConfig(model, data, str(folder), dtype="float32", **flags)
    counts = {"train": {"in": 1200, "out": 1024}, "test": {"in": 8, "out": 8}}
    run = SimpleNamespace(config=config, method=method_of(config), folder=folder, counts=counts, steps=8)
    text = model_card(run, 4, METRICS)
    text.encode()
    return ModelCard(text)


def test_a_card_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: who/what\n---\ntext")
    found = card(str(base), "who/pairs|x", tmp_path / "a run", kldpo_tau=0.05)
    assert (found.data.base_model, found.data.license, found.data.datasets) == ("who/what", "apache-2.0", ["who/pairs|x"])
    assert found.data.library_name == "transformers"
    for text in ("who/what, aligned by **KLDPO (kldpo_tau=0.05)**", "step 4 of 8", "| train pairs | 1,024 of 1,200 |",
                 "| pairs from | who/pairs\\|x |", "| eval loss | 0.625 |", "| loss | 0.5 |",
                 "AutoModelForCausalLM"):  # fmt: skip
        assert text in found.text, text


def test_a_downloaded_base_is_named_by_its_repository_and_an_adapter_by_its_library(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"assets": {"made_by": {"repository": "meta/Llama"}}}))
    found = card(str(tmp_path), str(tmp_path), tmp_path, lora_rank=4, lora_merge=False)
    assert (found.data.base_model, found.data.library_name, found.data.datasets) == ("meta/Llama", "peft", None)
    assert "AutoPeftModelForCausalLM" in found.text
    assert card("some/hub", "d", tmp_path).data.base_model == "some/hub"
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert card(str(tmp_path), "d", tmp_path).data.base_model is None


def test_a_checkpoint_is_uploaded_whole_to_a_private_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    asked = []

    def upload(api: HfApi, **given: Any) -> SimpleNamespace:
        asked.append(given)
        return SimpleNamespace(commit_url="https://huggingface.co/me/aligned/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", lambda api, name, **given: asked.append({"repo_id": name, **given}))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    push_to_hub("me/aligned", tmp_path / "global_step_4")
    assert asked[0] == {"repo_id": "me/aligned", "private": True, "exist_ok": True}
    whole = {"repo_id": "me/aligned", "folder_path": tmp_path / "global_step_4", "commit_message": "drdpo: global_step_4"}
    assert asked[1] == whole
    said = capsys.readouterr()
    assert "commit/1" in said.out and not said.err


def test_a_failed_upload_is_a_warning_without_the_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """With huggingface_hub's own request, which the hub refuses."""
    asked = []

    def refuse(client: httpx2.Client, request: httpx2.Request, **_: Any) -> httpx2.Response:
        asked.append(request)
        return httpx2.Response(403, request=request)

    monkeypatch.setattr(httpx2.Client, "send", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    push_to_hub("me/aligned", tmp_path)
    assert "Bearer hf_secretsecretsecret" in [request.headers.get("Authorization") for request in asked]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: --push_to_hub=me/aligned failed") and "403" in line and str(tmp_path) in line
    assert "secret" not in line

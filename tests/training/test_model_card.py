"""Model cards and uploads, against a local stand-in of the hub's API."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Takes commits of small files; `asked` are the requests' paths, `files` what was committed."""
    state = SimpleNamespace(asked=[], files={}, private=None, status=200)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.asked.append(self.path)
            answer: dict[str, Any] = {"error": "no"}
            if self.path == "/api/repos/create":
                state.private = json.loads(body).get("visibility", json.loads(body).get("private"))
                answer = {"url": "https://huggingface.co/me/aligned"}
            elif "/preupload/" in self.path:
                paths = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    row = json.loads(line)
                    if row["key"] == "file":
                        state.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
                answer = {"commitOid": "1" * 40, "commitUrl": "https://huggingface.co/me/aligned/commit/1", "success": True}
            text = json.dumps(answer).encode()
            self.send_response(state.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    yield state
    server.shutdown()
    server.server_close()


def test_a_checkpoint_is_uploaded_whole_to_a_private_repository(hub: SimpleNamespace, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "global_step_4"
    (folder / "adapter").mkdir(parents=True)
    (folder / "README.md").write_text("card")
    (folder / "adapter" / "config.json").write_text("{}")
    push_to_hub("me/aligned", folder)
    assert hub.private in (True, "private")
    assert hub.files == {"README.md": b"card", "adapter/config.json": b"{}"}
    said = capsys.readouterr()
    assert "commit/1" in said.out and "secret" not in said.out + said.err


def test_a_failed_upload_is_a_warning(hub: SimpleNamespace, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "README.md").write_text("card")
    hub.status = 403
    push_to_hub("me/aligned", tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: --push_to_hub=me/aligned failed") and "secret" not in line and str(tmp_path) in line

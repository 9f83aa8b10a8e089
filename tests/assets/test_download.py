"""Hub downloads from a fake hub: what is downloaded, refused and resumed; HelpSteer2's rows as prompts; setup's choice."""

import gzip
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from drdpo.asset_names import HUB_MODELS, select_models
from drdpo.assets import download as step
from drdpo.assets import embedded
from drdpo.assets.download import download_assets
from drdpo.config.data import AssetsConfig
from drdpo.errors import DataError, UsageError
from drdpo.folder import read_manifest
from drdpo.records import Prompt, read_records, read_rows

PAD = "<|finetune_right_pad_id|>"
LLAMA = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"1",
    "model-00002-of-00002.safetensors": b"2",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": json.dumps({"added_tokens": [{"id": 128004, "content": PAD}]}).encode(),
    "tokenizer_config.json": b'{"eos_token": "<|eot_id|>"}',
    "generation_config.json": b'{"eos_token_id": [128001, 128008, 128009]}',
    "LICENSE.txt": b"licence",
}
REFUSED = dict.fromkeys(
    (
        "original/consolidated.00.pth", "original/params.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
        "modeling_custom.py", "tokenizer_code.py",
    ),
    b"code or pickle",
)  # fmt: skip


class FakeHub:
    """Serves `files` of a repository; the download raises `fail` after `fail_after` files, or calls `spoil` on a shard."""

    fail = info_error = spoil = None
    fail_after, free = 0, 1 << 40

    def __init__(self):
        self.files, self.fetched = LLAMA | REFUSED, []

    def model_info(self, repo, **options):
        if self.info_error:
            raise self.info_error
        siblings = [SimpleNamespace(rfilename=name, size=len(content)) for name, content in self.files.items()]
        return SimpleNamespace(sha="abc123", siblings=siblings)

    dataset_info = model_info

    def snapshot_download(self, repo, *, revision, local_dir, **patterns):
        assert revision == "abc123"
        for count, name in enumerate(filter_repo_objects(self.files, **patterns)):
            if self.fail and count >= self.fail_after:
                raise self.fail
            self.fetched.append(name)
            (local_dir / name).write_bytes(self.files[name])
        if self.spoil:
            self.spoil(local_dir / "model-00002-of-00002.safetensors")
        (local_dir / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)


@pytest.fixture
def fake(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(step.shutil, "disk_usage", lambda path: SimpleNamespace(free=fake.free))
    return fake


def _http(error, status):
    request = httpx.Request("GET", "https://hub.example/api")
    return error("Cannot access it.\nMore lines.", response=httpx.Response(status, request=request))


def test_a_llama_is_downloaded_with_its_pad_token(fake, tmp_path, capsys):
    folder = tmp_path / "models" / "Llama1b"
    step.download_model("meta-llama/Llama-3.2-1B-Instruct", folder)
    assert {str(file.relative_to(folder)) for file in folder.rglob("*")} == LLAMA.keys() | {"manifest.json"}
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"eos_token": "<|eot_id|>", "pad_token": PAD}
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [128001, 128008, 128009], "pad_token_id": 128004}
    assert read_manifest(folder)["assets"]["made_by"]["revision"] == "abc123"
    assert "downloading 0.0 GB" in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir()] == ["Llama1b"]
    # Other models keep their own.
    step.download_model("RLHFlow/ArmoRM-Llama3-8B-v0.1", tmp_path / "ArmoRM")
    assert b"pad" not in (tmp_path / "ArmoRM" / "tokenizer_config.json").read_bytes()
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 7, "content": PAD}]}))
    with pytest.raises(DataError, match=r"no token .* with the id 128004"):
        step.set_pad_token(folder, *step.LLAMA3_PAD)


def test_an_interrupted_download_shows_nothing_and_resumes(fake, tmp_path):
    fake.fail, fake.fail_after = ConnectionError("connection reset\nby peer"), 2
    folder, aside = tmp_path / "Llama1b", tmp_path / ".Llama1b.download"
    with pytest.raises(DataError, match=r"Llama-3\.2-1B-Instruct: the download failed \(connection reset\)"):
        step.download_model("meta-llama/Llama-3.2-1B-Instruct", folder)
    assert not folder.exists()
    assert (aside / "model-00001-of-00002.safetensors").is_file(), "complete files are kept for the next run"
    fake.fail = None
    step.download_model("meta-llama/Llama-3.2-1B-Instruct", folder)
    assert (folder / "model-00002-of-00002.safetensors").is_file()
    assert not aside.exists()


def test_a_folder_that_is_no_whole_model_is_refused_before_the_download(fake, tmp_path):
    folder = tmp_path / "Llama1b"
    folder.mkdir()
    step.download_model("owner/model", folder)
    assert (folder / "config.json").is_file(), "an empty folder is replaced"
    fake.fetched.clear()
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match=r"Llama1b: exists without config\.json.*move it away"):
        step.download_model("owner/model", folder)
    assert fake.fetched == []


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_an_incomplete_file_shows_nothing(fake, tmp_path, spoil):
    fake.spoil = spoil
    with pytest.raises(DataError, match=r"model-00002-of-00002\.safetensors is incomplete"):
        step.download_model("owner/model", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"info_error": _http(RepositoryNotFoundError, 404)}, "no such repository"),
        ({"info_error": _http(HfHubHTTPError, 503)}, r"the download failed \(Cannot access it\.\)"),
        ({"info_error": TimeoutError("timed out")}, r"the download failed \(timed out\)"),
        ({"files": {"config.json": b"{}", "tokenizer.json": b"{}"} | REFUSED}, "no safetensors weights"),
        ({"fail": _http(GatedRepoError, 401)}, r"huggingface\.co/owner/model, run `hf auth login`"),
        ({"free": 99}, r"only 0\.0 GB are free"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line(fake, tmp_path, broken, says):
    vars(fake).update(broken)
    with pytest.raises(step.NeedsLoginError if "login" in says else DataError, match=says):
        step.download_model("owner/model", tmp_path / "model")
    assert not (tmp_path / "model").exists() and fake.fetched == []


@pytest.mark.parametrize("error", [None, ConnectionError("no route"), _http(HfHubHTTPError, 500), TimeoutError()])
def test_the_hub_answers_unless_the_request_fails(fake, error):
    fake.info_error = error
    assert step.hub_answers() is (error is None)


def test_the_hub_does_not_answer_offline():
    """The real client: conftest sets HF_HUB_OFFLINE before it is imported."""
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert step.hub_answers() is False


@pytest.fixture
def helpsteer2(fake, tmp_path, monkeypatch):
    """Serves both splits from lists of prompts and downloads them into a folder."""

    def fetch(repo, name, repo_type, revision):
        assert (repo, repo_type, revision) == ("nvidia/HelpSteer2", "dataset", "abc123")
        return str(tmp_path / name)

    def download(cut=0, **splits):
        for split, texts in splits.items():
            content = gzip.compress("".join(json.dumps({"prompt": text}) + "\n" for text in texts).encode())
            (tmp_path / f"{split}.jsonl.gz").write_bytes(content[: len(content) - cut])
        step.download_helpsteer2("nvidia/HelpSteer2", tmp_path / "datasets" / "helpsteer2_prompts")
        return tmp_path / "datasets" / "helpsteer2_prompts"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return download


def test_helpsteer2_omits_train_prompts_of_the_test_split(helpsteer2):
    folder = helpsteer2(train=["A", "A", "B"], validation=["B", "B"])
    assert [row.prompt[0]["content"] for row in read_records(folder / "train.jsonl", Prompt.from_row)] == ["A"]
    assert [row.prompt_id for row in read_records(folder / "test.jsonl", Prompt.from_row)] == [step.FIRST_TEST_ID]
    manifest = read_manifest(folder)["assets"]
    assert manifest["made_by"] == {"repository": "nvidia/HelpSteer2", "revision": "abc123"}
    assert manifest["count"]["train"]["dropped_also_in_test"] == 1
    assert manifest["count"]["test"]["dropped_repeated"] == 1
    assert manifest["licence"].startswith("CC-BY-4.0")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"validation": []}, "the validation split has no usable prompt"),
        ({"validation": ["B"], "cut": 9}, r"\.jsonl\.gz: the download is damaged"),
        ({"validation": [None]}, 'row 1: field "prompt"'),
    ],
)
def test_bad_helpsteer2_leaves_nothing(helpsteer2, tmp_path, splits, message):
    with pytest.raises(DataError, match=message):
        helpsteer2(train=["A"], **splits)
    assert not list(tmp_path.glob("datasets/*"))


ASSISTANT, USER = "\n<extra_id_1>Assistant\n", "\n<extra_id_1>User\n"


def converted(*texts, **options):
    return step.convert_rows([{"prompt": text, "response": "r"} for text in texts], **options)


def user(text):
    return {"role": "user", "content": text}


def test_each_prompt_once_and_turns_split():
    prompts, counts = converted(" Hi ", "Hi", f"A{ASSISTANT}B\n{USER}\nC", f"A{ASSISTANT}B{USER}C", "Bye", first_id=10)
    turns = [user("A"), {"role": "assistant", "content": "B"}, user("C")]
    assert prompts == [Prompt(10, [user("Hi")]), Prompt(11, turns), Prompt(12, [user("Bye")])]
    assert counts == {
        "rows": 5, "prompts": 3, "multi_turn": 1,
        "dropped_repeated": 2, "dropped_broken_turns": 0, "dropped_also_in_test": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"Hi{ASSISTANT}Hello", "does not end in a user turn"),
        (f"Hi{USER}again", "turn 2 is the user's"),
        (f"Hi{ASSISTANT} {USER}Bye", "turn 2 is empty"),
        (f"Hi{ASSISTANT}Hello{USER}", "turn 3 is empty"),
        ("  \n ", "turn 1 is empty"),
        ("<extra_id_1>Assistant\nHello", "turn 1 is the assistant's"),
        ("Hi <extra_id_1>assistant Hello", None),  # one turn, but with a marker left in it
    ],
)
def test_broken_turns_are_dropped_and_counted(text, message):
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        step.split_helpsteer_turns(text)
    prompts, counts = converted("fine\n\nUser\nthere", text)
    assert [prompt.prompt for prompt in prompts] == [[user("fine\n\nUser\nthere")]]
    assert counts["dropped_broken_turns"] == 1


@pytest.mark.parametrize(("split", "prompts", "multi_turn"), [("train", 500, 52), ("validation", 350, 52)])
def test_rows_of_the_real_data_set_are_converted(root, split, prompts, multi_turn):
    path = root.parent / "shared" / "data" / "helpsteer2" / f"{split}.jsonl"
    if not path.is_file():
        pytest.skip("../shared is missing")
    rows = [row for _, row in read_rows(path)]
    kept, counts = step.convert_rows(rows)
    assert counts["rows"] == len(rows) == 2 * prompts
    assert counts["prompts"] + counts["dropped_broken_turns"] // 2 == prompts
    marked = {row["prompt"] for row in rows if "<extra_id_1>" in row["prompt"]}
    assert len(marked) == multi_turn
    assert counts["multi_turn"] + counts["dropped_broken_turns"] // 2 == multi_turn
    assert "extra_id" not in json.dumps([prompt.prompt for prompt in kept])


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """Run setup's second half; {asset: state}. Embedded models, which have tests of their own, and hub are stand-ins."""
    errors = {}

    def make(folder, *rest):
        folder.mkdir(parents=True)

    def download(repo, folder):
        if error := errors.get(repo):
            raise error
        folder.mkdir(parents=True)
        for name in ("config.json", "test.jsonl"):
            (folder / name).write_text("{}")

    for name in ("policy", "reward_model"):
        monkeypatch.setattr(embedded, f"make_{name}", make)
        monkeypatch.setattr(embedded, f"{name}_is_made", lambda folder, *rest: folder.is_dir())
    for name in ("model", "helpsteer2"):
        monkeypatch.setattr(step, f"download_{name}", download)

    def run(answers=True, llama=None, **flags):
        errors[HUB_MODELS["Llama1b"]] = llama
        monkeypatch.setattr(step, "hub_answers", Mock(return_value=answers))
        return {outcome.name: outcome.state for outcome in download_assets(AssetsConfig(**flags), tmp_path)}

    return run


def test_auto_without_a_hub_is_the_embedded_set(setup, capsys):
    names = {"SmolLM2-135M", "ArmoRM-SmolLM2", "embedded_prompts"}
    assert setup(answers=False) == dict.fromkeys(names, "made")
    assert capsys.readouterr().out.count("The hub does not answer") == 1
    assert setup(answers=False) == dict.fromkeys(names, "present"), "a second run makes nothing"


def test_auto_with_a_hub_is_everything_and_a_missing_login_is_no_error(setup, capsys):
    states = setup(llama=step.NeedsLoginError("gated: accept the licence"))
    assert states.pop("Llama1b") == "needs a login"
    assert set(states.values()) == {"made"}
    assert re.search(r"^Llama1b +needs a login +gated: accept the licence$", capsys.readouterr().out, re.MULTILINE)
    assert setup()["Llama1b"] == "made"
    assert set(setup().values()) == {"present"}
    assert not step.hub_answers.called, "the hub is not asked if nothing is missing"


@pytest.mark.parametrize(
    ("error", "state"), [(step.NeedsLoginError("gated"), "needs a login"), (DataError("failed"), "failed")]
)
def test_a_named_asset_that_fails_is_an_error_after_the_others_are_made(setup, tmp_path, capsys, error, state):
    with pytest.raises(DataError, match=r"1 of 3 .*: Llama1b"):
        setup(llama=error, models="Llama1b,ArmoRM", datasets="embedded")
    assert (tmp_path / "models" / "ArmoRM" / "config.json").is_file()
    assert (tmp_path / "datasets" / "embedded_prompts" / "train.jsonl").is_file()
    assert state in capsys.readouterr().out
    with pytest.raises(DataError, match=r"1 of 2 .* helpsteer2_prompts"):
        setup(answers=False, models="none", datasets="all")


def test_the_reward_model_brings_its_backbone(setup):
    assert list(setup(models="ArmoRM-SmolLM2", datasets="none")) == ["SmolLM2-135M", "ArmoRM-SmolLM2"]


def test_names_are_selected_once():
    assert select_models("embedded,Llama1b") == dict.fromkeys(("SmolLM2-135M", "ArmoRM-SmolLM2", "Llama1b"), True)
    assert select_models("ArmoRM,Llama1b,ArmoRM") == {"ArmoRM": True, "Llama1b": True}
    assert not select_models("auto")["Llama1b"] and all(select_models("all").values())
    assert select_models("none") == {}
    for value in ("llama1b", "", "Llama1b,", "auto,Llama1b", "none,embedded"):
        with pytest.raises(UsageError, match="choose from SmolLM2-135M, ArmoRM-SmolLM2, Llama1b"):
            AssetsConfig(models=value)


def test_the_entrypoint_imports_no_torch(root):
    code = (
        "import runpy, sys; sys.argv = ['x', '--models=none', '--datasets=none'];"
        f"runpy.run_path('{root}/src/download_assets.py', run_name='__main__');"
        "from drdpo.assets.embedded import policy_is_made; from pathlib import Path;"
        "assert policy_is_made(Path('models/SmolLM2-135M'));"
        "assert not {'torch', 'gguf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=120)

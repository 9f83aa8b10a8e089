"""Model folders that no step could use are refused before anything slow."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from drdpo import models
from drdpo.errors import DataError
from drdpo.models import check_model, fingerprint, table


@pytest.fixture
def folder(tmp_path, tiny_policy):
    return Path(shutil.copytree(tiny_policy, tmp_path / "a model"))


def change(folder, into):
    """Other tensors in the folder's weights."""
    file = folder / "model.safetensors"
    save_file(into(load_file(file)), file, metadata={"format": "pt"})


def set_config(folder: Path, name: str = "config.json", **fields: Any) -> None:
    file = folder / name
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(before | fields))


def refused(path: Path, words: str, **flags: Any) -> None:
    with pytest.raises(DataError, match=words):
        check_model(str(path), **flags)


def test_a_whole_folder_passes_and_its_table_says_what_it_is(folder):
    model = check_model(str(folder))
    assert (model.name, model.tensors, model.structure.positions) == ("LlamaForCausalLM", 20, 2048)
    assert model.parameters == 49152 * 32 + 2 * (32 * (2 * 32 + 2 * 16) + 3 * 32 * 64 + 2 * 32) + 32
    lines = dict(line.split(maxsplit=1) for line in table(model).splitlines())
    assert lines["weights"] == "20 tensors, all that the model has and no others"
    assert lines["training"] == lines["packing"] == "yes"
    assert lines["tokens"].startswith("49,152 in the tokenizer, 49,152 rows in the embedding; end of sequence <|im_end|>")
    assert lines["template"] == "answers end with <|im_end|>; trains on text or ids"
    assert "14 linear layers" in lines["LoRA"]


def test_of_a_hub_id_the_config_alone_is_looked_at(folder, monkeypatch):
    settings = models.read_settings(str(folder))
    monkeypatch.setattr(models, "read_settings", lambda path: settings)
    for path in ("meta-llama/Llama-3.2-1B-Instruct", "gpt2"):
        model = check_model(path)
        assert model.tokenizer is None and "on the hub: not read" in table(model)


HEAD, LAST = "lm_head.weight", "model.layers.1.mlp.down_proj.weight"


WEIGHTS = {
    "a matrix missing": (lambda w: {k: v for k, v in w.items() if k != LAST}, rf"{LAST} is missing"),
    "of data parallel": (lambda w: {f"module.{k}": v for k, v in w.items()},
                         r"model.embed_tokens.weight \(and 20 more\) is missing, and module\.model\."),
    "of peft, adapters not merged": (lambda w: {k.replace("q_proj.", "q_proj.base_layer."): v for k, v in w.items()},
                                     r"q_proj.weight \(and 1 more\) is missing, and model\.\S+\.q_proj\.base_layer\."),
    "of another wrapper": (lambda w: {k.replace("model.", "model.language_model.", 1): v for k, v in w.items()},
                           r"is missing, and model\.language_model\."),
    "more layers": (lambda w: w | {k.replace("layers.1", "layers.2"): v.clone() for k, v in w.items() if "layers.1" in k},
                    r"model\.layers\.2\.\S+ \(and 8 more\) has no place in it"),
    "fewer layers in the config": ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ \(and 8 more\) has no place in it"),
    "no head of its own": ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    "another width": (lambda w: w | {LAST: w[LAST][:, :-1].clone()}, rf"{LAST} has shape \[32, 63\], not \[32, 64\]"),
    "a classifier": (lambda w: w | {"score.weight": w[LAST][:1].clone()}, "score.weight has no place in it"),
    "a bias without a place": (lambda w: w | {"model.layers.0.self_attn.q_proj.bias": w["model.norm.weight"].clone()},
                               "q_proj.bias has no place in it"),
    "int8 codes": (lambda w: w | {LAST: w[LAST].to(torch.int8)}, "is stored in I8, and config.json names no quantization"),
    "fp8": (lambda w: w | {LAST: w[LAST].to(torch.float8_e4m3fn)}, "is stored in F8_E4M3, and config.json names no"),
}  # fmt: skip
"""Tensors, or fields of config.json, that are others: transformers would draw the missing ones, and cast the codes."""


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_exactly_the_models_are_refused_by_the_first(name, folder):
    into, words = WEIGHTS[name]
    set_config(folder, **into) if isinstance(into, dict) else change(folder, into)
    refused(folder, words)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(folder):
    """transformers would use it, and vLLM the embedding: trained and sampled would be two models."""
    change(folder, lambda w: w | {HEAD: w["model.embed_tokens.weight"].clone()})
    check_model(str(folder))
    set_config(folder, tie_word_embeddings=False)
    check_model(str(folder))
    set_config(folder, tie_word_embeddings=True)
    change(folder, lambda w: w | {HEAD: w[HEAD].double()})  # the same values
    check_model(str(folder))
    change(folder, lambda w: w | {HEAD: w[HEAD] + 1})
    refused(folder, r"config\.json ties lm_head\.weight to model\.embed_tokens\.weight, and the weights differ")


def test_names_that_transformers_maps_or_does_without_pass(folder, tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "masked_bias": torch.tensor(-1e9)}
    extra["model.layers.0.self_attn.mask"] = torch.ones(4, 4, dtype=torch.bool)
    change(folder, lambda w: {k.removeprefix("model."): v for k, v in (w | extra).items()})
    assert check_model(str(folder)).tensors == 23, "without the prefix, as a bare backbone is saved"
    # Stored one by one, experts are stacked when they are loaded.
    sizes = {"vocab_size": 49152, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}  # fmt: skip
    AutoModelForCausalLM.from_config(MixtralConfig(**sizes)).save_pretrained(folder)
    check_model(str(folder))
    change(folder, lambda w: {k: v for k, v in w.items() if ".experts.2." not in k})
    refused(folder, r"experts\.gate_up_proj has shape \[2, 16, 16\], not \[3, 16, 16\]|down_proj has shape")


def test_tokens_without_a_row_are_named_unless_no_text_becomes_them(folder):
    words, template = json.loads((folder / "tokenizer.json").read_text()), folder / "chat_template.jinja"
    token = {"id": 49152, "content": "<extra>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}

    def add(special):
        added = [*words["added_tokens"], token | {"special": special}]
        (folder / "tokenizer.json").write_text(json.dumps(words | {"added_tokens": added}))

    add(special=False)
    refused(folder, r"token '<extra>' has the id 49152, and the embedding has 49152 rows; resize")
    refused(folder, "'<extra>'", chat=False)
    add(special=True)  # drdpo.chat writes it as plain text; Gemma 3 of 1B has such an image token
    assert "<extra> has no row, and no text becomes it" in table(check_model(str(folder)))
    own = template.read_text()
    template.write_text("{% for m in messages %}{{ '<extra>' + m.content }}{% endfor %}")
    refused(folder, "token '<extra>' has the id 49152")
    check_model(str(folder), chat=False)
    template.write_text(own)
    (folder / "tokenizer.json").write_text(json.dumps(words))
    set_config(folder, "tokenizer_config.json", **{"pad_token": "[PAD]"})
    refused(folder, r"token '\[PAD\]' has the id 49152")


def test_the_command_prints_the_table_or_one_line(root, folder, forks):
    done = forks.run([sys.executable, root / "src/check_model.py", folder])
    assert done.returncode == 0 and "packing    yes" in done.stdout
    set_config(folder, num_hidden_layers=3)
    done = forks.run([sys.executable, root / "src/check_model.py", folder])
    assert done.returncode == 1 and done.stdout == ""
    assert "model.layers.2.self_attn.q_proj.weight (and 8 more) is missing" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", ["outputs/x/global_step_9", "/no/such/model", "../none", "~/m", "", "config.json"])
def test_a_missing_folder_or_a_file_is_not_taken_for_a_hub_id(path, folder, monkeypatch):
    monkeypatch.chdir(folder)
    refused(path, "no such model folder")


@pytest.mark.parametrize("of_file", [False, True])
def test_an_index_does_not_hide_what_the_shards_lack(of_file, folder):
    """What is loaded is what the files hold; an index only names the files."""
    weights, listed = load_file(folder / "model.safetensors"), {}
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((False, True)):
        held = {name: weight for name, weight in weights.items() if ("layers.1." in name) == part}
        file = f"model-0000{number + 1}-of-00002.safetensors"
        listed |= dict.fromkeys(held, file)
        save_file({name: w for name, w in held.items() if name != LAST or not of_file}, folder / file, {"format": "pt"})
    if not of_file:
        del listed[LAST]
    (folder / models.INDEX).write_text(json.dumps({"weight_map": listed}))
    if of_file:
        refused(folder, LAST + " is missing")
    else:
        assert check_model(str(folder)).tensors == 20
        shutil.copy(folder / listed["model.norm.weight"], folder / "model-00002-of-00002.safetensors")
        refused(folder, r"00002\.safetensors: the tensor \S+ is also in model-00001-of-00002")


def index(folder: Path, *files: str) -> None:
    (folder / "model.safetensors").rename(folder / "1.safetensors")
    (folder / models.INDEX).write_text(json.dumps({"weight_map": dict(enumerate(files))}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": '), r"config\.json: not JSON"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), r"generation_config\.json: not JSON"),
        (lambda folder: set_config(folder, model_type="nosuchmodel"), r"config\.json cannot be"),
        (lambda folder: set_config(folder, hidden_size="wide"), r"config\.json cannot be"),
        (lambda folder: set_config(folder, num_attention_heads=0), r"config\.json cannot be"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
         r"the weights are pickled \(pytorch_model.bin\).*safetensors"),
        (lambda folder: index(folder, "1.safetensors", "2.safetensors"), r"2\.safetensors is missing"),
        (lambda folder: index(folder, "../outside.safetensors"), r"'\.\./outside\.safetensors' is no file of this folder"),
        (lambda folder: set_config(folder, "adapter_config.json", base_model_name_or_path="some/base"),
         r"an adapter of some/base, not a whole model; merge it"),
    ],
)  # fmt: skip
def test_what_is_missing_or_damaged_is_named(damage, words, folder):
    damage(folder)
    refused(folder, words)


def test_every_byte_changes_a_fingerprint_but_results_beside_a_model_do_not(folder, tmp_path):
    before = fingerprint(folder)
    for name in ("manifest.json", "train.jsonl", "rejects.jsonl", "scores.csv", "report.md", "spider.png"):
        (folder / name).write_text("results")
    (folder / "sampled").mkdir()
    assert fingerprint(folder) == before
    path, content = tmp_path / "prompts.jsonl", bytearray(6 << 20)
    path.write_bytes(content)
    found = {before, fingerprint(path)}
    for place in (1, (5 << 20) + 70001, (6 << 20) - 1):
        content[place] = 1
        path.write_bytes(content)
        found.add(fingerprint(path))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert len({*found, fingerprint(folder)}) == 6


def test_heads_fitted_anew_change_a_fingerprint(tmp_path):
    """Large weights are sampled, but a head is small: a change of one number in it must show."""
    found = set()
    layers = {f"model.layer{number}": torch.full((1 << 20,), float(number)) for number in range(4)}
    (tmp_path / "config.json").write_text("{}")
    for place in (None, 0, 1234, 2879, None):
        changed = torch.zeros(5, 576)
        if place is not None:
            changed.view(-1)[place] = 1e-3
        save_file(layers | {"regression_layer.weight": changed}, tmp_path / "model.safetensors")
        found.add(fingerprint(tmp_path))
    assert len(found) == 4
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * (5 << 20))  # no header: still a fingerprint
    assert fingerprint(tmp_path) not in found


def test_another_revision_of_a_hub_model_is_another_model(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fingerprint("who/what") == "hub:who/what"
    cache = tmp_path / "models--who--what"
    (cache / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
        (cache / "refs" / "main").write_text(commit)
        assert fingerprint("who/what") == f"hub:who/what@{commit}"
    assert fingerprint(tmp_path / "no such folder") == f"hub:{tmp_path}/no such folder"

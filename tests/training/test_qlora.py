"""QLoRA: adapters beside bitsandbytes' 4-bit weights, compared with plain LoRA on the dequantized weights."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from harness import policies
from harness.policies import gradient_of, pairs_of_lengths
from harness.runs import flags_of, words_of, write_pairs
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, Qwen2Config

from drdpo import chat
from drdpo.config.training import TrainConfig
from drdpo.errors import DataError
from drdpo.models import check_model, table
from drdpo.training.checkpoint import save_model
from drdpo.training.data import form_batch
from drdpo.training.lora import add_lora
from drdpo.training.losses import method_of
from drdpo.training.memory import predict, shapes
from drdpo.training.objective import objective
from drdpo.training.policy import load_policy
from drdpo.training.run import arithmetic_of

METHODS = {
    "dpo": {}, "kldpo": {"kldpo_tau": 0.1}, "drdpo": {"drdpo_beta": 0.5},
    "padded": {"packing": False, "micro_batch_size": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory, smollm) -> dict[str, Path]:
    """Random models of width 64 with a tokenizer: Llama, whose head is tied, and Qwen2, whose queries have biases."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2,
    }  # fmt: skip
    made = {"llama": LlamaConfig(**shape, tie_word_embeddings=True), "qwen": Qwen2Config(**shape, tie_word_embeddings=False)}
    for name, settings in made.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings)
        for part, value in model.named_parameters():
            if part.endswith("bias"):
                nn.init.normal_(value)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in made}


PAIRS = pairs_of_lengths((4, 3, 6), (3, 5, 9), (9, 4, 3), (3, 7, 4), vocabulary=400)


def config_of(path: Path | str = "-", **flags) -> TrainConfig:
    return policies.config_of(
        model_path=str(path), **{"lora_rank": 4, "lora_quantize": "nf4", "train_batch_size": 4, **flags}
    )


def policy_of(config: TrainConfig, moved: bool = True):
    """With adapters that do something, unless not `moved`."""
    policy = load_policy(
        config.model_path, getattr(torch, config.dtype), config.attention, config.recompute,
        config.second_derivative, config.lora_quantize,
    )  # fmt: skip
    add_lora(policy, config.lora)
    generator = torch.Generator().manual_seed(1)
    for name, value in policy.named_parameters():
        if moved and "lora_B" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=generator).to(value.dtype)
    return policy


def quantized_layers(policy) -> dict[str, Linear4bit]:
    layers = policy.language_model.named_modules()
    return {name.removesuffix(".base_layer"): layer for name, layer in layers if isinstance(layer, Linear4bit)}


def dequantized(policy, path: Path, folder: Path) -> Path:
    """The stored model with the values of a policy's 4-bit weights."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, layer in quantized_layers(policy).items():
        model.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    model.save_pretrained(folder)
    return folder


def saved(policy, path: Path, folder: Path, settings) -> Path:
    engine = SimpleNamespace(module=policy, zero_optimization_stage=lambda: 2, device=torch.device("cpu"))
    save_model(engine, chat.load_tokenizer(str(path)), folder, settings)
    return folder


def value_and_gradient(policy, config) -> tuple[float, torch.Tensor]:
    batch = form_batch(PAIRS, list(range(4)), config.packing)
    with torch.no_grad():
        reference_B2 = policy(batch).logprob_S.view(2, -1).T + torch.tensor([[0.3, -0.2]])
    total = objective(policy, batch, reference_B2, method_of(config), None).total
    return float(total.detach()), gradient_of(policy, total)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["llama", "qwen"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_plain_lora_on_the_dequantized_weights(method, model, dtype, models, tmp_path):
    config = config_of(models[model], dtype=dtype, **METHODS[method])
    policy = policy_of(config)
    assert len(quantized_layers(policy)) == 2 * 7
    plain = replace(config, lora_quantize="none", model_path=str(dequantized(policy, models[model], tmp_path / "plain")))
    value, ours = value_and_gradient(policy, config)
    assert all(".lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    expected, theirs = value_and_gradient(policy_of(plain), plain)
    assert value == pytest.approx(expected, rel=1e-5)
    assert len(ours) == len(theirs)
    assert float((ours - theirs).norm()) < 1e-4 * float(theirs.norm())


def test_the_weights_are_near_the_stored_ones_and_take_the_bytes_that_are_predicted(models):
    config = config_of(models["llama"], dtype="bfloat16")
    policy = policy_of(config)
    stored = load_file(models["llama"] / "model.safetensors")
    held = 0
    for name, layer in quantized_layers(policy).items():
        state, whole = layer.weight.quant_state, stored[f"{name}.weight"]
        # The rounding error of a 4-bit code relative to its block's largest weight is at most half the widest gap, 0.15.
        blocks = (dequantize_4bit(layer.weight.data, state).float() - whole).view(-1, 64)
        assert float((blocks.abs().amax(dim=1) / whole.view(-1, 64).abs().amax(dim=1)).max()) < 0.2
        held += sum(part.untyped_storage().nbytes() for part in (layer.weight, state.absmax, state.state2.absmax))
    assert torch.equal(policy.head.weight, stored["model.embed_tokens.weight"].bfloat16()), "head and embeddings stay whole"
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    others = sum(parameter.numel() for parameter in policy.parameters() if parameter.is_floating_point())
    meta = shapes(config)
    predicted = predict(meta, config, 1, 0, 0, 0).weights
    # At most one layer's weight is dequantized at a time.
    assert predicted == pytest.approx(held + 2 * others + 2 * 64 * 128, rel=1e-3)
    assert sum(p.numel() for p in meta.parameters()) == linear + others, "the preflight counts parameters, not bytes"


def test_before_the_first_step_policy_and_reference_are_one(models, monkeypatch):
    # On such CPUs bitsandbytes would repack the weights at their first evaluation, for good.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    for dtype in ("float32", "bfloat16"):
        config = config_of(models["llama"], dtype=dtype)
        policy = policy_of(config, moved=False)
        batch = form_batch(PAIRS, list(range(4)), config.packing)
        policy.eval()
        with torch.no_grad():
            reference_B2 = policy(batch).logprob_S.view(2, -1).T
        policy.train()
        found = objective(policy, batch, reference_B2, method_of(config), None)
        assert found.losses_B.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-6)
        found.total.backward()
        assert all(p.grad is not None for n, p in policy.named_parameters() if "lora_B" in n)
        states = [layer.weight.quant_state for layer in quantized_layers(policy).values()]
        assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)
    assert arithmetic_of(config) != arithmetic_of(replace(config, lora_quantize="none"))


@pytest.mark.parametrize("model", ["llama", "qwen"])
def test_a_merged_checkpoint_is_the_stored_weights_and_the_adapters(model, models, tmp_path):
    config = config_of(models[model])
    policy = policy_of(config)
    whole = saved(policy, models[model], tmp_path / "whole", config.lora)
    alone = saved(policy, models[model], tmp_path / "alone", replace(config, lora_merge=False).lora)
    assert "quantization_config" not in json.loads((whole / "config.json").read_text())
    kept, base = (load_file(path / "model.safetensors") for path in (whole, models[model]))
    own = policy.language_model.state_dict()
    assert kept.keys() == base.keys()
    for name, weight in base.items():
        layer = name.removesuffix(".weight")
        if layer.endswith("_proj"):
            down_rD, up_Dr = (own[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            assert torch.allclose(kept[name], weight + 8 * up_Dr @ down_rD, atol=1e-6)
            assert not torch.allclose(kept[name], weight, atol=1e-3)
        else:
            assert torch.equal(kept[name], weight), name
    ids = torch.tensor([[5, 6, 7, 8]])
    for adapter in (whole / "adapter", alone):
        plain, merged = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (models[model], whole))
        with torch.no_grad():
            adapted = PeftModel.from_pretrained(plain, adapter)(ids).logits
            torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-4, rtol=1e-4)
    names = {path.name for path in alone.iterdir()}
    assert "tokenizer.json" in names and not {"config.json", "model.safetensors"} & names
    settings = json.loads((alone / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert settings["base_model_name_or_path"] == str(models[model])
    gone = replace(config, model_path=str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"gone: cannot be read to merge.*--lora_merge=false"):
        saved(policy, models[model], tmp_path / "new", gone.lora)
    assert not (tmp_path / "new").exists()


def test_weights_that_are_stored_quantized_are_refused(models, tmp_path):
    few = AutoModelForCausalLM.from_pretrained(
        models["llama"], device_map={"": "cpu"}, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    few.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(models["llama"]).save_pretrained(tmp_path)
    model = check_model(str(tmp_path))
    assert "stored quantized: cannot be trained" in table(model)
    with pytest.raises(DataError, match="stored quantized; pass the model in full precision"):
        model.refuse_training(False, False, False, True, 2048)


@pytest.mark.slow
def test_a_run_starts_at_ln_2_without_a_librarys_word_and_records_what_it_is(models, tmp_path, root):
    """From nothing: what libraries say when they are imported is heard too. test_equality.py resumes such a run."""
    save = tmp_path / "whole"
    flags = flags_of(models["llama"], write_pairs(tmp_path / "pairs"), save, lora_rank=4, lora_quantize="nf4", max_steps=1)
    command = [sys.executable, root / "src/train_alignment.py", *words_of(flags)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    whole = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert whole.returncode == 0, whole.stderr[-3000:]
    trained = 4 * 2 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128))
    assert f"{trained:,} of them trained" in whole.stdout
    assert "bitsandbytes" not in whole.stderr and "kernels" not in whole.stderr
    assert json.loads((save / "metrics.jsonl").read_text())["loss"] == pytest.approx(math.log(2), abs=1e-6)
    manifest = json.loads((save / "manifest.json").read_text())["train"]
    assert manifest["made_by"]["lora_quantize"] == "nf4" and "bitsandbytes" in manifest["versions"]

"""QLoRA: adapters beside bitsandbytes' 4-bit weights, compared with plain LoRA on the dequantized weights."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from harness.runs import flags_of, words_of, write_pairs
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from drdpo import chat
from drdpo.config.training import TrainConfig
from drdpo.errors import DataError
from drdpo.models import check_model, table
from drdpo.training.checkpoint import save_model
from drdpo.training.data import Pair, form_batch
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
    made = {}
    for name, kind, settings in (
        ("llama", LlamaForCausalLM, LlamaConfig(**shape, tie_word_embeddings=True)),
        ("qwen", Qwen2ForCausalLM, Qwen2Config(**shape, tie_word_embeddings=False)),
    ):
        torch.manual_seed(0)
        model = kind(settings)
        for part, value in model.named_parameters():
            if part.endswith("bias"):
                nn.init.normal_(value)
        made[name] = folder / name
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    numbers = random.Random(4)
    return [
        Pair(*([numbers.randrange(3, 400) for _ in range(numbers.randint(3, 9))] for _ in range(3)), row) for row in range(4)
    ]


def config_of(path: Path | str = "-", **flags) -> TrainConfig:
    common = {
        "dtype": "float32",
        "beta": 0.5,
        "lora_rank": 4,
        "lora_quantize": "nf4",
        "train_batch_size": 4,
    }
    return TrainConfig(str(path), "-", "-", **{**common, **flags})


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


def gradients(policy, pairs, config) -> tuple[float, dict[str, torch.Tensor]]:
    batch = form_batch(pairs, list(range(4)), config.packing)
    with torch.no_grad():
        reference_B2 = policy(batch).logprob_S.view(2, -1).T + torch.tensor([[0.3, -0.2]])
    total = objective(policy, batch, reference_B2, method_of(config), None).total
    total.backward()
    return float(total.detach()), {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["llama", "qwen"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_plain_lora_on_the_dequantized_weights(method, model, dtype, models, pairs, tmp_path):
    config = config_of(models[model], dtype=dtype, **METHODS[method])
    policy = policy_of(config)
    assert len(quantized_layers(policy)) == 2 * 7
    plain = replace(config, lora_quantize="none", model_path=str(dequantized(policy, models[model], tmp_path / "plain")))
    value, ours = gradients(policy, pairs, config)
    expected, theirs = gradients(policy_of(plain), pairs, plain)
    assert value == pytest.approx(expected, rel=1e-5)
    assert ours.keys() == theirs.keys() and all(".lora_" in name for name in ours)
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name
        assert float(gradient.norm()) > 0


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


def test_before_the_first_step_policy_and_reference_are_one(models, pairs, monkeypatch):
    # On such CPUs bitsandbytes would repack the weights at their first evaluation, for good.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    for dtype in ("float32", "bfloat16"):
        config = config_of(models["llama"], dtype=dtype)
        policy = policy_of(config, moved=False)
        batch = form_batch(pairs, list(range(4)), config.packing)
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
    from peft import PeftModel

    config = config_of(models[model])
    policy = policy_of(config)
    engine = SimpleNamespace(module=policy, zero_optimization_stage=lambda: 2, device=torch.device("cpu"))
    save_model(engine, chat.load_tokenizer(str(models[model])), tmp_path / "whole", config.lora)
    save_model(engine, chat.load_tokenizer(str(models[model])), tmp_path / "alone", replace(config, lora_merge=False).lora)
    settings = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert "quantization_config" not in settings
    saved, base = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", models[model]))
    own = policy.language_model.state_dict()
    assert saved.keys() == base.keys()
    for name, weight in base.items():
        layer = name.removesuffix(".weight")
        if layer.endswith("_proj"):
            down_rD, up_Dr = (own[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            assert torch.allclose(saved[name], weight + 8 * up_Dr @ down_rD, atol=1e-6)
            assert not torch.allclose(saved[name], weight, atol=1e-3)
        else:
            assert torch.equal(saved[name], weight), name
    for adapter in (tmp_path / "whole" / "adapter", tmp_path / "alone"):
        plain = AutoModelForCausalLM.from_pretrained(models[model], dtype=torch.float32)
        adapted = PeftModel.from_pretrained(plain, adapter)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert "tokenizer.json" in names and not {"config.json", "model.safetensors"} & names
    settings = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert settings["base_model_name_or_path"] == str(models[model])


def test_a_base_that_is_gone_is_said(models, tmp_path):
    config = config_of(models["llama"])
    policy = policy_of(config)
    engine = SimpleNamespace(module=policy, zero_optimization_stage=lambda: 2, device=torch.device("cpu"))
    gone = replace(config, model_path=str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"gone: cannot be read to merge.*--lora_merge=false"):
        save_model(engine, chat.load_tokenizer(str(models["llama"])), tmp_path / "whole", gone.lora)
    assert not (tmp_path / "whole").exists()


def test_weights_that_are_stored_quantized_are_refused(models, tmp_path):
    from transformers import BitsAndBytesConfig

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
def test_a_run_that_was_broken_off_ends_as_one_that_was_not(models, tmp_path, root, forks):
    data = write_pairs(tmp_path / "pairs")

    def train(save: str) -> subprocess.CompletedProcess[str]:
        flags = flags_of(
            models["llama"], data, tmp_path / save, lora_rank=4, lora_quantize="nf4", kldpo_tau=0.1, max_steps=3
        )
        command = [sys.executable, root / "src/train_alignment.py", *words_of(flags)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        # The first one from nothing: what libraries say when they are imported is heard too.
        run = partial(subprocess.run, capture_output=True, text=True) if save == "whole" else forks.run
        done = run(command, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    whole = train("whole")
    trained = 4 * 2 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128))
    assert f"{trained:,} of them trained" in whole.stdout
    assert "bitsandbytes" not in whole.stderr and "kernels" not in whole.stderr
    first = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-2)
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())["train"]
    assert manifest["made_by"]["lora_quantize"] == "nf4"
    assert "bitsandbytes" in manifest["versions"]

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for place in ("resume/step_3", "global_step_3"):
        shutil.rmtree(tmp_path / "again" / place)
    assert "continuing after step 2 of 3" in train("again").stdout
    ends = [
        load_file(tmp_path / save / "global_step_3" / "adapter" / "adapter_model.safetensors") for save in ("whole", "again")
    ]
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name

"""Small random reward models in ArmoRM's layout, in float32."""

import json
import shutil
from pathlib import Path
from typing import Any

from harness import ROOT

PUBLISHED_CONFIG = {  # RLHFlow/ArmoRM-Llama3-8B-v0.1's config.json; sizes are made small below
    "_name_or_path": "RLHFlow/ArmoRM-Llama3-8B-v0.1 ",
    "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
    "architectures": ["LlamaForRewardModelWithGating"],
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu",
    "hidden_size": 4096, "id2label": {"0": "LABEL_0"}, "initializer_range": 0.02, "intermediate_size": 14336,
    "label2id": {"LABEL_0": 0}, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pad_token_id": 128256, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.40.0", "use_cache": False, "vocab_size": 128257, "num_objectives": 19,
    "gating_temperature": 10, "gating_hidden_dim": 1024, "gating_n_hidden": 3,
}  # fmt: skip

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
EMBEDDED_PATTERN = [2, 198, 1, 520, 9531, 198]
"""SmolLM2's ids of "<|im_end|>\\n<|im_start|>assistant\\n"."""


def write_reward_model(folder: Path, config: dict[str, Any], shards: int) -> dict[str, Any]:
    """Write a random reward model, its backbone first and its heads last; returns its tensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(3)
    known = {name: value for name, value in config.items() if name not in ("auto_map", "architectures", "torch_dtype")}
    backbone = LlamaModel(LlamaConfig(**{**known, "initializer_range": 0.3}))
    width, heads, hidden = config["hidden_size"], config["num_objectives"], config["gating_hidden_dim"]
    tensors = {f"model.{name}": tensor.clone() for name, tensor in backbone.state_dict().items()}
    widths = [width, *[hidden] * config["gating_n_hidden"], heads]
    for layer in range(len(widths) - 1):
        tensors[f"gating.layers.{layer}.weight"] = torch.randn(widths[layer + 1], widths[layer])
        tensors[f"gating.layers.{layer}.bias"] = torch.randn(widths[layer + 1])
    tensors["gating.logit_scale"] = torch.tensor([1.3])
    tensors["regression_layer.weight"] = torch.randn(heads, width)
    tensors["reward_transform_matrix"] = torch.eye(heads) + 0.1 * torch.randn(heads, heads)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    size = -(-len(names) // shards)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = {name: tensors[name] for name in names[shard * size : (shard + 1) * size]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def write_embedded_like(folder: Path, smollm: Path, objectives: list[str], shards: int) -> Path:
    """A small model with the embedded model's tokenizer, template and pattern, and objectives of its own."""
    config = PUBLISHED_CONFIG | SMALL | {
        "vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "num_hidden_layers": 2,
        "objectives": objectives, "num_objectives": len(objectives), "gating_token_pattern": EMBEDDED_PATTERN,
        "gating_hidden_dim": 8, "gating_n_hidden": 1,
    }  # fmt: skip
    write_reward_model(folder, config, shards)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(smollm / name, folder / name)
    shutil.copyfile(ROOT / "src/drdpo/assets/armorm_smollm2/chat_template.jinja", folder / "chat_template.jinja")
    return folder


def apart(model: Any, sequences: Any) -> Any:
    """Scores of sequences that share no prefix."""
    from drdpo.kernels.packed_attention import PackedRow

    return model.score_packed(PackedRow([(0, [ids]) for ids in sequences]), [model.span(ids) for ids in sequences])

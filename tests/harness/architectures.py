"""Families of transformers as tiny random models with their odd parts on, and the table of docs/models.md."""

from functools import cache
from typing import Any

import torch
import transformers

from drdpo.models import Structure, meta_model, quiet, structure_of

_SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}  # fmt: skip
_GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
_SHORT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
WINDOW = 8

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama 3, rope scaled": ("Llama", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "Llama, YaRN": ("Llama", {"rope_parameters": _YARN, "head_dim": 16}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Mistral, window": ("Mistral", {"sliding_window": WINDOW}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2, window": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "Qwen3, q/k norms": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "Qwen3-MoE": ("Qwen3Moe", {"head_dim": 8, **_EXPERTS}),
    "Qwen2-MoE": ("Qwen2Moe", {"shared_expert_intermediate_size": 16, **_EXPERTS}),
    "Qwen2-MoE, window": ("Qwen2Moe", {"shared_expert_intermediate_size": 16, "use_sliding_window": True,
                                       "sliding_window": WINDOW, "max_window_layers": 1, **_EXPERTS}),
    "Gemma": ("Gemma", {"head_dim": 8}),
    "Gemma 2, soft caps": ("Gemma2", {"head_dim": 8, "sliding_window": WINDOW}),
    "Gemma 2 without caps": ("Gemma2", {"head_dim": 8, "sliding_window": WINDOW, "final_logit_softcapping": None,
                                        "attn_logit_softcapping": None}),
    "Gemma 2, attention capped": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": None,
                                             "attn_logit_softcapping": 2.0}),
    "Gemma 3, window": ("Gemma3Text", {"head_dim": 8, "sliding_window": WINDOW,
                                       "layer_types": ["sliding_attention", "full_attention"]}),
    "Phi, head bias": ("Phi", {}),
    "Phi-3": ("Phi3", {}),
    "Phi-3, window": ("Phi3", {"sliding_window": WINDOW}),
    "PhiMoE": ("Phimoe", _LOCAL),
    "PhiMoE, window": ("Phimoe", {"sliding_window": WINDOW, **_LOCAL}),
    "OLMo-2": ("Olmo2", {}),
    "Granite, multipliers": ("Granite", {"embedding_multiplier": 2.0, "residual_multiplier": 0.5,
                                         "attention_multiplier": 0.3}),
    "Granite, logits scaled": ("Granite", {"logits_scaling": 8.0}),
    "GLM": ("Glm", {"head_dim": 8}),
    "GPT-NeoX": ("GPTNeoX", {}),
    "StableLM, q/k norms": ("StableLm", {"use_qkv_bias": True, "qk_layernorm": True}),
    "Nemotron": ("Nemotron", {}),
    "SmolLM3": ("SmolLM3", {}),
    "Cohere, logits scaled": ("Cohere", {"logit_scale": 0.0625}),
    "Mixtral": ("Mixtral", _LOCAL),
    "DeepSeek-V3": ("DeepseekV3", {"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4,
                                   "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
                                   "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                                   "v_head_dim": 8}),
    "GPT-2, learned positions": ("GPT2", _GPT2),
    "OPT, learned positions": ("OPT", {**_SHORT, "ffn_dim": 24, "num_attention_heads": 2, "word_embed_proj_dim": 16,
                                       "max_position_embeddings": 64, "init_std": 0.3}),
    "GPT-OSS, sinks": ("GptOss", {"head_dim": 8, **_LOCAL}),
    "LFM2, convolutions": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Falcon": ("Falcon", {**_SHORT, "num_attention_heads": 4}),
    "Mamba": ("Mamba", {**_SHORT, "state_size": 4}),
    "MPT": ("Mpt", {"vocab_size": 96, "d_model": 32, "n_heads": 4, "n_layers": 2}),
    "Llama 4": ("Llama4Text", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}),
}  # fmt: skip
"""Name -> class of the config without `Config`, and its settings beside the sizes that most have."""

_OTHER_NAMES = ("GPT2", "OPT", "Falcon", "Mamba", "Mpt")


def settings_of(name: str, **more: Any) -> Any:
    family, odd = FAMILIES[name]
    return getattr(transformers, f"{family}Config")(**((odd if family in _OTHER_NAMES else _SIZES | odd) | more))


@cache
def structure(name: str) -> Structure:
    with quiet():
        return structure_of(meta_model(settings_of(name)))


def random_model(name: str, **more: Any) -> Any:
    """In float32 and plain attention, with biases and norms that do something."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings_of(name, **more), attn_implementation="eager")
    for weight, parameter in model.named_parameters():
        if weight.endswith("bias"):
            torch.nn.init.normal_(parameter)
        elif "norm" in weight or "ln_" in weight:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.eval()


def table() -> str:
    """The architectures of docs/models.md, as drdpo.models sees them."""
    lines = ["| family, odd parts | training | packed rows | tangent solver |", "|---|---|---|---|"]
    for name in FAMILIES:
        about = structure(name)
        packed = f"no: {about.packing}" if about.packing else "yes"
        if about.window and not about.packing:
            packed = "for `--max_len` up to the window"
        training = f"no: {about.head}" if about.head else f"`--attn=eager`: {about.eager}" if about.eager else "yes"
        cells = [name, training, "-" if about.head else packed, "-" if about.head or about.tangent else "yes"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

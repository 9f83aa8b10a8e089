"""LoRA (2106.09685): low-rank adapters beside frozen weights, W + (alpha / r) B A, trained in place of the weights.

B starts at zero, so the policy before its first step is the model without adapters, bit for bit: the reference log-probs
that are taken from it are those of the frozen reference, and no second model is needed.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from drdpo.config import TrainConfig
from drdpo.errors import DataError, UsageError
from drdpo.training.policy import Policy, quiet_bitsandbytes

ADAPTER = "default"
ALPHA = 32
"""Changes are multiplied by ALPHA / rank."""
_PREFIX = "base_model.model."
"""What peft puts before the names of parameters in an adapter's file."""


def add_lora(policy: Policy, config: TrainConfig) -> None:
    """Put adapters beside linear layers and freeze everything else.

    Args:
        policy: as loaded, or on the meta device.
        config: of the run; the seed draws A, the same on every rank.

    Raises:
        UsageError: the decoder blocks have no linear layers.
    """
    quiet_bitsandbytes()
    from peft import inject_adapter_in_model

    model = policy.language_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject_adapter_in_model(lora_config(model, config), model, adapter_name=ADAPTER)
    dtype = model.get_input_embeddings().weight.dtype
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            # peft keeps adapters in float32 beside bfloat16 weights; DeepSpeed holds the float32 copy that is trained.
            parameter.data = parameter.data.to(dtype)


def lora_config(model: Any, config: TrainConfig) -> Any:
    """peft's description of the adapters.

    Raises:
        UsageError: the decoder blocks have no linear layers.
    """
    from peft import LoraConfig

    linear = block_linears(model)
    if not linear:
        raise UsageError(
            f"--lora_rank={config.lora_rank}: the blocks of {config.model_path} have no torch Linear layers; leave it out"
        )
    return LoraConfig(
        r=config.lora_rank, lora_alpha=ALPHA, lora_dropout=0.0, bias="none", target_modules=sorted(linear),
        task_type="CAUSAL_LM", base_model_name_or_path=config.model_path,
    )  # fmt: skip


def block_linears(model: Any) -> set[str]:
    """Last names of the linear layers inside the decoder blocks: not the embeddings, not the output head."""
    head = model.get_output_embeddings()
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head)
    return {name.rsplit(".", 1)[-1] for name in linear}


def merged(weights: dict[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """Weights of a plain model, W + (alpha / r) B A in W's dtype, under their plain names.

    Args:
        weights: of the adapters and of the frozen model, whole; frozen ones with or without peft's `base_layer` in the name.
        config: of the run.
    """
    plain = {name.replace(".base_layer.", "."): weight for name, weight in weights.items() if ".lora_" not in name}
    for name, down_rD in weights.items():
        layer, adapter, _ = name.partition(f".lora_A.{ADAPTER}.")
        if adapter:
            up_Dr, weight = weights[f"{layer}.lora_B.{ADAPTER}.weight"], plain[f"{layer}.weight"]
            # In float32: a small change would be lost in bfloat16's rounding twice.
            change = up_Dr.float() @ down_rD.float() * (ALPHA / config.lora_rank)
            plain[f"{layer}.weight"] = (weight.float() + change).to(weight.dtype)
    return plain


def load_base(config: TrainConfig) -> Any:
    """The model of --model_path on the CPU in the run's dtype, for merging: not the quantized one, which lost precision.

    Raises:
        DataError: --model_path cannot be read any more.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            config.model_path, dtype=getattr(torch, config.dtype), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{config.model_path}: cannot be read to merge the adapters into it ({reason}); --lora_merge=false saves the "
            "adapters alone"
        ) from error


def save_adapter(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft does.

    Args:
        model: with adapters.
        weights: of the model with adapters, whole.
        folder: created if missing.
    """
    settings = copy.copy(model.peft_config[ADAPTER])
    # peft would write a set's order, which changes from run to run.
    settings.inference_mode, settings.target_modules = True, sorted(settings.target_modules)
    settings.save_pretrained(str(folder))
    own = {
        _PREFIX + name.replace(f".{ADAPTER}.", "."): weight.detach().cpu().contiguous()
        for name, weight in weights.items()
        if ".lora_" in name
    }
    save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})

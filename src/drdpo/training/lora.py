"""LoRA (2106.09685): train low-rank adapters beside frozen weights, W + (alpha / r) B A, instead of the weights.

B starts at zero, so before its first step the policy is the model without adapters, bit for bit: its log-probs are those of
the frozen reference, and no second model is needed.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from drdpo.config.training import LoraSettings
from drdpo.errors import DataError, one_line
from drdpo.training.policy import Policy, quiet_bitsandbytes

ADAPTER = "default"
ALPHA = 32
"""Changes are multiplied by ALPHA / rank."""


def add_lora(policy: Policy, lora: LoraSettings) -> None:
    """Put adapters beside the linear layers of a policy, as loaded or on the meta device, and freeze everything else. The
    seed draws A, the same on every rank."""
    quiet_bitsandbytes()
    from peft import LoraConfig, inject_adapter_in_model

    model = policy.language_model
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    settings = LoraConfig(
        r=lora.rank, lora_alpha=ALPHA, lora_dropout=0.0, bias="none",
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in linear}),
        task_type="CAUSAL_LM", base_model_name_or_path=lora.model_path,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    dtype = model.get_input_embeddings().weight.dtype
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            # peft keeps adapters in float32 beside bfloat16 weights; DeepSpeed has the float32 copy that is trained.
            parameter.data = parameter.data.to(dtype)


def merged(weights: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Weights of a plain model, W + (alpha / r) B A in W's dtype, under their plain names, from those of the adapters and
    of the frozen model, whole; frozen ones with or without peft's `base_layer` in the name."""
    plain = {name.replace(".base_layer.", "."): weight for name, weight in weights.items() if ".lora_" not in name}
    for name, down_rD in weights.items():
        layer, adapter, _ = name.partition(f".lora_A.{ADAPTER}.")
        if adapter:
            up_Dr, weight = weights[f"{layer}.lora_B.{ADAPTER}.weight"], plain[f"{layer}.weight"]
            # In float32: bfloat16 would round a small change away twice.
            change = up_Dr.float() @ down_rD.float() * (ALPHA / rank)
            # On the CPU: a second copy of the weights may not fit the GPU.
            plain[f"{layer}.weight"] = (weight.float() + change).to("cpu", weight.dtype)
    return plain


def load_base(lora: LoraSettings) -> Any:
    """The model in full precision on the CPU, to merge adapters into: the quantized weights have lost precision."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            lora.model_path, dtype=getattr(torch, lora.dtype), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"{lora.model_path}: cannot be read to merge the adapters into it ({one_line(str(error), 300)}); "
            "--lora_merge=false saves the adapters alone"
        ) from error


def save_adapter(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors of a model with adapters, and its whole weights, as peft
    does."""
    settings = copy.copy(model.peft_config[ADAPTER])
    # peft would write a set's order, which changes from run to run.
    settings.inference_mode, settings.target_modules = True, sorted(settings.target_modules)
    settings.save_pretrained(str(folder))
    own = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": weight.detach().cpu().contiguous()  # peft's own names
        for name, weight in weights.items()
        if ".lora_" in name
    }
    save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})

"""LoRA (2106.09685): low-rank adapters beside frozen weights, W + (alpha / r) B A, trained in place of the weights.

B starts at zero, so the policy before its first step is the model without adapters, bit for bit: the reference log-probs
that are taken from it are those of the frozen reference, and no second model is needed.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from drdpo.config import TrainConfig
from drdpo.errors import DataError, UsageError
from drdpo.training.nf4 import quiet_bitsandbytes
from drdpo.training.policy import Policy

ADAPTER = "default"
_PREFIX = "base_model.model."
"""What peft puts before the names of parameters in an adapter's file."""


def add_lora(policy: Policy, config: TrainConfig) -> None:
    """Put adapters beside linear layers and freeze everything else.

    Args:
        policy: as loaded, or on the meta device.
        config: of the run: rank, alpha, targets; the seed draws A, the same on every rank.

    Raises:
        UsageError: a target is no linear layer of the decoder blocks.
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
        UsageError: a target is no linear layer of the decoder blocks, or these have none.
    """
    from peft import LoraConfig

    linear = block_linears(model)
    if not linear:
        raise UsageError(
            f"--lora_rank={config.lora_rank}: the blocks of {config.model_path} have no torch Linear layers; leave it out"
        )
    targets = config.lora_targets or sorted(linear)
    unknown = [name for name in targets if name not in linear]
    if unknown:
        raise UsageError(
            f"--lora_targets={' '.join(unknown)}: no linear layer of the model's blocks; it has {', '.join(sorted(linear))}"
        )
    return LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=0.0, bias="none", target_modules=targets,
        task_type="CAUSAL_LM", base_model_name_or_path=config.model_path,
    )  # fmt: skip


def block_linears(model: Any) -> set[str]:
    """Last names of the linear layers inside the decoder blocks: not the embeddings, not the output head."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = model.get_output_embeddings()
    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | BaseTunerLayer) and module is not head and ".lora_" not in name
        and not name.endswith(".base_layer")
    }  # fmt: skip


def merged(weights: dict[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """Weights of a plain model, W + (alpha / r) B A in W's dtype, under their plain names.

    Args:
        weights: of the model with adapters, whole.
        config: of the run.
    """
    plain = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            down_rD, up_Dr = (weights[f"{layer}.lora_{part}.{ADAPTER}.weight"] for part in ("A", "B"))
            # In float32: a small change would be lost in bfloat16's rounding twice.
            change = up_Dr.float() @ down_rD.float() * (config.lora_alpha / config.lora_rank)
            weight = (weight.float() + change).to(weight.dtype)
        plain[name.replace(".base_layer.", ".")] = weight
    return plain


def on_stored_base(model: Any, weights: dict[str, Tensor], config: TrainConfig) -> tuple[Any, dict[str, Tensor]]:
    """The run's model in full precision, read again: quantized weights are not what anyone wants to go on with.

    Args:
        model: with quantized weights and adapters.
        weights: of it, whole; at least those of the adapters.
        config: of the run.

    Returns:
        A plain model on the CPU in the run's dtype, and its weights with the adapters beside them, named as for `merged`.

    Raises:
        DataError: --model_path cannot be read any more.
    """
    from transformers import AutoModelForCausalLM

    try:
        plain = AutoModelForCausalLM.from_pretrained(
            config.model_path, dtype=getattr(torch, config.dtype), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{config.model_path}: not there to merge the adapters into ({reason}); --lora_merge=false does without it"
        ) from error
    adapters = {name: weight.cpu() for name, weight in weights.items() if ".lora_" in name}
    adapted = {name.split(".lora_")[0] for name in adapters}
    stored = {}
    for name, weight in plain.state_dict().items():
        layer, _, last = name.rpartition(".")
        stored[f"{layer}.base_layer.{last}" if layer in adapted else name] = weight
    return plain, stored | adapters


def save_adapter(model: Any, weights: dict[str, Tensor], config: TrainConfig, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft does.

    Args:
        model: with adapters.
        weights: of the model with adapters, whole.
        config: of the run.
        folder: is made where it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lora_config(model, config).save_pretrained(str(folder))
    own = {
        _PREFIX + name.replace(f".{ADAPTER}.", "."): weight.detach().cpu().contiguous()
        for name, weight in weights.items()
        if ".lora_" in name
    }
    save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # For loading, not for going on: peft writes a set's order, which changes from run to run.
    settings.update(inference_mode=True, target_modules=sorted(settings["target_modules"]))
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""QLoRA's frozen weights (2305.14314): the linear layers of the decoder blocks in 4-bit NormalFloat.

64 weights share a scale; 256 scales share a scale again and are kept in 8 bits (double quantization). A product makes its
layer's whole weight for a moment, forward and backward. bitsandbytes makes and opens the codes; the products are torch's
own, so training, evaluation and the reference compute the same numbers on every device, and any derivative is exact.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from drdpo.errors import DataError

BLOCK, SCALES = 64, 256
"""Weights that share a scale, and scales that share one."""


class NF4Linear(nn.Linear):
    """A linear layer whose frozen weight is 4-bit codes, two a byte; on the meta device a stand-in of the whole shape.

    Args:
        plain: bitsandbytes' layer, quantized, or any linear layer on the meta device. Its bias stays as it is.
    """

    def __init__(self, plain: Any) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        # bitsandbytes' class of parameters would quantize and convert by itself when it is moved.
        self.weight = nn.Parameter(plain.weight.detach().as_subclass(Tensor), requires_grad=False)
        self.bias = plain.bias
        self.scales = getattr(plain.weight, "quant_state", None)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features] times the dequantized weight, with a gradient for the input alone."""
        return _Product.apply(input, self, self.bias, False)

    def dense(self) -> Tensor:
        """[out_features, in_features] the dequantized weight, in the precision that it was loaded in."""
        if self.weight.is_meta:
            return torch.empty_like(self.weight)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight.data, self.scales)

    def stored_bytes(self) -> float:
        """Of the codes and their scales."""
        weights = self.in_features * self.out_features
        return weights / 2 + weights / BLOCK + 4 * weights / (BLOCK * SCALES)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.scales is not None:
            self.scales.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The bias alone: the codes are made from the stored weights again, and mean nothing without their scales."""
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


class _Product(Function):
    """x W^T + b; keeps the layer, not the dequantized W, for the backward pass, which is such a product again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.layer, ctx.transposed = layer, transposed
        weight = layer.dense().to(x.dtype)
        # By its full name: the tangent pass replaces it where there is a bias.
        bias = None if bias is None else bias.to(x.dtype)
        return nn.functional.linear(x, weight.T if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Product.apply(grad, ctx.layer, None, not ctx.transposed), None, None, None


def loading(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """How transformers' from_pretrained quantizes what it loads, weight by weight.

    Args:
        dtype: of weights and products.
        device: where the weights are quantized and stay.
    """
    quiet_bitsandbytes()
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def use_nf4(model: Any, path: str) -> None:
    """Put NF4Linear in the place of linear layers, and freeze everything.

    Args:
        model: from transformers, loaded by `loading`, or on the meta device: then every linear layer of its blocks counts.
        path: of the model, for messages.

    Raises:
        DataError: no linear layer is there, or the output head is not whole.
    """
    kinds: type[nn.Module] = nn.Linear
    meta = model.get_input_embeddings().weight.is_meta
    if not meta:
        from bitsandbytes.nn.modules import Linear4bit

        kinds = Linear4bit
    head = model.get_output_embeddings()
    found = [name for name, part in model.named_modules() if isinstance(part, kinds) and not (meta and part is head)]
    if not found or not head.weight.is_floating_point():
        raise DataError(
            f"{path}: --lora_quantize=nf4 found {'no linear layers' if not found else 'a quantized output head'} in this "
            "model; give --lora_quantize=none"
        )
    for name in found:
        model.set_submodule(name, NF4Linear(model.get_submodule(name)))
    model.requires_grad_(False)
    if meta:
        return
    # From here on it is an ordinary model for peft, DeepSpeed and transformers alike.
    model.is_loaded_in_4bit = model.is_quantized = False
    model.hf_quantizer = None
    del model.config.quantization_config


def weight_bytes(model: nn.Module, element: int) -> int:
    """Bytes of all parameters, `element` each but for the quantized ones."""
    layers = [part for part in model.modules() if isinstance(part, NF4Linear)]
    codes = {id(part.weight) for part in layers}
    plain = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in codes)
    return element * plain + round(sum(part.stored_bytes() for part in layers))


def quiet_bitsandbytes() -> None:
    """Its warning that it cannot load an inference kernel from a hub is of no meaning here: NF4Linear does not use one."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

"""Tokens and pairs a second, and how much of the device's arithmetic that is (MFU)."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from drdpo import distributed
from drdpo.config import TrainConfig
from drdpo.training.batches import Batch
from drdpo.training.policy import Policy
from drdpo.training.values import AnyBatch

PEAK_BF16 = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bfloat16 FLOP/s by words in torch's name of the device, the first that fits. Source: NVIDIA's data sheets of these
products, line "BFLOAT16 Tensor Core", halved where they count sparsity."""


@dataclass(frozen=True)
class Shape:
    """What the arithmetic of a policy depends on."""

    parameters: int
    trained: int
    blocks: int
    """Parameters of the decoder blocks."""
    blocks_trained: int
    head: int
    """Parameters of the output head, V D."""
    head_trained: bool
    layers: int
    attention: int
    """Query heads times their width."""


def shape_of(policy: Policy) -> Shape:
    """The shape of a policy whose parameters are whole or on the meta device."""
    model, head = policy.language_model, policy.head.weight
    settings = model.config.get_text_config()
    table = model.get_input_embeddings().weight
    everything = list(policy.parameters())
    blocks = [parameter for parameter in everything if parameter is not head and parameter is not table]
    width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    return Shape(
        _count(everything), _count(_trained(everything)), _count(blocks), _count(_trained(blocks)), head.numel(),
        head.requires_grad, settings.num_hidden_layers, settings.num_attention_heads * width,
    )  # fmt: skip


def _count(parameters: list[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _trained(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def peak_flops(device: str, dtype: str) -> float | None:
    """FLOP/s of a device by torch's name of it; None where it is not known for certain."""
    if dtype != "bfloat16" or "MIG" in device:
        return None
    return next((peak for name, peak in PEAK_BF16.items() if re.search(rf"\b{name}\b", device)), None)


def dpo_flops(shape: Shape, batch: AnyBatch) -> float:
    """Arithmetic that a DPO step needs for a micro-batch, forward and backward, counted once however often it is done.

    6 a trained parameter of the blocks and token, 4 a frozen one; the same for the head and answer tokens alone; attention
    12 L H E a token and token it sees (2204.02311, appendix B, less what causality masks). WDPO's penalty is not counted:
    its MFU tells what it costs beside DPO.
    """
    a_token = 6 * shape.blocks_trained + 4 * (shape.blocks - shape.blocks_trained)
    a_target = (6 if shape.head_trained else 4) * shape.head
    if isinstance(batch, Batch):
        lengths = batch.attention_mask_ST.sum(dim=1).tolist()
        seen = sum(length**2 / 2 for length in lengths)
    else:
        seen = sum(
            group.prefix**2 / 2 + sum(length * (group.prefix + length / 2) for length in group.suffixes)
            for group in batch.groups
        )
    return a_token * batch.tokens + a_target * len(batch.targets_A) + 12 * shape.layers * shape.attention * seen


def throughput(batches: list[AnyBatch], shape: Shape, config: TrainConfig, seconds: float) -> dict[str, float]:
    """Of a step over all ranks; every rank must call.

    Args:
        batches: this rank's micro-batches.
        shape: of the policy.
        config: of the run.
        seconds: that the step took.

    Returns:
        tokens_per_second, pairs_per_second and, where the device's peak is known, mfu.
    """
    device = distributed.device()
    peak = peak_flops(torch.cuda.get_device_name(device), config.dtype) if device.type == "cuda" else None
    tokens = float(sum(batch.tokens for batch in batches))
    work = sum(dpo_flops(shape, batch) for batch in batches) if peak else 0.0
    # In units of 10^12: float32, which GPUs gather fastest, holds no more digits than a figure needs.
    totals = distributed.gather(torch.tensor([tokens, work / 1e12], device=device)).view(-1, 2).double().sum(dim=0)
    figures = {"tokens_per_second": float(totals[0]) / seconds, "pairs_per_second": config.train_batch_size / seconds}
    if peak:
        figures["mfu"] = float(totals[1]) * 1e12 / seconds / (peak * distributed.world_size())
    return figures

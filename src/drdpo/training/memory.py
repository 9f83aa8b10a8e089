"""What an optimizer step will hold in memory, before a weight is read: ZeRO's shares by formula, the rest by a dry run.

The dry run sends one micro-batch through the real policy and objective on torch's meta device, where tensors have shapes
but no content, and counts what is alive. So it knows every architecture, method and kind of checkpointing that the code has.
"""

import sys
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from drdpo.config import TrainConfig
from drdpo.kernels import vocabulary
from drdpo.kernels.shared_prefix import PrefixGroup
from drdpo.training.batches import Batch
from drdpo.training.engine import BUCKET
from drdpo.training.objective import Population, objective
from drdpo.training.packing import PackedBatch
from drdpo.training.policy import Policy
from drdpo.training.values import AnyBatch

HEAD_KERNELS = frozenset(
    str(Path(vocabulary.__file__).with_name(f"{name}.py")) for name in ("vocabulary", "linear_logprob", "tangent_logprob")
)
"""Files whose functions work on logits, a block of the vocabulary at a time."""
GATHERED = 1_000_000_000
"""Elements of weights that ZeRO-3 keeps gathered at most, DeepSpeed's default (stage3_max_live_parameters)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the moment when most is held."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Between the input embeddings and the last hidden states, forward and backward."""
    head: int
    """The output head's: logits of a block of the vocabulary, gradient of the head."""
    copies: int
    """What the optimizer step copies."""
    process: int
    """On a CPU: libraries and data."""

    @property
    def total(self) -> int:
        """All parts."""
        return sum(vars(self).values())


def predict(policy: Policy, config: TrainConfig, world: int, activations: int, head: int, process: int | None) -> Memory:
    """Peak memory of an optimizer step on one device.

    With P parameters, T of them trained, b bytes an element of the training dtype, W devices and ZeRO stage z:

        weights      b P; at z = 3 its share b P/W and what is gathered of it, b min(P, 10^9); see weight_bytes for
                     --lora_quantize=nf4
        optimizer    AdamW's two moments, at z > 0 also the weights in float32 that they move: 8 T at z = 0, else 12 T/W
        gradients    their sum over the micro-batches in float32, 4 T at z < 2, else 4 T/W; at z > 0 the bucket they are
                     reduced in, b min(T, 5 10^8); in float32 at z = 1, 2 also those of one micro-batch apart, 4 T/W
        copies       the optimizer step makes its share of the gradients flat, 4 T/W at z > 0; in bfloat16 at z = 1, 2 every
                     micro-batch after a step's first adds a float32 copy of its gradients to their sum, (4 + b) T/W
        activations and head   from dry_run

    Activations and copies are alive one after the other, so a GPU needs room for the larger. A CPU needs room for both:
    its allocator keeps blocks of less than 32 MiB that were freed. What it cannot use again is not in the formula.

    With --optimizer_offload a GPU holds neither optimizer nor copies.

    Args:
        policy: on the meta device, with adapters where there are some.
        config: of the run.
        world: W.
        activations, head: bytes.
        process: bytes of the process before a model is loaded, where the device is a CPU; else None.
    """
    size = getattr(torch, config.dtype).itemsize
    stage, parameters = config.zero_stage, list(policy.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    share = trained // world if stage else trained
    weights = weight_bytes(policy, config) if stage < 3 else size * (total // world + min(total, GATHERED))
    gradients = 4 * (share if stage >= 2 else trained) + (size * min(trained, BUCKET) if stage else 0)
    if size == 4 and stage in (1, 2):
        gradients += 4 * share
    optimizer, copies = (12 if stage else 8) * share, 4 * share if stage else 0
    if size == 2 and stage in (1, 2) and config.train_batch_size > config.micro_batch * world:
        copies += size * share
    if config.optimizer_offload and process is None:
        optimizer, copies = 0, 0
    if process is None and copies > activations + head:
        activations, head = 0, 0
    elif process is None:
        copies = 0
    return Memory(weights, gradients, optimizer, activations, head, copies, process or 0)


def weight_bytes(policy: Policy, config: TrainConfig) -> int:
    """Bytes of all weights that a process holds whole.

    Under --lora_quantize=nf4 each n frozen weights of linear layers take n/2 bytes for their codes, n/64 for 8-bit scales
    and 4 n/(64 256) for the scales of those; the largest layer's weight is dequantized while it is multiplied by.

    Args:
        policy: on the meta device, with adapters if the run has some.
        config: of the run.
    """
    element = getattr(torch, config.dtype).itemsize
    total = sum(parameter.numel() for parameter in policy.parameters())
    if config.lora_quantize == "none":
        return element * total
    linear = [module.weight for module in policy.modules() if isinstance(module, nn.Linear)]
    sizes = [weight.numel() for weight in linear if weight is not policy.head.weight and not weight.requires_grad]
    codes = sum(sizes) * (1 / 2 + 1 / 64 + 4 / (64 * 256))
    return element * (total - sum(sizes) + max(sizes)) + round(codes)


def dry_run(policy: Policy, batch: AnyBatch, config: TrainConfig) -> tuple[int, int]:
    """Bytes that a forward and backward pass of one micro-batch hold at most: (in the model, in the output head).

    Weights, and the sum of gradients, are not counted. A padded batch counts as rows of its width.

    Args:
        policy: on the meta device, as drdpo.training.preflight.meta_policy makes it.
        batch: the largest of the run.
        config: of the run.

    Raises:
        Exception: of any kind, where the model's forward pass looks at values.
    """
    meta = torch.device("meta")
    # WDPO's exact solver attends to padded rows by plain products, which shapes take as they are.
    given = (_as_packed(batch) if isinstance(batch, Batch) and not config.second_derivative else batch).to(meta)
    pairs = len(given.indices_B)
    # As under ZeRO, a parameter's gradient leaves as soon as it is there.
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        for parameter in policy.parameters()
        if parameter.requires_grad
    ]
    tensors = (value for value in vars(given).values() if isinstance(value, Tensor))
    known = [*policy.parameters(), *policy.buffers(), *tensors]
    population = Population(losses_P=torch.zeros(pairs, device=meta), mean_penalty=torch.ones(()))
    try:
        with _Alive(policy.head.weight.shape[0], known) as alive:
            objective(policy, given, torch.zeros(pairs, 2, device=meta), config, population).total.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return alive.at_peak["model"], alive.at_peak["head"]


class _Alive(TorchDispatchMode):
    """Counts the bytes of all tensors on the meta device that are alive, and keeps the count of when they were most.

    Args:
        vocabulary: tensors with a side of this length are the output head's, as are all that its kernels make.
        known: not to be counted.
    """

    def __init__(self, vocabulary: int, known: list[Tensor]) -> None:
        super().__init__()
        self.at_peak: Counter[str] = Counter()
        self._vocabulary = vocabulary
        self._alive: Counter[str] = Counter()
        self._seen: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return tree_map_only(Tensor, self._count, out)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if tensor.is_meta and place not in self._seen:
            kind = "head" if self._vocabulary in tensor.shape or _called_by(HEAD_KERNELS) else "model"
            size = storage.nbytes()
            self._alive[kind] += size
            self._seen[place] = weakref.finalize(storage, self._forget, place, kind, size)
            if self._alive.total() > self.at_peak.total():
                self.at_peak = Counter(self._alive)
        return tensor

    def _forget(self, place: int, kind: str, size: int) -> None:
        del self._seen[place]
        self._alive[kind] -= size


def _called_by(files: frozenset[str]) -> bool:
    """Is a function of one of these files being run? Also in a backward pass, where no module is."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename not in files:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def _as_packed(batch: Batch) -> PackedBatch:
    """A packed row with the shapes of a padded batch; its content means nothing."""
    rows, width = batch.input_ids_ST.shape
    nothing_A = torch.zeros_like(batch.targets_A)
    tokens_1N = torch.zeros(1, rows * width, dtype=torch.int64)
    groups = (PrefixGroup(0, (width,)),) * rows
    return PackedBatch(batch.indices_B, tokens_1N, tokens_1N, tokens_1N[0], nothing_A, nothing_A, nothing_A, groups)

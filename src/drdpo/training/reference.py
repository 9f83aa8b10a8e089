"""Log-probs of the frozen reference: the policy before its first step, by the same code, once, kept as data.

No second model is ever in memory. The file is keyed by a hash of weights, pairs (their token ids, so data, template and
--max_len), precision and attention: log-probs of anything else are not read but made anew, before any state is loaded, so
never from trained weights.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from drdpo import distributed
from drdpo.config import TrainConfig
from drdpo.errors import DataError
from drdpo.folder import atomic_file
from drdpo.progress import progress
from drdpo.training.data import Pair, form_batch
from drdpo.training.engine import Engine, evaluating
from drdpo.training.patches import POSITIONS
from drdpo.training.run import pairs_hash


def reference_key(model_fingerprint: str, pairs: list[Pair], config: TrainConfig) -> str:
    """Hash of everything that reference log-probs depend on."""
    kernel = config.attention_kernel + " and plain log-softmax" * config.second_derivative
    made_by = (
        config.dtype, config.attention, kernel, str(config.torch_compile), config.lora_quantize,
        str(POSITIONS if config.wide_first_tokens else 0),
    )  # fmt: skip
    return hashlib.sha256(" ".join([model_fingerprint, *made_by, pairs_hash(pairs)]).encode()).hexdigest()


def read_reference(path: Path, key: str, pairs: int) -> Tensor | None:
    """Log-probs [pairs, 2] that an earlier start of the run left, or None where there are none with this key.

    Raises:
        DataError: the file is damaged or has holes.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            if (stored.metadata() or {}).get("key") != key:
                return None
            logprobs_M2 = stored.get_tensor("logprobs")
    except Exception as error:
        raise DataError(f"{path}: not a readable safetensors file ({error}); delete it") from error
    _check(logprobs_M2, pairs, str(path))
    return logprobs_M2


def write_reference(path: Path, key: str, logprobs_M2: Tensor) -> None:
    """Keep log-probs with their key."""
    with atomic_file(path, "wb") as stream:
        stream.write(save({"logprobs": logprobs_M2.contiguous()}, metadata={"key": key}))


def reference_logprobs(
    engine: Engine, pairs: list[Pair], batches: list[list[int]], config: TrainConfig, pad_token_id: int, label: str
) -> Tensor:
    """Run the untrained policy over all pairs, sharded over the ranks.

    Args:
        engine: before its first step.
        pairs: of one split.
        batches: this rank's micro-batches, -1 for none; over the ranks they hold every pair. A bfloat16 log-prob depends
            a little on what it is computed with, so they should be those of the first epoch: the first loss is then that
            of a margin of exactly zero.
        config: of the run, for the form of the batches.
        pad_token_id: for the padded form.
        label: for the progress bar.

    Returns:
        [M, 2] float32 on the CPU: log-probs of the chosen and the rejected answer of every pair.
    """
    device = engine.device
    rows = []
    with evaluating(engine) as policy:
        for indices in progress(
            batches, desc=f"reference log-probs, {label}", unit="batch", disable=not distributed.is_main()
        ):
            batch = form_batch(pairs, indices, config, pad_token_id).to(device)
            logprob_S = policy(batch).logprob_S.float()
            rows.append(torch.stack([batch.indices_B.float(), *logprob_S.view(2, -1)], dim=1))
    found_K3 = distributed.gather(torch.cat(rows)).cpu()
    logprobs_M2 = torch.full((len(pairs), 2), float("nan"))
    found_K3 = found_K3[found_K3[:, 0] >= 0]
    logprobs_M2[found_K3[:, 0].long()] = found_K3[:, 1:]
    _check(logprobs_M2, len(pairs), f"the reference model on the {label} pairs")
    return logprobs_M2


def _check(logprobs_M2: Tensor, pairs: int, source: str) -> None:
    if logprobs_M2.shape != (pairs, 2) or not torch.isfinite(logprobs_M2).all():
        raise DataError(f"{source}: the reference log-probs have holes or are not finite")

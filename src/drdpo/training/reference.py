"""Log-probs of the frozen reference: computed once, by the policy before its first step, and stored.

No second model is ever in memory. The file is keyed by a hash of weights, pairs (their token ids, so data, template and
--max_len), precision, attention, kind of device and versions of libraries. Log-probs with another key are ignored and
recomputed, before any state is loaded, so never from trained weights.

Shape suffixes: S = 2B sequences, M pairs of the split, K pairs with padding, C candidates.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from drdpo import distributed
from drdpo.candidates import Candidates
from drdpo.errors import DataError
from drdpo.folder import atomic_file, versions
from drdpo.progress import progress
from drdpo.training.data import BatchPlan, Pair, pack_candidates
from drdpo.training.engine import Engine, evaluating
from drdpo.training.run import pairs_hash


def reference_key(model_fingerprint: str, pairs: list[Pair], arithmetic: str) -> str:
    """Hash of everything that reference log-probs depend on, versions of libraries and the kind of device included.

    Args:
        model_fingerprint: of the weights.
        pairs: of the split.
        arithmetic: see drdpo.training.run.arithmetic_of.
    """
    computed_by = [f"{name} {versions().get(name)}" for name in ("torch", "transformers", "bitsandbytes")]
    words = [model_fingerprint, arithmetic, distributed.device().type, *computed_by, pairs_hash(pairs, columns=False)]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def read_reference(path: Path, key: str, *shape: int) -> Tensor | None:
    """Log-probs of this shape ([M, 2] of pairs, [C] of candidates) of an earlier start, or None if there are none with this
    key.

    Raises:
        DataError: the file is damaged or incomplete.
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
    check_logprobs(logprobs_M2, shape, str(path))
    return logprobs_M2


def write_reference(path: Path, key: str, logprobs_M2: Tensor) -> None:
    """Store log-probs with their key."""
    with atomic_file(path, "wb") as stream:
        stream.write(save({"logprobs": logprobs_M2.contiguous()}, metadata={"key": key}))


def reference_logprobs(engine: Engine, plan: BatchPlan, batches: list[list[int]], label: str) -> Tensor:
    """Run the untrained policy over all pairs, sharded over the ranks.

    Args:
        engine: before its first step.
        plan: of one split.
        batches: this rank's micro-batches, -1 being padding; over the ranks they have every pair. A bfloat16 log-prob
            depends slightly on the rest of its batch, so they should be those of the first epoch: the margins of the first
            step are then exactly zero.
        label: for the progress bar.

    Returns:
        [M, 2] float32 on the CPU: log-probs of the chosen and the rejected answer of every pair.
    """
    rows = []
    with evaluating(engine) as policy:
        for indices in progress(
            batches, desc=f"reference log-probs, {label}", unit="batch", disable=not distributed.is_main()
        ):
            batch = plan.batch(indices).to(engine.device)
            logprob_S = policy(batch).logprob_S.float()
            rows.append(torch.stack([batch.indices_B.float(), *logprob_S.view(2, -1)], dim=1))
    rows_K3 = distributed.gather(torch.cat(rows)).cpu()
    rows_K3 = rows_K3[rows_K3[:, 0] >= 0]
    logprobs_M2 = torch.full((len(plan.pairs), 2), float("nan"))
    logprobs_M2[rows_K3[:, 0].long()] = rows_K3[:, 1:]
    check_logprobs(logprobs_M2, (len(plan.pairs), 2), f"the reference model on the {label} pairs")
    return logprobs_M2


def candidate_logprobs(engine: Engine, candidates: Candidates, row_tokens: int, label: str) -> Tensor:
    """[C] float32 on the CPU: log-probs of all candidates under the policy as it is; see Candidates.logprobs."""
    with evaluating(engine) as policy:
        return candidates.logprobs(lambda row: policy(pack_candidates(row).to(engine.device)).logprob_S, row_tokens, label)


def check_logprobs(logprobs_M2: Tensor, shape: tuple[int, ...], source: str) -> None:
    """Raise DataError if log-probs do not have the shape, or one is not finite."""
    if logprobs_M2.shape != shape or not torch.isfinite(logprobs_M2).all():
        raise DataError(f"{source}: the reference log-probs are incomplete or not finite")

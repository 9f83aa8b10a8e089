"""Log-probs of the frozen reference: computed once, by the policy before its first step, and stored.

No second model is ever in memory. The file is keyed by a hash of weights, pairs (their token ids, so data, template and
--max_len), precision, attention, kind of device and versions of libraries. Log-probs with another key are ignored and
recomputed, before any state is loaded, so never from trained weights.

Shape suffixes: B pairs of a batch, S = 2B sequences, M pairs of the split, K pairs with padding, C candidates.
"""

import hashlib
from collections.abc import Callable
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
    """Hash of everything that log-probs of a split's pairs depend on, versions of libraries and the kind of device included;
    `arithmetic`: see drdpo.training.run.arithmetic_of."""
    computed_by = [f"{name} {versions().get(name)}" for name in ("torch", "transformers", "bitsandbytes")]
    words = [model_fingerprint, arithmetic, distributed.device().type, *computed_by, pairs_hash(pairs, columns=False)]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def stored_logprobs(path: Path, key: str, shape: tuple[int, ...], compute: Callable[[], Tensor], source: str) -> Tensor:
    """Log-probs of this shape ([M, 2] of pairs, [C] of candidates) that an earlier start stored with this key, or else those
    that `compute` finds for `source`, stored. Every rank must call.

    Raises:
        DataError: they are damaged, incomplete or not finite.
    """
    logprobs = None
    try:
        if path.is_file():
            with safe_open(path, framework="pt") as stored:
                if (stored.metadata() or {}).get("key") == key:
                    logprobs, source = stored.get_tensor("logprobs"), str(path)
    except Exception as error:
        raise DataError(f"{path}: not a readable safetensors file ({error}); delete it") from error
    # All ranks must agree: one that sees the file while another does not would wait for it forever.
    known = not distributed.any_rank(logprobs is None)
    logprobs = logprobs if known and logprobs is not None else compute()
    if logprobs.shape != shape or not torch.isfinite(logprobs).all():
        raise DataError(f"{source}: the reference log-probs are incomplete or not finite")
    if not known:
        content = save({"logprobs": logprobs.contiguous()}, metadata={"key": key})
        distributed.on_main(lambda: _write(path, content))
    return logprobs


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path, "wb") as stream:
        stream.write(content)


def reference_logprobs(engine: Engine, plan: BatchPlan, batches: list[list[int]], label: str) -> Tensor:
    """Run the untrained policy over all pairs of a split, sharded over the ranks.

    Args:
        batches: this rank's micro-batches, -1 being padding; over the ranks they have every pair. A bfloat16 log-prob
            depends slightly on the rest of its batch, so they should be those of the first epoch: the margins of the first
            step are then exactly zero.

    Returns:
        [M, 2] float32 on the CPU: log-probs of the chosen and the rejected answer of every pair, NaN for one in no batch.
    """
    rows = []
    desc = f"reference log-probs, {label}"
    with evaluating(engine) as policy:
        for indices in progress(batches, desc=desc, unit="batch", disable=not distributed.is_main()):
            batch = plan.batch(indices).to(engine.device)
            logprob_S = policy(batch).logprob_S.float()
            rows.append(torch.stack([batch.indices_B.float(), *logprob_S.view(2, -1)], dim=1))
    rows_K3 = distributed.gather(torch.cat(rows)).cpu()
    rows_K3 = rows_K3[rows_K3[:, 0] >= 0]
    logprobs_M2 = torch.full((len(plan.pairs), 2), float("nan"))
    logprobs_M2[rows_K3[:, 0].long()] = rows_K3[:, 1:]
    return logprobs_M2


def candidate_logprobs(engine: Engine, candidates: Candidates, row_tokens: int, label: str) -> Tensor:
    """[C] float32 on the CPU: log-probs of all candidates under the policy as it is; see Candidates.logprobs."""
    with evaluating(engine) as policy:
        return candidates.logprobs(lambda row: policy(pack_candidates(row).to(engine.device)).logprob_S, row_tokens, label)

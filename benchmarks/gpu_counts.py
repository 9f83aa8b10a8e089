"""What a training step costs on a GPU, counted without one: launches, arithmetic, bytes and memory of a micro-batch.

The trainer's own code runs on fake CUDA tensors (fake_cuda.py) at the shapes of Llama-3.2-1B and Llama-3.1-8B: a forward and
backward pass and, for methods whose weights depend on the other pairs, the pass that surveys them. Rows without flags are
what the trainer's preflight chooses on one H100 of 80 GB. Prompts are about 200 tokens long and answers 300, drawn uniformly
within half of that from a fixed seed. Counted are

    launches       operations that run at least one kernel; each counts once, though a few run several
    GEMM TFLOP     of matrix products, and of those in float32; Triton's separately; attention kernels' not counted
    GiB moved      all operands and results of all launches: an upper bound, as a cache may hold them
    peak GiB       allocated at once beyond weights, gradients and optimizer states

Times are modelled, not measured: a launch takes the longer of its arithmetic and its memory traffic at RATES, the step the
longer of their sum and the host's time to launch them. ZeRO's float32 sums, the optimizer step and communication between
GPUs are excluded. The counts are deterministic; tests/test_fake_cuda.py repeats some of them.

    PYTHONPATH=src python benchmarks/gpu_counts.py [--output=benchmarks/results/gpu_counts.json]
"""

import argparse
import json
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_cuda
import processes
import torch
from shapes import pairs_of, settings_of
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from drdpo.config.training import TrainConfig
from drdpo.training.data import Pair, form_batch
from drdpo.training.losses import method_of
from drdpo.training.memory import preflight, resolve_attention, shapes
from drdpo.training.objective import objective, survey
from drdpo.training.policy import FiniteWatch, Policy, set_recomputation
from drdpo.training.run import Run

OUTPUT = Path(__file__).parent / "results" / "gpu_counts.json"
METHODS: dict[str, dict[str, Any]] = {"dpo": {}, "kldpo": {"kldpo_tau": 0.05}, "wdpo": {"wdpo_rho": 0.01}}
CASES: list[tuple[str, str, int, dict[str, Any]]] = [
    *(("Llama-3.2-1B", method, pairs, {}) for method, pairs in
      (("dpo", 1), ("dpo", 4), ("dpo", 16), ("kldpo", 4), ("wdpo", 1), ("wdpo", 4))),
    *(("Llama-3.2-1B", "dpo", pairs, flags) for pairs in (1, 16) for flags in
      ({"attn": "sdpa"}, {"gradient_checkpointing": "true"})),
    *(("Llama-3.1-8B", method, pairs, {}) for method, pairs in (("dpo", 1), ("dpo", 4), ("kldpo", 4), ("wdpo", 1))),
    ("Llama-3.1-8B", "dpo", 4, {"attn": "sdpa"}),
]  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Rates that a GPU is assumed to sustain: shares of its data sheet's peaks."""

    bfloat16: float
    """FLOP/s of matrix products."""
    float32: float
    triton: float
    """FLOP/s of our Triton kernels."""
    memory: float
    """Bytes/s."""
    launch: float
    """Seconds of the host per launch."""

    def seconds(self, kind: str, flops: int, moved: int) -> float:
        """Of one launch."""
        return max(flops / getattr(self, kind) if kind else 0.0, moved / self.memory)


RATES = {
    # 61% of 989, 67% of 67 and 35% of 989 TFLOP/s, 90% of 3.35 TB/s.
    "H100": Rates(600e12, 45e12, 350e12, 3.0e12, 8e-6),
    # The same shares of the A100 80GB SXM's 312 and 19.5 TFLOP/s and 2.04 TB/s.
    "A100": Rates(190e12, 13e12, 110e12, 1.8e12, 8e-6),
}


def model_folder(name: str, folder: Path, **changes: Any) -> Path:
    """A folder with the config.json of a model of SHAPES, or one that differs from it in these settings."""
    path = folder / "-".join([name, *map(str, changes.values())])
    settings_of(name, **changes).save_pretrained(path)
    return path


def resolved(config: TrainConfig, pairs: list[Pair]) -> Run:
    """A run as the trainer resolves its flags on this GPU for one micro-batch of these pairs: by its preflight."""
    config = replace(config, train_batch_size=len(pairs), micro_batch_size=len(pairs), micro_batch_tokens=None)
    with redirect_stdout(StringIO()):
        with fake_cuda.FakeTensors():
            config = resolve_attention(config)
        sizes: Any = {"train": {"answer cut": 0}}
        return preflight(
            Run(config, method_of(config), Path("-"), SimpleNamespace(pad_token_id=0), pairs, pairs, sizes, {})
        )[0]


def policy_on_cuda(config: TrainConfig) -> Policy:
    """The policy of a run, in FakeTensors, as the trainer makes it from the config.json in config.model_path.

    Args:
        config: resolved.
    """
    with unset_fake_temporarily():  # fake tensors on the meta device cannot be swapped, which peft does
        policy = shapes(config)
    fake_cuda.to_cuda(policy)
    policy.language_model.set_attn_implementation(config.attention)
    return policy


def micro_batch(
    policy: Policy, pairs: list[Pair], config: TrainConfig, rates: dict[str, Rates] | None = None
) -> fake_cuda.Counts:
    """Count one micro-batch, forward and backward, in FakeTensors; for KLDPO and Dr. DPO with its share of the survey."""
    batch = form_batch(pairs, list(range(len(pairs))), config.packing).to(fake_cuda.DEVICE)
    reference_B2 = torch.zeros(len(pairs), 2, device=fake_cuda.DEVICE)
    hooks = [
        # As under ZeRO, a parameter's gradient is removed as soon as it is complete.
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        for parameter in policy.parameters()
        if parameter.requires_grad
    ]
    known = [*policy.parameters(), *policy.buffers(), *(part for part in vars(batch).values() if isinstance(part, Tensor))]
    with fake_cuda.Counts(known, rates) as counts:
        method = method_of(config)
        population = survey(policy, [(batch, reference_B2)], method) if method.needs_population else None
        policy.watch = FiniteWatch(fake_cuda.DEVICE)
        policy.watch.next_batch()
        part = objective(policy, batch, reference_B2, method, population)
        policy.watch.look(part.total)
        part.total.backward()
    for hook in hooks:
        hook.remove()
    return counts


def row(model: str, method: str, pairs: int, flags: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One row of the results.

    Args:
        model, method: of shapes.py and METHODS.
        pairs: of the micro-batch.
        flags: that differ from the trainer's choice on a GPU of 80 GB.
        folder: for the model's config.json.
    """
    config = TrainConfig(str(model_folder(model, folder)), "-", "-", dtype="bfloat16", **METHODS[method], **flags)
    given = pairs_of(pairs)
    run = resolved(config, given)
    with fake_cuda.FakeTensors():
        policy = policy_on_cuda(run.config)
        set_recomputation(policy.language_model, run.recompute)
        counts = micro_batch(policy, given, run.config, RATES)
    flops = counts.flops
    return {
        "model": model, "method": method, "pairs": pairs, "flags": flags, "default": not flags,
        "tokens": sum(pair.row_tokens() for pair in given),
        "launches": counts.launches.total(),
        "gemm_tflop": round((flops.total() - flops["triton"]) / 1e12, 3),
        "gemm_fp32_tflop": round(flops["float32"] / 1e12, 3),
        "triton_tflop": round(flops["triton"] / 1e12, 3),
        "gib_moved": round(counts.bytes / 2**30, 2),
        "peak_gib": round(counts.peak / 2**30, 3),
        **{f"{gpu.lower()}_ms": round(1e3 * max(counts.seconds[gpu], rates.launch * counts.launches.total()), 1)
           for gpu, rates in RATES.items()},
    }  # fmt: skip


def main() -> None:
    """Count every case, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output = parser.parse_args().output
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            rows.append(row(*case, Path(folder)))
    processes.show(rows)
    rates = {gpu: asdict(of) for gpu, of in RATES.items()}
    output.write_text(json.dumps({"rates": rates, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

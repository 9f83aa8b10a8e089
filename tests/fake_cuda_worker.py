"""Runs of our code on fake CUDA tensors, a line of JSON each, in a process of its own; see test_fake_cuda.py."""

import json
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import fake_cuda
import gpu_counts
import torch
from fake_cuda import Counts, FakeTensors
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from drdpo.config.training import TrainConfig
from drdpo.kernels.packed_attention import PackedRow
from drdpo.scoring.armorm import ArmoRM, RewardLayout, Span
from drdpo.training.data import Pair, form_batch
from drdpo.training.log import pair_table
from drdpo.training.losses import method_of
from drdpo.training.memory import dry_run, resolve_attention, shapes
from drdpo.training.policy import check_numbers, pairs_of

TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 512, "tie_word_embeddings": True,
}  # fmt: skip
METHODS = gpu_counts.METHODS | {
    "drdpo": {"drdpo_beta": 1.0}, "chi2": {"method": "chi2:0.25"}, "cvar": {"method": "cvar:0.5"},
}  # fmt: skip
WEIGHTS = ("kldpo", "drdpo", "chi2", "cvar")
EXACT = {"wdpo_rho": 0.01, "wdpo_solver": "exact"}
PAIRS = [Pair([1] * (3 + number), [2] * (4 + 2 * number), [3] * (5 + number), number) for number in range(2)]


def steps() -> dict[str, dict[str, Any]]:
    """{name: flags} of micro-batches, forward and backward."""
    again, wdpo = {"gradient_checkpointing": "true"}, METHODS["wdpo"]
    found: dict[str, dict[str, Any]] = {
        "dpo float32 lora": {"dtype": "float32", "lora_rank": 2}, "dpo recomputed": again, "wdpo recomputed": again | wdpo,
        "dpo padded": {"packing": False}, "kldpo padded": {"packing": False, **METHODS["kldpo"]},
        "wdpo exact padded": EXACT, "wdpo exact padded recomputed": again | EXACT,
        "wdpo once": {"wdpo_prompt": "once", **wdpo}, "wdpo root": {"wdpo_penalty": "root", **wdpo},
        "ipo": {"loss_type": "ipo"}, "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    }  # fmt: skip
    for (name, flags), dtype, attn in product(METHODS.items(), ("bfloat16", "float32"), ("auto", "sdpa", "flash")):
        refused = attn == "flash" and dtype == "float32"
        if not refused and (attn == "auto" or name not in WEIGHTS):  # which weigh DPO's losses
            found[f"{name} {dtype} {attn}"] = {"dtype": dtype, "attn": attn, **flags}
    adapted = {name: flags for name, flags in METHODS.items() if name not in ("chi2", "cvar")}
    return found | {f"{name} bfloat16 lora": {"lora_rank": 2, **flags} for name, flags in adapted.items()}


def config_of(folder: Path, flags: dict[str, Any]) -> TrainConfig:
    """The flags, with the attention that the trainer would choose."""
    chosen = {"dtype": "bfloat16", "gradient_checkpointing": "false", **flags}
    with FakeTensors(), redirect_stdout(StringIO()):
        return resolve_attention(TrainConfig(str(folder), "-", "-", **chosen))


def step(folder: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch of a tiny policy; flags that come to the same run once."""
    config = config_of(folder, flags)
    if str(config) not in DONE:
        with FakeTensors():
            DONE[str(config)] = told(gpu_counts.micro_batch(gpu_counts.policy_on_cuda(config), PAIRS, config))
    return DONE[str(config)]


DONE: dict[str, dict[str, Any]] = {}


def evaluation(folder: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """As drdpo.training.loop.evaluate on one batch."""
    config = config_of(folder, flags)
    with FakeTensors(), torch.no_grad():
        policy = gpu_counts.policy_on_cuda(config).eval()
        batch = form_batch(PAIRS, range(len(PAIRS)), config.packing).to(fake_cuda.DEVICE)
        reference_B2 = torch.zeros(len(PAIRS), 2, device=fake_cuda.DEVICE)
        with Counts() as counts:
            pairs = pairs_of(policy(batch).logprob_S, reference_B2, batch)
            assert pair_table(method_of(config).loss(pairs), pairs, config.beta).is_cuda
    return told(counts)


def scoring(pooling: str, flash: bool) -> dict[str, Any]:
    """ArmoRM on a packed row of two prompts with two answers each."""
    layout = RewardLayout(3, 10.0, 16, 1, 64, 512, 2048, ("a", "b", "c"), (7, 8), pooling)
    with torch.device("meta"):
        model = ArmoRM(LlamaModel(LlamaConfig(**TINY)).bfloat16(), layout).eval().requires_grad_(False)
    sequences = [[[1] * 5 + [7, 8] + [2] * (3 + number), [1] * 5 + [7, 8] + [3] * 4] for number in range(2)]
    with FakeTensors(), torch.no_grad(), Counts() as counts:
        fake_cuda.to_cuda(model)
        model.flash_attention = flash
        rewards = model.score_packed(PackedRow([(7, pair) for pair in sequences]), [Span(5, 7, 10)] * 4)
        assert rewards.stage1.is_cuda and rewards.stage1.shape == (4, 3) and rewards.stage2.dtype == torch.float32
    return told(counts)


def checks() -> dict[str, Any]:
    """What load_policy asks of a model, where nf4 has put it: on the GPU."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(attn_implementation="shared_prefix", **TINY)).bfloat16()
    with FakeTensors(), Counts() as counts:
        fake_cuda.to_cuda(model)
        check_numbers(model, "-")
    return told(counts)


def planted(folder: Path) -> dict[str, Any]:
    """A batch that was left on the CPU: must be an error."""
    with FakeTensors():
        config = config_of(folder, {})
        policy = gpu_counts.policy_on_cuda(config)
        policy(form_batch(PAIRS, range(len(PAIRS)), config.packing))
    return {}


def memory(folder: Path, pairs: int, layers: int, flags: dict[str, Any]) -> dict[str, Any]:
    """GiB of activations and head at Llama-3.2-1B's shape, predicted and counted."""
    path, given = gpu_counts.model_folder("Llama-3.2-1B", folder, num_hidden_layers=layers), gpu_counts.pairs_of(pairs)
    config = config_of(path, flags)
    with FakeTensors():
        counted = gpu_counts.micro_batch(gpu_counts.policy_on_cuda(config), given, config).peak
    return {"predicted": predicted(config, given), "counted": counted / 2**30}


MEMORY: dict[str, tuple[int, int, dict[str, Any]]] = {
    "dpo sdpa": (4, 4, {"attn": "sdpa"}), "dpo recomputed": (16, 4, {"gradient_checkpointing": "true"}),
    "wdpo": (1, 4, METHODS["wdpo"]), "wdpo exact": (1, 4, EXACT),
}  # fmt: skip
"""Pairs, layers and flags."""


def predicted(config: TrainConfig, pairs: list[Pair]) -> float:
    """GiB that the preflight predicts for activations and head."""
    batch = form_batch(pairs, range(len(pairs)), config.packing)
    return sum(dry_run(shapes(config), batch, method_of(config))) / 2**30


def recount(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """A committed row of gpu_counts, counted again, and its memory predicted."""
    model, method, pairs, flags = (row[key] for key in ("model", "method", "pairs", "flags"))
    found = gpu_counts.row(model, method, pairs, flags, folder)
    config = config_of(gpu_counts.model_folder(model, folder), {**METHODS[method], **flags})
    return {**found, "predicted": predicted(config, gpu_counts.pairs_of(pairs)), "counted": found["peak_gib"]}


def told(counts: Counts) -> dict[str, Any]:
    """What a test asks of counts."""
    attention = {" ".join(key): number for key, number in counts.attention.items()}
    found = {"flops": counts.flops, "syncs": counts.syncs, "on_cpu": counts.on_cpu, "attention": attention}
    return found | {"varlen": counts.launches["_varlen_attn"]}


def everything() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(name, function, arguments) of every run."""
    folder = Path(tempfile.mkdtemp())
    settings = LlamaConfig(**TINY)
    settings.architectures = ["LlamaForCausalLM"]
    settings.save_pretrained(folder)
    for name, flags in steps().items():
        yield name, step, (folder, flags)
    for name, flags in {"dpo": {}, "dpo padded": {"packing": False}, "wdpo": METHODS["wdpo"]}.items():
        yield f"evaluation {name}", evaluation, (folder, flags)
    yield "scoring", scoring, ("last", True)
    yield "scoring mean sdpa", scoring, ("mean", False)
    yield "checks", checks, ()
    yield "planted", planted, (folder,)
    yield "planted launch", fake_cuda._pairs_of_the_row, ()
    for name, given in MEMORY.items():
        yield f"memory {name}", memory, (folder, *given)
    for row in json.loads(gpu_counts.OUTPUT.read_text(encoding="utf-8"))["rows"]:
        if (row["model"], row["method"], row["default"]) == ("Llama-3.2-1B", "dpo", True) and row["pairs"] != 4:
            yield f"counts {row['pairs']}", recount, (folder, row)


def main() -> None:
    for name, run, arguments in everything():
        try:
            found = run(*arguments)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:500], "where": traceback.format_exc()[-2000:]}
        print(json.dumps({"name": name, **found}, default=str), flush=True)


if __name__ == "__main__":
    main()

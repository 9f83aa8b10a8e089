"""Which engine, and how many of them."""

import os
import sys

from drdpo.errors import UsageError
from drdpo.generation.engines.base import EngineSettings
from drdpo.generation.engines.pool import Engines, InProcess, Pool

SHORT_ANSWERS = 64
"""Tokens of an answer up to which `auto` is transformers on a CPU.

There vLLM 0.32 takes 14 s of a core to start, transformers less than 1; and 3,000 tokens in answers of 24 took vLLM 18 s and
transformers 15 in bfloat16, 31 and 25 in float32 by AVX2 (one busy core of an AVX-512 machine, AVX2 by oneDNN's and MKL's
variables). Longer answers are vLLM's: transformers copies its key-value cache for every token.
"""


def choose_engine(name: str, max_new_tokens: int, on_gpu: bool) -> str:
    """The engine that --engine names; `auto` is vLLM where it works, else transformers, which is said loudly; and
    transformers for short answers on a CPU.

    Args:
        name: "auto", "vllm" or "transformers".
        max_new_tokens: longest answer.
        on_gpu: is there a GPU to sample on?

    Raises:
        UsageError: vLLM is asked for and cannot be used here.
    """
    if name == "transformers":
        return name
    if name == "auto" and not on_gpu and max_new_tokens <= SHORT_ANSWERS:
        print(
            f"--engine=auto is transformers: answers of at most {SHORT_ANSWERS} tokens on a CPU end before vllm's start pays"
        )
        return "transformers"
    from drdpo.generation.engines.vllm_engine import vllm_problem

    problem = vllm_problem()
    if problem is None:
        return "vllm"
    if name == "vllm":
        raise UsageError(f"--engine=vllm: {problem}; run: bash setup.sh, or give --engine=transformers (slower)")
    print(f"WARNING: sampling with transformers, several times slower than vLLM: {problem}", file=sys.stderr, flush=True)
    return "transformers"


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES spells them; none on a CPU."""
    import torch

    count = torch.cuda.device_count()
    named = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    return (named or [str(number) for number in range(count)])[:count]


def plan_engines(engine: str, tensor_parallel_size: int, gpus: list[str]) -> list[dict[str, str]]:
    """Environment variables of each engine process; a list of one means an engine in this process.

    One engine per `tensor_parallel_size` GPUs, or one on a CPU. The environment variable DRDPO_ENGINES asks for another
    number: fewer than the GPUs allow, or several on a CPU, which share its cores.

    Args:
        engine: "vllm" or "transformers".
        tensor_parallel_size: GPUs that one engine spans.
        gpus: from visible_gpus.

    Raises:
        UsageError: that many GPUs, or engines, cannot be had.
    """
    if tensor_parallel_size > 1 and engine != "vllm":
        raise UsageError(f"--tensor_parallel_size={tensor_parallel_size} needs --engine=vllm; transformers spans one GPU")
    if tensor_parallel_size > max(1, len(gpus)):
        raise UsageError(
            f"--tensor_parallel_size={tensor_parallel_size}: {len(gpus)} GPUs are visible; give at most that many, or leave "
            "it out"
        )
    most = len(gpus) // tensor_parallel_size if gpus else None
    asked = os.environ.get("DRDPO_ENGINES")
    if asked is not None and (not asked.isdigit() or int(asked) < 1 or (most is not None and int(asked) > most)):
        limit = f"from 1 to {most} here" if most is not None else "of at least 1"
        raise UsageError(f"DRDPO_ENGINES={asked}: it must be a number {limit}")
    count = int(asked) if asked is not None else most or 1
    if not gpus:
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        return [{"OMP_NUM_THREADS": str(threads)} for _ in range(count)]
    if most is not None and count == most and len(gpus) % tensor_parallel_size:
        print(f"{len(gpus) % tensor_parallel_size} of {len(gpus)} GPUs stay idle (--tensor_parallel_size)", flush=True)
    parts = [gpus[first * tensor_parallel_size :][:tensor_parallel_size] for first in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]


def open_engines(settings: EngineSettings, plan: list[dict[str, str]]) -> Engines:
    """Start the engines of a plan; a single one runs in this process."""
    return InProcess(settings) if len(plan) == 1 else Pool(settings, plan)

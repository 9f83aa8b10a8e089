"""The Triton kernels compiled, as a launch would, for GPUs that are not here: their code is read, nothing runs."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
kernels, tangents, layers = (pytest.importorskip(f"drdpo.kernels.triton_{name}") for name in ("logprob", "tangent", "layer"))

SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that a block may have by compute capability: A100; A10 and RTX 30; H100; B200; RTX 50. Source:
CUDA C++ programming guide, technical specifications per compute capability."""
PRODUCTS = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""What multiplies on tensor cores; else mma.sync."""
SPILLED = {(120, "logsumexp"): 16, (80, "keys 128"): 8}
"""Bytes of registers a thread that may go to memory where it is not none: of 128 by 128 sums in 255 registers, and
of two of 64 by 128."""


class NoDriver:
    """In the place of a driver: says which GPU it would be."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Pretends that a GPU of some capability is here."""
    from triton.runtime.driver import driver

    if kernels.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return lambda capability: monkeypatch.setattr(driver, "_active", NoDriver(capability))


@pytest.fixture
def compiled(pretend: Any) -> Any:
    """Compiles a kernel for 2,048 tokens, width 2,048 and a block of the vocabulary."""

    def build(capability: int, dtype: torch.dtype, kernel: str, vocabulary: int) -> Any:
        pretend(capability)
        matrix, ids, floats = torch.empty(1, dtype=dtype), torch.empty(1, dtype=torch.int64), torch.empty(1)
        options = {**kernels._products(dtype), **kernels._tiles(dtype), "grid": (1,)}
        tokens = width = 2048
        if kernel == "logsumexp":
            return kernels._logsumexp_kernel.warmup(
                matrix, matrix, ids, floats, floats, floats, tokens, width, vocabulary, 8064, width, width, **options
            )
        return kernels._logit_gradient_kernel.warmup(
            matrix, matrix, ids, floats, floats, matrix, tokens, width, vocabulary, width, width, vocabulary, **options
        )

    return build


def spilled(cubin: bytes, folder: Path) -> int:
    """Bytes of a thread's registers that the machine code keeps in memory."""
    (folder / "kernel.cubin").write_bytes(cubin)
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    told = subprocess.run([reader, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    (stack,), (local,) = (re.findall(rf"{name}:(\d+)", told) for name in ("STACK", "LOCAL"))
    return int(stack) + int(local)


@pytest.mark.parametrize("kernel", ["logsumexp", "gradient"])
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [*((capability, torch.bfloat16) for capability in SHARED), (80, torch.float32), (90, torch.float32)],
)
def test_the_kernels_compiled_for_gpus(
    compiled: Any, tmp_path: Path, capability: int, dtype: torch.dtype, kernel: str
) -> None:
    built = compiled(capability, dtype, kernel, 32768)
    ptx = built.asm["ptx"]
    assert built.metadata.shared <= SHARED[capability]
    assert spilled(built.asm["cubin"], tmp_path) <= SPILLED.get((capability, kernel), 0)
    assert "cp.async.c" in ptx, "tiles are loaded while others are multiplied"
    assert (PRODUCTS.get(capability, "mma.sync") in ptx) == (dtype == torch.bfloat16), "float32 is not cut to TF32"
    if kernel == "gradient":
        assert re.search(r"st\.global[.\w]*\.v4", ptx) and "st.global.b16" not in ptx, "16 bytes are stored at a time"


def test_a_gradient_block_of_odd_width_is_stored_two_bytes_at_a_time(compiled: Any) -> None:
    """Why the blocks of drdpo.kernels.linear_logprob are multiples of 128 wide."""
    ptx = compiled(80, torch.bfloat16, "gradient", 44739).asm["ptx"]
    assert "st.global.b16" in ptx and not re.search(r"st\.global[.\w]*\.v4", ptx)


@pytest.mark.parametrize("kernel", ["forward", "tangent", "queries", "keys"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_attention_of_tangents_compiled_for_gpus(
    pretend: Any, tmp_path: Path, capability: int, width: int, kernel: str
) -> None:
    """Of second order and in float32, which needs most; SPILLED is the only excess."""
    pretend(capability)
    half, single, table = torch.empty(1, dtype=torch.bfloat16), torch.empty(1), torch.empty(1, dtype=torch.int32)
    function, halves, singles = {
        "forward": (tangents._attention_forward_kernel, 3, 2), "tangent": (tangents._attention_tangent_kernel, 6, 4),
        "queries": (tangents._query_gradient_kernel, 8, 5), "keys": (tangents._key_gradient_kernel, 8, 6),
    }[kernel]  # fmt: skip
    options = {"SECOND": True} if kernel in ("queries", "keys") else {}
    built = function.warmup(
        *[half] * halves, *[single] * singles, table, 2048, 32, 4, 0.125, 1 << 20, 1 << 18, WIDTH=width, BLOCK_E=width,
        PARTS=3, WIDEN=False, grid=(1,), **tangents.tiles(kernel == "keys", width, capability // 10), **options,
    )  # fmt: skip
    ptx = built.asm["ptx"]
    assert built.metadata.shared <= min(SHARED.values()), "for every GPU of a generation"
    assert spilled(built.asm["cubin"], tmp_path) <= SPILLED.get((capability, f"{kernel} {width}"), 0)
    own = (capability, kernel, width) != (100, "keys", 128)
    assert (PRODUCTS.get(capability, "mma.sync") if own else "mma.sync") in ptx
    assert "trap;" not in ptx
    if (capability, kernel) != (80, "keys"):
        assert "cp.async.c" in ptx, "tiles are loaded while others are multiplied"
    assert re.search(r"ld\.global[.\w]*\.v[24]|cp\.async\.c", ptx) and "ld.global.b16" not in ptx, (
        "16 bytes are loaded at a time"
    )


@pytest.mark.parametrize("capability", SHARED)
def test_the_kernels_between_products_compile_for_gpus(pretend: Any, capability: int) -> None:
    """Norm, gate, rotary positions, and what attention needs before its products."""
    pretend(capability)
    half, single = torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
    norm = {"WIDTH": 2048, "BLOCK_R": 1, "BLOCK_D": 2048, "num_warps": 8}
    built = [layers._norm_kernel.warmup(*[single] * 4, half, *[single] * 2, 300, 1e-5, PART=part, grid=(1,), **norm)
             for part in ("forward", "tangent", "backward", "second", "second_and_weight")]  # fmt: skip
    built += [layers._gate_kernel.warmup(*[half] * 8, 5000, PART=part, BLOCK=1024, grid=(1,))
              for part in ("forward", "tangent", "backward", "second")]  # fmt: skip
    built += [layers._rotate_kernel.warmup(half, *[single] * 3, 5000, 10, 512, -1.0, WIDTH=64, BLOCK=1024, grid=(1,))]
    built += [tangents._split_kernel.warmup(*[single] * 4, *[half] * 4, *[5000] * 4, BLOCK=2048, grid=(1,))]
    sizes = {"WIDTH": 64, "BLOCK_E": 64, "BLOCK_M": 32}
    built += [tangents._row_sums_kernel.warmup(*[single] * 6, 300, 32, SECOND=second, grid=(1,), **sizes)
              for second in (False, True)]  # fmt: skip
    assert all("trap;" not in each.asm["ptx"] for each in built)

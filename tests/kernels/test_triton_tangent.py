"""The Triton kernels of the tangent pass: by Triton's interpreter on a CPU, compiled under `pytest -m gpu`."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_tangent import attention, gate, norm, worst_error
from torch import Tensor

from drdpo.kernels.packed_attention import PrefixGroup
from drdpo.kernels.tangent import rotate

ROW = [PrefixGroup(66, (3, 9)), PrefixGroup(2, (1,))]
"""A prefix longer than a block, suffixes that see it, and a second group, which does not."""


def turned(x_2NHE: Tensor) -> tuple[Tensor, Tensor]:
    """Turned, and turned back."""
    angles_N1E = torch.linspace(0, 9, x_2NHE.shape[1] * 8, device=x_2NHE.device).view(-1, 1, 8).repeat(1, 1, 2)
    cos, sin = angles_N1E.cos().to(x_2NHE.dtype), angles_N1E.sin().to(x_2NHE.dtype)
    return rotate(x_2NHE, cos, sin), rotate(x_2NHE, cos, sin, back=True)


LAYERS: list[tuple[Callable[..., tuple[Tensor, ...]], list[tuple[int, ...]]]] = [
    (norm, [(2, 7, 48), (7, 48), (7, 48), (48,)]),
    (norm, [(2, 150, 16), (150, 16), (150, 16), (16,)]),
    (gate, [(2, 5, 300), (2, 5, 300), (5, 300), (5, 300)]),
    (turned, [(2, 7, 3, 16)]),
]


def check_layers(dtype: torch.dtype, device: str) -> None:
    """Norm, gate and rotation against float64, which is torch."""
    torch.manual_seed(0)
    for function, shapes in LAYERS:
        given = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
        for ours, theirs in zip(function(*given), function(*(part.double() for part in given)), strict=True):
            assert ours.dtype == dtype
            assert float((ours - theirs).norm() / theirs.norm()) < (1e-6 if dtype == torch.float32 else 1e-2), function


def interpreted() -> None:
    """In a process that set TRITON_INTERPRET before Triton was imported, and in which torch's formulas are missing."""
    from drdpo.kernels import tangent, triton_tangent

    assert triton_tangent.INTERPRETED
    used, launch = [], triton_tangent._Row.launch
    triton_tangent._Row.launch = lambda row, *rest, **options: (used.append(row.parts), launch(row, *rest, **options))[1]
    for dtype in (torch.float32, torch.bfloat16):
        check_layers(dtype, "cpu")
    tokens = sum(group.tokens for group in ROW)
    # The interpreter cuts what a GPU rounds to bfloat16: halves keep 15 bits.
    assert worst_error(tokens, ROW, torch.float32, "cpu") < 2e-4
    assert worst_error(tokens, ROW, torch.bfloat16, "cpu") < 2e-2
    assert worst_error(3, [PrefixGroup(0, (3,))], torch.float16, "cpu", width=48) < 1e-3
    assert used == [3] * 6 + [1] * 6 + [3] * 6, "torch's formulas ran instead"
    plain, tangent._kernels = tangent._kernels, lambda *_: None
    assert worst_error(tokens, ROW, torch.float32, "cpu") < 2e-6, "and these are more exact: the comparison sees which ran"
    tangent._kernels = plain


def test_the_kernels_under_the_interpreter(root: Path) -> None:
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(root / "src"), str(Path(__file__).parent)])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    words = [sys.executable, "-c", "import test_triton_tangent; test_triton_tangent.interpreted()"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layers_on_a_gpu(dtype: torch.dtype) -> None:
    check_layers(dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 48, 64, 128])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-5), (torch.bfloat16, 2e-2), (torch.float16, 1e-3)])
def test_attention_on_a_gpu(dtype: torch.dtype, bound: float, width: int) -> None:
    assert worst_error(sum(group.tokens for group in ROW), ROW, dtype, "cuda", width) < bound


@pytest.mark.gpu
def test_attention_repeats_to_the_bit_on_a_gpu() -> None:
    torch.manual_seed(0)
    shapes = [(2, 2000, 8, 64), (2, 2000, 2, 64), (2, 2000, 2, 64), *[(2000, 8, 64)] * 2]
    given = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
    first, second = (attention(*given, [PrefixGroup(400, (700, 900))], 0.125) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_table_of_blocks() -> None:
    """By hand: which rows a block's queries see, and until where a block's keys are seen."""
    pytest.importorskip("triton")
    from drdpo.kernels.triton_tangent import _blocks

    groups = [PrefixGroup(0, (2,)), PrefixGroup(5, (1, 4))]
    assert _blocks(groups, 4) == [
        [0, 2, 0, 0, 0, 2],  # a sequence alone
        [2, 7, 2, 2, 0, 12],  # the prefix: seen by its group
        [6, 7, 2, 2, 0, 12],
        [7, 8, 7, 2, 5, 8],  # suffixes: each sees the prefix, and itself
        [8, 12, 8, 2, 5, 12],
    ]

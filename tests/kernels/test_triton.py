"""The Triton kernels of linear_logprob and of the tangent pass: by Triton's interpreter on a CPU, compiled under
`pytest -m gpu`."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_tangent import attention, gate, norm, worst_error
from torch import Tensor

from drdpo.kernels import linear_logprob
from drdpo.kernels.linear_logprob import logprob_and_slope, tangent_logprob
from drdpo.kernels.packed_attention import PrefixGroup
from drdpo.kernels.tangent import rotate

SHAPES = [(1, 3, 7), (5, 8, 33), (70, 40, 300), (130, 70, 257)]
"""Tokens, width and vocabulary: below, at and beyond a tile, and multiples of nothing."""


def check_logprob(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
    """Values and gradients against float64, by linear_logprob's own float64 path, which is torch."""
    torch.manual_seed(tokens)
    hidden_ND = torch.randn(tokens, width, dtype=dtype, device=device).requires_grad_()
    weight_VD = torch.randn(vocabulary, width, dtype=dtype, device=device).requires_grad_()
    targets_N = torch.randint(vocabulary, (tokens,), device=device)
    upstream_N = torch.randn(tokens, device=device)
    logprob_N = linear_logprob(hidden_ND, weight_VD, targets_N)
    assert logprob_N.dtype == torch.float32
    logprob_N.backward(upstream_N)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_ND, weight_VD)]
    exact_N = torch.log_softmax(exact[0] @ exact[1].T, dim=1).gather(1, targets_N[:, None]).squeeze(1)
    exact_N.backward(upstream_N.double())
    # The sums are in float32 for every dtype: log-probs are as exact from bfloat16 inputs as from float32 ones.
    torch.testing.assert_close(logprob_N.double(), exact_N, atol=1e-4, rtol=1e-5)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip((hidden_ND, weight_VD), exact, strict=True):
        size = theirs.grad.abs().max()
        assert (ours.grad.double() - theirs.grad).abs().max() <= tolerance * size


def peaked_tangents(device: str) -> None:
    """Where logits are large, the log-probability's gradient is as good through the tangent kernel as through the plain one:
    both take probabilities from logits that are rounded as their log-sum-exp's were."""
    torch.manual_seed(0)
    hidden_ND = (2 * torch.randn(48, 64, device=device)).bfloat16()
    weight_VD = (2 * torch.randn(500, 64, device=device)).bfloat16()
    targets_N = (hidden_ND @ weight_VD.T).argmax(dim=1)
    known = logprob_and_slope(hidden_ND, weight_VD, targets_N)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        pair_2ND = torch.stack([hidden_ND, torch.randn_like(hidden_ND)]).to(dtype).requires_grad_()
        if dtype == torch.float64:
            logprob_N = linear_logprob(pair_2ND[0], weight_VD.double(), targets_N)
        else:
            logprob_N, _ = tangent_logprob(pair_2ND, weight_VD.requires_grad_(), targets_N, known)
        grads.append(torch.autograd.grad(logprob_N.sum(), pair_2ND)[0][0].double())
    ours, exact = grads
    assert float((ours - exact).norm() / exact.norm()) < 0.01


def split_vocabulary() -> None:
    """Few tokens: the vocabulary is cut into shares, whose log-sum-exps are put together."""
    from drdpo.kernels.triton_logprob import logprob_and_lse

    torch.manual_seed(0)
    hidden_ND, weight_VD = 9 * torch.randn(2, 16), torch.randn(1500, 16)
    logprob_N, lse_N = logprob_and_lse(hidden_ND, weight_VD, torch.tensor([0, 1499]))
    logits_NV = hidden_ND.double() @ weight_VD.double().T
    torch.testing.assert_close(lse_N.double(), logits_NV.logsumexp(dim=1), atol=1e-4, rtol=1e-5)
    picked_N = torch.stack([logits_NV[0, 0], logits_NV[1, 1499]])
    torch.testing.assert_close(logprob_N.double(), picked_N - logits_NV.logsumexp(dim=1), atol=1e-4, rtol=1e-5)


def logprob_interpreted() -> None:
    """All shapes and dtypes, in a process that set TRITON_INTERPRET before Triton was imported."""
    from drdpo.kernels import triton_logprob

    assert triton_logprob.INTERPRETED
    used = []
    original = triton_logprob.logit_gradient
    triton_logprob.logit_gradient = lambda *values: (used.append(1), original(*values))[1]
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            check_logprob(*shape, dtype, "cpu")
    assert len(used) >= 8, "the torch path ran instead"
    split_vocabulary()
    peaked_tangents("cpu")


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


def tangent_interpreted() -> None:
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


@pytest.mark.parametrize("kernels", ["logprob", "tangent"])
def test_the_kernels_under_the_interpreter(kernels: str, root: Path) -> None:
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(root / "src"), str(Path(__file__).parent)])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    words = [sys.executable, "-c", f"import test_triton; test_triton.{kernels}_interpreted()"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_log_sum_exp_fills_a_gpu_of_any_size() -> None:
    """Its programs run in as many waves as must be, and no cut of the vocabulary would end sooner."""
    pytest.importorskip("triton")
    from drdpo.kernels.triton_logprob import splits_of

    def steps(token_blocks: int, blocks: int, processors: int, parts: int) -> int:
        return -(-token_blocks * parts // processors) * -(-blocks // parts)

    for processors in (1, 8, 84, 108, 132, 148):
        for token_blocks in (1, 5, 6, 10, 79, 500):
            for blocks in (1, 3, 384, 1002):
                parts = splits_of(token_blocks, blocks, processors)
                assert 1 <= parts <= min(blocks, processors)
                ours = steps(token_blocks, blocks, processors, parts)
                assert all(ours <= steps(token_blocks, blocks, processors, n) for n in range(1, min(blocks, processors) + 1))
    # 653 tokens are 6 blocks: 22 parts fill an H100's 132 SMs exactly, 18 an A100's 108.
    assert (splits_of(6, 1002, 132), splits_of(6, 1002, 108)) == (22, 18)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 576, 49152)])
def test_the_log_probs_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_logprob(*shape, dtype, "cuda")


@pytest.mark.gpu
def test_peaked_tangents_on_a_gpu() -> None:
    peaked_tangents("cuda")


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

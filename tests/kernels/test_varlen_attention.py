"""Packed attention in one call: its bookkeeping against a plain stand-in for flash attention, the real one on a GPU."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers import LlamaConfig, LlamaModel

from drdpo.kernels import packed_attention
from drdpo.kernels.packed_attention import (
    PackedRow,
    PrefixGroup,
    PrefixPlan,
    check_varlen,
    hidden_states,
    refusal,
    shared_prefix_attention,
)

GROUPS = [PrefixGroup(4, (3, 6)), PrefixGroup(0, (5,)), PrefixGroup(0, (1, 2)), PrefixGroup(2, (1, 40))]
TOKENS = sum(group.tokens for group in GROUPS)


def stand_in(
    query_NHE: Tensor, key_MKE: Tensor, value_MKE: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int,
    *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What varlen_attn promises, sequence by sequence, causal from the bottom right."""
    assert window_size == (-1, 0) and starts_q.dtype == starts_k.dtype == torch.int32
    assert enable_gqa == (query_NHE.shape[1] != key_MKE.shape[1])
    assert (starts_q.diff().max(), starts_k.diff().max()) == (max_q, max_k)
    parts = []
    for number in range(len(starts_q) - 1):
        rows, columns = (slice(int(starts[number]), int(starts[number + 1])) for starts in (starts_q, starts_k))
        query, key, value = (part.transpose(0, 1) for part in (query_NHE[rows], key_MKE[columns], value_MKE[columns]))
        key, value = (part.repeat_interleave(len(query) // len(key), dim=0) for part in (key, value))
        seen = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril(key.shape[1] - query.shape[1])
        logits = (query @ key.transpose(1, 2) * (scale or query.shape[2] ** -0.5)).masked_fill(~seen, float("-inf"))
        parts.append((logits.softmax(dim=2) @ value).transpose(0, 1))
    return torch.cat(parts)


def agree(kv_heads: int, dtype: torch.dtype, device: str, tolerance: float) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, TOKENS, 16, dtype=dtype, device=device, requires_grad=True)
              for heads in (6, kv_heads, kv_heads)]  # fmt: skip
    upstream = torch.randn(1, 6, TOKENS, 16, dtype=dtype, device=device)
    outputs = []
    for flash in (True, False):
        parts = inputs if flash else [part.double() for part in inputs]
        plan = PrefixPlan(GROUPS, torch.device(device), parts[0].dtype, flash=flash)
        out = shared_prefix_attention(*parts, plan, 0.3)
        outputs.append([out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))])
    for ours, theirs in zip(*outputs, strict=True):
        ours, theirs = ours.detach().double(), theirs.detach().double()
        assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_every_segment_sees_its_prefix_and_itself(kv_heads: int, monkeypatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    agree(kv_heads, torch.float64, "cpu", 1e-12)


def test_what_a_row_needs_is_made_once_for_all_layers_and_no_mask_for_flash(monkeypatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    made = []
    segments_of = packed_attention.segments_of
    monkeypatch.setattr(packed_attention, "segments_of", lambda *given: made.append(given) or segments_of(*given))
    plan = PrefixPlan(GROUPS, torch.device("cpu"), torch.float32, flash=True)
    query, key, value = (torch.randn(1, heads, TOKENS, 16) for heads in (6, 2, 2))
    for _ in range(3):
        shared_prefix_attention(query, key, value, plan, None)
    assert len(made) == 1 and "_mask" not in vars(plan)
    # Four tokens, then 3 and 6 behind them; a row of 5; rows of 1 and 2; two tokens, then 1 and 40 behind them.
    assert plan.segments.starts_q.diff().tolist() == [4, 3, 6, 5, 1, 2, 2, 1, 40]
    assert plan.segments.starts_k.diff().tolist() == [4, 7, 10, 5, 1, 2, 2, 3, 42]
    fused = PrefixPlan(GROUPS, torch.device("cpu"), torch.float32)
    shared_prefix_attention(query, key, value, fused, None)
    assert "_mask" in vars(fused) and "segments" not in vars(fused)


def test_a_model_is_refused_by_its_shape_before_the_device_is_asked(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(packed_attention, "check_varlen", lambda *given: asked.append(given))
    device, settings = torch.device("cuda"), LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    assert refusal(settings, device, torch.float32) == "flash attention takes 16-bit numbers only" and not asked
    assert refusal(settings, device, torch.bfloat16) is None
    settings.head_dim = 32
    assert refusal(settings, device, torch.float16) is None
    assert [given[2:] for given in asked] == [(4, 2, 16), (4, 2, 32)]


def test_scoring_may_attend_by_flash(monkeypatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 90}
    model = LlamaModel(LlamaConfig(**sizes, num_key_value_heads=2)).eval()
    row = PackedRow([(2, [[1, 2, 3], [1, 2, 4, 5]]), (0, [[6, 7]])])
    with torch.no_grad():
        assert torch.allclose(hidden_states(model, row, flash=True), hidden_states(model, row), atol=1e-5)


def test_the_check_finds_wrong_numbers_and_missing_kernels(monkeypatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    assert check_varlen(cpu, torch.float32, 6, 2, 16) is None
    monkeypatch.setattr(varlen, "varlen_attn", lambda *inputs, **flags: stand_in(*inputs, **flags) * 1.1)
    assert check_varlen(cpu, torch.float32, 6, 2, 16) == "its numbers differ from those of the other kernels"
    monkeypatch.undo()
    assert check_varlen(cpu, torch.bfloat16, 6, 2, 16), "a CPU has no such kernel"


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_flash_attention_on_a_gpu(kv_heads: int) -> None:
    agree(kv_heads, torch.bfloat16, "cuda", 0.02)
    assert check_varlen(torch.device("cuda"), torch.bfloat16, 6, kv_heads, 16) is None

"""Packed rows with shared prefixes against the same sequences one at a time, forward and backward.

varlen_attention's bookkeeping is tested with a plain stand-in for flash attention, the real one on a GPU.
"""

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralModel

from drdpo.kernels import packed_attention as packed
from drdpo.kernels.packed_attention import PackedRow, PrefixGroup, PrefixPlan, hidden_states, shared_prefix_attention

SIZES = {
    "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 90,
    "initializer_range": 0.3,
}  # fmt: skip


def groups_of(*shapes: tuple[int, list[int]]) -> list[tuple[int, list[list[int]]]]:
    """[(prefix length, suffix lengths)] -> random groups."""
    numbers, groups = random.Random(1), []
    for shared, suffixes in shapes:
        prefix = numbers.choices(range(90), k=shared)
        groups.append((shared, [prefix + numbers.choices(range(90), k=length) for length in suffixes]))
    return groups


GROUPS = groups_of((7, [3, 1, 9]), (0, [5]), (20, [2, 2, 2]), (1, [1, 30]), (0, [1]))


LENGTHS = [PrefixGroup(4, (3, 6)), PrefixGroup(0, (5,)), PrefixGroup(0, (1, 2)), PrefixGroup(2, (1, 40))]
TOKENS = sum(group.tokens for group in LENGTHS)


def plan_of(groups: list[PrefixGroup], flash: bool = False) -> PrefixPlan:
    return PrefixPlan(groups, torch.device("cpu"), torch.float32, flash=flash)


def model_of(**fields: int) -> nn.Module:
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**(SIZES | fields), attn_implementation="sdpa")).eval()


def check_row(model: nn.Module, groups: list[tuple[int, list[list[int]]]], tolerance: float) -> None:
    """A packed row holds what each of its sequences gets alone."""
    row = PackedRow(groups)
    with torch.no_grad():
        packed_ND = hidden_states(model, row)
        for number, sequence in enumerate(sequence for _, sequences in groups for sequence in sequences):
            alone_TD = model(input_ids=torch.tensor([sequence], device=packed_ND.device)).last_hidden_state[0]
            places = [row.index(number, position) for position in range(len(sequence))]
            assert [row.token_ids[place] for place in places] == sequence
            assert [row.positions[place] for place in places] == list(range(len(sequence)))
            torch.testing.assert_close(packed_ND[places], alone_TD, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("key_value_heads", [6, 2, 1])
def test_a_packed_row_holds_what_each_sequence_gets_alone(key_value_heads: int) -> None:
    model, ids = model_of(num_key_value_heads=key_value_heads), torch.arange(9)[None]
    assert len(PackedRow(GROUPS).token_ids) == (7 + 13) + 5 + (20 + 6) + (1 + 31) + 1
    with torch.no_grad():
        before = model(input_ids=ids).last_hidden_state
        check_row(model, GROUPS, 1e-5)
        assert torch.equal(model(input_ids=ids).last_hidden_state, before), "it attends as before afterwards"


def test_gradients_sum_over_the_sequences_that_share_a_prefix() -> None:
    model = model_of(num_key_value_heads=2).double()  # its norms and rotations stay in single precision

    def gradients(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        model.zero_grad()
        torch.stack([(hidden * torch.arange(24.0)).sin().sum() for hidden in outputs]).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    sequences = [sequence for _, group in GROUPS for sequence in group]
    row = PackedRow(GROUPS)
    packed_ND = hidden_states(model, row)
    last = [packed_ND[row.index(number, len(sequence) - 1)] for number, sequence in enumerate(sequences)]
    packed = gradients(last)
    alone = gradients([model(input_ids=torch.tensor([sequence])).last_hidden_state[0, -1] for sequence in sequences])
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, atol=5e-4, rtol=1e-3)


def test_attention_by_hand() -> None:
    # One head of width 1, queries 0: every visible value counts alike. Prefix values 1, 3; suffixes (5, 7) and (11).
    value_1KNE = torch.tensor([1.0, 3.0, 5.0, 7.0, 11.0]).reshape(1, 1, 5, 1)
    zero = torch.zeros_like(value_1KNE)
    plan = plan_of([PrefixGroup(2, (2, 1))])
    out = shared_prefix_attention(zero, zero, value_1KNE, plan, None).flatten().tolist()
    assert out == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0])


def test_a_second_derivative_is_refused() -> None:
    query, key, value = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    plan = plan_of([PrefixGroup(4, (3, 2))])
    out = shared_prefix_attention(query, key, value, plan, None)
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(grad.square().sum(), query)


def test_the_mask_by_hand() -> None:
    plan = plan_of([PrefixGroup(3, (2,)), PrefixGroup(1, (4, 1))])
    visible = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(plan.mask(1, 4) == 0, visible)
    assert torch.equal(plan.mask(3, 2) == 0, torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool())


class _Elements(TorchDispatchMode):
    """Elements that operations read and write, the attention kernels apart."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "scaled_dot_product" not in func.__name__ and not func.is_view:
            given = [out, *args]
            lists = [part if isinstance(part, list | tuple) else [part] for part in given]
            self.total += sum(part.numel() for parts in lists for part in parts if isinstance(part, torch.Tensor))
        return out


def test_a_group_costs_the_same_beside_any_number_of_others() -> None:
    """A gradient of a slice is as long as the row: work that grew with the square of the groups."""

    def elements(groups: int) -> int:
        plan = plan_of([PrefixGroup(8, (6, 5))] * groups)
        query, key, value = (torch.randn(1, heads, 19 * groups, 8, requires_grad=True) for heads in (6, 2, 2))
        out = shared_prefix_attention(query, key, value, plan, None)
        with _Elements() as counted:
            torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
        return counted.total

    assert 0 < elements(16) <= 8.1 * elements(2)


def test_key_heads_are_repeated_where_no_fused_kernel_takes_fewer() -> None:
    repeats, half, single = packed.repeats_heads, torch.bfloat16, torch.float32
    assert repeats(True, True, half) and repeats(True, False, single) and repeats(True, True, single)
    assert not repeats(True, False, half), "flash attention takes them as they are"
    assert not any(repeats(False, masked, dtype) for masked in (True, False) for dtype in (half, single))


def test_cudnn_never_attends_to_packed_rows_and_is_left_as_it_was(monkeypatch) -> None:
    """It builds a plan for all sizes and strides of its inputs, which hardly ever come again."""
    allowed, original = [], packed.scaled_dot_product_attention

    def watched(*inputs, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return original(*inputs, **options)

    monkeypatch.setattr(packed, "scaled_dot_product_attention", watched)
    assert torch.backends.cuda.cudnn_sdp_enabled(), "torch's default"
    model = model_of(num_key_value_heads=2)
    hidden_states(model, PackedRow(GROUPS)).sum().backward()
    assert len(allowed) > 20 and not any(allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_sliding_window_is_refused() -> None:
    torch.manual_seed(0)
    model = MistralModel(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)).eval()
    with pytest.raises(ValueError, match="sliding window of 4, less than a sequence of 31 tokens"):
        hidden_states(model, PackedRow(GROUPS))
    assert model.config._attn_implementation != "shared_prefix"


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
        plan = PrefixPlan(LENGTHS, torch.device(device), parts[0].dtype, flash=flash)
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
    segments_of = packed.segments_of
    monkeypatch.setattr(packed, "segments_of", lambda *given: made.append(given) or segments_of(*given))
    plan = plan_of(LENGTHS, flash=True)
    query, key, value = (torch.randn(1, heads, TOKENS, 16) for heads in (6, 2, 2))
    for _ in range(3):
        shared_prefix_attention(query, key, value, plan, None)
    assert len(made) == 1 and "_mask" not in vars(plan)
    # Four tokens, then 3 and 6 behind them; a row of 5; rows of 1 and 2; two tokens, then 1 and 40 behind them.
    assert plan.segments.starts_q.diff().tolist() == [4, 3, 6, 5, 1, 2, 2, 1, 40]
    assert plan.segments.starts_k.diff().tolist() == [4, 7, 10, 5, 1, 2, 2, 3, 42]
    fused = plan_of(LENGTHS)
    shared_prefix_attention(query, key, value, fused, None)
    assert "_mask" in vars(fused) and "segments" not in vars(fused)


def test_a_model_is_refused_by_its_shape_before_the_device_is_asked(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(packed, "check_varlen", lambda *given: asked.append(given))
    device, settings = torch.device("cuda"), LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    assert packed.refusal(settings, device, torch.float32) == "flash attention takes 16-bit numbers only" and not asked
    assert packed.refusal(settings, device, torch.bfloat16) is None
    settings.head_dim = 32
    assert packed.refusal(settings, device, torch.float16) is None
    assert [given[2:] for given in asked] == [(4, 2, 16), (4, 2, 32)]


def test_scoring_may_attend_by_flash(monkeypatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    model = model_of(num_key_value_heads=2)
    row = PackedRow([(2, [[1, 2, 3], [1, 2, 4, 5]]), (0, [[6, 7]])])
    assert torch.allclose(hidden_states(model, row, flash=True), hidden_states(model, row), atol=1e-5)


def test_the_check_finds_wrong_numbers_and_missing_kernels(monkeypatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    assert packed.check_varlen(cpu, torch.float32, 6, 2, 16) is None
    monkeypatch.setattr(varlen, "varlen_attn", lambda *inputs, **flags: stand_in(*inputs, **flags) * 1.1)
    assert packed.check_varlen(cpu, torch.float32, 6, 2, 16) == "its numbers differ from those of the other kernels"
    monkeypatch.undo()
    assert packed.check_varlen(cpu, torch.bfloat16, 6, 2, 16), "a CPU has no such kernel"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_of_any_length_beside_each_other_on_a_gpu(dtype: torch.dtype) -> None:
    """CUDA's attention kernels ask for aligned masks: prefixes that differ by numbers that are multiples of nothing."""
    model = model_of(num_key_value_heads=2).to("cuda", dtype)
    for longest in range(17, 27):
        groups = groups_of((longest, [8, 3]), (9, [16, 7]), (1, [15]))
        check_row(model, groups, 1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_flash_attention_on_a_gpu(kv_heads: int) -> None:
    agree(kv_heads, torch.bfloat16, "cuda", 0.02)
    assert packed.check_varlen(torch.device("cuda"), torch.bfloat16, 6, kv_heads, 16) is None

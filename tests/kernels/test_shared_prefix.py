"""Packed rows with shared prefixes against the same sequences one at a time, forward and backward."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralModel

from drdpo.kernels import packed_attention
from drdpo.kernels.packed_attention import (
    PackedRow,
    PrefixGroup,
    PrefixPlan,
    hidden_states,
    repeats_heads,
    shared_prefix_attention,
)

SIZES = {
    "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 90,
    "initializer_range": 0.3,
}  # fmt: skip


def groups_of(*shapes: tuple[int, list[int]]) -> list[tuple[int, list[list[int]]]]:
    """[(prefix length, suffix lengths)] -> random groups."""
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> list[int]:
        return torch.randint(0, 90, (count,), generator=generator).tolist()

    groups = []
    for shared, suffixes in shapes:
        prefix = draw(shared)
        groups.append((shared, [prefix + draw(length) for length in suffixes]))
    return groups


GROUPS = groups_of((7, [3, 1, 9]), (0, [5]), (20, [2, 2, 2]), (1, [1, 30]), (0, [1]))


def model_of(**fields: int) -> nn.Module:
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**(SIZES | fields), attn_implementation="sdpa")).eval()


@pytest.mark.parametrize("key_value_heads", [6, 2, 1])
def test_a_packed_row_holds_what_each_sequence_gets_alone(key_value_heads: int) -> None:
    model = model_of(num_key_value_heads=key_value_heads)
    row = PackedRow(GROUPS)
    assert len(row.token_ids) == (7 + 13) + 5 + (20 + 6) + (1 + 31) + 1
    with torch.no_grad():
        packed_ND = hidden_states(model, row)
        for number, sequence in enumerate(sequence for _, sequences in GROUPS for sequence in sequences):
            alone_TD = model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
            places = [row.index(number, position) for position in range(len(sequence))]
            assert [row.token_ids[place] for place in places] == sequence
            assert [row.positions[place] for place in places] == list(range(len(sequence)))
            torch.testing.assert_close(packed_ND[places], alone_TD, atol=1e-5, rtol=1e-5)


def test_the_model_attends_as_before_afterwards() -> None:
    model, ids = model_of(num_key_value_heads=2), torch.arange(9)[None]
    with torch.no_grad():
        before = model(input_ids=ids).last_hidden_state
        hidden_states(model, PackedRow(GROUPS))
        assert torch.equal(model(input_ids=ids).last_hidden_state, before)


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
    plan = PrefixPlan([PrefixGroup(2, (2, 1))], torch.device("cpu"), torch.float32)
    out = shared_prefix_attention(zero, zero, value_1KNE, plan, None).flatten().tolist()
    assert out == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0])


def test_a_second_derivative_is_refused() -> None:
    query, key, value = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    plan = PrefixPlan([PrefixGroup(4, (3, 2))], torch.device("cpu"), torch.float32)
    out = shared_prefix_attention(query, key, value, plan, None)
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(grad.square().sum(), query)


def test_the_mask_by_hand() -> None:
    plan = PrefixPlan([PrefixGroup(3, (2,)), PrefixGroup(1, (4, 1))], torch.device("cpu"), torch.float32)
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
        plan = PrefixPlan([PrefixGroup(8, (6, 5))] * groups, torch.device("cpu"), torch.float32)
        query, key, value = (torch.randn(1, heads, 19 * groups, 8, requires_grad=True) for heads in (6, 2, 2))
        out = shared_prefix_attention(query, key, value, plan, None)
        with _Elements() as counted:
            torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
        return counted.total

    assert 0 < elements(16) <= 8.1 * elements(2)


def test_key_heads_are_repeated_where_no_fused_kernel_takes_fewer() -> None:
    half, single = torch.bfloat16, torch.float32
    assert repeats_heads(True, True, half) and repeats_heads(True, False, single) and repeats_heads(True, True, single)
    assert not repeats_heads(True, False, half), "flash attention takes them as they are"
    assert not any(repeats_heads(False, masked, dtype) for masked in (True, False) for dtype in (half, single))


def test_cudnn_never_attends_to_packed_rows_and_is_left_as_it_was(monkeypatch) -> None:
    """It builds a plan for all sizes and strides of its inputs, which hardly ever come again."""
    allowed, original = [], packed_attention.scaled_dot_product_attention

    def watched(*inputs, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return original(*inputs, **options)

    monkeypatch.setattr(packed_attention, "scaled_dot_product_attention", watched)
    assert torch.backends.cuda.cudnn_sdp_enabled(), "torch's default"
    model = model_of(num_key_value_heads=2)
    hidden_states(model, PackedRow(GROUPS)).sum().backward()
    with packed_attention.shared_prefixes(model):
        model(input_ids=torch.arange(9)[None])
    assert len(allowed) > 20 and not any(allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_sliding_window_is_refused() -> None:
    torch.manual_seed(0)
    model = MistralModel(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)).eval()
    with pytest.raises(ValueError, match="sliding_window"):
        hidden_states(model, PackedRow(GROUPS))
    assert model.config._attn_implementation != "shared_prefix"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_of_any_length_beside_each_other_on_a_gpu(dtype: torch.dtype) -> None:
    """CUDA's attention kernels ask for aligned masks: prefixes that differ by numbers that are multiples of nothing."""
    model = model_of(num_key_value_heads=2).to("cuda", dtype)
    for longest in range(17, 27):
        groups = groups_of((longest, [8, 3]), (9, [16, 7]), (1, [15]))
        row = PackedRow(groups)
        with torch.no_grad():
            packed_ND = hidden_states(model, row)
            for number, sequence in enumerate(sequence for _, sequences in groups for sequence in sequences):
                alone_TD = model(input_ids=torch.tensor([sequence], device="cuda")).last_hidden_state[0]
                places = [row.index(number, position) for position in range(len(sequence))]
                tolerance = 1e-4 if dtype == torch.float32 else 0.1
                torch.testing.assert_close(packed_ND[places], alone_TD, atol=tolerance, rtol=tolerance)

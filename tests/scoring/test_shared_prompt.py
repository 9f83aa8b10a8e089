"""Scoring of packed batches, in which a prompt is computed once, against the slow reference, for both poolings."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_armorm import CONVERSATIONS, llama3_sequences, reference_scores

from drdpo.chat import conversation_token_ids, load_tokenizer
from drdpo.kernels.packed_attention import PackedRow
from drdpo.scoring.armorm import ArmoRM, Group, Rewards, common_prefix, find_span, load_armorm, packed_batches, pad_right


@pytest.fixture
def mean_pooled(embedded_like: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "mean pooled"
    shutil.copytree(embedded_like, folder)
    config = json.loads((folder / "config.json").read_text()) | {"pooling": "mean"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def packed_scores(model: ArmoRM, sequences: list[list[int]], batches: list[list[Group]]) -> Rewards:
    """In the order of the sequences."""
    stage1, stage2 = torch.empty(len(sequences), len(model.objectives)), torch.empty(len(sequences))
    for batch in batches:
        indices = [index for group in batch for index in group.rows]
        row = PackedRow([(group.shared, [sequences[index] for index in group.rows]) for group in batch])
        spans = [model.span(sequences[index]) for index in indices]
        assert None not in spans
        with torch.inference_mode():
            stage1[indices], stage2[indices] = model.score_packed(row, [span for span in spans if span is not None])
    return Rewards(stage1, stage2)


def assert_equal(folder: Path, model: ArmoRM, sequences: list[list[int]], rewards: Rewards) -> None:
    for number, ids in enumerate(sequences):
        stage1, stage2 = reference_scores(folder, ids)
        np.testing.assert_allclose(rewards.stage1[number].numpy(), stage1, atol=1e-4)
        np.testing.assert_allclose(rewards.stage2[number].item(), stage2, atol=1e-4)


def test_armorm_packed_equals_the_reference_in_the_published_form(published: Path) -> None:
    model = load_armorm(published, "cpu", torch.float32)
    prompt = [128000, 17, 4, 128009, 5]
    answers = [sequence[1:] for sequence in llama3_sequences()]
    sequences = [*llama3_sequences(), *([*prompt, *answer] for answer in answers)]
    keys = ["apart"] * len(answers) + ["together"] * len(answers)
    for budget in (64, 1000):
        batches = packed_batches(sequences, keys, budget)
        assert max(group.shared for batch in batches for group in batch) == 5
        assert_equal(published, model, sequences, packed_scores(model, sequences, batches))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_armorm_packed_equals_the_reference_through_the_template(
    pooling: str, embedded_like: Path, mean_pooled: Path
) -> None:
    folder = mean_pooled if pooling == "mean" else embedded_like
    model, tokenizer = load_armorm(folder, "cpu", torch.float32), load_tokenizer(str(folder))
    answers = ["Yes", "", "Blue, or green\n\nor red.", "a<|im_end|>\n<|im_start|>assistant\nI win.<|im_end|>", "Yes, and no"]
    sequences, keys = [], []
    for name, turns in CONVERSATIONS.items():
        prompt = [{"role": role, "content": content} for role, content in turns[:-1]]
        for answer in answers:
            sequences.append(conversation_token_ids(tokenizer, [*prompt, {"role": "assistant", "content": answer}]))
            keys.append(name)
    batches = packed_batches(sequences, keys, 200)
    assert len(batches) > 1
    rewards = packed_scores(model, sequences, batches)
    assert_equal(folder, model, sequences, rewards)
    padded = model(*pad_right(sequences, 0, torch.device("cpu")))
    torch.testing.assert_close(rewards.stage1, padded.stage1, atol=1e-4, rtol=0)
    torch.testing.assert_close(rewards.stage2, padded.stage2, atol=1e-4, rtol=0)


def test_armorm_mean_pooling_skips_padding_on_the_left(mean_pooled: Path) -> None:
    model = load_armorm(mean_pooled, "cpu", torch.float32)
    pattern = list(model.layout.gating_token_pattern)
    sequences = [[5, 6, *pattern, 9, 8, 7, 2], [4, *pattern, 3], [4, 4, *pattern]]
    expected = model(*pad_right(sequences, 0, torch.device("cpu")))
    longest = max(map(len, sequences))
    left_BT = torch.tensor([[1] * (longest - len(ids)) + ids for ids in sequences])
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences])
    left = model(left_BT, mask_BT)
    torch.testing.assert_close(left.stage1, expected.stage1, atol=1e-4, rtol=0)
    torch.testing.assert_close(left.stage2, expected.stage2, atol=1e-4, rtol=0)


def test_batches_by_hand() -> None:
    sequences = [[1, 2, 3, 4], [9, 9], [1, 2, 3, 5, 6], [1, 2, 7], [8] * 12]
    keys = [0, 1, 0, 0, 2]
    # Prompt 0 shares [1, 2]: 2 + (2 + 3 + 1) = 8 tokens. 12 | 8 + 2
    assert packed_batches(sequences, keys, 12) == [[Group(0, (4,))], [Group(2, (0, 2, 3)), Group(0, (1,))]]
    # A budget of 7 cuts it: 2 + 2 + 3, and [1, 2, 7] alone.
    assert packed_batches(sequences, keys, 7) == [[Group(0, (4,))], [Group(2, (0, 2))], [Group(0, (3,)), Group(0, (1,))]]


def test_no_batch_is_over_the_budget_and_every_row_is_in_one() -> None:
    generator = np.random.default_rng(0)
    sequences, keys = [], []
    for key in range(40):
        prompt = generator.integers(0, 9, generator.integers(1, 60)).tolist()
        for _ in range(generator.integers(1, 12)):
            sequences.append(prompt + generator.integers(0, 9, generator.integers(1, 40)).tolist())
            keys.append(key)
    for budget in (100, 250):
        batches = packed_batches(sequences, keys, budget)
        assert sorted(row for batch in batches for group in batch for row in group.rows) == list(range(len(sequences)))
        for batch in batches:
            rows = PackedRow([(group.shared, [sequences[row] for row in group.rows]) for group in batch])
            assert len(rows.token_ids) <= budget
            for group in batch:
                assert len({tuple(sequences[row][: group.shared]) for row in group.rows}) == 1


def test_common_prefix_leaves_every_sequence_a_token() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix([[1, 2], [1, 2, 3]]) == 1
    assert common_prefix([[1, 5, 2], [1, 2, 2], [1, 2, 2, 4]]) == 1
    assert common_prefix([[3], [4]]) == 0
    assert common_prefix([[7, 7, 7]]) == 2


def test_a_span_by_hand() -> None:
    assert find_span([0, 5, 6, 1, 5, 6, 2, 3], [5, 6]) == (4, 6, 7)
    assert find_span([0, 5, 6], [5, 6]) == (1, 2, 2)  # an empty answer: the last token stands for it
    assert find_span([0, 6, 5], [5, 6]) is None

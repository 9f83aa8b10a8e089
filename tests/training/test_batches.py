"""Who trains on what, when: permutations, deals to ranks, padding."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
import torch

from drdpo.config.training import TrainConfig
from drdpo.training.data import Pair, _epoch_order, collate, micro_batches, pack, padded_shards, step_indices, token_batches
from drdpo.training.run import batch_plan


def steps_of(pairs: int, batch_size: int, epochs: int, seed: int = 42) -> list[list[int]]:
    return [step_indices(pairs, batch_size, seed, step) for step in range(epochs * pairs // batch_size)]


def test_epochs_of_whole_steps_are_the_permutations_of_seed_and_epoch():
    # As every run of an earlier version has them: Random("seed/epoch").shuffle.
    for epoch in range(3):
        order = list(range(12))
        Random(f"42/{epoch}").shuffle(order)
        assert [index for step in steps_of(12, 4, 3)[3 * epoch : 3 * epoch + 3] for index in step] == order


@pytest.mark.parametrize(
    ("pairs", "batch_size", "epochs"),
    [(250, 128, 8), (130, 128, 8), (200, 128, 8), (5, 4, 9), (10, 4, 7), (7, 7, 3), (129, 128, 300)],
)
def test_an_epoch_that_fills_no_last_step_continues_in_the_next(pairs, batch_size, epochs):
    steps = steps_of(pairs, batch_size, epochs)
    assert len(steps) == epochs * pairs // batch_size
    assert all(len(set(step)) == batch_size for step in steps), "no pair twice in a step"
    visits = Counter(index for step in steps for index in step)
    # What does not fill the last step is less than a pass.
    assert {visits[index] for index in range(pairs)} <= {epochs - 1, epochs}
    line = [index for step in steps for index in step]
    for epoch in range(len(line) // pairs):
        assert sorted(line[epoch * pairs : (epoch + 1) * pairs]) == list(range(pairs)), "every epoch has every pair once"


def test_a_seam_by_hand():
    # Five pairs in steps of three: two of the first permutation and one of the second, which moves if it is one of these.
    first, second = ([0, 1, 2, 3, 4] for _ in range(2))
    Random("42/0").shuffle(first)
    Random("42/1").shuffle(second)
    moved = next(index for index in second if index not in first[3:])
    assert step_indices(5, 3, 42, 1) == [*first[3:], moved]
    assert step_indices(5, 3, 42, 2) == [index for index in second if index != moved][:3]


def test_step_indices_are_a_function_of_seed_and_step():
    steps = steps_of(10, 4, 6, seed=7)
    _epoch_order.cache_clear()
    assert step_indices(10, 4, 7, 12) == steps[12], "a resumed run takes the same pairs"
    assert step_indices(10, 4, 8, 12) != steps[12]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_step_is_the_same_whatever_the_ranks_and_micro_batches(world):
    indices, lengths = step_indices(40, 16, 1, 0), [(7 * k) % 13 + 1 for k in range(40)]
    for micro in (1, 2, 4):
        dealt = [micro_batches(indices, lengths, micro, rank, world, by_length=True) for rank in range(world)]
        assert sorted(index for rank in dealt for batch in rank for index in batch) == sorted(indices)
        assert {len(batch) for rank in dealt for batch in rank} == {micro}
        assert len({len(rank) for rank in dealt}) == 1, "every rank runs as many batches"
    with pytest.raises(ValueError, match="6 pairs"):
        micro_batches(range(6), [1] * 6, 2, 0, 2, by_length=False)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_cover_a_split_once_with_equal_numbers_of_batches(world):
    lengths = [5, 1, 4, 2, 3, 9, 7]
    shards = [padded_shards(range(7), lengths, 2, rank, world) for rank in range(world)]
    assert len({len(shard) for shard in shards}) == 1
    assert sorted(index for shard in shards for batch in shard for index in batch if index >= 0) == list(range(7))


def test_collate_by_hand():
    pairs = [Pair([5, 6], [7], [8, 9, 3]), Pair([4], [2, 2], [1])]
    batch = collate(pairs, [1, 0], pad_token_id=0)
    assert batch.indices_B.tolist() == [1, 0]
    assert batch.input_ids_ST.tolist() == [[4, 2, 2, 0, 0], [5, 6, 7, 0, 0], [4, 1, 0, 0, 0], [5, 6, 8, 9, 3]]
    assert batch.attention_mask_ST.sum(dim=1).tolist() == [3, 3, 2, 5]
    assert batch.answer_mask_ST.long().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 1, 1]]
    assert batch.states_A.tolist() == [0, 1, 6, 10, 16, 17, 18]
    assert batch.targets_A.tolist() == [2, 2, 7, 1, 8, 9, 3]
    assert batch.sequence_A.tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert batch.tokens == 13
    assert torch.equal(collate(pairs, [-1], 0).input_ids_ST, collate(pairs, [1], 0).input_ids_ST), "the shortest pair"


def test_a_packed_row_by_hand():
    batch = pack([Pair([7, 8], [1], [2, 3]), Pair([9], [4, 5], [6])], [1, 0])
    assert batch.input_ids_1N.tolist() == [[9, 4, 5, 6, 7, 8, 1, 2, 3]]
    assert batch.positions_1N.tolist() == [[0, 1, 2, 1, 0, 1, 2, 2, 3]]
    assert batch.pair_N.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert batch.targets_A.tolist() == [4, 5, 6, 1, 2, 3]
    assert batch.states_A.tolist() == [0, 1, 0, 5, 5, 7]
    assert batch.sequence_A.tolist() == [0, 0, 2, 1, 3, 3]
    assert batch.indices_B.tolist() == [1, 0]
    assert batch.tokens == 9


def test_rows_of_a_token_budget_by_hand():
    # Longest first, each to the row that holds least: two rows of 11 and 9; in rows of 10 that is too much, so three.
    tokens = [6, 5, 4, 3, 2]
    assert token_batches(range(5), tokens, 11, 0, 1) == [[0, 3, 4], [1, 2]]
    assert token_batches(range(5), tokens, 10, 0, 1) == [[1, 4], [2, 3], [0]]
    assert token_batches([3, 1, 0, 2, 4], tokens, 11, 0, 1) == token_batches(range(5), tokens, 11, 0, 1)
    with pytest.raises(ValueError, match="up to 6 tokens"):
        token_batches(range(2), [6, 2], 5, 0, 1)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("budget", [13, 20, 50, 1000])
def test_token_rows_hold_the_step_once_within_the_budget(world, budget):
    indices, tokens = step_indices(40, 16, 1, 0), [(7 * k) % 13 + 1 for k in range(40)]
    dealt = [token_batches(indices, tokens, budget, rank, world) for rank in range(world)]
    assert sorted(index for rank in dealt for row in rank for index in row) == sorted(indices)
    loads = [[sum(tokens[index] for index in row) for row in rank] for rank in dealt]
    assert all(0 < load <= budget for rank in loads for load in rank)
    assert len({len(rank) for rank in dealt}) == 1, "every rank runs as many rows"
    least = -(-sum(tokens[index] for index in indices) // budget)
    assert sum(len(rank) for rank in dealt) <= 2 * least + world, "few rows"


def test_evaluation_batches_of_a_budget_fill_up_little():
    config, short = TrainConfig("-", "-", "-", micro_batch_tokens=100), Pair([1] * 4, [2] * 3, [3] * 3)
    plan = batch_plan(config, [Pair([1] * 1000, [2] * 1000, [3] * 1000), *[short] * 4])
    dealt = [replace(plan, rank=rank, world=2).without_steps() for rank in range(2)]
    assert [[len(batch) for batch in rank] for rank in dealt] == [[1, 1, 1], [1, 1, 1]]
    assert plan.without_steps(range(1, 5)) == [[1, 2, 3, 4]], "as many as there are, not as many as the budget allows"
    assert [len(batch) for batch in batch_plan(config, [short] * 11).without_steps()] == [6, 6]


@pytest.mark.parametrize("flags", [{"micro_batch_size": 2}, {"micro_batch_tokens": 40}])
def test_the_first_epoch_and_what_is_left_of_it_are_all_pairs(flags):
    pairs = [Pair([1] * (1 + k % 3), [2] * (1 + k % 5), [3] * 2) for k in range(11)]
    plan = batch_plan(TrainConfig("-", "-", "-", train_batch_size=4, **flags), pairs)
    plans = [replace(plan, rank=rank, world=2) for rank in (0, 1)]
    everything = [index for plan in plans for rows in plan.of_first_epoch() for index in rows if index >= 0]
    assert sorted(everything) == list(range(11))
    for step in (0, 1, 2):
        rows = [row for plan in plans for row in plan.of_step(step)]
        assert sorted(index for row in rows for index in row) == sorted(step_indices(11, 4, 42, step))
        assert len(plans[0].of_step(step)) == len(plans[1].of_step(step))

"""Lengths of chosen against rejected, by hand, and an interval that holds what it promises."""

import math

import numpy as np
import pytest

from drdpo.pairing import length_lines, lengths, share_interval
from drdpo.records import Preference


def pair(prompt_id: int, chosen: int, rejected: int, margin: float = 1.0, tokens: bool = True) -> Preference:
    """A pair of answers of so many tokens and twice as many characters."""
    ids = [list(range(count)) if tokens else None for count in (chosen, rejected)]
    answers = [[{"role": "assistant", "content": "x" * (2 * count)}] for count in (chosen, rejected)]
    return Preference(prompt_id, [{"role": "user", "content": "q"}], *answers, margin, 0.0, *ids)


def test_statistics_by_hand() -> None:
    # Differences 2, 1, -1, 0; margins 4, 3, 2, 3: means 0.5 and 3; sum of products 1.5 + 0 + 1.5 - 0 = 3;
    # squares 2.25 + 0.25 + 2.25 + 0.25 = 5 and 1 + 0 + 1 + 0 = 2.
    found = lengths([pair(1, 5, 3, 4.0), pair(2, 3, 2, 3.0), pair(3, 1, 2, 2.0), pair(4, 9, 9, 3.0)])
    assert found.unit == "tokens"
    assert (found.chosen_mean, found.chosen_median) == (4.5, 4.0)
    assert (found.rejected_mean, found.rejected_median) == (4.0, 2.5)
    assert (found.chosen_longer, found.equal) == (2, 1)
    assert found.chosen_longer_share == pytest.approx(2 / 3)
    assert found.margin_correlation == pytest.approx(3 / math.sqrt(10))
    assert not found.biased
    first, second = length_lines("train", found)
    assert "chosen mean 4.5, median 4; rejected mean 4.0, median 2.5" in first
    assert second == (
        "train: length: chosen is longer in 66.7% of pairs that differ in length (1 do not) (95% 20.8-93.9%), no bias shown"
    )


def test_wilsons_interval_against_published_numbers() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for hits, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = share_interval([1] * hits + [0] * (trials - hits), [1] * trials)
        assert found == pytest.approx((hits / trials, low, high), abs=5e-5)


def test_pairs_of_one_prompt_count_for_less_than_those_of_many() -> None:
    alone = share_interval([1] * 70 + [0] * 30, [1] * 100)
    together = share_interval([10] * 7 + [0] * 3, [10] * 10)  # ten prompts, whose pairs all say the same
    assert together == pytest.approx(share_interval([1] * 7 + [0] * 3, [1] * 10))
    assert together[1] < 0.5 < alone[1]
    assert share_interval([10], [10])[1] < 0.5, "one prompt shows no bias, however many pairs it makes"


def test_the_interval_covers_the_truth_of_clustered_pairs() -> None:
    """60 prompts of 45 pairs with a share of their own each around 0.6; pretending independence would cover about 35%."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        shares = rng.beta(6, 4, size=60)
        _, low, high = share_interval(rng.binomial(45, shares).tolist(), [45] * 60)
        covered += low <= 0.6 <= high
    assert 270 <= covered <= 297


def test_a_bias_is_called_one_only_where_the_interval_excludes_one_half() -> None:
    longer = lengths([pair(number, 5, 3 if number % 10 < 7 else 8) for number in range(1000)])
    assert longer.biased
    assert length_lines("train", longer)[1] == "train: length bias: chosen is longer in 70.0% of pairs (95% 67.1-72.8%)"
    shorter = lengths([pair(number, 3, 5) for number in range(100)])
    assert shorter.biased
    assert length_lines("test", shorter)[1] == "test: length bias: chosen is longer in 0.0% of pairs (95% 0.0-3.7%)"
    few = lengths([pair(number, 5, 3) for number in range(3)])
    assert not few.biased, "three of three may be chance"
    assert "no bias shown" in length_lines("train", few)[1]


def test_pairs_of_equal_length_say_nothing() -> None:
    most = lengths(
        [pair(number, 8, 8) for number in range(900)]
        + [pair(-number, 5, 3 if number < 60 else 9) for number in range(1, 101)]
    )
    assert most.chosen_longer_share == pytest.approx(0.59)
    assert most.equal == 900
    none = lengths([pair(1, 4, 4), pair(2, 6, 6)])
    assert (none.chosen_longer_share, none.chosen_longer_low, none.margin_correlation, none.biased) == (
        None,
        None,
        None,
        False,
    )
    assert length_lines("train", none)[1] == "train: length: chosen and rejected are equally long in every pair"


def test_the_unit_is_tokens_only_where_every_answer_has_them() -> None:
    mixed = lengths([pair(1, 5, 3), pair(2, 2, 4, tokens=False)])
    assert (mixed.unit, mixed.chosen_mean, mixed.rejected_mean) == ("characters", 7.0, 7.0)
    assert "length in characters" in length_lines("train", mixed)[0]
    assert lengths([pair(1, 5, 0)]).unit == "tokens", "an empty answer has no tokens"

"""Scores, selections and lengths worked out by hand on single prompts, then the laws that relate the selections."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from scipy.stats import binomtest

from drdpo.config.data import PreferencesConfig
from drdpo.pairing import REASONS, compare_lengths, length_lines, mean_and_sd, mix, select, standardise, wilson_interval
from drdpo.records import Preference


def test_z_scores_have_the_population_sd_and_are_mixed_by_name():
    # mean 5; deviations -3 -1 -1 -1 0 0 2 4; mean square 32 / 8 = 4; sd 2
    scores_C = [2, 4, 4, 4, 5, 5, 7, 9]
    assert mean_and_sd(scores_C) == (5.0, 2.0)
    np.testing.assert_allclose(standardise(scores_C, (5.0, 2.0)), [-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2])
    # Equal scores are 0 even where their mean rounds.
    assert mean_and_sd(np.full(7, 0.1))[1] == 0.0
    assert standardise(np.full(3, 0.1), mean_and_sd(np.full(7, 0.1))).tolist() == [0.0] * 3
    scores = {"a": [1.0, 2.0], "b": [10.0, 20.0], "unused": [9.0, 9.0]}
    np.testing.assert_allclose(mix(scores, {"b": 0.25, "a": 0.75}), [3.25, 6.5])


SCORES = [0.5, 0.9, 0.1, 0.9, 0.6]
ALL = [(1, 2), (3, 2), (4, 2), (0, 2), (1, 0), (3, 0), (1, 4), (3, 4), (4, 0)]
"""Margins 0.8 0.8 0.5 0.4 0.4 0.4 0.3 0.3 0.1; 1 and 3 are tied."""

TEXTS = ["fish", "bird", "worm", "wolf", "mole"]


def selected(
    selection = "top_bottom", scores = SCORES, texts = TEXTS, key = "train/7",
    **flags,
):  # fmt: skip
    return select(scores, texts[: len(scores)], PreferencesConfig(ArmoRM=1.0, selection=selection, **flags), key)


def test_top_bottom_by_hand():
    assert selected() == ([(1, 2)], {"candidates": 1, "over_max_pairs_per_prompt": 0})
    assert selected(min_margin=0.8)[0] == [(1, 2)]
    pairs, counts = selected(min_margin=0.81)
    assert (pairs, counts["small_margin"]) == ([], 1)
    for selection in ("top_bottom", "top_random", "all_pairs"):
        pairs, counts = selected(selection, [0.5])
        assert (pairs, counts["candidates"]) == ([], 0), "one completion makes no candidate"


def test_all_pairs_by_hand():
    pairs, counts = selected("all_pairs")
    assert pairs == ALL
    assert (counts["candidates"], counts["zero_margin"]) == (10, 1)
    pairs, counts = selected("all_pairs", min_margin=0.4)
    assert pairs == ALL[:6], "0.9 - 0.5 and 0.5 - 0.1 are 0.4, whatever floats say"
    assert counts["small_margin"] == 3
    pairs, counts = selected("all_pairs", min_margin=0.2, max_pairs_per_prompt=3)
    assert pairs == ALL[:3]
    assert (counts["small_margin"], counts["over_max_pairs_per_prompt"]) == (1, 5)


def test_top_random_rejects_each_of_the_lower_completions_equally_often():
    drawn = Counter(selected("top_random", key=f"train/{prompt}")[0][0] for prompt in range(3000))
    assert set(drawn) == {(1, 0), (1, 2), (1, 4)}, "3 has the score of the best one"
    assert all(900 < count < 1100 for count in drawn.values()), drawn  # 1000 +- 26 for one standard deviation
    _, counts = selected("top_random")
    assert (counts["candidates"], counts["zero_margin"], counts["not_drawn"]) == (4, 1, 2)


def test_top_random_depends_on_seed_split_and_prompt_only():
    keys = [f"{split}/{prompt}" for split in ("train", "test") for prompt in range(50)]
    first = [selected("top_random", seed=1, key=key)[0] for key in keys]
    assert first[::-1] == [selected("top_random", seed=1, key=key)[0] for key in reversed(keys)]
    assert first != [selected("top_random", seed=2, key=key)[0] for key in keys]
    assert first[:50] != first[50:], "a prompt_id of train and one of test are different prompts"


def test_top_random_draws_after_filtering():
    texts = ["bird", *TEXTS[1:]]
    drawn = {selected("top_random", texts=texts, key=str(key), min_margin=0.35)[0][0] for key in range(50)}
    assert drawn == {(1, 2)}, "0 has the chosen one's text, the margin of 4 is too small"


def test_equal_texts_make_no_pair():
    texts, scores = ["one two three", " one two three\n", "four"], [3.0, 2.0, 1.0]
    pairs, counts = selected("all_pairs", scores, texts)
    assert (pairs, counts["equal_texts"]) == ([(0, 2), (1, 2)], 1)
    assert selected("top_bottom", scores[:2], texts[:2])[0] == [], "top_bottom tries no other pair"


def test_scores_that_differ_only_by_rounding_are_tied():
    scores = [0.1 + 0.2, 0.3, 0.0]
    assert scores[0] != scores[1]
    assert selected("all_pairs", scores)[0] == [(0, 2), (1, 2)]
    assert selected("all_pairs", [0.3, 0.1 + 0.2, 0.0])[0] == [(0, 2), (1, 2)]
    assert selected("top_bottom", scores[:2])[1]["zero_margin"] == 1
    assert selected("top_bottom", [1e-9, 0.0])[0] == [(0, 1)]


def test_laws():
    """On random prompts of 2 to 6 completions with many ties and some equal texts."""
    rng, some = random.Random(5), 0
    for _ in range(400):
        count = rng.randint(2, 6)
        scores_n, texts_n = [rng.randint(0, 8) / 10 for _ in range(count)], rng.choices("abcdefghij", k=count)
        every = selected("all_pairs", scores_n, texts_n)
        tiny = selected("all_pairs", scores_n, texts_n, min_margin=1e-9)
        first = selected("all_pairs", scores_n, texts_n, max_pairs_per_prompt=1)
        top, drawn = selected("top_bottom", scores_n, texts_n), selected("top_random", scores_n, texts_n)
        assert every[0] == tiny[0]
        assert {*top[0], *drawn[0]} <= set(every[0])
        if top[0]:  # else the texts of best and worst are equal
            assert first[0] == top[0]
            some += 1
        margins = [round(scores_n[chosen] - scores_n[rejected], 9) for chosen, rejected in every[0]]
        assert margins == sorted(margins, reverse=True)
        assert min(margins, default=1) > 0
        assert len({frozenset(pair) for pair in every[0]}) == len(every[0])
        for pairs, counts in (every, tiny, top, first, drawn):
            assert counts["candidates"] == len(pairs) + sum(counts[reason] for reason in (*REASONS, "not_drawn"))
    assert some > 300


def pair(prompt_id, chosen, rejected, margin=1.0, tokens=True):
    """A pair of answers of so many tokens and twice as many characters."""
    ids = [list(range(count)) if tokens else None for count in (chosen, rejected)]
    answers = [[{"role": "assistant", "content": "x" * (2 * count)}] for count in (chosen, rejected)]
    return Preference(prompt_id, [{"role": "user", "content": "q"}], *answers, margin, 0.0, *ids)


def test_lengths_by_hand():
    # Differences 2, 1, -1, 0; margins 4, 3, 2, 3: means 0.5 and 3; sum of products 1.5 + 0 + 1.5 - 0 = 3;
    # squares 2.25 + 0.25 + 2.25 + 0.25 = 5 and 1 + 0 + 1 + 0 = 2.
    found = compare_lengths([pair(1, 5, 3, 4.0), pair(2, 3, 2, 3.0), pair(3, 1, 2, 2.0), pair(4, 9, 9, 3.0)])
    assert (found.unit, found.chosen_mean, found.chosen_median) == ("tokens", 4.5, 4.0)
    assert (found.rejected_mean, found.rejected_median) == (4.0, 2.5)
    assert (found.chosen_longer, found.chosen_shorter, found.equal) == (2, 1, 1)
    assert found.chosen_longer_share == pytest.approx(2 / 3)
    assert found.margin_correlation == pytest.approx(3 / math.sqrt(10))
    assert not found.biased
    first, second = length_lines(found)
    assert "chosen mean 4.5, median 4; rejected mean 4.0, median 2.5" in first
    assert "66.7% of prompts (95% CI 20.8-93.9%)" in second
    assert "no significant bias" in second


@pytest.mark.parametrize(("hits", "trials"), [(81, 263), (15, 148), (0, 20), (1, 29), (29, 29)])
def test_the_interval_is_wilsons(hits, trials):
    interval = binomtest(hits, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits, trials) == pytest.approx((hits / trials, interval.low, interval.high), abs=1e-12)


def test_pairs_of_one_prompt_count_once():
    together = compare_lengths([pair(number // 10, 5, 3 if number < 70 else 8) for number in range(100)])
    alone = compare_lengths([pair(number, 5, 3 if number < 7 else 8) for number in range(10)])
    assert (together.chosen_longer, together.chosen_shorter) == (7, 3)
    assert together.chosen_longer_low == alone.chosen_longer_low
    # Differences 4, -1 and -1: longer in total.
    assert compare_lengths([pair(1, 7, 3), pair(1, 3, 4), pair(1, 3, 4)]).chosen_longer == 1


def test_a_bias_is_reported_only_if_the_interval_excludes_one_half():
    longer = compare_lengths([pair(number, 5, 3 if number % 10 < 7 else 8) for number in range(1000)])
    shorter = compare_lengths([pair(number, 3, 5) for number in range(100)])
    few = compare_lengths([pair(number, 5, 3) for number in range(3)])
    assert longer.biased and shorter.biased and not few.biased, "three of three may be chance"
    assert "length bias: chosen is longer for 70.0% of prompts (95% CI 67.1-72.8%)" in length_lines(longer)
    assert "length bias: chosen is longer for 0.0% of prompts (95% CI 0.0-3.7%)" in length_lines(shorter)


def test_equal_lengths_do_not_enter_the_share():
    others = [pair(-number, 5, 3 if number < 60 else 9) for number in range(1, 101)]
    most = compare_lengths([*(pair(number, 8, 8) for number in range(900)), *others])
    assert (most.equal, most.chosen_longer_share) == (900, pytest.approx(0.59))
    none = compare_lengths([pair(1, 4, 4), pair(2, 6, 6)])
    assert (none.chosen_longer_share, none.chosen_longer_low, none.margin_correlation) == (None, None, None)
    assert not none.biased and "equally long" in length_lines(none)[1]


def test_the_unit_is_tokens_only_if_every_answer_has_them():
    mixed = compare_lengths([pair(1, 5, 3), pair(2, 2, 4, tokens=False)])
    assert (mixed.unit, mixed.chosen_mean, mixed.rejected_mean) == ("characters", 7.0, 7.0)
    assert "length in characters" in length_lines(mixed)[0]
    assert compare_lengths([pair(1, 5, 0)]).unit == "tokens", "an empty answer has no tokens"

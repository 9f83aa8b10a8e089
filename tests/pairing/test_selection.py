"""Which completions are paired: every selection worked out by hand on one prompt, then the laws that relate them."""

import random
from collections import Counter

import numpy as np

from drdpo.pairing import REASONS, Chosen, Rule, best_and_worst, select

SCORES = [0.5, 0.9, 0.1, 0.9, 0.6]
ALL = [(1, 2), (3, 2), (4, 2), (0, 2), (1, 0), (3, 0), (1, 4), (3, 4), (4, 0)]
"""Margins 0.8 0.8 0.5 0.4 0.4 0.4 0.3 0.3 0.1; 1 and 3 are tied."""

TEXTS = ["fish", "bird", "worm", "wolf", "mole"]


def pairs_of(rule: Rule, scores: list[float] = SCORES, texts: list[str] | None = None, key: str = "train/7") -> Chosen:
    (best,), (worst,), _ = best_and_worst([scores])
    return select(scores, texts or TEXTS[: len(scores)], int(best), int(worst), rule, key)


def test_top_bottom_by_hand() -> None:
    found = pairs_of(Rule())
    assert found.pairs == [(1, 2)]
    assert found.counts["candidates"] == 1
    assert found.largest_margin == 0.8


def test_all_pairs_by_hand() -> None:
    found = pairs_of(Rule("all_pairs"))
    assert found.pairs == ALL
    assert (found.counts["candidates"], found.counts["zero_margin"]) == (10, 1)


def test_min_margin_by_hand() -> None:
    found = pairs_of(Rule("all_pairs", min_margin=0.4))
    assert found.pairs == ALL[:6], "0.9 - 0.5 and 0.5 - 0.1 are 0.4, whatever floats say"
    assert found.counts["small_margin"] == 3


def test_max_pairs_per_prompt_keeps_the_largest_margins() -> None:
    found = pairs_of(Rule("all_pairs", min_margin=0.2, max_pairs_per_prompt=3))
    assert found.pairs == ALL[:3]
    assert (found.counts["small_margin"], found.counts["over_max_pairs_per_prompt"]) == (1, 5)


def test_top_random_rejects_one_of_the_lower_completions_each_as_often() -> None:
    drawn = Counter(pairs_of(Rule("top_random"), key=f"train/{prompt}").pairs[0] for prompt in range(3000))
    assert set(drawn) == {(1, 0), (1, 2), (1, 4)}, "3 has the score of the best one"
    assert all(900 < count < 1100 for count in drawn.values()), drawn  # 1000 +- 26 for one standard deviation
    found = pairs_of(Rule("top_random"))
    assert (found.counts["candidates"], found.counts["zero_margin"], found.counts["not_drawn"]) == (4, 1, 2)


def test_top_random_depends_on_seed_split_and_prompt_alone() -> None:
    keys = [f"{split}/{prompt}" for split in ("train", "test") for prompt in range(50)]
    first = [pairs_of(Rule("top_random", seed=1), key=key).pairs for key in keys]
    assert first[::-1] == [pairs_of(Rule("top_random", seed=1), key=key).pairs for key in reversed(keys)]
    assert first != [pairs_of(Rule("top_random", seed=2), key=key).pairs for key in keys]
    assert first[:50] != first[50:], "a prompt_id of train and one of test are different prompts"


def test_top_random_draws_among_those_that_may_be_a_pair() -> None:
    rule = Rule("top_random", min_margin=0.35)
    drawn = {pairs_of(rule, texts=["bird", *TEXTS[1:]], key=str(key)).pairs[0] for key in range(50)}
    assert drawn == {(1, 2)}, "0 has the chosen one's text, 4 is too near"


def test_equal_texts_make_no_pair() -> None:
    texts, scores = ["one two three", " one two three\n", "four"], [3.0, 2.0, 1.0]
    found = pairs_of(Rule("all_pairs"), scores, texts)
    assert found.pairs == [(0, 2), (1, 2)]
    assert found.counts["equal_texts"] == 1
    assert pairs_of(Rule(), scores[:2], texts[:2]).pairs == [], "best against worst or nothing: no other pair is tried"


def test_smallest_margin_goes_with_top_bottom() -> None:
    assert pairs_of(Rule(min_margin=0.8)).pairs == [(1, 2)]
    found = pairs_of(Rule(min_margin=0.81))
    assert (found.pairs, found.counts["small_margin"], found.largest_margin) == ([], 1, 0.8)


def test_a_prompt_with_fewer_completions_than_others() -> None:
    scores = [0.5, 0.9, float("nan"), float("nan")]
    (best,), (worst,), _ = best_and_worst([scores])
    assert select(scores, TEXTS[:2], int(best), int(worst), Rule("all_pairs"), "train/1").pairs == [(1, 0)]


def prompts() -> list[tuple[list[float], list[str]]]:
    """Random prompts of 2 to 6 completions with many ties and some equal texts."""
    rng = random.Random(5)
    made = []
    for _ in range(400):
        count = rng.randint(2, 6)
        made.append(([rng.randint(0, 8) / 10 for _ in range(count)], [rng.choice("abcdefghij") for _ in range(count)]))
    return made


def test_laws() -> None:
    some = 0
    for scores_n, texts_n in prompts():
        every, tiny, top, first, drawn = (
            pairs_of(rule, scores_n, texts_n)
            for rule in (
                Rule("all_pairs"),
                Rule("all_pairs", min_margin=1e-9),
                Rule(),
                Rule("all_pairs", max_pairs_per_prompt=1),
                Rule("top_random"),
            )
        )
        assert every.pairs == tiny.pairs
        assert set(top.pairs) <= set(every.pairs)
        assert set(drawn.pairs) <= set(every.pairs)
        if top.pairs:  # else the texts of best and worst are equal
            assert first.pairs == top.pairs
            some += 1
        margins = [round(scores_n[chosen] - scores_n[rejected], 9) for chosen, rejected in every.pairs]
        assert margins == sorted(margins, reverse=True)
        assert min(margins, default=1) > 0
        assert len({frozenset(pair) for pair in every.pairs}) == len(every.pairs)
        for found in (every, tiny, top, first, drawn):
            lost = sum(found.counts[reason] for reason in REASONS) + found.counts["not_drawn"]
            assert found.counts["candidates"] == len(found.pairs) + lost
    assert some > 300


def test_scores_that_differ_by_rounding_only_are_tied() -> None:
    scores = [0.1 + 0.2, 0.3, 0.0]
    assert scores[0] != scores[1]
    assert pairs_of(Rule("all_pairs"), scores).pairs == [(0, 2), (1, 2)]
    assert pairs_of(Rule("all_pairs"), np.array(scores)[[1, 0, 2]].tolist()).pairs == [(0, 2), (1, 2)]


def test_the_seed_is_part_of_what_made_the_pairs_only_where_it_draws() -> None:
    assert Rule(seed=1).made_by() == Rule(seed=2).made_by()
    assert Rule("top_random", seed=1).made_by() != Rule("top_random", seed=2).made_by()
    assert Rule(min_margin=1.0).made_by() != Rule().made_by()
    assert Rule("all_pairs", max_pairs_per_prompt=1).made_by() != Rule("all_pairs").made_by()

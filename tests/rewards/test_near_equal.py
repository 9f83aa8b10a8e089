"""The likeness of two answers, counted by hand, and the laws of a similarity."""

import random

import pytest

from drdpo.rewards.near_equal import Answer, alike, similarity


def like(first: str, second: str) -> float:
    return similarity(Answer(first), Answer(second))


def test_word_pairs_counted_by_hand() -> None:
    # (, a) (a b) (b c) (c,) against (, a) (a b) (b d) (d,): 2 in common of 4 + 4 - 2
    assert like("a b c", "a b d") == pytest.approx(2 / 6)
    # A changed word in the middle of 9 takes 2 of the 10 pairs of each: 8 of 12.
    assert like("1 2 3 4 5 6 7 8 9", "1 2 3 4 x 6 7 8 9") == pytest.approx(8 / 12)
    # Repeats count: (, a) (a a) (a,) against (, a) 3 x (a a) (a,).
    assert like("a a", "a a a a") == pytest.approx(3 / 5)
    assert like("a b", "c d") == 0.0
    assert like("a b c", "c b a") == 0.0, "the order counts"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("The answer is 42.", "the  answer\nis: **42**"),
        ("  yes ", "Yes!"),
        ("Straße", "STRASSE"),
        ("", "..."),
        ("你好,世界。", "你好世界"),
    ],
)
def test_case_white_space_and_punctuation_do_not_count(first: str, second: str) -> None:
    assert like(first, second) == 1.0
    assert alike(Answer(first), Answer(second), 0.99)


@pytest.mark.parametrize(
    ("first", "second"),
    [("1 + 2", "1 2"), ("a < b", "a > b"), ("😀", "😡"), ("42", "43"), ("", "no"), ("你好世界", "你好地球")],
)
def test_words_digits_signs_and_emoji_count(first: str, second: str) -> None:
    assert like(first, second) < 0.9


def test_text_without_spaces_is_compared_by_its_characters() -> None:
    # 4 characters, the last 2 changed: 2 pairs of 5 in common, (, 你) and (你 好).
    assert like("你好世界", "你好地球") == pytest.approx(2 / 8)


def test_the_default_of_the_help_one_word_of_40() -> None:
    words = [str(number) for number in range(400)]
    for changed, over in ((8, True), (12, False)):  # one of 50, one of 33
        other = [f"x{word}" if index % (400 // changed) == 20 else word for index, word in enumerate(words)]
        assert sum(a != b for a, b in zip(words, other, strict=True)) in (changed, changed + 1)
        assert alike(Answer(" ".join(words)), Answer(" ".join(other)), 0.9) is over


def test_it_is_symmetric_and_the_length_shortcut_changes_nothing() -> None:
    rng = random.Random(0)
    over = 0
    for _ in range(300):
        words = rng.choices("abcdefgh", k=rng.randint(0, 12))
        other = [rng.choice("abcdefgh") if rng.random() < 0.1 else word for word in words] + rng.choices(
            "abc", k=rng.randint(0, 2)
        )
        one, two = Answer(" ".join(words)), Answer(" ".join(other))
        found = similarity(one, two)
        assert 0 <= found <= 1
        assert found == similarity(two, one)
        assert similarity(one, one) == 1
        for limit in (0.2, 0.5, 0.9):
            assert alike(one, two, limit) is (found > limit) is alike(two, one, limit)
            over += found > limit
    assert 100 < over < 800, "both answers happen"


def test_a_limit_of_1_is_off() -> None:
    assert not alike(Answer("same"), Answer("Same"), 1.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [("x = -5.", "x = 5."), ("x = \u22125", "x = 5"), ("a * b", "a / b"), ("a - b", "a + b"), ("கை", "கா"), ("की", "का"),
     ("50%", "50"), ("na\u0308he", "nahe")],
)  # fmt: skip
def test_signs_and_vowels_that_change_the_meaning_count(one: str, other: str) -> None:
    assert similarity(Answer(one), Answer(other)) < 0.9


def test_layout_does_not_count() -> None:
    assert (
        similarity(Answer("- one\n- two"), Answer("one\n\ntwo")) == similarity(Answer("*one* two"), Answer("One, two.")) == 1
    )
    assert Answer("a well-known fact").words == ["a", "well", "known", "fact"]

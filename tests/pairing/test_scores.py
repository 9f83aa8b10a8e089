"""The arithmetic of scores, against numbers computed by hand."""

import numpy as np
import pytest

from drdpo.errors import DataError
from drdpo.pairing import best_and_worst, mean_and_sd, mix, standardise

NAN = float("nan")


def test_standardise_takes_all_entries_and_the_population_sd() -> None:
    # mean 5; deviations -3 -1 -1 -1 0 0 2 4; mean square 32 / 8 = 4; sd 2
    z_Mn = standardise([[2, 4, 4, 4], [5, 5, 7, 9]])
    np.testing.assert_allclose(z_Mn, [[-1.5, -0.5, -0.5, -0.5], [0, 0, 1, 2]])


def test_standardise_of_equal_scores_is_zero_even_when_their_mean_rounds() -> None:
    assert standardise(np.full((3, 2), 0.1)).tolist() == [[0.0, 0.0]] * 3
    assert mean_and_sd(np.full(7, 0.1))[1] == 0.0


def test_standardise_leaves_absent_completions_out() -> None:
    z_Mn = standardise([[1.0, 3.0], [5.0, NAN], [7.0, NAN]])  # mean 4, sd sqrt((9 + 1 + 1 + 9) / 4)
    sd = 5**0.5
    np.testing.assert_allclose(z_Mn, [[-3 / sd, -1 / sd], [1 / sd, NAN], [3 / sd, NAN]])
    np.testing.assert_array_equal(standardise([[2.0, NAN], [2.0, 2.0]]), [[0.0, NAN], [0.0, 0.0]])


def test_standardise_by_the_statistics_of_another_split() -> None:
    np.testing.assert_array_equal(standardise([[5.0, NAN], [1.0, 3.0]], (3.0, 2.0)), [[1.0, NAN], [-1.0, 0.0]])
    np.testing.assert_array_equal(standardise([[5.0, NAN]], (3.0, 0.0)), [[0.0, NAN]])


def test_mix_is_a_weighted_sum_by_name() -> None:
    scores = {"a": [[1.0, 2.0]], "b": [[10.0, 20.0]], "unused": [[NAN, NAN]]}
    np.testing.assert_allclose(mix(scores, {"b": 0.25, "a": 0.75}), [[3.25, 6.5]])
    with pytest.raises(DataError, match="no scores of c; there are scores of a, b, unused"):
        mix(scores, {"a": 0.5, "c": 0.5})


def test_best_and_worst_take_the_first_on_ties() -> None:
    mixed_Mn = [[1.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0], [NAN, 5.0, 4.0, NAN], [NAN, NAN, 1.0, NAN], [NAN] * 4]
    best_M, worst_M, usable_M = best_and_worst(mixed_Mn)
    assert best_M.tolist()[:3] == [1, 0, 1]
    assert worst_M.tolist()[:3] == [0, 0, 2]
    assert usable_M.tolist() == [True, False, True, False, False]


def test_rounding_in_the_mix_does_not_break_a_tie() -> None:
    tie = [[0.1 + 0.2, 0.3]]
    assert tie[0][0] != tie[0][1]
    assert best_and_worst(tie)[2].tolist() == [False]
    assert best_and_worst([[1e-9, 0.0]])[2].tolist() == [True]

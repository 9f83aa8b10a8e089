"""How much an answer repeats itself: seq-rep-4 of Welleck et al. 2020 (arXiv 1908.04319, section 6).

    seq-rep-n = 1 - |distinct n-grams| / |n-grams|,     over the tokens of one answer, n = 4.

0 where no 4 tokens stand twice, near 1 for a loop. Answers of fewer than 4 tokens have no 4-gram and count 0. The tokens are
the policy's own, so runs compare like with like where they share a tokenizer.
"""

from collections.abc import Sequence

N = 4


def repeated_share(token_ids: Sequence[int], n: int = N) -> float:
    """The share of an answer's n-grams that stood in it before.

    Args:
        token_ids: of one answer.
        n: length of an n-gram.
    """
    grams = len(token_ids) - n + 1
    if grams < 1:
        return 0.0
    return 1 - len({tuple(token_ids[start : start + n]) for start in range(grams)}) / grams

"""Three pairs to look at: which ones, what is shown, and nothing that a terminal would obey."""

from drdpo.records import Preference
from drdpo.rewards.preview import LINES, WIDTH, preview


def pair(prompt_id: int, margin: float, chosen: str = "good", rejected: str = "bad") -> Preference:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"question {prompt_id}"}]
    answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return Preference(prompt_id, turns, *answers, 1.0 + margin, 1.0, [5, 6, 7], [8])


def test_the_smallest_the_median_and_the_largest_margin() -> None:
    pairs = [pair(number, margin) for number, margin in enumerate([0.5, 0.1, 0.9, 0.3, 0.7])]
    text = preview(pairs)
    heads = [line for line in text.splitlines() if line.startswith("==")]
    assert heads == [
        "== the smallest margin, 0.1000: prompt_id 1",
        "== the median margin, 0.5000: prompt_id 0",
        "== the largest margin, 0.9000: prompt_id 2",
    ]
    assert preview(pairs[::-1]) == text, "not a matter of the order"
    assert [line.split(",")[0] for line in preview(pairs[:2]).splitlines() if line.startswith("==")] == [
        "== the smallest margin", "== the largest margin",
    ]  # fmt: skip
    assert preview(pairs[:1]).count("==") == 1


def test_prompt_answers_scores_and_lengths() -> None:
    assert preview([pair(3, 0.25)]).splitlines()[1:] == [
        "== the only margin, 0.2500: prompt_id 3",
        "-- system", "    be brief", "-- prompt", "    question 3",
        "-- chosen, score 1.2500, 3 tokens", "    good", "-- rejected, score 1.0000, 1 tokens", "    bad",
    ]  # fmt: skip


def test_long_and_hostile_texts() -> None:
    hostile = "\x1b[2J\x1b]0;title\x07 \u202eright to left\r over \ud800"
    text = preview([pair(1, 1.0, chosen="word " * 5000, rejected=hostile)])
    assert not set(text) & set("\x1b\x07\r\u202e\ud800")
    assert "right to left" in text
    assert "25,000 characters" in text
    assert len(text.splitlines()) < 3 * LINES
    assert max(map(len, text.splitlines())) <= WIDTH

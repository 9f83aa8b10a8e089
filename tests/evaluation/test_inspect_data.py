"""inspect_data on fabricated folders: kinds by their fields, figures by hand, leaks, dropped rows, honest errors."""

import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drdpo.config import InspectConfig
from drdpo.errors import DataError, UsageError, one_line_errors
from drdpo.evaluation.inspection import inspect_data, output_folder
from drdpo.evaluation.kinds import COMPLETIONS, PREFERENCES, PROMPTS, RATINGS, Kind
from drdpo.evaluation.tally import Group, Tally, shared_prompts, tally_file

Rows = list[dict[str, Any]]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def completion(prompt_id: int, sample_id: int, answer: str, tokens: int, score: float | None, **more: Any) -> dict[str, Any]:
    row = {
        "prompt_id": prompt_id,
        "sample_id": sample_id,
        "prompt": user(f"question {prompt_id}"),
        "completion": [{"role": "assistant", "content": answer}],
        "token_ids": [7] * tokens,
        "finish_reason": "stop",
    }
    return row | ({} if score is None else {"scores": {"helpsteer-coherence": score, "ArmoRM": 1.0}}) | more


COMPLETION_ROWS: Rows = [
    completion(1, 0, "an answer", 1, 1.0),
    completion(1, 1, "an  answer ", 2, 2.0, finish_reason="length"),
    completion(2, 0, "", 3, 3.0, prompt=[{"role": "system", "content": "be brief"}, *user("question 2")]),
    completion(2, 1, "b", 4, 6.0, prompt=[{"role": "system", "content": "be brief"}, *user("question 2")]),
    completion(3, 0, "c", 15, None, prompt=[*user("a"), {"role": "assistant", "content": "b"}, *user("question 1")]),
]


def write(path: Path, rows: Rows, tail: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return path


def tally(path: Path, kind: Kind, samples: int = 3, seed: int = 0, tokenizer: Any = None) -> Tally:
    return tally_file(path.stem, path, kind, samples, seed, tokenizer)


def look(path: Path, capsys: pytest.CaptureFixture[str], **flags: Any) -> str:
    output = path.parent / "pictures of it"
    inspect_data(InspectConfig(path=str(path), **{"output_path": str(output), **flags}))
    return capsys.readouterr().out


def line(printed: str, start: str) -> list[str]:
    """The cells after `start` in the line that begins with it."""
    (found,) = [row for row in printed.splitlines() if row.startswith(start)]
    return re.split(r" {2,}", found.removeprefix(start).strip())


def test_completions_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "scored" / "train.jsonl", COMPLETION_ROWS)
    write(tmp_path / "scored" / "test.jsonl", [completion(9, 0, "x", 5, 1.0)])
    printed = look(tmp_path / "scored", capsys)
    assert "completions in train.jsonl, test.jsonl (recognised by the fields prompt, completion, token_ids)" in printed
    for start, cells in {
        "completions  ": ["5", "1"],
        "distinct prompts": ["3", "1"],
        "completions per prompt, min / median / max": ["1 / 2 / 2", "1 / 1 / 1"],
        "prompts with a system message": ["1 (33.3%)", "0 (0.0%)"],
        "prompts of several turns": ["1 (33.3%)", "0 (0.0%)"],
        "scored  ": ["4 (80.0%)", "1 (100.0%)"],
        "ended by itself": ["(stop)", "4 (80.0%)", "1 (100.0%)"],
        "cut by the length limit": ["1 (20.0%)", "0 (0.0%)"],
        "answers that repeat one to the same prompt": ["1 (20.0%)", "0 (0.0%)"],
        "empty answers": ["1", "0"],
        # min, p10, median, p90, p99, max, mean of 1 2 3 4 15: p10 lies 0.4 of the way from 1 to 2, p90 0.6 from 4 to 15.
        "answer     train": ["tokens", "1", "1", "3", "11", "15", "15", "5.0"],
        # 10 characters, 8 + 10, 1 + 1 + 10: the prompts of several rows count once.
        "prompt     train": ["characters", "10", "10", "12", "17", "18", "18", "13.3"],
        # Of 1 2 3 6: mean 3, population variance (4 + 1 + 0 + 9) / 4, quartiles by linear interpolation.
        "helpsteer-coherence  train": ["4", "3", "1.871", "1", "1.75", "2.5", "3.75", "6"],
        "ArmoRM               train": ["4", "1", "0", "1", "1", "1", "1", "1"],
    }.items():
        assert line(printed, start) == cells, start
    assert "train: every row has the same ArmoRM, 1; it cannot tell answers apart" in printed
    assert {file.name for file in (tmp_path / "pictures of it").iterdir()} == {"lengths.png", "scores.png", "manifest.json"}
    assert (tmp_path / "pictures of it" / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in (tmp_path / "scored").iterdir()} == {"train.jsonl", "test.jsonl"}, (
        "the data stays as it is"
    )


def test_pairs_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def pair(number: int, chosen: str, rejected: str, scores: tuple[float, float]) -> dict[str, Any]:
        texts = {"chosen": chosen, "rejected": rejected}
        row: dict[str, Any] = {"prompt_id": number, "prompt": user(f"q{number}")}
        for (name, text), score in zip(texts.items(), scores, strict=True):
            row |= {name: [{"role": "assistant", "content": text}], f"{name}_score": score}
            row |= {f"{name}_token_ids": [3] * len(text)}
        return row

    rows = [pair(1, "aaaa", "b", (2.0, 1.0)), pair(2, "a", "bbb", (0.5, 0.5)), pair(3, "aa", "bb", (0.0, 2.0)),
            pair(3, "same", "same", (4.0, 0.0))]  # fmt: skip
    printed = look(write(tmp_path / "train.jsonl", rows), capsys)
    for start, cells in {
        "preference pairs": ["4"],
        "pairs per prompt, min / median / max": ["1 / 1 / 2"],
        "pairs with scores": ["4 (100.0%)"],
        "tied scores": ["1 (25.0%)"],
        "equal texts": ["1 (25.0%)"],
        "chosen longer, in tokens": ["1 (25.0%)"],
        "equally long, in tokens": ["2 (50.0%)"],
        # 1, 0, -2, 4: mean 0.75, variance (21 - 4 * 0.75^2) / 4 = 4.6875.
        "margin          train": ["4", "0.75", "2.165", "-2", "-0.5", "0.5", "1.75", "4"],
    }.items():
        assert line(printed, start) == cells, start
    assert "train: 1 row whose chosen answer has the lower score (first: row 3)" in printed
    assert {file.name for file in (tmp_path / "pictures of it").glob("*.png")} == {"lengths.png", "margins.png"}


def test_trl_pairs_without_ids_or_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [{"role": "assistant", "content": text} for text in ("long answer", " short\n")]
    rows: Rows = [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": user("q"), "chosen": answers[:1], "rejected": answers[1:]},
        {"chosen": [*user("other"), answers[1]], "rejected": [*user("other"), answers[0]]},
    ]
    printed = look(write(tmp_path / "eval.jsonl", rows), capsys)
    assert line(printed, "distinct prompts") == ["2"]
    assert line(printed, "pairs per prompt, min / median / max") == ["1 / 1.5 / 2"]
    assert line(printed, "pairs with scores") == ["0 (0.0%)"]
    assert line(printed, "chosen longer, in characters") == ["2 (66.7%)"]
    # yes, long answer, short: white space around an answer does not count.
    assert line(printed, "chosen     eval") == ["characters", "3", "3", "5", "10", "11", "11", "6.3"]
    assert "margin" not in printed.split("---")[0]
    assert "note" not in printed


def test_ratings_in_helpsteers_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc"
    rows: Rows = [
        {"prompt": flat, "response": "x", "verbosity": 1, "helpfulness": 4},
        {"prompt": flat, "response": "y", "verbosity": 2, "helpfulness": None},
        {"prompt": "d", "response": " ", "verbosity": 7, "helpfulness": "4"},
    ]
    printed = look(write(tmp_path / "train.jsonl", rows), capsys)
    assert line(printed, "rated answers per prompt, min / median / max") == ["1 / 1.5 / 2"]
    assert line(printed, "prompts of several turns") == ["1 (50.0%)"]
    assert line(printed, "empty answers") == ["1"]
    assert line(printed, "helpfulness  train")[:2] == ["1", "4"]
    assert "train: 2 rows without a number for helpfulness" in printed
    assert "train: 1 rating of verbosity outside 0 to 4" in printed
    assert printed.index("verbosity    train") < printed.index("helpfulness  train"), "in the order of the file"


def test_prompts_that_train_and_test_share_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def prompts(*texts: str) -> Rows:
        return [{"prompt_id": number, "prompt": user(text)} for number, text in enumerate(texts)]

    write(tmp_path / "p" / "train.jsonl", prompts("a", "b  c", "d", "a"))
    write(tmp_path / "p" / "test.jsonl", prompts("x", "b c\n", "d", "A"))
    printed = look(tmp_path / "p", capsys)
    assert "test and train share 2 prompts" in printed
    assert "(first in row 2 of test)" in printed
    assert line(printed, "prompts with the text of an earlier prompt_id") == ["1 (25.0%)", "0 (0.0%)"]
    train, test = (tally(tmp_path / "p" / f"{split}.jsonl", PROMPTS) for split in ("train", "test"))
    assert shared_prompts(test, train) == [2, 3]
    assert shared_prompts(train, test) == [2, 3]


def test_a_role_makes_another_prompt(tmp_path: Path) -> None:
    system = [{"role": "system", "content": "a"}, *user("b")]
    one = tally(write(tmp_path / "1.jsonl", [{"prompt_id": 1, "prompt": system}]), PROMPTS)
    other = tally(
        write(tmp_path / "2.jsonl", [{"prompt_id": 1, "prompt": [{"role": "user", "content": "a"}, *user("b")]}]), PROMPTS
    )
    assert shared_prompts(one, other) == []


def test_ids_that_the_steps_refuse_are_counted_not_fatal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [completion(1, 0, "a", 1, 1.0), completion(1, 0, "b", 1, 2.0), completion(1, 1, "c", 1, 3.0, prompt=user("else"))]
    printed = look(write(tmp_path / "train.jsonl", rows), capsys)
    assert "train: 1 row with the id of an earlier row; the steps refuse that (first: row 2)" in printed
    assert (
        "train: 1 row with the prompt_id of an earlier row and another prompt; the steps refuse that (first: row 3)"
        in printed
    )


def test_lengths_are_in_one_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: Rows = [
        {"prompt_id": 1, "prompt": user("q"), "chosen": "four", "rejected": "no", "chosen_token_ids": [1]},
        {
            "prompt_id": 2,
            "prompt": user("r"),
            "chosen": "a",
            "rejected": "b",
            "chosen_token_ids": [1],
            "rejected_token_ids": [1],
        },
    ]
    printed = look(write(tmp_path / "train.jsonl", rows), capsys)
    assert "train: only some answers have token_ids, so lengths are in characters" in printed
    assert line(printed, "chosen     train") == ["characters", "1", "1", "2", "4", "4", "4", "2.5"]
    with_ids, without = (
        tally(write(tmp_path / f"{name}.jsonl", [row]), PREFERENCES) for name, row in zip("ab", rows[::-1], strict=True)
    )
    assert Group(PREFERENCES, [with_ids]).unit("chosen") == "tokens"
    assert Group(PREFERENCES, [with_ids, without]).unit("rejected") == "characters", "so that files can be compared"


def test_lengths_in_the_tokens_of_a_tokenizer(tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from drdpo import chat

    tokenizer = chat.load_tokenizer(str(tiny_policy))
    refusal = "{% if 'question 2' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [completion(1, 0, "Hello there, world.", 99, None), completion(2, 0, "Hello there, world.", 2, None)]
    printed = look(write(tmp_path / "train.jsonl", rows), capsys, tokenizer=str(tmp_path / "tokenizer"))
    answer = len(chat.answer_token_ids(tokenizer, [{"role": "assistant", "content": "Hello there, world."}]))
    assert answer < 10
    assert line(printed, "answer     train") == ["tokens", *[str(answer)] * 6, f"{answer}.0"]
    prompt = len(chat.prompt_token_ids(tokenizer, user("question 1")))
    assert line(printed, "prompt     train")[-1] == f"{prompt}.0"
    assert "train: 1 row with a text that the tokenizer or its chat template refuses; it has no length" in printed


def test_dropped_rows_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "scored"
    write(folder / "train.jsonl", COMPLETION_ROWS)
    write(folder / "sampled" / "train.jsonl", COMPLETION_ROWS)
    reject = {"prompt_id": 1, "file": "sampled/train.jsonl"}
    write(
        folder / "rejects.jsonl",
        [
            {**reject, "row": 4, "sample_id": 0, "reason": "longer than --score_max_len=40 (91 tokens)"},
            {**reject, "row": 9, "sample_id": 1, "reason": "longer than --score_max_len=40 (1,204 tokens)"},
            {**reject, "row": 2, "sample_id": 1, "reason": "no\x1b[2J gate"},
        ],
    )
    write(
        folder / "sampled" / "rejects.jsonl",
        [{**reject, "row": row, "reason": f"{row}00 tokens, more than --prompt_max_len=20"} for row in (5, 6)],
    )
    counts = {"in": 8, "out": 5, "dropped": 3, "why": {"longer than --score_max_len=40": 2, "odd": 0}}
    (folder / "manifest.json").write_text(json.dumps({"score_train": {"made_by": {"counts": {"no": 1}}, "counts": counts}}))
    printed = look(folder, capsys)
    assert printed.count("completions in train.jsonl (") == 1, "sampled/ holds the same rows without scores"
    assert f"set aside in {folder / 'rejects.jsonl'}: 3 rows" in printed
    assert line(printed, "sampled/train.jsonl  longer than") == ["--score_max_len=40", "2", "4"]
    assert line(printed, r"sampled/train.jsonl  no\x1b[2J gate") == ["1", "2"]
    assert line(printed, "sampled/train.jsonl  N tokens, more than") == ["--prompt_max_len=20", "2", "5"]
    assert "  score_train: in 8, out 5, dropped 3, why: longer than --score_max_len=40 2\n" in printed
    assert "\x1b" not in printed
    alone = look(folder / "rejects.jsonl", capsys)
    assert alone.startswith(f"set aside in {folder / 'rejects.jsonl'}: 3 rows")
    beside = look(folder / "train.jsonl", capsys)
    assert f"set aside in {folder / 'rejects.jsonl'}: 3 rows" in beside


def test_samples_that_nobody_scored_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "s" / "sampled" / "test.jsonl", [completion(1, 0, "a", 1, None)])
    write(tmp_path / "s" / "sampled" / "rejects.jsonl", [])
    part = write(tmp_path / "s" / "sampled" / ".train.part.jsonl", [{"made_by": {}}, {"block": 0}], '{"block": 1, "samp')
    printed = look(tmp_path / "s", capsys)
    assert line(printed, "completions  ") == ["1"]
    assert line(printed, "scored  ") == ["0 (0.0%)"]
    assert "set aside in" in printed and ": no rows" in printed
    assert f"note: {part}: unfinished, 2 whole lines; the line after them is torn" in printed
    assert "lengths.png" in printed and "scores.png" not in printed


def test_training_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: Rows = [{"step": 1, "loss": 0.75, "eval_loss": None}, {"step": 2, "loss": 0.25, "eval_loss": 0.5}]
    printed = look(write(tmp_path / "metrics.jsonl", rows), capsys)
    assert line(printed, "loss  ") == ["2", "0.75", "0.25", "0.25", "0.75", "0.5"]
    assert line(printed, "eval_loss") == ["1", "0.5", "0.5", "0.5", "0.5", "0.5"]
    assert (tmp_path / "pictures of it" / "metrics.png").is_file()


def test_two_kinds_in_one_folder_are_looked_at_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "d" / "prompts.jsonl", [{"prompt_id": 1, "prompt": user("q")}])
    write(tmp_path / "d" / "ratings.jsonl", [{"prompt": "q", "response": "a", "good": 1}])
    printed = look(tmp_path / "d", capsys)
    assert "prompts in prompts.jsonl" in printed and "ratings in ratings.jsonl" in printed
    pictures = {file.name for file in (tmp_path / "pictures of it").glob("*.png")}
    assert pictures == {"prompts_lengths.png", "ratings_lengths.png", "ratings_scores.png"}


def test_the_sample_is_of_the_seed_and_covers_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "response": f"{number}", "x": 1} for number in range(200)])
    chosen = [[row.number for row in tally(path, RATINGS, 5, seed).sample.rows] for seed in range(60)]
    assert chosen[3] == [row.number for row in tally(path, RATINGS, 5, 3).sample.rows]
    assert all(rows == sorted(set(rows)) and len(rows) == 5 for rows in chosen)
    # 300 draws, uniform over 1 to 200: their mean has a standard error of 57.7 / sqrt(300) = 3.3.
    assert abs(np.mean(chosen) - 100.5) < 5 * 3.4
    assert len({row for rows in chosen for row in rows}) > 120
    assert len(tally(path, RATINGS, 500).sample.rows) == 200


def test_untrusted_text_is_printed_harmless_and_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;owned\x07\u202e $\\frac$"
    rows = [completion(1, 0, evil + " word" * 5000, 1, None, prompt=[{"role": "system", "content": evil}, *user(evil)])]
    rows[0]["scores"] = {f"{evil}\nname": 1.0}
    printed = look(write(tmp_path / "train.jsonl", rows), capsys, width=60)
    assert not set(printed) & set("\x1b\x07\u202e")
    assert r"\x1b]0;owned\x07\u202e $\frac$" in printed
    sample = printed.split("--- train.jsonl, row 1")[1].split("pictures")[0]
    assert "of 25,019 characters ...]" in sample
    assert max(map(len, sample.splitlines()[1:])) <= 60
    assert len(sample.splitlines()) < 40


def test_pictures_of_an_earlier_look_go_when_they_are_no_longer_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, pictures = tmp_path / "train.jsonl", tmp_path / "pictures of it"
    look(write(path, COMPLETION_ROWS), capsys)
    (pictures / "mine.png").write_text("kept")
    look(write(path, [{"prompt_id": 1, "prompt": user("q")}]), capsys)
    assert {file.name for file in pictures.glob("*.png")} == {"lengths.png", "mine.png"}
    before = (pictures / "lengths.png").read_bytes()
    look(path, capsys)
    assert (pictures / "lengths.png").read_bytes() == before


def test_where_pictures_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert output_folder(InspectConfig("outputs/my run/")) == Path("outputs/inspection/outputs_my run")
    assert output_folder(InspectConfig("a/../b/train.jsonl")) == Path("outputs/inspection/b_train.jsonl")
    assert output_folder(InspectConfig("/some/where")) == Path("outputs/inspection/some_where")
    assert output_folder(InspectConfig("x", output_path="here")) == Path("here")


def bad(tmp_path: Path, case: str) -> Path:
    good, path = COMPLETION_ROWS[0], tmp_path / "data.jsonl"
    match case:
        case "no path":
            return tmp_path / "nowhere"
        case "no rows":
            write(path, [])
        case "unknown kind":
            write(path, [{"question": 1, "\x1b[2Jturns": []}])
        case "mixed kinds":
            write(path, [good, {"prompt_id": 4, "prompt": user("x")}])
        case "mixed with unknown":
            write(path, [good, {"nothing": 1}])
        case "torn":
            write(path, [good], json.dumps(good)[:40])
        case "bad field":
            write(path, [good, completion(1, 1, "a", 1, 1.0) | {"finish_reason": "tired"}])
        case "no number":
            path.write_text(json.dumps(good).replace("1.0", "NaN", 1))
        case "beyond all scores":
            write(path, [completion(1, 0, "a", 1, 1e300)])
        case "long integer":
            path.write_text('{"prompt": "a", "response": "b", "x": ' + "9" * 5000 + "}")
        case "metrics":
            write(path, [{"step": 1, "loss": "low"}])
        case "reject":
            write(path, [{"row": 1, "file": "f", "reason": None}])
        case "part file":
            return write(tmp_path / "sampled" / ".train.part.jsonl", [{"made_by": {}}], '{"blo')
        case "score part":
            return write(tmp_path / ".score_parts" / "train" / "0.jsonl", [{"batch": 0, "rows": []}])
        case "empty folder":
            (tmp_path / "d" / "model.bin").mkdir(parents=True)
            return tmp_path / "d"
        case "saved data set":
            (tmp_path / "d").mkdir()
            (tmp_path / "d" / "dataset_dict.json").write_text("{}")
            return tmp_path / "d"
    return path


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("no path", "nowhere: no such file or folder"),
        ("no rows", "data.jsonl: the file has no rows"),
        (
            "unknown kind",
            r"row 1: of no known kind; its fields are question, \\x1b\[2Jturns. Known are preference pairs \(chosen",
        ),
        ("mixed kinds", r"row 2: a prompt \(prompt_id, prompt\) in a file of completions"),
        ("mixed with unknown", "row 2: of no known kind; its fields are nothing"),
        ("torn", "data.jsonl, row 2: not a whole JSON object"),
        ("bad field", "data.jsonl, row 2: field \"finish_reason\" is 'tired'"),
        ("no number", 'data.jsonl, row 1: field "scores" must map objectives to finite numbers'),
        ("beyond all scores", "data.jsonl, row 1: the score 1e.300 of helpsteer-coherence is beyond"),
        ("long integer", "data.jsonl, row 1: not a whole JSON object"),
        ("metrics", "data.jsonl, row 1: field 'loss' is 'low', not a finite number"),
        ("reject", 'data.jsonl, row 1: field "reason" is None'),
        ("part file", r"\.train\.part\.jsonl: unfinished, 1 whole lines; the line after them is torn"),
        ("score part", r"0\.jsonl: unfinished, 1 whole lines; give the step's command again"),
        ("empty folder", r"no JSON-lines file \(\*\.jsonl\) in the folder; it has model.bin"),
        ("saved data set", "it has dataset_dict.json; a data set saved by datasets.save_to_disk"),
    ],
)
def test_bad_data_ends_in_one_line(tmp_path: Path, case: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = InspectConfig(path=str(bad(tmp_path, case)), output_path=str(tmp_path / "out"))
    with pytest.raises(DataError, match=says):
        inspect_data(config)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stop, one_line_errors():
        inspect_data(config)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "\x1b" not in error


@pytest.mark.parametrize("flags", [{"samples": -1}, {"seed": -1}, {"width": 39}])
def test_flags_that_mean_nothing(flags: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(flags))}="):
        InspectConfig("x", **flags)  # type: ignore[arg-type]


def test_memory_holds_figures_not_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [completion(number, 0, "x" * 100_000, 1, 1.0) for number in range(120)])
    tracemalloc.start()
    tally(path, COMPLETIONS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 12_000_000
    assert peak < 4_000_000


def test_command_line_needs_no_torch(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "my data" / "train.jsonl", COMPLETION_ROWS)
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "assert 'torch' not in sys.modules"
    )
    words = [sys.executable, "-c", program, str(root / "src" / "inspect_data.py"), "my data"]
    environment = {"PATH": "/usr/bin", "PYTHONPATH": str(root / "src"), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*words, "--samples=1"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "inspection" / "my data" / "lengths.png").is_file()
    wrong = subprocess.run([*words, "more"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "unrecognized arguments: more" in wrong.stderr


def test_a_bad_neighbour_costs_a_good_file_neither_tables_nor_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "scored" / "train.jsonl", COMPLETION_ROWS)
    write(tmp_path / "scored" / "rejects.jsonl", [{"file": "a", "row": 1, "reason": 5}])
    config = InspectConfig(path=str(tmp_path / "scored" / "train.jsonl"), output_path=str(tmp_path / "pictures"))
    inspect_data(config)
    assert "note: " in capsys.readouterr().out
    assert (tmp_path / "pictures" / "lengths.png").is_file()

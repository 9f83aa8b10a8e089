"""Whatever goes in: success with files that pass their own reader, or one line. DRDPO_FUZZ_CASES=10000 for the long run."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import readme
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drdpo import chat
from drdpo.cli import parse
from drdpo.config.data import PreferencesConfig
from drdpo.config.training import DataSettings
from drdpo.errors import DataError, UsageError, is_text, one_line
from drdpo.pairing import generate_preferences
from drdpo.records import Completion, Preference, Prompt, read_records, write_records
from drdpo.sampling.sample import read_prompts, render
from drdpo.training.data import tokenise
from drdpo.training.rows import load_split

pytestmark = pytest.mark.fuzz

PROPERTIES = 7
CASES = -(-int(os.environ.get("DRDPO_FUZZ_CASES", "350")) // PROPERTIES)


@pytest.fixture(autouse=True)
def denormal_numbers() -> None:
    """Tests before these may have let torch flush them to zero, which hypothesis refuses to draw floats under."""
    torch.set_flush_denormal(False)


unhealthy = list(HealthCheck)
fuzz = settings(max_examples=CASES, derandomize=True, database=None, deadline=None, suppress_health_check=unhealthy)

ODD = ["", " ", "\ud800", "a\udfffb", "\ufeff", "\x00", "<|im_end|>", "\ue000", "<extra_id_1>User\n", "x" * 5000]
TURNS = ["<|im_start|>assistant\n", "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "\u202e", "é" * 3]
TEXT = st.one_of(st.text(st.characters(), max_size=12), st.sampled_from(ODD), st.sampled_from(TURNS))
NUMBER = st.one_of(st.integers(-3, 5), st.floats(), st.sampled_from([True, 10**400, 2**63, -(2**70), 1e308, -1e308]))
LEAF = st.one_of(st.none(), TEXT, NUMBER)
JUNK = st.recursive(LEAF, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3), max_leaves=5)
ROLE = st.sampled_from(["user", "assistant", "system", "tool"]) | JUNK


def rarely(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any] = JUNK) -> st.SearchStrategy[Any]:
    """Mostly good: a file of junk alone never gets past its first row."""
    # Scrambled, as hypothesis draws ends of a range and the constants of this file more often than other numbers.
    return st.integers(0, 2**30).flatmap(lambda draw: bad if (draw * 2654435761 >> 9) % 50 == 7 else good)


def message(role: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({"role": rarely(role, ROLE), "content": rarely(TEXT)})


def turns(role: str) -> st.SearchStrategy[Any]:
    return rarely(st.lists(message(st.just(role)), min_size=1, max_size=1))


IDS = rarely(st.lists(st.integers(0, 9), max_size=4))
SMALL = rarely(st.integers(0, 4), NUMBER)
SCORES = st.fixed_dictionaries({"ArmoRM": rarely(st.floats(-5, 5), NUMBER | JUNK)})
PROMPT = {"prompt_id": SMALL, "prompt": turns("user")}
ROWS = {
    Prompt: st.fixed_dictionaries(PROMPT),
    Completion: st.fixed_dictionaries(
        PROMPT
        | {"sample_id": SMALL, "completion": turns("assistant"), "token_ids": IDS, "scores": rarely(SCORES)}
        | {"finish_reason": rarely(st.sampled_from(["stop", "length"]))}
    ),
    Preference: st.fixed_dictionaries(
        {"chosen": turns("assistant") | TEXT, "rejected": turns("assistant") | TEXT},
        optional=PROMPT | {"chosen_score": SMALL, "rejected_score": SMALL, "chosen_token_ids": IDS, "score_chosen": SMALL},
    ),
}


def bytes_of(row: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """A file: rows, blank lines, rows that are cut, junk and bytes that are no text."""
    whole = row.map(lambda one: json.dumps(one).encode())
    cut = whole.map(lambda line: line[:-2]) | st.binary(max_size=8) | JUNK.map(lambda one: json.dumps(one).encode())
    line = rarely(rarely(whole, cut), st.just(b" "))
    start = rarely(st.just(b""), st.just(b"\xef\xbb\xbf"))
    return st.tuples(start, st.lists(line, max_size=8)).map(lambda two: two[0] + b"\n".join(two[1]))


@st.composite
def completions(draw: st.DrawFn) -> bytes:
    """A file of completions, two or three of each prompt, with a few wrong values put in."""
    lines = []
    for prompt_id in range(draw(st.integers(1, 3))):
        prompt = [{"role": "user", "content": draw(TEXT.filter(is_text))}]
        for sample_id in range(draw(st.integers(1, 3))):
            row = {
                "prompt_id": prompt_id, "sample_id": sample_id, "prompt": prompt, "token_ids": [sample_id],
                "completion": [{"role": "assistant", "content": draw(rarely(TEXT.filter(is_text), TEXT))}],
                "finish_reason": "stop", "scores": {"ArmoRM": draw(rarely(st.floats(-5, 5), NUMBER))},
            }  # fmt: skip
            if draw(rarely(st.just(False), st.just(True))):
                row[draw(st.sampled_from(sorted(row)))] = draw(JUNK)
            lines.append(json.dumps(row).encode())
    return b"\n".join(draw(st.permutations(lines)))


def ends(call: Callable[[], Any], file: str | None = None) -> Any:
    """The result; or None after an error of ours whose line names the file. Any other exception fails the test."""
    try:
        return call()
    except (DataError, UsageError) as error:
        line = one_line(str(error))
        line.encode()
        assert line and "\n" not in line
        if isinstance(error, DataError) and file is not None:
            assert re.search(re.escape(file), line), line
        return None


@contextmanager
def folder_of(**files: bytes) -> Iterator[Path]:
    """A folder with <name>.jsonl of these contents."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / f"{name}.jsonl").write_bytes(data)
        yield Path(folder)


@pytest.mark.parametrize("kind", [Prompt, Completion, Preference], ids=lambda kind: kind.__name__)
@fuzz
@given(data=st.data())
def test_records(kind: Any, data: st.DataObject) -> None:
    with folder_of(x=data.draw(bytes_of(ROWS[kind]))) as folder:
        records = ends(lambda: read_records(folder / "x.jsonl", kind.from_row), "x.jsonl")
        if records is not None:
            write_records(folder / "y.jsonl", records)
            assert read_records(folder / "y.jsonl", kind.from_row) == records


SELECTIONS = st.sampled_from([[], ["--selection=all_pairs"], ["--selection=top_random"]])


@fuzz
@given(train=completions(), test=completions() | bytes_of(ROWS[Completion]), selection=SELECTIONS)
def test_pairs(train: bytes, test: bytes, selection: list[str]) -> None:
    with folder_of(train=train, test=test) as folder:
        words = [f"--completions={folder}", f"--output_path={folder / 'out'}", "--ArmoRM=1", *selection]
        made = ends(lambda: generate_preferences(parse(PreferencesConfig, "x", words)) or True, ".jsonl")
        there = sorted(path.name for path in (folder / "out").glob("*"))
        assert there == (["manifest.json", "test.jsonl", "train.jsonl"] if made else [])
        for name in there[1:]:
            read_records(folder / "out" / name, Preference.from_row)


@pytest.fixture(scope="module")
def tokenizer(smollm: Path) -> Any:
    return chat.load_tokenizer(str(smollm))


MESSAGES = st.lists(message(st.sampled_from(["user", "assistant", "system"])), max_size=3)
CONVERSATION = st.tuples(MESSAGES, message(st.just("user"))).map(lambda parts: [*parts[0], parts[1]])


@fuzz
@given(rows=bytes_of(st.fixed_dictionaries({"prompt_id": st.integers(0, 2**40), "prompt": rarely(CONVERSATION)})))
def test_prompts_to_sample_from(tokenizer: Any, rows: bytes) -> None:
    with folder_of(test=rows) as folder:
        found = ends(lambda: read_prompts(folder, True, None)["test"], "test.jsonl")
        made = found and ends(lambda: render(tokenizer, found, folder / "test.jsonl", 64), "test.jsonl")
        if made:
            rendered, rejects = made
            assert len(found) == len(rendered) + len(rejects)
            assert all(one_line(reject["reason"]).encode() for reject in rejects)
            end = chat.end_of_turn_id(tokenizer)
            for one in rendered:
                # Special tokens in a text end no turn: as many turns end as with texts that name none.
                plain = [{**message, "content": "x"} for message in one.prompt.prompt]
                assert one.token_ids.count(end) == chat.prompt_token_ids(tokenizer, plain).count(end)
                assert len(one.token_ids) <= 64


@fuzz
@given(rows=bytes_of(ROWS[Preference]))
def test_training_data(tokenizer: Any, rows: bytes) -> None:
    with folder_of(train=rows) as folder:
        found = ends(lambda: load_split(DataSettings(str(folder)), "train")[0], "train.jsonl")
        if found is not None:
            pairs, counts = tokenise(found, tokenizer, 64)
            left_out = ("prompt too long", "template refuses", "empty answer", "equal answers")
            assert len(found) == len(pairs) + sum(counts[reason] for reason in left_out)
            assert all(pair.chosen and pair.rejected and len(pair) <= 64 for pair in pairs)


@fuzz
@given(data=st.data())
def test_flags(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(readme.CONFIGS.values())))
    names = st.sampled_from([*kind.__dataclass_fields__, "nothing", "ultrafeedback_verbosity"])
    odd = ["true", "auto", "²", "a=b", "a=nan", "9" * 4301, "9" * 30, "\udcff", "none"]
    values = st.one_of(TEXT, NUMBER.map(str), st.sampled_from(odd))
    words = [f"--{name}={value}" for name, value in data.draw(st.lists(st.tuples(names, values), max_size=5))]
    required = {"save_path", "model_path", "output_path", "dataset_path"}
    words += [f"--{name}=x" for name in required & set(kind.__dataclass_fields__)]
    try:
        ends(lambda: parse(kind, "x", words))
    except SystemExit as stop:
        if stop.code != 2:
            raise


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_surrogate_pair_is_refused_and_a_byte_order_mark_is_no_text(tokenizer, tmp_path, text):
    with pytest.raises(ValueError):
        chat.prompt_token_ids(tokenizer, [{"role": "user", "content": text}])
    path, row = tmp_path / "train.jsonl", {"prompt": "x", "chosen": "a", "rejected": "y"}
    path.write_text("\n" + json.dumps(row | {"chosen": text}))
    with pytest.raises(DataError, match=r'row 2: field "chosen" '):
        load_split(DataSettings(str(tmp_path)), "train")
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode())
    assert len(load_split(DataSettings(str(tmp_path)), "train")[0]) == 1

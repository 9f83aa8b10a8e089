"""datasets/embedded_prompts out of the committed prompts."""

import json
from pathlib import Path

import pytest

from drdpo.assets.prompts import make_prompts, prompts_are_made
from drdpo.errors import DataError
from drdpo.folder import read_manifest
from drdpo.records import Prompt, read_records


def _row(number: int, text: str = "Why?") -> str:
    return json.dumps({"prompt_id": number, "category": "facts", "prompt": [{"role": "user", "content": text}]}) + "\n"


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    folder = tmp_path / "committed"
    folder.mkdir()
    (folder / "train.jsonl").write_text(_row(0) + _row(1, "How?"))
    (folder / "test.jsonl").write_text(_row(1000, "Where?"))
    return folder


def test_plain_records_and_a_manifest(committed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    assert not prompts_are_made(folder, committed)
    make_prompts(folder, committed)
    assert prompts_are_made(folder, committed)
    assert json.loads((folder / "test.jsonl").read_text()) == {
        "prompt_id": 1000,
        "prompt": [{"role": "user", "content": "Where?"}],
    }
    facts = read_manifest(folder)["assets"]
    assert facts["count"] == {"train": 2, "test": 1}
    assert facts["categories"] == {"train": {"facts": 2}, "test": {"facts": 1}}
    (committed / "train.jsonl").write_text(_row(0))
    assert not prompts_are_made(folder, committed), "changed prompts are written again"


@pytest.mark.parametrize(
    ("line", "message"),
    [(_row(0), r'train\.jsonl, row 3: field "prompt_id" repeats'), ('{"prompt_id": 2}\n', 'row 3: .*"prompt"')],
)
def test_a_bad_row_leaves_nothing(committed: Path, tmp_path: Path, line: str, message: str) -> None:
    with (committed / "train.jsonl").open("a") as stream:
        stream.write(line)
    with pytest.raises(DataError, match=message):
        make_prompts(tmp_path / "datasets" / "prompts", committed)
    assert not list((tmp_path / "datasets").iterdir())


def test_the_real_prompts(tmp_path: Path) -> None:
    make_prompts(tmp_path / "prompts")
    train = read_records(tmp_path / "prompts" / "train.jsonl", Prompt.from_row)
    test = read_records(tmp_path / "prompts" / "test.jsonl", Prompt.from_row)
    assert len(train) >= 128
    assert len(test) >= 32
    assert not {prompt.prompt_id for prompt in train} & {prompt.prompt_id for prompt in test}

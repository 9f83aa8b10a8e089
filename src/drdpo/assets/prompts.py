"""datasets/embedded_prompts: the prompts that were written for this repository, as plain prompt records."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from drdpo.folder import atomic_folder, read_manifest, write_manifest
from drdpo.records import SPLITS, Prompt, check_unique, read_records, read_rows, write_records

COMMITTED = Path(__file__).parent / "prompts"


def prompts_are_made(folder: Path, committed: Path = COMMITTED) -> bool:
    """Does `folder` hold what make_prompts would write?"""
    before = read_manifest(folder).get("assets", {}).get("made_by")
    return all((folder / f"{split}.jsonl").is_file() for split in SPLITS) and before == _made_by(committed)


def make_prompts(folder: Path, committed: Path = COMMITTED) -> None:
    """Write `folder/{train,test}.jsonl` and its manifest, whole or not at all.

    Raises:
        DataError: a committed file is missing or has a bad row.
    """
    facts: dict[str, Any] = {"licence": "MIT, written for this repository", "count": {}, "categories": {}}
    with atomic_folder(folder) as aside:
        for split in SPLITS:
            source = committed / f"{split}.jsonl"
            prompts = read_records(source, Prompt.from_row)
            check_unique(source, ((prompt.prompt_id,) for prompt in prompts), '"prompt_id"')
            facts["count"][split] = write_records(aside / f"{split}.jsonl", prompts)
            facts["categories"][split] = Counter(str(row.get("category")) for _, row in read_rows(source))
        write_manifest(aside, "assets", _made_by(committed), **facts)


def _made_by(committed: Path) -> dict[str, Any]:
    files = (committed / f"{split}.jsonl" for split in SPLITS)
    content = b"".join(file.read_bytes() for file in files if file.is_file())
    return {"source": hashlib.sha256(content).hexdigest()[:32]}

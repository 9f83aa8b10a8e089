"""What the sampling step leaves in <save_path>/sampled: completions of a split, rejects, the manifest."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drdpo import chat
from drdpo.errors import DataError
from drdpo.folder import already_made, owner_of, read_manifest, write_manifest
from drdpo.generation.engines.base import Sample, Sampling
from drdpo.generation.part import PartFile
from drdpo.generation.prompts import Reject, RenderedPrompt
from drdpo.records import Completion, Prompt, read_rows, write_records, write_rows

Blocks = dict[int, list[RenderedPrompt]]
"""Number of the block -> its prompts, in the order of the file."""


@dataclass(frozen=True)
class Split:
    """One split on its way through the step; `made_by` is what its samples depend on."""

    name: str
    file: Path
    result: Path
    made_by: dict[str, Any]
    prompts: list[Prompt]

    @property
    def step(self) -> str:
        """Name of the split's entry in the manifest."""
        return f"sample {self.name}"

    @property
    def part(self) -> Path:
        """Its part file."""
        return self.result.parent / f".{self.name}.part.jsonl"

    def with_engine(self, engine: str) -> "Split":
        """The split with --engine=auto settled."""
        return dataclasses.replace(self, made_by={**self.made_by, "engine": engine})


def finished(split: Split, overwrite: bool) -> bool:
    """Are the split's results there, made with the same flags, model and prompts? Then it says so.

    Raises:
        UsageError: other flags, another model or other prompts made them.
    """
    if split.made_by["engine"] == "auto":  # whichever it was then
        before = read_manifest(split.result.parent).get(split.step, {}).get("made_by", {})
        split = split.with_engine(before.get("engine", "auto"))
    if not already_made(split.result.parent, split.step, split.made_by, [split.result], overwrite):
        return False
    if owner_of(split.result.parent) is None:
        split.part.unlink(missing_ok=True)  # of a run that was killed after the split's file was there
    print(f"{split.result} is there already, made with these flags, model and prompts; skipped", flush=True)
    return True


def write_results(
    split: Split,
    blocks: Blocks,
    part: PartFile,
    rejects: list[Reject],
    sampling: Sampling,
    tokenizer: Any,
    facts: dict[str, Any],
) -> None:
    """Write rejects, manifest, then the split's file, whole. Killed in between, the next run ends it from the part file.

    Args:
        split: what was sampled.
        blocks: its prompts, every one with samples in `part`.
        part: the finished samples; removed at the end.
        rejects: prompts that were not sampled.
        sampling: how the samples were to end.
        tokenizer: for their text.
        facts: for the manifest.

    Raises:
        DataError: no prompt has usable completions.
    """
    bad = [reject for number, block in blocks.items() for reject in _bad(split, block, part.read(number), sampling)]
    rejects = sorted([*rejects, *bad], key=lambda reject: reject.row)
    if len(rejects) == len(split.prompts):
        raise DataError(f"{split.file}: no prompt gave usable completions; row {rejects[0].row}: {rejects[0].reason}")
    skip = {reject.prompt_id for reject in rejects}
    counts = {"prompts": len(split.prompts), "rejected": len(rejects), "completions": 0, "tokens": 0, "stop": 0}
    for completion in _completions(blocks, part, skip, tokenizer):
        counts["completions"] += 1
        counts["tokens"] += len(completion.token_ids)
        counts["stop"] += completion.finish_reason == "stop"
    split.result.unlink(missing_ok=True)  # results of other flags, under --overwrite=true
    _write_rejects(split, rejects)
    write_manifest(split.result.parent, split.step, split.made_by, counts=counts, **facts)
    write_records(split.result, _completions(blocks, part, skip, tokenizer))
    part.remove()
    print(f"{split.result}: {json.dumps(counts)}", flush=True)


def _write_rejects(split: Split, rejects: list[Reject]) -> None:
    """Write the split's rejects beside those of the other split."""
    path = split.result.parent / "rejects.jsonl"
    before = [row for _, row in read_rows(path)] if path.is_file() else []
    others = [row for row in before if Path(str(row.get("file"))).name != split.file.name]
    write_rows(path, [*others, *(dataclasses.asdict(reject) for reject in rejects)])


def _bad(
    split: Split, block: list[RenderedPrompt], samples: dict[int, list[Sample]], sampling: Sampling
) -> Iterator[Reject]:
    """Prompts with a sample that the engine did not end properly; a prompt has all its n completions or none."""
    for prompt in block:
        for sample in samples[prompt.prompt.prompt_id]:
            if sample.finish_reason not in ("stop", "length"):
                reason = f"the engine ended a completion by {sample.finish_reason!r}"
            elif sample.finish_reason == "stop" and not set(sample.token_ids[-1:]) & set(sampling.stop_token_ids):
                reason = "the engine ended a completion by 'stop' without a stop token"
            else:
                continue
            yield Reject(str(split.file), prompt.row, prompt.prompt.prompt_id, reason)
            break


def _completions(blocks: Blocks, part: PartFile, skip: set[int], tokenizer: Any) -> Iterator[Completion]:
    """Completions in the order of the prompts, of one block at a time."""
    for number, block in blocks.items():
        samples = part.read(number)
        for prompt in (prompt.prompt for prompt in block if prompt.prompt.prompt_id not in skip):
            for sample_id, sample in enumerate(samples[prompt.prompt_id]):
                answer = [{"role": "assistant", "content": chat.decode(tokenizer, sample.token_ids)}]
                yield Completion(prompt.prompt_id, sample_id, prompt.prompt, answer, sample.token_ids, sample.finish_reason)

"""Flags of src/inspect_data.py."""

from dataclasses import dataclass

from drdpo.flags import flag, positional, require

NARROWEST = 40


@dataclass(frozen=True)
class InspectConfig:
    """A look at the data, whichever step made it."""

    path: str = positional(
        "JSON-lines file of prompts, completions, preference pairs, ratings, set-aside rows (rejects.jsonl) or training "
        "metrics (metrics.jsonl), or a folder of them"
    )
    samples: int = flag("rows of each file to print; 0 is none", 3)
    seed: int = flag("seed of the choice of these rows", 42)
    tokenizer: str | None = flag(
        "Hugging Face folder or hub id: lengths in its tokens, by its chat template (default: answers in token_ids where "
        "all rows have them, all else in characters)",
        None,
    )
    output_path: str | None = flag(
        "folder for the pictures (default: one in outputs/inspection named after the path; never the data's own)",
        None,
    )
    width: int = flag("columns of the printed samples", 100)

    def __post_init__(self) -> None:
        require(self.samples >= 0, f"--samples={self.samples} must not be negative")
        require(self.seed >= 0, f"--seed={self.seed} must not be negative")
        require(self.width >= NARROWEST, f"--width={self.width} must be at least {NARROWEST}")

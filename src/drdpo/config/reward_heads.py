"""Flags of src/fit_reward_heads.py."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from drdpo.flags import flag, require

HELPSTEER_COLUMNS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


@dataclass(frozen=True)
class FitHeadsConfig:
    """Fit the reward heads of a multi-objective reward model on a frozen backbone."""

    MAY_BE_EMPTY: ClassVar[tuple[str, ...]] = ("verbosity",)

    backbone: str = flag("Hugging Face folder of a Llama-family model")
    ratings: str = flag(
        "JSON lines {prompt, response, <column>: rating 0-4, ...}; answers to one prompt are paired for the gate"
    )
    validation: str = flag("held-out ratings of the same form; used for the printed figures only")
    output_path: str = flag("folder for heads.safetensors, config.json and README.md; give an empty one or an earlier fit")
    objectives: list[str] = flag(
        "objectives to fit, NAME=COLUMN words", [f"helpsteer-{column}={column}" for column in HELPSTEER_COLUMNS]
    )
    quality: list[str] = flag("columns whose sum says which of two answers is better", ["helpfulness", "correctness"])
    verbosity: str = flag(
        "objective whose rank correlation the transform takes out of the others; '' is none", "helpsteer-verbosity"
    )
    chat_template: str | None = flag(
        "file of the reward model's chat template (default: the backbone tokenizer's own)", None
    )
    max_len: int = flag("a longer conversation, in tokens, is left out and counted", 2048)
    batch_tokens: int = flag("tokens, padding included, in one batch", 4096)
    dtype: Literal["bfloat16", "float32"] = flag("precision of the backbone; heads are float32", "bfloat16")
    gating_hidden_dim: int = flag("width of the gate's hidden layers", 64)
    gating_n_hidden: int = flag("hidden layers of the gate", 1)
    gating_temperature: float = flag("temperature of the gate's softmax", 10.0)
    gate_steps: int = flag("most AdamW steps of the gate, each on all pairs; it stops where held-out prompts say so", 300)
    attribution: str = flag("one line for the card: whose ratings, under which licence", "not stated")
    cache: str | None = flag("folder that keeps the backbone's features between runs", None)
    seed: int = flag("seed of the validation folds and of the gate", 42)

    def objective_columns(self) -> dict[str, str]:
        """{objective: column}, in head order."""
        columns: dict[str, str] = {}
        for word in self.objectives:
            name, separator, column = word.partition("=")
            require(bool(separator and name and column), f"--objectives {word}: write NAME=COLUMN")
            require(name not in columns and name != "ArmoRM", f"--objectives {word}: {name} is given twice or taken")
            columns[name] = column
        return columns

    def __post_init__(self) -> None:
        columns = self.objective_columns()
        require(bool(columns), "--objectives: at least one NAME=COLUMN")
        for name in self.quality:
            require(name in columns.values(), f"--quality {name}: no objective is fitted on this column")
        require(bool(self.quality), "--quality: at least one column")
        require(
            self.verbosity in ("", *columns),
            f"--verbosity={self.verbosity}: not among the objectives; give one of them, or --verbosity=",
        )
        for name in ("max_len", "batch_tokens", "gating_hidden_dim", "gate_steps"):
            require(getattr(self, name) >= 1, f"--{name}={getattr(self, name)} must be at least 1")
        require(self.gating_n_hidden >= 0, f"--gating_n_hidden={self.gating_n_hidden} must not be negative")
        require(self.gating_temperature > 0, f"--gating_temperature={self.gating_temperature} must be positive")

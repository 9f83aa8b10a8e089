"""Flags of src/fit_reward_heads.py."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from drdpo.flags import flag, require
from drdpo.objectives import GATED_SCORE

HELPSTEER_COLUMNS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


@dataclass(frozen=True)
class FitHeadsConfig:
    """Fit the reward heads of a multi-objective reward model on a frozen backbone."""

    MAY_BE_EMPTY: ClassVar[tuple[str, ...]] = ("verbosity", "preferences_objective")

    backbone: str = flag("Hugging Face folder of a Llama-family model")
    ratings: str = flag(
        "JSON lines {prompt, response, <column>: rating 0-4, ...}; answers to one prompt are paired for the gate"
    )
    validation: str = flag("held-out ratings of the same form; used for the printed figures only")
    output_path: str = flag("folder for heads.safetensors, config.json and README.md; give an empty one or an earlier fit")
    preferences: str | None = flag(
        "JSON lines {prompt, chosen, rejected, score_chosen, score_rejected}, texts or message lists, the scores in the row "
        "or its metadata: more pairs for the gate, and an objective",
        None,
    )
    preferences_validation: str | None = flag("held-out preferences of the same form; for the printed figures only", None)
    preferences_objective: str = flag(
        "objective that is fitted on the preferences' scores; '' is none", "ultrafeedback-overall_score"
    )
    objectives: list[str] = flag(
        "objectives to fit, NAME=COLUMN words", [f"helpsteer-{column}={column}" for column in HELPSTEER_COLUMNS]
    )
    highest_rating: float = flag("ratings run from 0 to this; HelpSteer2's do to 4", 4.0)
    highest_score: float = flag("the preferences' scores run from 0 to this; UltraFeedback's are 1 to 10", 10.0)
    drop_weak: bool = flag(
        "drop an objective that, over the folds of the training prompts, does not clearly beat a constant and length",
        True,
    )
    quality: list[str] = flag("columns whose sum says which of two answers is better", ["helpfulness", "correctness"])
    verbosity: str = flag(
        "objective whose rank correlation the transform takes out of the others; '' is none", "helpsteer-verbosity"
    )
    layers: list[int] = flag(
        "candidates for the backbone's depth, one chosen on the training answers (default: its full depth)", []
    )
    pooling: Literal["auto", "last", "mean"] = flag(
        "what stage 1 reads: the last token's hidden state, the mean over the answer, or what does better in training",
        "auto",
    )
    chat_template: str | None = flag(
        "file of the reward model's chat template (default: the backbone tokenizer's own)", None
    )
    max_len: int = flag("a longer conversation, in tokens, is left out and counted", 2048)
    batch_tokens: int = flag("tokens, padding included, in one batch", 4096)
    dtype: Literal["auto", "bfloat16", "float32"] = flag(
        "precision of the backbone; heads are float32; 'auto' is bfloat16 on GPUs and on CPUs with fast bfloat16 products "
        "(AVX512_BF16, AMX), else float32",
        "auto",
    )
    gating_hidden_dim: int = flag("width of the gate's hidden layers", 64)
    gating_n_hidden: int = flag("hidden layers of the gate", 1)
    gating_temperature: float = flag("temperature of the gate's softmax", 10.0)
    gate_steps: int = flag("most AdamW steps of the gate, each on all pairs; it stops where held-out prompts say so", 300)
    attribution: str = flag("for the card: whose ratings and preferences, under which licence", "not stated")
    remarks: str | None = flag("for the card: what its reader should know and the figures do not show", None)
    cache: str | None = flag("folder that keeps the backbone's features between runs", None)
    seed: int = flag("seed of the validation folds and of the gate", 42)

    def objective_columns(self) -> dict[str, str]:
        """{objective: column}, in head order."""
        columns: dict[str, str] = {}
        for word in self.objectives:
            name, separator, column = word.partition("=")
            require(bool(separator and name and column), f"--objectives {word}: write NAME=COLUMN")
            require(
                name not in (*columns, self.preferences_objective, GATED_SCORE),
                f"--objectives {word}: {name} is given twice or taken",
            )
            columns[name] = column
        return columns

    def objective_names(self) -> list[str]:
        """Every objective to fit, in head order: those of the ratings, then that of the preferences."""
        scored = self.preferences is not None and self.preferences_objective != ""
        return [*self.objective_columns(), *([self.preferences_objective] if scored else [])]

    def __post_init__(self) -> None:
        columns = self.objective_columns()
        require(bool(columns), "--objectives: at least one NAME=COLUMN")
        for name in self.quality:
            require(name in columns.values(), f"--quality {name}: no objective is fitted on this column")
        require(bool(self.quality), "--quality: at least one column")
        require(
            self.verbosity in ("", *self.objective_names()),
            f"--verbosity={self.verbosity}: not among the objectives; give one of them, or --verbosity=",
        )
        require(
            (self.preferences is None) == (self.preferences_validation is None),
            "--preferences and --preferences_validation go together: what is fitted is also tested",
        )
        require(
            self.preferences_objective != GATED_SCORE, f"--preferences_objective={GATED_SCORE}: the name of the gated score"
        )
        require(all(layer >= 1 for layer in self.layers), "--layers: they are counted from 1")
        for name in ("highest_rating", "highest_score"):
            require(getattr(self, name) > 0, f"--{name}={getattr(self, name)} must be positive")
        for name in ("max_len", "batch_tokens", "gating_hidden_dim", "gate_steps"):
            require(getattr(self, name) >= 1, f"--{name}={getattr(self, name)} must be at least 1")
        require(self.gating_n_hidden >= 0, f"--gating_n_hidden={self.gating_n_hidden} must not be negative")
        require(self.gating_temperature > 0, f"--gating_temperature={self.gating_temperature} must be positive")

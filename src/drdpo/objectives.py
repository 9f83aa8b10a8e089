"""ArmoRM's nineteen objectives (arXiv 2406.12845), in the order of its regression head, mapped by NAME.

Positions do not identify objectives: published lists differ from the head's order. Upstream writes names with
hyphens (`helpsteer-helpfulness`); command lines write them with underscores (`--helpsteer_helpfulness`).
"""

from drdpo.errors import UsageError

ARMORM_OBJECTIVES: tuple[str, ...] = (
    "helpsteer-helpfulness",
    "helpsteer-correctness",
    "helpsteer-coherence",
    "helpsteer-complexity",
    "helpsteer-verbosity",
    "ultrafeedback-overall_score",
    "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness",
    "ultrafeedback-honesty",
    "ultrafeedback-helpfulness",
    "beavertails-is_safe",
    "prometheus-score",
    "argilla-overall_quality",
    "argilla-judge_lm",
    "code-complexity",
    "code-style",
    "code-explanation",
    "code-instruction-following",
    "code-readability",
)

GATED_SCORE = "ArmoRM"
"""Name of the stage-2 score: the objectives mixed by the prompt's gate."""

PHANTOM_FLAG = "ultrafeedback_verbosity"
"""Listed in the paper's README, but no head of ArmoRM has this name."""


def flag_name(objective: str) -> str:
    """`code-instruction-following` -> `code_instruction_following`."""
    return objective.replace("-", "_")


FLAG_TO_OBJECTIVE: dict[str, str] = {flag_name(name): name for name in (*ARMORM_OBJECTIVES, GATED_SCORE)}


def objective_from_flag(flag: str) -> str:
    """The objective of a flag or argument.

    Args:
        flag: an objective in either spelling, e.g. `helpsteer_coherence` or `helpsteer-coherence`, or `ArmoRM`.

    Raises:
        UsageError: no such objective; the message lists the real names.
    """
    name = FLAG_TO_OBJECTIVE.get(flag_name(flag))
    if name is not None:
        return name
    if flag_name(flag) == PHANTOM_FLAG:
        raise UsageError(
            f"--{PHANTOM_FLAG} is listed in the paper's README, but ArmoRM has no such head. Its UltraFeedback heads are "
            + ", ".join(f for f in FLAG_TO_OBJECTIVE if f.startswith("ultrafeedback"))
            + "; for verbosity there is helpsteer_verbosity."
        )
    raise UsageError(f"unknown objective {flag!r}; the objectives are {', '.join(FLAG_TO_OBJECTIVE)}")

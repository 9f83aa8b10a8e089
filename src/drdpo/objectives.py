"""ArmoRM's nineteen objectives (arXiv 2406.12845), in the order of its regression head, mapped by NAME.

Positions do not identify objectives: published lists differ from the head's order. Upstream writes names with
hyphens (`helpsteer-helpfulness`); command lines write them with underscores (`--helpsteer_helpfulness`).
"""

import math
import re

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
    """The objective of a flag or argument in either spelling, e.g. `helpsteer_coherence` or `helpsteer-coherence`, or
    `ArmoRM`; raises UsageError, which lists the real names, if there is none."""
    if flag_name(flag) in FLAG_TO_OBJECTIVE:
        return FLAG_TO_OBJECTIVE[flag_name(flag)]
    if flag_name(flag) == PHANTOM_FLAG:
        heads = ", ".join(name for name in FLAG_TO_OBJECTIVE if name.startswith("ultrafeedback"))
        raise UsageError(
            f"--{PHANTOM_FLAG} is listed in the paper's README, but ArmoRM has no such head. Its UltraFeedback heads are "
            f"{heads}; for verbosity there is helpsteer_verbosity."
        )
    raise UsageError(f"unknown objective {flag!r}; the objectives are {', '.join(FLAG_TO_OBJECTIVE)}")


def mixtures_of(flag: str, words: list[str]) -> dict[str, dict[str, float]]:
    """{name: {objective: weight}} of the arguments NAME=OBJECTIVE:WEIGHT,... of a flag.

    Raises:
        UsageError: not of that form, or weights that are negative or do not sum to 1.
    """
    found = {}
    for word in words:
        name, equals, parts = word.partition("=")
        try:
            if not (equals and re.fullmatch(r"[\w-]+", name)):
                raise UsageError("write NAME=OBJECTIVE:WEIGHT,..., the name of letters, digits, _ and -")
            weights = _weights(parts)
        except UsageError as error:
            raise UsageError(f"{flag} {word}: {error}") from None
        if name in found:
            raise UsageError(f"{flag}: two mixtures have the same name")
        found[name] = weights
    return found


def _weights(parts: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in parts.split(","):
        spelled, colon, number = part.rpartition(":")
        objective = FLAG_TO_OBJECTIVE.get(spelled, spelled)
        if not (colon and objective) or objective in weights:
            raise UsageError("write NAME=OBJECTIVE:WEIGHT,..., each objective once")
        try:
            weights[objective] = float(number)
        except ValueError:
            raise UsageError(f"{number!r} is not a number") from None
        if not 0 <= weights[objective] < math.inf:
            raise UsageError("a weight is finite and not negative")
    if abs((total := sum(weights.values())) - 1) > 1e-6:
        raise UsageError(f"the weights sum to {total:g}, not to 1")
    return weights

"""The model card of fitted reward heads."""

import dataclasses
import shlex

from drdpo.config import FitHeadsConfig
from drdpo.rewards.heldout import ObjectiveFigures, PairFigures, objective_table, pair_table


def model_card(
    config: FitHeadsConfig,
    objectives: list[ObjectiveFigures],
    pairs: list[PairFigures],
    gate_steps: int,
    rows: tuple[int, int],
    left_out: tuple[int, int],
) -> str:
    """README.md: what the heads are, held-out figures, data, limits and the command that made them.

    Args:
        config: flags of the fit.
        objectives, pairs: held-out figures.
        gate_steps: after which the gate's fit stopped.
        rows: answers used, training and held-out.
        left_out: answers over max_len, training and held-out.
    """
    gated = next(f for f in pairs if f.name.startswith("ArmoRM"))
    return f"""# Reward heads in ArmoRM's layout

Heads of a multi-objective reward model (architecture: Wang et al. 2024, arXiv 2406.12845) on the frozen backbone
`{config.backbone}`. The backbone is not in this folder. A stage-1 score x stands for the rating 5 x - 0.5, from 0 to 4.

- Stage 1: per objective a ridge regression without intercept on the hidden state of the last token, penalty chosen by
  5 folds of the training prompts.
- Stage 2: identity transform with {_transform(config)}.
  Gate: {config.gating_n_hidden} hidden layer(s) of {config.gating_hidden_dim}, temperature {config.gating_temperature:g},
  fitted by a Bradley-Terry loss on pairs of answers to one prompt, better by {" + ".join(config.quality)}.
  {_gate(gate_steps)}
  Stage 2 was fitted on cross-fitted stage-1 rewards: each answer's by heads that had not seen its prompt.

## Held-out figures

{rows[1]} held-out answers, no prompt of which was used in fitting; {rows[0]} training answers. Answers whose conversation is
longer than {config.max_len} tokens were left out: {left_out[0]} of training, {left_out[1]} held out. The figures say
nothing about such. Errors are mean squares in rating points. The baselines are fitted on the training answers: their mean,
and a line through the log of the answer's length.

{objective_table(objectives)}

{_verdict(objectives)}

How often a score prefers, of two held-out answers to one prompt, the one that people rated higher in
{" + ".join(config.quality)} (a constant: 0.500), and its rank correlation with these ratings over all held-out answers:

{pair_table(pairs)}

{_use(config, gated)}"""


def _transform(config: FitHeadsConfig) -> str:
    if not config.verbosity:
        return "no debiasing"
    return (
        f"penalties in the row of {config.verbosity},\n  so that no objective's rank correlation with it is over 0.03 "
        "(its own column is empty)"
    )


def _use(config: FitHeadsConfig, gated: PairFigures) -> str:
    return f"""## What it is good for, and what not

Good for: running and testing the whole pipeline on a small machine with scores that carry some of people's judgement.
Not good for: research results, safety decisions, or comparing models. It is weak: the gated score agrees with people on
{gated.accuracy:.0%} of held-out pairs{_chance(gated)}. It reads English, and answers like those it was fitted on.

## Data

{config.attribution}

## Command

    {_command(config)}
"""


def _verdict(objectives: list[ObjectiveFigures]) -> str:
    weak = [f.objective for f in objectives if not f.beats_baselines]
    if not weak:
        return "Every objective beats both trivial baselines on the held-out answers."
    return (
        "No better than a trivial baseline (a constant, or the answer's length) on the held-out answers: "
        f"{', '.join(weak)}. Such a score adds nothing to what it is compared with."
    )


def _gate(steps: int) -> str:
    if steps:
        return f"The fit stopped after {steps} steps, where the loss on held-out training prompts was least."
    return "No step of the fit helped on held-out training prompts, so the gate weighs all objectives alike."


def _chance(figures: PairFigures) -> str:
    """What must be added where the interval does not exclude guessing."""
    low, high = figures.interval
    return ", which is not distinguishable from guessing" if low <= 0.5 <= high else ""


def _command(config: FitHeadsConfig) -> str:
    """The command line: required flags, and those that differ from their default. The cache changes nothing."""
    words = ["python src/fit_reward_heads.py"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name == "cache" or value == default:
            continue
        text = " ".join(shlex.quote(word) for word in value) if isinstance(value, list) else shlex.quote(str(value))
        words.append(f"--{field.name} {text}" if isinstance(value, list) else f"--{field.name}={text}")
    return " \\\n        ".join(words)

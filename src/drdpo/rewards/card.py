"""The model card of fitted reward heads."""

import dataclasses
import shlex
from dataclasses import dataclass

from drdpo.config import FitHeadsConfig
from drdpo.rewards.baselines import Claim
from drdpo.rewards.choice import Candidate
from drdpo.rewards.heads import FOLDS, LARGEST_SPEARMAN
from drdpo.rewards.heldout import GATED, FileFigures, ObjectiveFigures, PairFigures
from drdpo.rewards.rated import scales
from drdpo.rewards.stages import Heads
from drdpo.rewards.tables import choice_table, claim_table, objective_table, pair_table


@dataclass(frozen=True)
class Report:
    """All that is known of a fit."""

    config: FitHeadsConfig
    heads: Heads
    chosen: Candidate
    candidates: list[Candidate]
    claims: list[Claim]
    """Every objective against the baselines, over the folds of the training prompts."""
    objectives: list[ObjectiveFigures]
    files: list[FileFigures]
    notes: list[str]
    """What was masked or left out in the files."""
    depth: int
    """Layers of the backbone."""
    rows: tuple[int, int]
    """Answers used, training and held out."""
    left_out: tuple[int, int]
    """Answers over max_len, training and held out."""

    def figures(self) -> str:
        """The held-out figures."""
        parts = [objective_table(self.objectives), _verdict(self.objectives)]
        for file in self.files:
            parts.append(f"Pairs of {file.source}: {file.pairs}.\n\n{pair_table(file)}\n\n{_gated(file)}")
        return "\n\n".join(parts)


def model_card(report: Report) -> str:
    """README.md: what the heads are, held-out figures, data, limits and the command that made them."""
    config = report.config
    return f"""# Reward heads in ArmoRM's layout

Heads of a multi-objective reward model (architecture: Wang et al. 2024, arXiv 2406.12845) on the frozen backbone
`{config.backbone}`, of which they read the first {report.chosen.layer} of {report.depth} layers.
The backbone is not in this folder.

{_meanings(report)}

- Stage 1: per objective a ridge regression without intercept on {_reading(report.chosen.pooling)}
  after layer {report.chosen.layer} and the final norm. The penalty was chosen by {FOLDS} folds of the training prompts.
- Stage 2: identity transform with {_transform(report)}.
  Gate: {config.gating_n_hidden} hidden layer(s) of {config.gating_hidden_dim}, temperature {config.gating_temperature:g},
  fitted by a Bradley-Terry loss on pairs of answers to one prompt{_better(config)}.
  {_gate(report.heads.gate_steps)}
  Stage 2 was fitted on cross-fitted stage-1 rewards: each answer's by heads that had not seen its prompt.

## Data

{report.rows[0]} training answers; {report.rows[1]} held-out answers, no prompt of which was used in fitting.
Answers whose conversation is longer than {config.max_len} tokens were left out: {report.left_out[0]} of training,
{report.left_out[1]} held out. The figures say nothing about such.

{_list(report.notes)}{config.attribution}

## Choices, on the training answers alone

{_choice(report)}

An objective has a head only if, over the same folds, it beats a constant and a line through the log of the answer's length:
a smaller error than both, and a rank correlation above length's by more than two standard errors.{_dropped(report)}

{claim_table(report.claims)}
{_remarks(config)}
## Held-out figures

Errors are mean squares in rating points. The baselines are fitted on the training answers: their mean, and a line through
the log of the answer's length. Pair accuracy is how often a score prefers, of two held-out answers to one prompt, the one
that was rated higher (a constant: 0.500). Intervals resample prompts.

{report.figures()}

## What it is good for, and what not

Good for: running and testing the whole pipeline on a small machine with scores that carry some of people's judgement.
Not good for: research results, safety decisions, or comparing models. It reads English, and answers like those it was
fitted on. The difference of two gated scores is meant as the log-odds that the first answer is preferred.
{_expect(report.files)}

## Command

    {_command(config)}
"""


def _meanings(report: Report) -> str:
    """What a stage-1 score means, per scale."""
    lines: dict[str, list[str]] = {}
    for name, column in zip(report.heads.objectives, report.heads.columns, strict=True):
        lines.setdefault(scales(report.config)[column].meaning, []).append(name)
    return _list(
        [f"A score x of {', '.join(names)} stands for the rating {meaning}." for meaning, names in lines.items()]
    ).rstrip()


def _reading(pooling: str) -> str:
    return {"last": "the hidden state of the last token", "mean": "the mean of the answer's hidden states"}[pooling]


def _transform(report: Report) -> str:
    if not report.heads.debiased:
        dropped = bool(report.config.verbosity) and report.config.verbosity not in report.heads.objectives
        return f"no debiasing{f', since {report.config.verbosity} was dropped' if dropped else ''}"
    return (
        f"penalties in the row of {report.config.verbosity},\n  so that no objective's rank correlation with it is over "
        f"{LARGEST_SPEARMAN} (its own column is empty)"
    )


def _better(config: FitHeadsConfig) -> str:
    return f":\n  of the ratings, better by {' + '.join(config.quality)}" + (
        "; and the preferences" if config.preferences else ""
    )


def _gate(steps: int) -> str:
    if steps:
        return f"The fit stopped after {steps} steps, where the loss on held-out training prompts was least."
    return "No step of the fit helped on held-out training prompts, so the gate weighs all objectives alike."


def _choice(report: Report) -> str:
    if len(report.candidates) == 1:
        return "The layer and the pooling were given."
    return (
        "Candidates for layer and pooling, with the share of the ratings' variance that heads explain which were fitted\n"
        f"without the answer's prompt ({FOLDS} folds). Of those within one standard error of the best mean (of\n"
        "the difference, resampling prompts), the shallowest was taken; of its poolings, the better one.\n\n"
        + choice_table(report.candidates, report.chosen, report.config.objective_names())
    )


def _remarks(config: FitHeadsConfig) -> str:
    return f"\n{config.remarks}\n" if config.remarks else ""


def _dropped(report: Report) -> str:
    weak = [claim.against.objective for claim in report.claims if not claim.holds]
    if not weak:
        return " All do."
    return f" {'Dropped' if report.config.drop_weak else 'Kept by --drop_weak=false'}: {', '.join(weak)}."


def _verdict(objectives: list[ObjectiveFigures]) -> str:
    weak = [f.against.objective for f in objectives if not f.against.beats_baselines]
    if not weak:
        return "Every objective beats both trivial baselines on the held-out answers."
    return (
        "No better than a trivial baseline (a constant, or the answer's length) on the held-out answers: "
        f"{', '.join(weak)}. Such a score adds nothing to what it is compared with."
    )


def _gated(file: FileFigures) -> str:
    low, high = file.lead_interval
    return (
        f"Gated score less longer answer: {file.lead:+.3f} ({low:+.3f} to {high:+.3f}). "
        f"Bradley-Terry loss of the gated score: {file.loss:.3f} (guessing: 0.693).\n"
        f"Rank correlation with the answer's length, over these answers: {file.length_bias[0]:.3f} of the gated score, "
        f"{file.length_bias[1]:.3f} of the ratings."
    )


def _expect(files: list[FileFigures]) -> str:
    lines = []
    for file in files:
        gated = next(figures for figures in file.scores if figures.name == GATED)
        lines.append(f"On the pairs of {file.source} it agrees with the raters in {gated.accuracy:.0%}{_chance(gated)}.")
    return "\n".join(lines)


def _chance(figures: PairFigures) -> str:
    """What must be added where the interval does not exclude guessing."""
    low, high = figures.interval
    return ", which is not distinguishable from guessing" if low <= 0.5 <= high else f" ({low:.0%} to {high:.0%})"


def _list(lines: list[str]) -> str:
    return "".join(f"- {line}\n" for line in lines) + ("\n" if lines else "")


def _command(config: FitHeadsConfig) -> str:
    """The command line: required flags, and those that differ from their default. The cache changes nothing."""
    words = ["python src/fit_reward_heads.py"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name == "cache" or value == default:
            continue
        many = isinstance(value, list)
        text = " ".join(shlex.quote(str(word)) for word in value) if many else shlex.quote(str(value))
        words.append(f"--{field.name} {text}" if many else f"--{field.name}={text}")
    return " \\\n        ".join(words)

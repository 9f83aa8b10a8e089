"""Expected scores of policies on a fixed set of scored completions of their starting model, see drdpo.candidates.

Every policy is judged by the same candidates, so that what they share cancels in the differences: the intervals are those of
drdpo.evaluation.statistics, a bootstrap over prompts, paired over all policies, and over the checkpoints of a name.

Shape suffixes: N prompts, K candidates of a prompt, O kinds of score, S checkpoints of a policy, C candidates
of all prompts.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from drdpo import chat, distributed
from drdpo.candidates import Array, CandidateRow, Candidates, load_candidates, values
from drdpo.config.evaluation import EvaluatePolicyConfig
from drdpo.errors import DataError
from drdpo.evaluation.report import STYLE, interval, markdown_table, save_picture, text_table, write_report
from drdpo.evaluation.runs import parse_runs
from drdpo.evaluation.spider import run_styles
from drdpo.evaluation.statistics import Estimate, Observations, estimate, resample
from drdpo.folder import atomic_file, versions
from drdpo.machine import announce, settle
from drdpo.models import check_model, fingerprint
from drdpo.objectives import flag_name


@dataclass(frozen=True)
class PolicyValue:
    """What the candidates say of one policy, as in value.json; gains in standard deviations of the candidates' scores."""

    values: dict[str, float]
    """In the scores' own unit."""
    gains_sd: dict[str, Estimate]
    """Over the starting model, whose value is the plain mean; without scores that are all equal."""
    against_first_sd: dict[str, Estimate]
    """Difference of the gains from the first policy's; empty for that one."""
    ess: float
    """Mean effective sample size over prompts and checkpoints."""
    share_below_min_ess: float
    """Of prompts and checkpoints."""


def evaluate_policy(config: EvaluatePolicyConfig) -> None:
    """Write value.json, report.md and a picture; log-probs stay beside them, so that a rerun computes none.

    Raises:
        UsageError: a --policies argument that is not NAME=FOLDER, or a locked output folder.
        DataError: completions, a policy or its tokenizer are not usable.
    """
    folders = parse_runs(config.policies, "--policies")
    config, precision = settle(config)
    tokenizer = chat.load_tokenizer(config.reference, config.chat_template_kwargs)
    candidates = load_candidates(config.candidates, config.split, tokenizer, config.weights, config.max_prompts)
    for folder in dict.fromkeys([config.reference, *(str(place) for places in folders.values() for place in places)]):
        _check(folder, config, candidates)
    announce(precision)
    start_C = _logprobs(config.reference, "the starting model", config, candidates)
    ratios = {
        name: [candidates.table(_logprobs(str(place), name, config, candidates) - start_C) for place in places]
        for name, places in folders.items()
    }
    found = policy_values(candidates, ratios, config.min_ess, config.bootstrap, config.seed)
    numbers = {"candidates": {"path": str(candidates.path), "key": candidates.key, "prompts": len(candidates.prompts),
                              "completions": len(candidates.places), "sd": candidates.units, "note": candidates.note},
               "policies": {name: {"checkpoints": [str(place) for place in folders[name]], **asdict(value)}
                            for name, value in found.items()}}  # fmt: skip
    notes = [f"{candidates.path}: {candidates.note}"] if candidates.note else []
    notes += [
        f"{name}: {value.share_below_min_ess:.0%} of its prompts have an effective sample below {config.min_ess:g}: it has "
        "moved far from the starting model, and a few candidates decide its value there; sample it, or draw more candidates"
        for name, value in found.items()
        if value.share_below_min_ess
    ]
    files: dict[str, str | bytes] = {"value.json": json.dumps(numbers, indent=2) + "\n", **_picture(candidates, found)}
    files["report.md"] = value_report(candidates, found, config.reference, notes)
    inputs = {name: [fingerprint(place) for place in places] for name, places in folders.items()}
    inputs |= {"reference": [fingerprint(config.reference)], "candidates": [candidates.key]}
    print(text_table(*_table(candidates, found, "gains_sd")))
    for note in notes:
        print(f"note: {note}")
    write_report("evaluate_policy", config, inputs, files)


def _check(path: str, config: EvaluatePolicyConfig, candidates: Candidates) -> None:
    """Refuse a policy of which packed rows would give wrong log-probs, or whose tokenizer is not the starting model's."""
    model = check_model(path)
    about, longest = model.structure, candidates.longest
    problem = about.head or about.packing or ("the weights are stored quantized" if model.quantized else None)
    if problem is None and about.window and about.window < longest:
        problem = f"its attention has a sliding window of {about.window} tokens, and the longest candidate {longest}"
    if problem is None and about.learned and about.positions and about.positions < longest:
        problem = f"it has {about.positions} positions, and the longest candidate {longest} tokens"
    if problem:
        raise DataError(f"{path}: cannot be evaluated: {problem}")
    if path != config.reference and not candidates.read_alike(chat.load_tokenizer(path, config.chat_template_kwargs)):
        raise DataError(f"{path}: its tokenizer or chat template is not that of --reference={config.reference}")


def _logprobs(path: str, name: str, config: EvaluatePolicyConfig, candidates: Candidates) -> Array:
    """[C] log-probs of all candidates, from the output folder if they are there; finite."""
    from safetensors.numpy import load_file, save

    computed_by = [versions().get(package) for package in ("torch", "transformers")]
    arithmetic = (config.dtype, config.micro_batch_tokens, distributed.device().type)
    made_by = (fingerprint(path), candidates.key, *arithmetic, *computed_by)
    key = hashlib.sha256(repr(made_by).encode()).hexdigest()[:32]
    stored = Path(config.output_path) / "logprobs" / f"{key}.safetensors"
    if stored.is_file():
        try:
            logprob_C: Array = load_file(stored)["logprobs"]
        except Exception as error:
            raise DataError(f"{stored}: not a readable safetensors file ({error}); delete it") from error
    else:
        logprob_C = answer_logprobs(path, config.dtype, candidates, config.micro_batch_tokens, name)
        with atomic_file(stored, "wb") as stream:
            stream.write(save({"logprobs": logprob_C}, metadata={"model": path, "candidates": candidates.key}))
    candidates.table(logprob_C)
    return logprob_C


def answer_logprobs(path: str, dtype: str, candidates: Candidates, row_tokens: int, label: str) -> Array:
    """[C] log-probs of all candidates under a model that _check has passed; see Candidates.logprobs."""
    import torch
    from transformers import AutoModelForCausalLM

    from drdpo.kernels.linear_logprob import linear_logprob
    from drdpo.kernels.packed_attention import hidden_states, refusal

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(f"{path}: the model could not be loaded ({error})") from error
    model = model.to(distributed.device()).eval()
    weight_VD = model.get_output_embeddings().weight
    flash = weight_VD.is_cuda and refusal(model.config, weight_VD.device, weight_VD.dtype) is None

    def of_row(row: CandidateRow) -> torch.Tensor:
        states_A, targets_A, sequence_A = (torch.tensor(part, device=weight_VD.device) for part in row.packed.answers())
        logprob_A = linear_logprob(hidden_states(model.base_model, row.packed, flash)[states_A], weight_VD, targets_A)
        return logprob_A.new_zeros(len(row.indices_S)).index_add(0, sequence_A, logprob_A)

    with torch.inference_mode():
        logprobs_C = candidates.logprobs(of_row, row_tokens, f"log-probs, {label}")
    return logprobs_C.double().numpy()


def policy_values(
    candidates: Candidates, ratios: dict[str, list[Array]], min_ess: float, draws: int, seed: int
) -> dict[str, PolicyValue]:
    """The value of every policy.

    Args:
        ratios: {policy: log-ratios [N, K] of each of its S checkpoints}; the first is what the others are compared with.
        draws, seed: of the bootstrap.
    """
    names, first = candidates.names, next(iter(ratios))
    start_NK = np.where(np.isnan(ratios[first][0]), np.nan, 0.0)
    found = {
        name: [values(table_NK, candidates.scores_NKO) for table_NK in tables_NK]
        for name, tables_NK in {"": [start_NK], **ratios}.items()
    }
    tables = {
        (name, score): Observations(np.stack([values_NO[:, o] for values_NO, _ in runs], axis=1), (name,))
        for name, runs in found.items()
        for o, score in enumerate(names)
    }
    means, layout = resample(tables, {name: len(runs) for name, runs in found.items()}, draws, seed)
    # A mixture is of z-scores; scores that are all equal have no unit.
    units = {score: unit for score in names if (unit := candidates.units.get(score, 1.0))}

    def over(base: str, name: str) -> dict[str, Estimate]:
        return {score: estimate((means[name, score] - means[base, score]) / unit, layout) for score, unit in units.items()}

    results = {}
    for name in ratios:
        sizes_NS = np.stack([sizes_N for _, sizes_N in found[name]], axis=1)
        results[name] = PolicyValue(
            {score: float(means[name, score][0]) for score in names}, over("", name),
            over(first, name) if name != first else {}, float(sizes_NS.mean()), float((sizes_NS < min_ess).mean()),
        )  # fmt: skip
    return results


def _table(candidates: Candidates, found: dict[str, PolicyValue], kind: str) -> tuple[list[str], list[list[str]]]:
    """A row a policy; `kind` is gains_sd or against_first_sd."""
    header = ["policy", *map(flag_name, candidates.names), "effective sample"]
    return header, [
        [name, *(interval(getattr(value, kind).get(score)) for score in candidates.names), f"{value.ess:.2f}"]
        for name, value in found.items()
    ]


def value_report(candidates: Candidates, found: dict[str, PolicyValue], reference: str, notes: list[str]) -> str:
    """report.md."""
    first, *others = found
    parts = [
        "# Expected scores without sampling",
        f"{len(candidates.prompts)} prompts with {len(candidates.places)} scored completions of {reference}, "
        "weighted by pi / pi_ref of each policy. Gains are over the starting model, in standard deviations of its "
        "completions' scores, with 95% bootstrap intervals over prompts, and over checkpoints where a policy has several. "
        f"The effective sample is the mean over prompts; {candidates.scores_NKO.shape[1]} is the most.",
        markdown_table(*_table(candidates, found, "gains_sd")),
        "![Gains over the starting model](value.png)",
    ]
    if others:
        table = _table(candidates, {name: found[name] for name in others}, "against_first_sd")
        text = "In the same unit; all policies share prompts and completions."
        parts += [f"## Differences from {first}", text, markdown_table(*table)]
    return "\n\n".join(parts + [f"* {note}" for note in notes]) + "\n"


def _picture(candidates: Candidates, found: dict[str, PolicyValue]) -> dict[str, bytes]:
    """Gains with their intervals: a group of lines a score, a line a policy."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = [score for score in candidates.names if all(score in value.gains_sd for value in found.values())]
    looks = run_styles(["the starting model", *found])
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 1.2 + len(names) * (0.25 + 0.16 * len(found))), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color="#333333", linestyle="--", linewidth=1)
        for number, (policy, value) in enumerate(found.items()):
            gains = [value.gains_sd[score] for score in names]
            middle = [gain.value for gain in gains]
            ends = [[gain.value if end is None else end for end in (gain.low, gain.high)] for gain in gains]
            lengths = np.abs(np.subtract(ends, np.reshape(middle, (-1, 1)))).T
            places = np.arange(len(names)) + 0.7 * ((number + 0.5) / len(found) - 0.5)
            axes.errorbar(middle, places, xerr=lengths, linestyle="", markersize=4, label=policy, **looks[policy])
        axes.set_yticks(range(len(names)), [flag_name(score) for score in names])
        axes.invert_yaxis()
        axes.set_xlabel("gain over the starting model, sd of its completions")
        axes.legend(fontsize=8, frameon=False, loc="best")
        return save_picture(figure, "value", dpi=120)

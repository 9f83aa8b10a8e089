"""Scoring n completions of a prompt: one at a time, in padded batches, and packed with the prompt computed once.

    one      a forward pass per conversation, as SimPO's and Online-RLHF's annotation scripts do
    padded   conversations in their order, --padded_batch at a time, padded to the longest of them, as the authors do
    packed   ours: drdpo.scoring.armorm and drdpo.kernels.packed_attention

All three use the same model, heads, precision and conversations, and must agree, so only the arrangement differs. Each runs
in its own process (processes.py). Memory is the peak beyond what the loaded model takes.

Prompts have HelpSteer2's lengths (NVIDIA, CC-BY-4.0; quantiles of 500 prompts and 1000 answers below). Answers have
either HelpSteer2's lengths, or those of a small model limited to --short_answers tokens. Token ids are random: the time does
not depend on them.

    PYTHONPATH=src python benchmarks/scoring.py [--model=models/ArmoRM-SmolLM2] [--output=benchmarks/results/scoring]
"""

from argparse import Namespace
from pathlib import Path

import processes
from processes import ROOT, Facts, median, seconds_of

PROMPT_QUANTILES = (
    11, 15, 18, 20, 22, 25, 28, 31, 38, 42, 52, 63, 80, 106, 138, 217, 331, 402, 479, 569, 1849,
)  # fmt: skip
ANSWER_QUANTILES = (
    2, 23, 56, 94, 126, 165, 188, 223, 249, 276, 304, 327, 363, 396, 424, 462, 510, 567, 668, 847, 1572,
)  # fmt: skip
"""0%, 5%, ..., 100% of the lengths in tokens of SmolLM2's tokenizer, template included."""

WAYS = ("one", "padded", "packed")
LABELS = {"one": "one at a time", "padded": "padded batches", "packed": "packed, prompt once"}
COLORS = dict(zip(LABELS.values(), ("#999999", "#56B4E9", "#D55E00"), strict=True))


def conversations(model, n: int, prompts: int, short_answers: int):
    """Token ids of prompts * n conversations, and the prompt of each."""
    import numpy as np

    generator = np.random.default_rng(0)
    pattern = list(model.layout.gating_token_pattern)
    at = np.linspace(0, 1, len(PROMPT_QUANTILES))
    # Stratified, so that few prompts have the distribution's mean: one draw from each of `prompts` equal shares.
    shares = (generator.permutation(prompts) + generator.random(prompts)) / prompts
    lengths = np.interp(shares, at, PROMPT_QUANTILES).astype(int)
    answers = np.interp((generator.permutation(prompts * n) + 0.5) / (prompts * n), at, ANSWER_QUANTILES).astype(int)
    sequences, keys = [], []
    for number, length in enumerate(lengths):
        prompt = [*generator.integers(100, 40000, max(1, length - len(pattern))).tolist(), *pattern]
        for answer in answers[number * n : (number + 1) * n]:
            size = min(int(answer), short_answers) if short_answers else int(answer)
            sequences.append([*prompt, *generator.integers(100, 40000, size).tolist()])
            keys.append(number)
    return sequences, keys


def score(model, way: str, sequences, keys, batch_tokens: int, padded_batch: int):
    """Stage-2 scores in order, and how many tokens were computed."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from drdpo.kernels.packed_attention import PackedRow
    from drdpo.scoring.armorm import packed_batches

    scores, computed = [0.0] * len(sequences), 0
    if way == "packed":
        for batch in packed_batches(sequences, keys, batch_tokens):
            rows = [index for group in batch for index in group.rows]
            row = PackedRow([(group.shared, [sequences[index] for index in group.rows]) for group in batch])
            stage2 = model.score_packed(row, [model.span(sequences[index]) for index in rows]).stage2
            for index, value in zip(rows, stage2.tolist(), strict=True):
                scores[index] = value
            computed += len(row.token_ids)
        return scores, computed
    size = 1 if way == "one" else padded_batch
    device = next(model.parameters()).device
    for start in range(0, len(sequences), size):
        rows = [torch.tensor(sequence, device=device) for sequence in sequences[start : start + size]]
        ids_BT, mask_BT = (pad_sequence(part, True) for part in (rows, [torch.ones_like(row) for row in rows]))
        scores[start : start + size] = model(ids_BT, mask_BT).stage2.tolist()
        computed += ids_BT.numel()
    return scores, computed


def measure(arguments: Namespace) -> dict:
    """One way in this process: seconds, peak memory and the scores."""
    import torch

    from drdpo import distributed
    from drdpo.scoring.armorm import load_armorm
    from drdpo.scoring.score import use_cpu_well

    device = distributed.device()
    use_cpu_well(device)
    model = load_armorm(arguments.model, device, getattr(torch, arguments.dtype))
    sequences, keys = conversations(model, arguments.n, arguments.prompts, arguments.short)
    found = []

    def score_all() -> None:
        found.append(score(model, arguments.way, sequences, keys, arguments.batch_tokens, arguments.padded_batch))

    with torch.inference_mode():
        score(model, arguments.way, sequences[:2], keys[:2], arguments.batch_tokens, 2)  # the first call sets things up
        before, seconds = processes.memory_now(), seconds_of(score_all)
    peak, (scores, computed), tokens = processes.peak_gib() - before, found[0], sum(map(len, sequences))
    return {"seconds": seconds, "peak_gib": peak, "computed": computed, "scores": scores, "tokens": tokens}


def compare(n: int, short: int, arguments: Namespace) -> dict:
    """All ways on the same conversations, several rounds."""
    prompts = max(4, arguments.completions // n)
    rounds = processes.run_rounds(arguments, WAYS, n=n, prompts=prompts, short=short)
    apart = max(
        abs(one - other)
        for way in WAYS
        for one, other in zip(rounds[0]["one"]["scores"], rounds[0][way]["scores"], strict=True)
    )
    case = {"n": n, "prompts": prompts, "answers": f"at most {short} tokens" if short else "HelpSteer2's lengths"}
    case |= {"rounds": arguments.rounds, "largest_difference_of_scores": apart, "ways": {}}
    for way in WAYS:
        case["ways"][way] = {
            "completions_per_second": median(rounds, lambda r, way=way: prompts * n / r[way]["seconds"]),
            "packed_is_faster_by": median(rounds, lambda r, way=way: r[way]["seconds"] / r["packed"]["seconds"]),
            "peak_gib_over_the_model": max(r[way]["peak_gib"] for r in rounds),
            "tokens_computed": rounds[0][way]["computed"],
            "tokens_of_conversations": rounds[0][way]["tokens"],
        }
    return case


def draw(facts: Facts, path: Path) -> None:
    """Speed and memory, by case."""
    panels = [
        (title, form, {LABELS[way]: [scale * case["ways"][way][key] for case in facts["cases"]] for way in WAYS})
        for key, scale, form, title in (
            ("completions_per_second", 1, "%.1f", "completions per second"),
            ("peak_gib_over_the_model", 1024, "%.0f", "peak MiB over the model"),
        )
    ]
    names = [f"n = {case['n']}\n{case['answers']}" for case in facts["cases"]]
    processes.draw_bars(path, f"{facts['model']}, {facts['dtype']}, {facts['device']}", names, COLORS, panels)


def main() -> None:
    parser = processes.parser_of(__doc__)
    parser.add_argument("--model", default=str(ROOT / "models" / "ArmoRM-SmolLM2"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="of the backbone")
    parser.add_argument("--completions", type=int, default=80, help="of each case, about")
    parser.add_argument("--short_answers", type=int, default=64, help="longest answer of the second kind of case")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="--score_batch_tokens of the packed way")
    parser.add_argument("--padded_batch", type=int, default=8, help="conversations in a padded batch")
    arguments = processes.parse(parser, measure)
    cases = [compare(n, short, arguments) for short in (0, arguments.short_answers) for n in (2, 10)]
    rows = [{"answers": case["answers"], "n": case["n"], "way": LABELS[way], **found}
            for case in cases for way, found in case["ways"].items()]  # fmt: skip
    processes.show(rows)
    facts = {
        "device": processes.device_name(), "model": Path(arguments.model).name, "dtype": arguments.dtype,
        "batch_tokens": arguments.batch_tokens, "padded_batch": arguments.padded_batch, "cases": cases,
    }  # fmt: skip
    processes.write(arguments, facts, draw)


if __name__ == "__main__":
    main()

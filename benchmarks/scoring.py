"""Scoring n completions of a prompt: one at a time, in padded batches, and packed with the prompt computed once.

    one      a forward pass per conversation, as SimPO's and Online-RLHF's annotation scripts do
    padded   conversations in their order, --padded_batch at a time, padded to the longest of them, as the authors do
    packed   ours: drdpo.scoring.armorm and drdpo.kernels.packed_attention

All three use the same model, heads, precision and conversations, and must agree, so only the arrangement differs. Each runs
in its own process (peak memory is a property of the process), in turn, for several rounds, so that a drift of the machine's
speed affects all alike. Ratios are taken within a round; their median is reported.

Prompts have HelpSteer2's lengths (NVIDIA, CC-BY-4.0; quantiles of 500 prompts and 1000 answers below). Answers have
either HelpSteer2's lengths, or those of a small model limited to --short_answers tokens. Token ids are random: the time does
not depend on them.

    PYTHONPATH=src python benchmarks/scoring.py [--model=models/ArmoRM-SmolLM2] [--output=benchmarks/results/scoring]
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PROMPT_QUANTILES = (
    11, 15, 18, 20, 22, 25, 28, 31, 38, 42, 52, 63, 80, 106, 138, 217, 331, 402, 479, 569, 1849,
)  # fmt: skip
ANSWER_QUANTILES = (
    2, 23, 56, 94, 126, 165, 188, 223, 249, 276, 304, 327, 363, 396, 424, 462, 510, 567, 668, 847, 1572,
)  # fmt: skip
"""0%, 5%, ..., 100% of the lengths in tokens of SmolLM2's tokenizer, template included."""

WAYS = ("one", "padded", "packed")
LABELS = {"one": "one at a time", "padded": "padded batches", "packed": "packed, prompt once"}
COLORS = {"one": "#999999", "padded": "#56B4E9", "packed": "#D55E00"}


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
        spans = [model.span(sequence) for sequence in sequences[start : start + size]]
        rows = [torch.tensor(sequence, device=device) for sequence in sequences[start : start + size]]
        ids_BT = pad_sequence(rows, True)  # on the right, where no token of a causal model sees it
        hidden_BTD = list(zip(spans, model.model(input_ids=ids_BT, use_cache=False).last_hidden_state, strict=True))
        answers = [states_TD[span.first : span.last + 1].float() for span, states_TD in hidden_BTD]
        answer_BD = torch.stack([part.mean(dim=0) if model.layout.pooling == "mean" else part[-1] for part in answers])
        gate_BD = torch.stack([states_TD[span.gate] for span, states_TD in hidden_BTD])
        scores[start : start + size] = model.heads(answer_BD, gate_BD).stage2.tolist()
        computed += ids_BT.numel()
    return scores, computed


def measure(arguments: argparse.Namespace) -> dict:
    """One way in this process: seconds, peak memory over what the loaded model takes, and the scores."""
    import torch

    from drdpo import distributed
    from drdpo.scoring.armorm import load_armorm
    from drdpo.scoring.score import DTYPES, use_cpu_well

    device = distributed.device()
    use_cpu_well(device)
    model = load_armorm(arguments.model, device, DTYPES[arguments.dtype])
    sequences, keys = conversations(model, arguments.n, arguments.prompts, arguments.short)
    with torch.inference_mode():
        score(model, arguments.way, sequences[:2], keys[:2], arguments.batch_tokens, 2)  # the first call sets things up
        before = peak_gib(device)
        started = time.perf_counter()
        scores, computed = score(model, arguments.way, sequences, keys, arguments.batch_tokens, arguments.padded_batch)
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds, "peak_gib": peak_gib(device) - before, "computed": computed, "scores": scores,
        "tokens": sum(map(len, sequences)),
    }  # fmt: skip


def peak_gib(device) -> float:
    """Most memory so far, of the GPU or of the process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(way: str, n: int, prompts: int, short: int, arguments: argparse.Namespace) -> dict:
    """`measure` in a process of its own."""
    words = [
        sys.executable, __file__, f"--model={arguments.model}", f"--dtype={arguments.dtype}", f"--way={way}", f"--n={n}",
        f"--prompts={prompts}", f"--short={short}", f"--batch_tokens={arguments.batch_tokens}",
        f"--padded_batch={arguments.padded_batch}",
    ]  # fmt: skip
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(n: int, short: int, arguments: argparse.Namespace) -> dict:
    """All ways on the same conversations, several rounds."""
    prompts = max(4, arguments.completions // n)
    rounds = [{way: run(way, n, prompts, short, arguments) for way in WAYS} for _ in range(arguments.rounds)]
    apart = max(
        abs(one - other)
        for way in WAYS
        for one, other in zip(rounds[0]["one"]["scores"], rounds[0][way]["scores"], strict=True)
    )
    case = {"n": n, "prompts": prompts, "answers": f"at most {short} tokens" if short else "HelpSteer2's lengths"}
    case |= {"rounds": arguments.rounds, "largest_difference_of_scores": apart, "ways": {}}
    for way in WAYS:
        speed = [prompts * n / r[way]["seconds"] for r in rounds]
        case["ways"][way] = {
            "completions_per_second": statistics.median(speed),
            "packed_is_faster_by": statistics.median(r[way]["seconds"] / r["packed"]["seconds"] for r in rounds),
            "peak_gib_over_the_model": max(r[way]["peak_gib"] for r in rounds),
            "tokens_computed": rounds[0][way]["computed"],
            "tokens_of_conversations": rounds[0][way]["tokens"],
        }
    return case


def table(cases: list[dict]) -> str:
    """A line per case and way."""
    names = ("completions/s", "packed x", "peak MiB", "tokens computed")
    lines = ["{:<22} {:>3}  {:<20} {:>13} {:>9} {:>9} {:>16}".format("answers", "n", "way", *names)]
    for case in cases:
        for way, f in case["ways"].items():
            lines.append(
                f"{case['answers']:<22} {case['n']:>3}  {LABELS[way]:<20} {f['completions_per_second']:>13.2f} "
                f"{f['packed_is_faster_by']:>9.2f} {1024 * f['peak_gib_over_the_model']:>9.0f} {f['tokens_computed']:>16}"
            )
    return "\n".join(lines)


def draw(facts: dict, path: Path) -> None:
    """Bars of speed and of memory, by case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for panel, (key, scale, title) in enumerate(
        [
            ("completions_per_second", 1, "completions per second"),
            ("peak_gib_over_the_model", 1024, "peak MiB over the model"),
        ]
    ):
        axes = figure.add_subplot(1, 2, panel + 1)
        for shift, way in enumerate(WAYS):
            heights = [case["ways"][way][key] * scale for case in facts["cases"]]
            places = [number + 0.27 * (shift - 1) for number in range(len(heights))]
            bars = axes.bar(places, heights, 0.25, color=COLORS[way], label=LABELS[way])
            axes.bar_label(bars, fmt="%.1f" if panel == 0 else "%.0f", fontsize=8)
        axes.set_xticks(
            range(len(facts["cases"])), [f"n = {case['n']}\n{case['answers']}" for case in facts["cases"]], fontsize=8
        )
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"{facts['model']}, {facts['dtype']}, {facts['device']}", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "ArmoRM-SmolLM2"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="of the backbone")
    parser.add_argument("--completions", type=int, default=80, help="of each case, about")
    parser.add_argument("--short_answers", type=int, default=64, help="longest answer of the second kind of case")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="--score_batch_tokens of the packed way")
    parser.add_argument("--padded_batch", type=int, default=8, help="conversations in a padded batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=None, help="write OUTPUT.json and OUTPUT.png")
    for name in ("way", "n", "prompts", "short"):
        parser.add_argument(f"--{name}", type=str if name == "way" else int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments)))
        return
    import torch

    from drdpo.machine import resolve_dtype

    arguments.dtype = resolve_dtype(arguments.dtype).dtype
    cases = [compare(n, short, arguments) for short in (0, arguments.short_answers) for n in (2, 10)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, {platform.machine()}"
    facts = {
        "device": device, "model": Path(arguments.model).name, "dtype": arguments.dtype,
        "batch_tokens": arguments.batch_tokens, "padded_batch": arguments.padded_batch, "cases": cases,
    }  # fmt: skip
    print(table(cases))
    if arguments.output:
        path = Path(arguments.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
        draw(facts, path.with_suffix(".png"))


if __name__ == "__main__":
    main()

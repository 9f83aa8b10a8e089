"""WDPO's solvers and DPO: error of the penalty's parameter gradient, time and peak memory of a step.

    dpo          ours: packed, prompt once
    original     the authors' formulation: two padded rows, eager attention, double backward, full float32 logits, and the
                 reference model run at every step
    exact        --wdpo_solver=exact: padded rows, eager attention, double backward; "once": --wdpo_prompt=once
    tangent      --wdpo_solver=tangent: packed, prompt per sequence; "once": --wdpo_prompt=once

A step is the forward and backward pass of one pair of real text (the bundled prompts), half of each sequence answer.
Optimizer and engine cost the same for all and are excluded. Each solver runs in its own process (peak memory is a property
of the process), in turn, for several rounds, so that a drift of the machine's speed affects all alike; ratios are taken
within a round and their median is reported. On a CPU the time is that of all busy cores (wall time times their number),
which with OMP_NUM_THREADS=1 hardly depends on other work. Memory is the peak beyond weights and gradients. Errors are those
of the gradient of mean |grad l|^2 for all parameters against exact in float32 on the same weights, relative and as cosine:
in bfloat16 the median over --pairs pairs, the worst, and the lowest cosine; in float32 those of the first pair.

Accuracy is that of the tangent solver in bfloat16 alone, over more pairs and lengths: half of them plain text, half prompts
in the model's chat template with two answers of other text. The truth is the same solver in float32, which the suite
compares with a double backward in float64. Every pair is printed and written, with its `solver_condition`. The machine's
load does not change it; --only_accuracy measures nothing else and keeps the rest of OUTPUT.json.

    PYTHONPATH=src python benchmarks/wdpo.py [--model=models/SmolLM2-135M]
        [--tokens 256 512 1024] [--accuracy 64:16 128:8 256:6 512:4] [--output=benchmarks/results/wdpo]
"""

import argparse
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

WAYS = {
    "dpo": {"wdpo_rho": None},
    "original": {"packing": False},
    "exact": {"wdpo_solver": "exact"},
    "exact once": {"wdpo_solver": "exact", "wdpo_prompt": "once"},
    "tangent": {"wdpo_solver": "tangent"},
    "tangent once": {"wdpo_solver": "tangent", "wdpo_prompt": "once"},
}
PALETTE = ("#000000", "#999999", "#0072B2", "#56B4E9", "#D55E00", "#E69F00")
COLORS = dict(zip(WAYS, PALETTE, strict=True))
BETA = 0.01


def bundled_text(model: str):
    """The bundled prompts, their text as token ids, and the model's tokenizer."""
    from drdpo.chat import load_tokenizer

    rows = (ROOT / "src" / "drdpo" / "assets" / "prompts" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    prompts, tokenizer = [json.loads(row)["prompt"] for row in rows], load_tokenizer(model)
    text = "\n".join(turn["content"] for prompt in prompts for turn in prompt)
    return prompts, tokenizer(text, verbose=False)["input_ids"], tokenizer


def real_pairs(model: str, tokens: int, count: int):
    """Pairs of real text, two sequences of `tokens`, half of each prompt."""
    from drdpo.training.data import Pair

    (_, ids, _), half = bundled_text(model), tokens // 2
    starts = [number * (len(ids) - 3 * half) // max(1, count - 1) for number in range(count)]
    return [Pair(*(ids[start + part * half :][:half] for part in range(3))) for start in starts]


def chat_pairs(model: str, tokens: int, count: int):
    """Prompts in the model's chat template, and answers cut from the prompts' text that fill both sequences to `tokens`."""
    from drdpo.chat import end_of_turn_id, prompt_token_ids
    from drdpo.training.data import Pair

    prompts, text, tokenizer = bundled_text(model)
    short = [ids for ids in (prompt_token_ids(tokenizer, prompt) for prompt in prompts) if 4 * len(ids) <= 3 * tokens]
    pairs = []
    for number in range(count):
        prompt = short[number * (len(short) - 1) // max(1, count - 1)]
        length = tokens - len(prompt) - 1
        start = (2 * number + 1) * (len(text) - 2 * length) // (2 * count)
        answers = (text[start + part * length :][:length] for part in range(2))
        pairs.append(Pair(prompt, *([*answer, end_of_turn_id(tokenizer)] for answer in answers)))
    return pairs


@functools.cache
def prepare(way: str, dtype: str, checkpointing: bool, model: str, rho: float):
    """The flags of a way, and its policy."""
    import torch

    from drdpo.config.training import TrainConfig
    from drdpo.training.policy import load_policy, widen_values

    flags = {"wdpo_rho": rho, **WAYS[way]}
    config = TrainConfig(model_path=model, dataset_path="-", save_path="-", beta=BETA, dtype=dtype, train_batch_size=1,
                         gradient_checkpointing=checkpointing, **flags)  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(model, getattr(torch, dtype), config.attention, checkpointing, config.second_derivative).to(device)
    if config.wide_values:
        widen_values(policy)
    return config, policy, device


def original_loss(model, reference, batch, rho: float):
    """l + rho |grad_e l|^2 of one pair as the authors' code computes it."""
    import torch

    def logprobs(model, embeds):
        logits = model(inputs_embeds=embeds, attention_mask=batch.attention_mask_ST, use_cache=False).logits
        token = logits[:, :-1].float().log_softmax(-1).gather(2, batch.input_ids_ST[:, 1:, None]).squeeze(2)
        return (token * batch.answer_mask_ST[:, 1:]).sum(1)

    embeds = model.get_input_embeddings()(batch.input_ids_ST)
    with torch.no_grad():
        reference_S = logprobs(reference, reference.get_input_embeddings()(batch.input_ids_ST))
    chosen, rejected = logprobs(model, embeds) - reference_S
    loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected))
    (grad,) = torch.autograd.grad(loss, embeds, create_graph=True)
    return loss + rho * grad.square().sum()


def step_of(way: str, config, policy, device: str, pair):
    """A function that computes the scalar whose gradient is the step's."""
    import torch

    from drdpo.training.data import form_batch
    from drdpo.training.losses import method_of
    from drdpo.training.objective import objective

    batch = form_batch([pair], [0], config.packing).to(device)
    if way == "original":
        from transformers import AutoModelForCausalLM

        reference = AutoModelForCausalLM.from_pretrained(config.model_path, dtype=policy.language_model.dtype,
                                                         attn_implementation="eager").to(device).eval()  # fmt: skip
        return lambda: original_loss(policy.language_model, reference, batch, config.wdpo_rho)
    with torch.no_grad():
        reference_B2 = policy(batch).logprob_S[None]
    return lambda: objective(policy, batch, reference_B2, method_of(config), None).total


def memory(key: str) -> float:
    """GiB allocated by the process, or on a GPU by torch: now ("VmRSS") or at most ("VmHWM")."""
    import torch

    if torch.cuda.is_available():
        return (torch.cuda.memory_allocated() if key == "VmRSS" else torch.cuda.max_memory_allocated()) / 2**30
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 2**20


def flush_denormals() -> None:
    """As the trainer does; NumPy warns when it first measures a float type after that, so it measures them before."""
    import numpy as np
    import torch

    for dtype in (np.float32, np.float64):
        np.finfo(dtype)
    torch.set_flush_denormal(True)


def measure(arguments) -> dict[str, float]:
    """Seconds and peak memory of one way, in this process."""
    import torch

    flush_denormals()
    config, policy, device = prepare(
        arguments.way, arguments.dtype[0], arguments.checkpointing, arguments.model, arguments.rho
    )
    step = step_of(arguments.way, config, policy, device, real_pairs(arguments.model, arguments.tokens[0], 1)[0])
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter).fill_(0)
    gc.collect()
    before = memory("VmRSS")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds = []
    for _ in range(arguments.steps + 1):
        started = clock()
        step().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return {"seconds": min(seconds[1:] or seconds), "peak_gib": memory("VmHWM") - before}


def compare(ours, truth) -> dict[str, float]:
    """Relative error and cosine of two vectors."""
    import torch

    cosine = torch.nn.functional.cosine_similarity(ours, truth, dim=0)
    return {"error": float((ours - truth).norm() / truth.norm()), "cosine": float(cosine)}


def penalty_gradient(way: str, dtype: str, pair, arguments):
    """The gradient of mean |grad l|^2 for all parameters."""
    import torch

    rho = 1e12  # beside this radius the loss itself counts for nothing
    config, policy, device = prepare(way, dtype, True, arguments.model, rho)
    parts = torch.autograd.grad(step_of(way, config, policy, device, pair)(), list(policy.parameters()))
    return torch.cat([part.flatten().float().cpu() for part in parts]).double() / rho


def accuracy(arguments) -> list[dict]:
    """Error, cosine and solver_condition of every pair, in this process."""
    import torch

    from drdpo.training.data import form_batch
    from drdpo.training.losses import method_of
    from drdpo.training.objective import objective

    def gradient(dtype: str, pair) -> tuple:
        config, policy, device = prepare("tangent", dtype, True, arguments.model, 1e12)
        batch = form_batch([pair], [0], config.packing).to(device)
        with torch.no_grad():
            reference_B2 = policy(batch).logprob_S[None]
        part = objective(policy, batch, reference_B2, method_of(config), None)
        parts = torch.autograd.grad(part.total, list(policy.parameters()))
        return torch.cat([part.flatten().float().cpu() for part in parts]).double(), float(part.conditions_B)

    flush_denormals()
    rows = []
    for tokens, count in (map(int, words.split(":")) for words in arguments.accuracy):
        for kind, pairs_of in (("plain", real_pairs), ("chat", chat_pairs)):
            for number, pair in enumerate(pairs_of(arguments.model, tokens, count // 2)):
                truth, _ = gradient("float32", pair)
                ours, condition = gradient("bfloat16", pair)
                row = {"tokens": tokens, "text": kind, **compare(ours, truth), "solver_condition": condition}
                rows.append(row)
                print(f"{tokens:>6} {kind:<5} pair {number}: error {row['error']:.2%}, cosine {row['cosine']:.5f}, "
                      f"solver_condition {condition:.1f}", file=sys.stderr, flush=True)  # fmt: skip
    return rows


def errors(arguments) -> dict[str, dict[str, float]]:
    """Median and worst relative error and lowest cosine of every way over the pairs, in this process."""
    flush_denormals()
    found: dict[str, list[dict]] = {}
    for number, pair in enumerate(real_pairs(arguments.model, arguments.tokens[0], arguments.pairs)):
        truths = {
            once: penalty_gradient("exact once" if once else "exact", "float32", pair, arguments) for once in (False, True)
        }
        for dtype in arguments.dtype:
            for way in WAYS:
                if way == "dpo" or (dtype == "float32" and number > 0):
                    continue
                ours, truth = penalty_gradient(way, dtype, pair, arguments), truths[way.endswith("once")]
                found.setdefault(f"{way}, {dtype}", []).append(compare(ours, truth))
    return {name: summary(pairs) for name, pairs in found.items()}


def summary(pairs: list[dict]) -> dict[str, float]:
    """Median and worst error and lowest cosine."""
    errors = [pair["error"] for pair in pairs]
    return {"error": statistics.median(errors), "worst": max(errors), "cosine": min(pair["cosine"] for pair in pairs),
            "pairs": len(pairs)}  # fmt: skip


def run(arguments, allocator: dict[str, str] | None = None, **flags) -> dict:
    """A part in a process of its own, with these settings of the C library's allocator."""
    words = [sys.executable, __file__, f"--model={arguments.model}", f"--steps={arguments.steps}", f"--rho={arguments.rho}",
             f"--pairs={arguments.pairs}"]  # fmt: skip
    environment = os.environ | (allocator or {})
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [] if value is False else [f"--{name}", *map(str, value)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def allocated(arguments, way: str, setting: dict) -> float:
    """Peak GiB of one step. Every block of 64 KiB or more is returned to the system as soon as it is freed, at the
    price of time: glibc otherwise keeps several times as much resident in holes between tensors."""
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    once = argparse.Namespace(**vars(arguments) | {"steps": 0})
    return run(once, returned, way=[way], **setting)["peak_gib"]


def table_of(arguments, tokens: int, dtype: str, checkpointing: bool, measured: dict) -> list[dict]:
    """Rows of one setting."""
    ways = list(WAYS)
    if tokens > arguments.longest_double_backward:
        ways = [way for way in ways if way != "original" and not way.startswith("exact")]
    setting = {"tokens": [tokens], "dtype": [dtype], "checkpointing": checkpointing}
    rounds = [{way: run(arguments, way=[way], **setting) for way in ways} for _ in range(arguments.rounds)]
    rows = []
    held = {way: rounds[0][way]["peak_gib"] if on_gpu() else allocated(arguments, way, setting) for way in ways}
    for way in ways:
        row = {"tokens": tokens, "dtype": dtype, "checkpointing": checkpointing, "way": way}
        row["seconds"] = statistics.median(r[way]["seconds"] for r in rounds)
        row["time_ratio"] = statistics.median(r[way]["seconds"] / r["dpo"]["seconds"] for r in rounds)
        row["peak_gib"], row["memory_ratio"] = held[way], held[way] / held["dpo"]
        row["resident_gib"] = statistics.median(r[way]["peak_gib"] for r in rounds)
        rows.append(row | measured.get(f"{way}, {dtype}", {}))
        row = rows[-1]
        error = f"{row['error']:.2%} {row['worst']:.2%} {row['cosine']:.5f}" if "error" in row else ""
        print(
            f"{tokens:>6} {dtype:<9} {'yes' if checkpointing else 'no':<4} {way:<18} {row['seconds']:>8.2f} "
            f"{row['time_ratio']:>6.2f} {row['peak_gib']:>9.3f} {row['memory_ratio']:>6.2f} "
            f"{row['resident_gib']:>12.2f}  {error}",
            flush=True,
        )
    return rows


def draw(facts: dict, path: Path) -> None:
    """Time and memory in units of DPO's where errors are known, a panel a dtype; then memory over the sequences' length."""
    from matplotlib.figure import Figure

    rows = facts["rows"]
    dtypes, lengths = ([*dict.fromkeys(row[name] for row in rows)] for name in ("dtype", "tokens"))
    shown = max([row["tokens"] for row in rows if "error" in row] or lengths)
    panels = len(dtypes) + (len(lengths) > 1)
    figure = Figure(figsize=(5.6 * panels, 4.8), layout="constrained")
    for number, dtype in enumerate(dtypes):
        axes = figure.add_subplot(1, panels, number + 1)
        for row in rows:
            if (row["tokens"], row["dtype"]) != (shown, dtype):
                continue
            color, face = COLORS[row["way"]], "none" if row["checkpointing"] else COLORS[row["way"]]
            axes.scatter(row["time_ratio"], row["memory_ratio"], s=70, edgecolors=color, facecolors=face)
            error = f" {row['error']:.1%}" if "error" in row else ""
            place = (5, (-9, -18)[row["checkpointing"]] if row["way"].endswith("once") else 4)
            axes.annotate(row["way"] + error, (row["time_ratio"], row["memory_ratio"]), xytext=place,
                          textcoords="offset points", fontsize=7)  # fmt: skip
        axes.set(title=f"{dtype}, {shown} tokens a sequence", xlabel="time of a step / DPO's", yscale="log",
                 ylabel="peak memory over weights and gradients / DPO's")  # fmt: skip
        axes.margins(x=0.25)
    if len(lengths) > 1:
        axes = figure.add_subplot(1, panels, panels)
        for way in dict.fromkeys(row["way"] for row in rows):
            line = [row for row in rows if row["way"] == way and row["checkpointing"] and row["dtype"] == dtypes[0]]
            axes.plot([row["tokens"] for row in line], [row["peak_gib"] for row in line], "o-", color=COLORS[way], label=way)
        axes.set(title=f"{dtypes[0]}, with checkpointing", xlabel="tokens of a sequence", xscale="log", yscale="log",
                 ylabel="peak memory over weights and gradients, GiB")  # fmt: skip
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.legend(fontsize=7, frameon=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    title = (
        f"WDPO, {facts['model']}, {facts['device']}; hollow: with gradient checkpointing, against DPO with it; percentages: "
        "error of the penalty's gradient"
    )
    figure.suptitle(textwrap.fill(title, 85 * panels), fontsize=9)
    figure.savefig(path, dpi=130)


def write(arguments, facts: dict) -> None:
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    draw(facts, path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024], help="of each sequence")
    parser.add_argument(
        "--dtype", nargs="+", default=["auto"], choices=("auto", "bfloat16", "float32"), help="one or two, each measured"
    )
    parser.add_argument("--only_checkpointing", action="store_true", help="leave out the steps without it")
    parser.add_argument("--rho", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process; the fastest counts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=6, help="over which errors in bfloat16 are taken")
    parser.add_argument("--longest_errors", type=int, default=256, help="longest sequences that errors are taken of")
    parser.add_argument("--longest_double_backward", type=int, default=1024, help="longest of the original and exact")
    parser.add_argument("--accuracy", nargs="*", default=["64:16", "128:8", "256:6", "512:4"], help="TOKENS:PAIRS")
    parser.add_argument("--only_accuracy", action="store_true", help="keep the rest of OUTPUT.json")
    parser.add_argument("--output", default=None, help="write OUTPUT.json and OUTPUT.png")
    parser.add_argument("--way", choices=[*WAYS, "errors", "accuracy"], help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps({"errors": errors, "accuracy": accuracy}.get(arguments.way, measure)(arguments)))
        return
    if arguments.only_accuracy:
        known = json.loads(Path(arguments.output).with_suffix(".json").read_text())
        write(arguments, known | {"accuracy": run(arguments, way=["accuracy"], accuracy=arguments.accuracy)})
        return
    import torch

    from drdpo.machine import resolve_dtype

    arguments.dtype = [resolve_dtype(dtype).dtype for dtype in arguments.dtype]
    heading = (
        f"tokens dtype     ckpt {'way':<18} {'s/step':>8} {'x DPO':>6} {'peak GiB':>9} {'x DPO':>6} {'resident GiB':>12}"
    )
    print(heading + "  error: median, worst; lowest cosine")
    rows, errors_by_tokens = [], {}
    for tokens in arguments.tokens:
        measured = {}
        if tokens <= arguments.longest_errors:
            measured = errors_by_tokens[tokens] = run(arguments, way=["errors"], tokens=[tokens], dtype=arguments.dtype)
        for name, found in measured.items():
            print(f"{tokens:>6} {name:<28} error {found['error']:.2%}, worst {found['worst']:.2%}, lowest cosine "
                  f"{found['cosine']:.5f}, {found['pairs']} pairs", flush=True)  # fmt: skip
        for dtype in arguments.dtype:
            for checkpointing in (True,) if arguments.only_checkpointing else (False, True):
                rows += table_of(arguments, tokens, dtype, checkpointing, measured)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, {platform.machine()}"
    facts = {"device": device, "model": Path(arguments.model).name, "beta": BETA, "rho": arguments.rho,
             "rounds": arguments.rounds, "pairs": arguments.pairs, "errors": errors_by_tokens, "rows": rows}  # fmt: skip
    facts["accuracy"] = run(arguments, way=["accuracy"], accuracy=arguments.accuracy)
    if arguments.output:
        write(arguments, facts)


if __name__ == "__main__":
    main()

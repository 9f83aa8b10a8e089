"""WDPO's solvers and DPO: error of the penalty's parameter gradient, time and peak memory of a step.

    dpo          ours: packed, prompt once
    original     the authors' formulation: two padded rows, eager attention, double backward, full float32 logits, and the
                 reference model run at every step
    exact        --wdpo_solver=exact: padded rows, eager attention, double backward; "once": --wdpo_prompt=once
    tangent      --wdpo_solver=tangent: packed, prompt per sequence; "once": --wdpo_prompt=once

A step is the forward and backward pass of one pair of real text (the bundled prompts), half of each sequence answer.
Optimizer and engine cost the same for all and are excluded. Each solver runs in its own process (processes.py). On a CPU the
time is that of all busy cores (wall time times their number), which with OMP_NUM_THREADS=1 hardly depends on other work.
Memory is the peak beyond weights and gradients. Errors are those of the gradient of mean |grad l|^2 for all parameters
against exact in float32 on the same weights, relative and as cosine: in bfloat16 the median over --pairs pairs, the worst,
and the lowest cosine; in float32 those of the first pair.

Accuracy is that of the tangent solver in bfloat16 alone, over more pairs and lengths: half of them plain text, half prompts
in the model's chat template with two answers of other text. The truth is the same solver in float32, which the suite
compares with a double backward in float64. Every pair is printed and written, with its `solver_condition`. The machine's
load does not change it; --only_accuracy measures nothing else and keeps the rest of OUTPUT.json.

    PYTHONPATH=src python benchmarks/wdpo.py [--model=models/SmolLM2-135M]
        [--tokens 256 512 1024] [--accuracy 64:16 128:8 256:6 512:4] [--output=benchmarks/results/wdpo]
"""

import functools
import json
import statistics
import sys
import textwrap
import time
from argparse import Namespace
from pathlib import Path

import processes
from processes import ROOT, median, on_gpu

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
    device = "cuda" if on_gpu() else "cpu"
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
    """A function that computes the scalar whose gradient is the step's, and the solver's condition."""
    import torch

    from drdpo.training.data import form_batch
    from drdpo.training.losses import method_of
    from drdpo.training.objective import objective

    batch = form_batch([pair], [0], config.packing).to(device)
    if way == "original":
        from transformers import AutoModelForCausalLM

        reference = AutoModelForCausalLM.from_pretrained(config.model_path, dtype=policy.language_model.dtype,
                                                         attn_implementation="eager").to(device).eval()  # fmt: skip
        return lambda: (original_loss(policy.language_model, reference, batch, config.wdpo_rho), None)
    with torch.no_grad():
        reference_B2 = policy(batch).logprob_S[None]

    def step():
        part = objective(policy, batch, reference_B2, method_of(config), None)
        return part.total, part.conditions_B

    return step


def measure(arguments: Namespace):
    """One way, or one of the parts about errors, in this process."""
    return {"errors": errors, "accuracy": accuracy}.get(arguments.way, cost)(arguments)


def cost(arguments: Namespace) -> dict[str, float]:
    """Seconds and peak memory of one way."""
    import torch

    config, policy, device = prepare(arguments.way, arguments.dtype, arguments.checkpointing, arguments.model, arguments.rho)
    step = step_of(arguments.way, config, policy, device, real_pairs(arguments.model, arguments.tokens, 1)[0])
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter).fill_(0)
    before, clock = processes.memory_now(), time.perf_counter if on_gpu() else time.process_time
    seconds = [processes.seconds_of(lambda: step()[0].backward(), clock) for _ in range(arguments.steps + 1)]
    return {"seconds": min(seconds[1:] or seconds), "peak_gib": processes.peak_gib() - before}


def compare(ours, truth) -> dict[str, float]:
    """Relative error and cosine of two vectors."""
    import torch

    cosine = torch.nn.functional.cosine_similarity(ours, truth, dim=0)
    return {"error": float((ours - truth).norm() / truth.norm()), "cosine": float(cosine)}


def penalty_gradient(way: str, dtype: str, pair, model: str):
    """The gradient of mean |grad l|^2 for all parameters, up to a factor, and the solver's condition."""
    import torch

    # Beside this radius the loss itself counts for nothing.
    config, policy, device = prepare(way, dtype, True, model, 1e12)
    total, condition = step_of(way, config, policy, device, pair)()
    parts = torch.autograd.grad(total, list(policy.parameters()))
    return torch.cat([part.flatten().float().cpu() for part in parts]).double(), condition


def accuracy(arguments) -> list[dict]:
    """Error, cosine and solver_condition of every pair, in this process."""
    rows = []
    for tokens, count in (map(int, words.split(":")) for words in arguments.accuracy):
        for kind, pairs_of in (("plain", real_pairs), ("chat", chat_pairs)):
            for number, pair in enumerate(pairs_of(arguments.model, tokens, count // 2)):
                truth, _ = penalty_gradient("tangent", "float32", pair, arguments.model)
                ours, condition = penalty_gradient("tangent", "bfloat16", pair, arguments.model)
                row = {"tokens": tokens, "text": kind, **compare(ours, truth), "solver_condition": float(condition)}
                rows.append(row)
                print(f"pair {number}: {row}", file=sys.stderr, flush=True)
    return rows


def errors(arguments) -> dict[str, dict[str, float]]:
    """Median and worst relative error and lowest cosine of every way over the pairs, in this process."""
    found: dict[str, list[dict]] = {}
    for number, pair in enumerate(real_pairs(arguments.model, arguments.tokens, arguments.pairs)):
        truths = [penalty_gradient(way, "float32", pair, arguments.model)[0] for way in ("exact", "exact once")]
        for dtype in arguments.dtype:
            for way in WAYS:
                if way == "dpo" or (dtype == "float32" and number > 0):
                    continue
                ours, truth = penalty_gradient(way, dtype, pair, arguments.model)[0], truths[way.endswith("once")]
                found.setdefault(f"{way}, {dtype}", []).append(compare(ours, truth))
    return {name: summary(pairs) for name, pairs in found.items()}


def summary(pairs: list[dict]) -> dict[str, float]:
    """Median and worst error and lowest cosine."""
    errors = [pair["error"] for pair in pairs]
    return {"error": statistics.median(errors), "worst": max(errors), "cosine": min(pair["cosine"] for pair in pairs),
            "pairs": len(pairs)}  # fmt: skip


def allocated(arguments: Namespace, **setting) -> float:
    """Peak GiB of one step. Every block of 64 KiB or more is returned to the system as soon as it is freed, at the
    price of time: glibc otherwise keeps several times as much resident in holes between tensors."""
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return processes.run(arguments, returned, steps=0, **setting)["peak_gib"]


def rows_of(arguments: Namespace, tokens: int, dtype: str, checkpointing: bool, measured: dict) -> list[dict]:
    """Of one setting."""
    ways = list(WAYS)
    if tokens > arguments.longest_double_backward:
        ways = [way for way in ways if way != "original" and not way.startswith("exact")]
    setting = {"tokens": tokens, "dtype": dtype, "checkpointing": checkpointing}
    rounds = processes.run_rounds(arguments, ways, **setting)
    held = {way: rounds[0][way]["peak_gib"] if on_gpu() else allocated(arguments, way=way, **setting) for way in ways}
    rows = [
        {
            **setting, "way": way,
            "seconds": median(rounds, lambda r, way=way: r[way]["seconds"]),
            "time_ratio": median(rounds, lambda r, way=way: r[way]["seconds"] / r["dpo"]["seconds"]),
            "peak_gib": held[way], "memory_ratio": held[way] / held["dpo"],
            "resident_gib": median(rounds, lambda r, way=way: r[way]["peak_gib"]),
            **measured.get(f"{way}, {dtype}", {}),
        } for way in ways
    ]  # fmt: skip
    processes.show(rows)
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


def main() -> None:
    parser = processes.parser_of(__doc__)
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024], help="of each sequence")
    parser.add_argument(
        "--dtype", nargs="+", default=["auto"], choices=("auto", "bfloat16", "float32"), help="one or two, each measured"
    )
    parser.add_argument("--only_checkpointing", action="store_true", help="leave out the steps without it")
    parser.add_argument("--rho", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process; the fastest counts")
    parser.add_argument("--pairs", type=int, default=6, help="over which errors in bfloat16 are taken")
    parser.add_argument("--longest_errors", type=int, default=256, help="longest sequences that errors are taken of")
    parser.add_argument("--longest_double_backward", type=int, default=1024, help="longest of the original and exact")
    parser.add_argument("--accuracy", nargs="*", default=["64:16", "128:8", "256:6", "512:4"], help="TOKENS:PAIRS")
    parser.add_argument("--only_accuracy", action="store_true", help="keep the rest of OUTPUT.json")
    arguments = processes.parse(parser, measure)
    if arguments.only_accuracy:
        facts = json.loads(Path(arguments.output).with_suffix(".json").read_text())
    else:
        rows, errors_by_tokens = [], {}
        for tokens in arguments.tokens:
            measured = {}
            if tokens <= arguments.longest_errors:
                measured = errors_by_tokens[tokens] = processes.run(arguments, way="errors", tokens=tokens)
            for dtype in arguments.dtype:
                for checkpointing in (True,) if arguments.only_checkpointing else (False, True):
                    rows += rows_of(arguments, tokens, dtype, checkpointing, measured)
        facts = {"device": processes.device_name(), "model": Path(arguments.model).name, "beta": BETA, "rho": arguments.rho,
                 "rounds": arguments.rounds, "pairs": arguments.pairs, "errors": errors_by_tokens, "rows": rows}  # fmt: skip
    facts["accuracy"] = processes.run(arguments, way="accuracy")
    processes.write(arguments, facts, draw)


if __name__ == "__main__":
    main()

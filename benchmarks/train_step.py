"""A DPO step: pairs per second and peak memory of this trainer, TRL's DPOTrainer and the authors' formulation.

    trl        TRL's DPOTrainer, reference log-probs precomputed, weights in --dtype, its own collator and fused head
    authors    two padded rows per pair, full logits in float32, the reference model run at every step
    padded     ours with --packing=false
    packed     ours as it is by default

Forward, backward and optimizer step on the same pairs with the same micro-batch, no gradient checkpointing, AdamW. Prompts
and answers have HelpSteer2's lengths (see benchmarks/scoring.py), cut at --max_len; token ids are random. Each trainer runs
in its own process (processes.py). Peak memory is beyond weights and optimizer states, which a first step has allocated.

    PYTHONPATH=src python benchmarks/train_step.py [--model=models/SmolLM2-135M] [--output=benchmarks/results/train_step]
"""

import statistics
import tempfile
from pathlib import Path

import processes
from processes import ROOT, Facts, median, seconds_of

WAYS = ("trl", "authors", "padded", "packed")
LABELS = {"trl": "TRL DPOTrainer", "authors": "the authors' form", "padded": "ours, padded", "packed": "ours, packed"}
COLORS = dict(zip(LABELS.values(), ("#56B4E9", "#999999", "#E69F00", "#D55E00"), strict=True))
BETA, RATE = 0.1, 1e-6


def make_pairs(count: int, max_len: int):
    """Random pairs with HelpSteer2's lengths, stratified so that few have the distribution's mean."""
    import numpy as np
    from scoring import ANSWER_QUANTILES, PROMPT_QUANTILES

    from drdpo.training.data import Pair

    generator = np.random.default_rng(0)
    at = np.linspace(0, 1, len(PROMPT_QUANTILES))
    prompts = np.interp((generator.permutation(count) + 0.5) / count, at, PROMPT_QUANTILES).astype(int)
    answers = np.interp((generator.permutation(2 * count) + 0.5) / (2 * count), at, ANSWER_QUANTILES).astype(int)

    def ids(length: int) -> list[int]:
        return generator.integers(100, 40000, int(length)).tolist()

    pairs = []
    for number, prompt in enumerate(np.minimum(prompts, max_len // 2)):
        room = max_len - int(prompt)
        pairs.append(Pair(ids(prompt), *(ids(min(int(size), room)) for size in answers[2 * number : 2 * number + 2])))
    # The trainer groups pairs of similar length, an option of TRL too.
    return sorted(pairs, key=len)


def trl_step(arguments):
    """A function of pairs that makes one optimizer step on them."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=arguments.micro_batch, beta=BETA, learning_rate=RATE,
        max_length=None, gradient_checkpointing=False, bf16=False, use_cpu=device == "cpu", report_to=[],
        precompute_ref_log_probs=True, optim="adamw_torch_fused",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    unused = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2)  # only to build the trainer
    trainer = DPOTrainer(model, args=config, train_dataset=unused, processing_class=tokenizer)
    trainer.create_optimizer_and_scheduler(100)
    trainer.current_gradient_accumulation_steps = arguments.pairs // arguments.micro_batch
    trainer.model.train()

    def step(pairs) -> None:
        rows = [
            {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected,
             "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
            for pair in pairs
        ]  # fmt: skip
        for start in range(0, len(rows), arguments.micro_batch):
            batch = trainer.data_collator(rows[start : start + arguments.micro_batch])
            trainer.training_step(trainer.model, {name: value.to(device) for name, value in batch.items()})
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def authors_step(arguments):
    """The same with two models, padded rows and whole logits."""
    import torch
    from transformers import AutoModelForCausalLM

    from drdpo.training.data import collate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).to(device)
        for _ in range(2)
    ]
    policy, reference = models[0].train(), models[1].eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, fused=True)

    def logprobs(model, batch):
        logits = model(input_ids=batch.input_ids_ST, attention_mask=batch.attention_mask_ST, use_cache=False).logits
        token = logits[:, :-1].float().log_softmax(-1).gather(2, batch.input_ids_ST[:, 1:, None]).squeeze(2)
        return (token * batch.answer_mask_ST[:, 1:]).sum(1).chunk(2)

    def step(pairs) -> None:
        for start in range(0, len(pairs), arguments.micro_batch):
            batch = collate(pairs, range(start, start + arguments.micro_batch), 0).to(device)
            chosen, rejected = logprobs(policy, batch)
            with torch.no_grad():
                ref_chosen, ref_rejected = logprobs(reference, batch)
            margin = (chosen - ref_chosen) - (rejected - ref_rejected)
            (-torch.nn.functional.logsigmoid(BETA * margin).sum() / len(pairs)).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(arguments):
    """The same by the real DeepSpeed engine and the trainer's own step."""
    import torch

    from drdpo.config.training import TrainConfig
    from drdpo.training import engine as deepspeed_engine
    from drdpo.training.data import form_batch
    from drdpo.training.loop import train_step
    from drdpo.training.losses import method_of
    from drdpo.training.policy import load_policy

    deepspeed_engine.join_with_deepspeed()
    config = TrainConfig(
        model_path=arguments.model, dataset_path="-", save_path="-", train_batch_size=arguments.pairs, learning_rate=RATE,
        micro_batch_size=arguments.micro_batch, gradient_checkpointing=False, packing=arguments.way == "packed", beta=BETA,
        dtype=arguments.dtype,
    )  # fmt: skip
    policy = load_policy(arguments.model, getattr(torch, arguments.dtype), config.attention, False)
    engine = deepspeed_engine.start_engine(policy, config, steps=100)

    def step(pairs) -> None:
        rows = [list(range(start, start + arguments.micro_batch)) for start in range(0, len(pairs), arguments.micro_batch)]
        nothing = torch.zeros(arguments.micro_batch, 2, device=engine.device)
        train_step(
            engine,
            [(form_batch(pairs, row, config.packing).to(engine.device), nothing) for row in rows],
            config,
            method_of(config),
        )

    return step


def measure(arguments) -> dict:
    """One way in this process."""
    from drdpo.training.data import Pair

    step = {"trl": trl_step, "authors": authors_step}.get(arguments.way, our_step)(arguments)
    # These steps make gradients and optimizer states, on pairs too short to show in the peak.
    for _ in range(3):
        step([Pair([5, 6], [7], [8])] * arguments.pairs)
    before, pairs = processes.peak_gib(), make_pairs(arguments.pairs, arguments.max_len)
    step(pairs)
    seconds = [seconds_of(lambda: step(pairs)) for _ in range(arguments.steps)]
    tokens = sum(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    return {"seconds": statistics.median(seconds), "peak_gib": processes.peak_gib() - before, "packed_tokens": tokens}


def draw(facts: Facts, path: Path) -> None:
    """Speed and memory."""
    panels = [
        (title, form, {LABELS[way]: [found[key]] for way, found in facts["ways"].items()})
        for key, form, title in (
            ("pairs_per_second", "%.3f", "pairs per second"),
            ("peak_gib_over_weights_and_optimizer", "%.2f", "peak GiB over weights and optimizer"),
        )
    ]
    title = f"DPO step, {facts['model']}, {facts['dtype']}, {facts['device']}"
    processes.draw_bars(path, title, [f"{facts['pairs']} pairs"], COLORS, panels)


def main() -> None:
    parser = processes.parser_of(__doc__)
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--pairs", type=int, default=8, help="of an optimizer step, a multiple of --micro_batch")
    parser.add_argument("--micro_batch", type=int, default=2)
    parser.add_argument("--max_len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1, help="timed steps of a round")
    arguments = processes.parse(parser, measure)
    rounds = processes.run_rounds(arguments, WAYS)
    ways = {}
    for way in WAYS:
        ways[way] = {
            "pairs_per_second": median(rounds, lambda r, way=way: arguments.pairs / r[way]["seconds"]),
            "faster_than_trl_by": median(rounds, lambda r, way=way: r["trl"]["seconds"] / r[way]["seconds"]),
            "peak_gib_over_weights_and_optimizer": max(r[way]["peak_gib"] for r in rounds),
        }
    processes.show([{"way": LABELS[way], **found} for way, found in ways.items()])
    facts = {"device": processes.device_name(), "model": Path(arguments.model).name, "dtype": arguments.dtype,
             **{name: getattr(arguments, name) for name in ("pairs", "micro_batch", "max_len", "rounds")},
             "packed_tokens": rounds[0]["packed"]["packed_tokens"], "ways": ways}  # fmt: skip
    processes.write(arguments, facts, draw)


if __name__ == "__main__":
    main()

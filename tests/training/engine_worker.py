"""Started on two ranks, with the launcher's variables, by test_lora.py: LoRA, resuming, saving, NaN under the real engine.

usage: engine_worker.py CASES.json PAIRS.json MODEL_FOLDER OUTPUT_FOLDER
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from drdpo import chat, distributed
from drdpo.config.training import TrainConfig
from drdpo.errors import DataError
from drdpo.training import engine as deepspeed_engine
from drdpo.training.checkpoint import _gathered, load_state, save_model, save_state
from drdpo.training.data import Pair
from drdpo.training.log import check_step
from drdpo.training.loop import train_step
from drdpo.training.lora import add_lora
from drdpo.training.losses import method_of
from drdpo.training.policy import load_policy, widen_values
from drdpo.training.reference import reference_logprobs
from drdpo.training.run import batch_plan

MODEL, OUTPUT = sys.argv[3], Path(sys.argv[4])
RANKS = ()


class Training:
    """One engine around a fresh policy."""

    def __init__(self, pairs: list[Pair], flags: dict, model: str) -> None:
        self.pairs = pairs
        self.config = config = TrainConfig(model_path=model, dataset_path="-", save_path="-", **flags)
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        policy = load_policy(
            model, dtype, config.attention, config.recompute, config.second_derivative, config.lora_quantize
        )
        if config.lora:
            add_lora(policy, config.lora)
        if config.wide_values:
            widen_values(policy)
        # ZeRO-3 would leave these small weights whole; so it takes all but norms and biases apart, as of a real model.
        with mock.patch.object(deepspeed_engine, "KEPT_WHOLE", 0):
            self.engine = deepspeed_engine.start_engine(policy, config, steps=3)
        self.plan = batch_plan(config, pairs, pad_token_id=2)
        self.reference_M2 = reference_logprobs(self.engine, self.plan, self.plan.without_steps(), "the case's")

    def batches(self, step: int) -> list:
        size = self.config.train_batch_size
        dealt = self.plan.deal(range(step * size, (step + 1) * size))
        return [(self.plan.batch(rows), self.reference_M2[rows]) for rows in dealt]

    def steps(self, first: int, last: int) -> float:
        """Mean loss of the first one on this rank."""
        losses = []
        for step in range(first, last):
            parts = train_step(self.engine, self.batches(step), self.config, method_of(self.config))
            losses.append(float(torch.cat([part.losses_B for part in parts]).mean()))
        return losses[0]

    def write_weights(self, name: str) -> None:
        model = self.engine.module.language_model
        weights = _gathered(model) if self.config.zero_stage == 3 else dict(model.named_parameters())
        if distributed.is_main():
            save_file({key: value.detach().clone() for key, value in weights.items()}, OUTPUT / f"{name}.safetensors")
        distributed.barrier()


def broken_step(training: Training, facts: dict) -> None:
    """A gradient that is NaN in rank 1's second micro-batch alone, while every loss is finite."""
    engine, batches = training.engine, training.batches(0)
    seen = []

    def spoil(module, inputs, output):
        if torch.is_grad_enabled() and output.requires_grad:
            seen.append(None)
            if len(seen) == 2 and distributed.rank() == 1:
                output.register_hook(lambda gradient: gradient * float("nan"))

    handle = engine.module.language_model.model.norm.register_forward_hook(spoil)
    parts = train_step(engine, batches, training.config, method_of(training.config))
    handle.remove()
    facts["losses_finite"] = all(bool(torch.isfinite(part.total)) for part in parts)
    facts["spoilt"] = [training.pairs[index].prompt_id for index in batches[1][0].indices_B.tolist()]
    metrics = {"step": 1.0, "loss": 0.7, "grad_norm": float(engine.get_global_grad_norm() or 0.0)}
    try:
        check_step(metrics, engine.module.watch, [batch.indices_B for batch, _ in batches], training.pairs)
    except DataError as error:
        facts["error"] = str(error)


def main() -> None:
    global RANKS
    cases = json.loads(Path(sys.argv[1]).read_text())
    pairs = [Pair(*row, 100 + number) for number, row in enumerate(json.loads(Path(sys.argv[2]).read_text()))]
    deepspeed_engine.join_with_deepspeed()
    RANKS = distributed.rank(), distributed.world_size()
    tokenizer = chat.load_tokenizer(MODEL)
    facts: dict = {}
    for name, case in cases.items():
        model = case.get("model", MODEL)
        training = Training(pairs, case["flags"], model)
        known = facts[name] = {}
        if case["do"] == "resume":
            known["first_loss"] = training.steps(0, 1)
            save_state(training.engine, OUTPUT / f"{name} state", 1)
            training.steps(1, 3)
            training.write_weights(name)
            training.engine.destroy()
            training = Training(pairs, case["flags"], model)
            known["done"] = load_state(training.engine, OUTPUT / f"{name} state")
            training.steps(1, 3)
            training.write_weights(f"{name}-resumed")
        else:
            known["first_loss"] = training.steps(0, 3)
            training.write_weights(name)
        if case.get("save"):
            save_model(training.engine, tokenizer, OUTPUT / f"{name} saved", training.config.lora)
        if case.get("break"):
            broken_step(training, known)
        training.engine.destroy()
    (OUTPUT / f"facts_{RANKS[0]}.json").write_text(json.dumps(facts))


main()

"""Started, with the launcher's variables, from test_equality.py: real optimizer steps, weights and figures to files.

usage: engine_worker.py CASES.json PAIRS.json MODEL_FOLDER OUTPUT_FOLDER

A case is a run's flags and, besides,
    steps (3), model (another folder), save (as a checkpoint too)
    engine   a name: cases that share it differ in the method alone, and use one engine, which is set back in between; their
             reference is shifted_reference
    resume   the steps after the first are taken again, by another engine that has loaded the state
    break    a last step has a gradient that is not finite
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from harness.policies import shifted_reference, with_facts
from safetensors.torch import save_file

from drdpo import chat, distributed
from drdpo.config.training import TrainConfig
from drdpo.errors import DataError
from drdpo.training import engine as deepspeed_engine
from drdpo.training.checkpoint import _gathered, load_state, save_model, save_state
from drdpo.training.data import Pair, columns_of
from drdpo.training.engine import Engine
from drdpo.training.log import check_step
from drdpo.training.loop import train_step
from drdpo.training.lora import add_lora
from drdpo.training.losses import method_of
from drdpo.training.policy import load_policy, widen_values
from drdpo.training.reference import reference_logprobs
from drdpo.training.run import batch_plan

OUTPUT = Path(sys.argv[4])
ENGINES = str(OUTPUT / "engines")
OWN = {"steps": 3, "model": sys.argv[3], "save": False, "engine": None, "resume": False, "break": False}


def engine_of(config: TrainConfig, steps: int) -> Engine:
    """An engine around a fresh policy."""
    policy = load_policy(
        config.model_path, getattr(torch, config.dtype), config.attention, config.recompute, config.second_derivative,
        config.lora_quantize,
    )  # fmt: skip
    if config.lora:
        add_lora(policy, config.lora)
    if config.wide_values:
        widen_values(policy)
    # ZeRO-3 would leave these small weights whole; so it takes all but norms and biases apart, as of a real model.
    with mock.patch.object(deepspeed_engine, "KEPT_WHOLE", 0):
        return deepspeed_engine.start_engine(policy, config, steps)


class Training:
    """What the steps of a case need, around an engine."""

    def __init__(self, engine: Engine, config: TrainConfig, pairs: list[Pair], shared: bool) -> None:
        self.engine, self.config, self.pairs, self.method = engine, config, pairs, method_of(config)
        engine.module.method_state = self.method.begin(columns_of(pairs)) if self.method.begin else {}
        self.plan = batch_plan(config, pairs, pad_token_id=2)
        reference_M2 = reference_logprobs(engine, self.plan, self.plan.without_steps(), "the case's")
        self.reference_M2 = shifted_reference(reference_M2) if shared else reference_M2
        self.facts: dict = {"losses": [], "norms": [], "sizes": []}

    def batches(self, step: int) -> list:
        size = self.config.train_batch_size
        dealt = self.plan.deal(list(range(step * size, (step + 1) * size)))
        return [(self.plan.batch(rows), self.reference_M2[rows]) for rows in dealt]

    def take(self, first: int, last: int) -> None:
        """Steps, with the figures of all ranks."""
        for step in range(first, last):
            batches = self.batches(step)
            parts = train_step(self.engine, batches, self.config, self.method, step)
            self.facts["losses"].append(float(distributed.gather(torch.cat([part.losses_B for part in parts])).mean()))
            self.facts["norms"].append(float(self.engine.get_global_grad_norm()))
            sizes = torch.tensor([float(len(reference_B2)) for _, reference_B2 in batches])
            self.facts["sizes"] += distributed.gather(sizes).tolist()

    def write_weights(self, name: str) -> None:
        model = self.engine.module.language_model
        weights = _gathered(model) if self.config.zero_stage == 3 else dict(model.named_parameters())
        if distributed.is_main():
            save_file({key: value.detach().clone() for key, value in weights.items()}, OUTPUT / f"{name}.safetensors")
        distributed.barrier()

    def break_step(self) -> None:
        """A gradient that is NaN in rank 1's second micro-batch alone, while every loss is finite."""
        batches, seen = self.batches(0), []

        def spoil(module, inputs, output):
            if torch.is_grad_enabled() and output.requires_grad:
                seen.append(None)
                if len(seen) == 2 and distributed.rank() == 1:
                    output.register_hook(lambda gradient: gradient * float("nan"))

        handle = self.engine.module.language_model.model.norm.register_forward_hook(spoil)
        parts = train_step(self.engine, batches, self.config, self.method)
        handle.remove()
        self.facts["losses_finite"] = all(bool(torch.isfinite(part.total)) for part in parts)
        self.facts["spoilt"] = [self.pairs[index].prompt_id for index in batches[1][0].indices_B.tolist()]
        metrics = {"step": 1.0, "loss": 0.7, "grad_norm": float(self.engine.get_global_grad_norm() or 0.0)}
        try:
            check_step(metrics, self.engine.module.watch, [batch.indices_B for batch, _ in batches], self.pairs)
        except DataError as error:
            self.facts["error"] = str(error)


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    rows = json.loads(Path(sys.argv[2]).read_text())
    pairs = with_facts([Pair(*row, 100 + number) for number, row in enumerate(rows)])
    deepspeed_engine.join_with_deepspeed()
    kept: dict[str, Engine] = {}
    for name, flags in cases.items():
        case = {key: flags.pop(key, usual) for key, usual in OWN.items()}
        config, steps, shared = TrainConfig(case["model"], "-", "-", **flags), case["steps"], case["engine"]
        engine = kept[shared] if shared in kept else engine_of(config, steps)
        if shared in kept:
            engine.load_checkpoint(ENGINES, tag=shared)
        elif shared:
            kept[shared] = engine
            engine.save_checkpoint(ENGINES, tag=shared, save_latest=False)
        training = Training(engine, config, pairs, bool(shared))
        training.take(0, 1)
        if case["resume"]:
            save_state(engine, OUTPUT / f"{name} state", 1)
        training.take(1, steps)
        training.write_weights(name)
        if case["resume"]:
            engine.destroy()
            facts, training = training.facts, Training(engine_of(config, steps), config, pairs, False)
            engine = training.engine
            training.facts["done"] = load_state(engine, OUTPUT / f"{name} state")
            training.take(1, steps)
            training.write_weights(f"{name}-resumed")
            training.facts |= facts
        if case["save"]:
            save_model(engine, chat.load_tokenizer(case["model"]), OUTPUT / f"{name} saved", config.lora)
        if case["break"]:
            training.break_step()
        (OUTPUT / f"{name}.{distributed.rank()}.json").write_text(json.dumps(training.facts))
        distributed.barrier()
        if not shared:
            engine.destroy()


main()

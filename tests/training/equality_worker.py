"""Started, with the launcher's variables, from test_equality.py and test_engine.py: real optimizer steps per case,
weights and figures to files.

usage: equality_worker.py CASES.json RANKED_PAIRS.json MODEL_FOLDER OUTPUT_FOLDER

A case is a run's flags and, besides, `steps` (default 3), `model` (another folder), `save` (as a checkpoint too) and
`engine` (a name: cases that share it differ in the method alone, and use one engine, which is set back in between; their
reference is shifted_reference).
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
from drdpo.training import engine as deepspeed_engine
from drdpo.training.checkpoint import _gathered, save_model
from drdpo.training.data import Pair, columns_of
from drdpo.training.engine import Engine
from drdpo.training.loop import train_step
from drdpo.training.losses import method_of
from drdpo.training.policy import load_policy, widen_values
from drdpo.training.reference import reference_logprobs
from drdpo.training.run import batch_plan


def engine_of(config: TrainConfig, model: str, steps: int) -> Engine:
    policy = load_policy(
        model, torch.bfloat16 if config.dtype == "bfloat16" else torch.float32, config.attention, config.recompute,
        config.second_derivative,
    )  # fmt: skip
    if config.wide_values:
        widen_values(policy)
    # ZeRO-3 would leave these small weights whole; so it takes all but norms and biases apart, as of a real model.
    with mock.patch.object(deepspeed_engine, "KEPT_WHOLE", 0):
        return deepspeed_engine.start_engine(policy, config, steps)


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    pairs = with_facts([Pair(*row) for row in json.loads(Path(sys.argv[2]).read_text())])
    output = Path(sys.argv[4])
    deepspeed_engine.join_with_deepspeed()
    kept: dict[str, Engine] = {}
    for name, flags in cases.items():
        steps, model, save = flags.pop("steps", 3), flags.pop("model", sys.argv[3]), flags.pop("save", False)
        shared = flags.pop("engine", None)
        config = TrainConfig(model_path=model, dataset_path="-", save_path="-", **flags)
        method = method_of(config)
        if shared in kept:
            engine = kept[shared]
            engine.load_checkpoint(str(output / "engines"), tag=shared)
        else:
            engine = engine_of(config, model, steps)
        if shared and shared not in kept:
            kept[shared] = engine
            engine.save_checkpoint(str(output / "engines"), tag=shared, save_latest=False)
        engine.module.method_state = method.begin(columns_of(pairs)) if method.begin else {}
        plan = batch_plan(config, pairs, pad_token_id=2)
        reference_M2 = reference_logprobs(engine, plan, plan.without_steps(), name)
        if shared:
            reference_M2 = shifted_reference(reference_M2)
        facts: dict[str, list[float]] = {"losses": [], "norms": [], "sizes": []}
        for step in range(steps):
            indices = list(range(step * config.train_batch_size, (step + 1) * config.train_batch_size))
            dealt = plan.deal(indices)
            batches = [(plan.batch(rows), reference_M2[rows]) for rows in dealt]
            parts = train_step(engine, batches, config, method, step)
            facts["losses"].append(float(distributed.gather(torch.cat([part.losses_B for part in parts])).mean()))
            facts["norms"].append(float(engine.get_global_grad_norm()))
            facts["sizes"] += distributed.gather(torch.tensor([float(len(rows)) for rows in dealt])).tolist()
        language_model = engine.module.language_model
        weights = _gathered(language_model) if config.zero_stage == 3 else dict(language_model.named_parameters())
        if distributed.is_main():
            save_file({key: value.detach().clone() for key, value in weights.items()}, output / f"{name}.safetensors")
            (output / f"{name}.json").write_text(json.dumps(facts))
        if save:
            save_model(engine, chat.load_tokenizer(model), output / f"{name} saved", config.lora)
        distributed.barrier()
        if not shared:
            engine.destroy()


main()

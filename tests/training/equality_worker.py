"""Started by DeepSpeed's launcher from test_equality.py: three real optimizer steps per case, weights to a file.

usage: equality_worker.py CASES.json RANKED_PAIRS.json MODEL_FOLDER OUTPUT_FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from drdpo import distributed
from drdpo.config import TrainConfig
from drdpo.training import engine as deepspeed_engine
from drdpo.training.batches import micro_batches, padded_shards
from drdpo.training.checkpoint import _gathered
from drdpo.training.data import Pair
from drdpo.training.fraction import penalised_pairs
from drdpo.training.loop import train_step
from drdpo.training.packing import form_batch
from drdpo.training.policy import load_policy
from drdpo.training.reference import reference_logprobs

engine_config = deepspeed_engine.engine_config


def partitioning_small_weights(*arguments: Any) -> dict[str, Any]:
    """ZeRO-3 leaves weights of less than 100,000 elements whole, which of the tiny model is all but the embeddings. Here it
    takes the linear maps apart as it does a real model's; norms, as there, stay."""
    settings = engine_config(*arguments)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    return settings


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    pairs = [Pair(*row) for row in json.loads(Path(sys.argv[2]).read_text())]
    model, output = sys.argv[3], Path(sys.argv[4])
    deepspeed_engine.initialise()
    for name, flags in cases.items():
        config = TrainConfig(model_path=model, dataset_path="-", save_path="-", **flags)
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        policy = load_policy(
            model, dtype, config.attention, config.gradient_checkpointing, plain_attention=config.second_derivative
        )
        with mock.patch.object(deepspeed_engine, "engine_config", partitioning_small_weights):
            engine = deepspeed_engine.start_engine(policy, config, steps=3)
        lengths = [len(pair) for pair in pairs]
        ranks = distributed.rank(), distributed.world_size()
        shards = padded_shards(range(len(pairs)), lengths, config.micro_batch, *ranks)
        reference_M2 = reference_logprobs(engine, pairs, shards, config, 2, name)
        for step in range(3):
            indices = list(range(step * config.train_batch_size, (step + 1) * config.train_batch_size))
            dealt = micro_batches(indices, lengths, config.micro_batch, *ranks, by_length=config.robust_scope == "step")
            batches = [(form_batch(pairs, rows, config, 2), reference_M2[rows]) for rows in dealt]
            train_step(engine, batches, config, penalised_pairs(indices, config, step))
        language_model = engine.module.language_model
        weights = _gathered(language_model) if config.zero_stage == 3 else dict(language_model.named_parameters())
        if distributed.is_main():
            save_file({key: value.detach().clone() for key, value in weights.items()}, output / f"{name}.safetensors")
        distributed.barrier()
        engine.destroy()


main()

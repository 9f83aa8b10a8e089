"""LoRA against plain torch and peft; the engine's checkpoints, resuming and NaN on two ranks, in one launch of DeepSpeed."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from harness.forks import Forks
from harness.policies import answer_logprobs, random_pairs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from drdpo import chat
from drdpo.config.training import TrainConfig
from drdpo.training.data import Pair, pack
from drdpo.training.lora import ALPHA, add_lora, merged
from drdpo.training.policy import load_policy

BATCH, BETA, CLIP = 4, 0.5, 1.0
LEARNING_RATE, RANK = 5e-4, 4
COMMON = {
    "beta": BETA, "learning_rate": LEARNING_RATE, "max_grad_norm": CLIP, "train_batch_size": BATCH, "warmup_ratio": 0.0,
    "dtype": "float32", "micro_batch_size": 1,
}  # fmt: skip
LORA = {**COMMON, "lora_rank": RANK}
WDPO = {"wdpo_rho": 0.05, "wdpo_solver": "exact"}
# Two steps of an engine's life in one case where they do not disturb each other: starting one takes seconds.
CASES = {
    "dpo-zero0": {**LORA, "zero_stage": 0, "break": True},
    "dpo-zero2": {**LORA, "zero_stage": 2, "resume": True, "save": True},
    "dpo-zero3": {**LORA, "zero_stage": 3, "resume": True, "save": True, "break": True},
    "wdpo-zero2": {**LORA, **WDPO, "zero_stage": 2},
    "wdpo-zero1": {**LORA, **WDPO, "zero_stage": 1},
    # On a model whose linear maps have biases.
    "wdpo-tangent": {**LORA, **WDPO, "zero_stage": 3, "wdpo_solver": "tangent", "model": "biased"},
    "nf4-zero2": {**LORA, "zero_stage": 2, "lora_quantize": "nf4", "resume": True, "save": True},
    "whole-zero2": {**COMMON, "zero_stage": 2, "break": True},
    "whole-zero3": {**COMMON, "zero_stage": 3, "dtype": "bfloat16", "resume": True},
}
EQUAL = [name for name in CASES if name.startswith(("dpo", "wdpo"))]


def config_of(path: Path, **flags) -> TrainConfig:
    return TrainConfig(str(path), "-", "-", **{"dtype": "float32", "lora_rank": RANK, **flags})


def policy_with_lora(path: Path, config: TrainConfig, dtype=torch.float32):
    policy = load_policy(str(path), dtype, config.attention, gradient_checkpointing=False)
    add_lora(policy, config.lora)
    return policy


@pytest.fixture(scope="module")
def pairs() -> list[list[list[int]]]:
    return random_pairs(seed=3, count=3 * BATCH)


@pytest.fixture(scope="module")
def biased(tmp_path_factory) -> Path:
    """A random Qwen2: queries, keys and values have biases."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2,
        )
    )  # fmt: skip
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value)
    path = tmp_path_factory.mktemp("models") / "biased"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine_folder(pairs, tiny_policy: Path, biased: Path, tmp_path_factory, forks: Forks) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    cases = {name: {**case, "model": str(biased if "model" in case else tiny_policy)} for name, case in CASES.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    (folder / "pairs.json").write_text(json.dumps(pairs))
    worker = Path(__file__).parent / "engine_worker.py"
    command = [sys.executable, worker, folder / "cases.json", folder / "pairs.json", tiny_policy, folder]
    for done in forks.ranks(command, 2, timeout=600):
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def facts_of(folder: Path, case: str) -> list[dict]:
    return [json.loads((folder / f"{case}.{rank}.json").read_text()) for rank in range(2)]


def plain_loss(model, pair, reference, flags):
    """DPO's loss of one pair, written out, and with --wdpo_rho the squared gradient for the embeddings of both sequences."""
    prompt, *answers = pair
    rows = [torch.tensor(prompt + answer) for answer in answers]
    embeds = [model.get_input_embeddings()(row) for row in rows]
    chosen, rejected = (answer_logprobs(model, e, row, len(prompt)) for e, row in zip(embeds, rows, strict=True))
    loss = -torch.log(torch.sigmoid(BETA * (chosen - reference[0] - rejected + reference[1])))
    if "wdpo_rho" not in flags:
        return loss
    gradients = torch.autograd.grad(loss, embeds, create_graph=True)
    return loss + flags["wdpo_rho"] * sum(gradient.square().sum() for gradient in gradients)


def plain_training(path: Path, pairs, flags) -> dict[str, torch.Tensor]:
    """peft's own model under torch's own optimizer, from the same A: the adapters' weights after three steps."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with torch.no_grad():
        reference = [
            [answer_logprobs(model, model.get_input_embeddings()(ids), ids, len(prompt))
             for ids in (torch.tensor(prompt + chosen), torch.tensor(prompt + rejected))]
            for prompt, chosen, rejected in pairs
        ]  # fmt: skip
    start = policy_with_lora(path, config_of(path)).language_model.state_dict()
    model.enable_input_require_grads()
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    own = {name.removeprefix("base_model.model."): value for name, value in tuned.named_parameters() if ".lora_" in name}
    assert own.keys() == {name for name in start if ".lora_" in name}
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(start[name])
    optimizer = torch.optim.AdamW(own.values(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 3)))
        losses = [plain_loss(tuned, *row, flags) for row in zip(pairs[rows], reference[rows], strict=True)]
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(own.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    assert max(float((value.detach() - start[name]).abs().max()) for name, value in own.items()) > 3e-4
    return {name: value.detach() for name, value in own.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", EQUAL)
def test_lora_on_two_ranks_equals_plain_peft(case, engine_folder, pairs, tiny_policy, biased):
    path = biased if "model" in CASES[case] else tiny_policy
    ours = load_file(engine_folder / f"{case}.safetensors")
    for name, value in plain_training(path, pairs, CASES[case]).items():
        assert torch.allclose(ours[name], value, atol=1e-5, rtol=0), f"{name}: {(ours[name] - value).abs().max():.1e}"
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    for name, value in ours.items():
        if ".lora_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")]), f"{name} is frozen"


@pytest.mark.slow
def test_the_first_loss_with_adapters_is_ln_2(engine_folder):
    for case in [*EQUAL, "nf4-zero2"]:
        for facts in facts_of(engine_folder, case):
            assert facts["losses"][0] == pytest.approx(math.log(2), abs=1e-6), case


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.get("resume")])
def test_resumed_weights_equal_uninterrupted_ones(case, engine_folder):
    assert [facts["done"] for facts in facts_of(engine_folder, case)] == [1, 1]
    ours, theirs = (load_file(engine_folder / f"{name}.safetensors") for name in (f"{case}-resumed", case))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.slow
def test_the_state_of_a_lora_run_holds_no_frozen_weights(engine_folder):
    sizes = {
        case: sum(file.stat().st_size for file in (engine_folder / f"{case} state").rglob("rank_*"))
        for case in ("dpo-zero3", "whole-zero3")
    }
    assert sizes["dpo-zero3"] < sizes["whole-zero3"] / 10


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dpo-zero2", "dpo-zero3", "nf4-zero2"])
def test_merged_model_and_adapter_say_the_same(case, engine_folder, tiny_policy):
    from peft import PeftModel

    folder, ids = engine_folder / f"{case} saved", torch.tensor([[5, 6, 7, 8, 9]])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-5)
        assert float((plain(ids).logits - before).abs().max()) > 1e-3, "the adapters must do something"
    assert chat.load_tokenizer(str(folder)).chat_template == chat.load_tokenizer(str(tiny_policy)).chat_template
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.get("break")])
def test_a_nan_gradient_stops_every_rank_and_names_the_pairs_of_its_micro_batch(case, engine_folder):
    facts = facts_of(engine_folder, case)
    assert all(known["losses_finite"] for known in facts)
    (spoilt,) = facts[1]["spoilt"]
    for known in facts:
        assert f"from the micro-batch of prompt_id {spoilt};" in known["error"]
        assert "grad_norm is" in known["error"]


def test_adapters_before_the_first_step_change_no_bit(tiny_policy, pairs):
    """So the reference, adapters off, is the policy before its first step."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    batch = pack([Pair(*row) for row in pairs], range(4))
    for dtype in (torch.float32, torch.bfloat16):
        config = config_of(tiny_policy, dtype="float32" if dtype == torch.float32 else "bfloat16")
        policy = policy_with_lora(tiny_policy, config, dtype)
        plain = load_policy(str(tiny_policy), dtype, config.attention, gradient_checkpointing=False)
        with torch.no_grad():
            before = policy(batch).logprob_S
            assert torch.equal(before, plain(batch).logprob_S)
            for name, value in policy.named_parameters():
                if "lora_B" in name:
                    value.normal_()
            assert not torch.equal(policy(batch).logprob_S, before)
            for module in policy.modules():
                if isinstance(module, BaseTunerLayer):
                    module.enable_adapters(False)
            assert torch.equal(policy(batch).logprob_S, before)


def test_all_linear_layers_of_the_blocks_and_nothing_else_are_trained(tiny_policy):
    policy = policy_with_lora(tiny_policy, config_of(tiny_policy))
    trained = {name: value for name, value in policy.named_parameters() if value.requires_grad}
    # Two layers of width 32, MLP 64, two of four heads' keys and values: (in + out) * rank each.
    by_hand = 2 * RANK * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))
    assert sum(value.numel() for value in trained.values()) == by_hand
    assert all(".lora_" in name and ".layers." in name for name in trained)
    assert policy.language_model.peft_config["default"].target_modules == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_the_seed_draws_the_adapters(tiny_policy):
    drawn = [
        policy_with_lora(tiny_policy, config_of(tiny_policy, seed=seed)).language_model.state_dict() for seed in (1, 1, 2)
    ]
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])


def test_merging_by_hand():
    weights = {
        "a.base_layer.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        "a.lora_A.default.weight": torch.tensor([[1.0, 2.0]]),
        "a.lora_B.default.weight": torch.tensor([[0.5], [-1.0]]),
        "a.base_layer.bias": torch.tensor([7.0, 8.0]),
        "norm.weight": torch.tensor([4.0]),
    }
    plain = merged(weights, rank=8)
    assert plain.keys() == {"a.weight", "a.bias", "norm.weight"}
    assert plain["a.weight"].tolist() == [[3.0, 4.0], [-4.0, -7.0]]
    assert weights["a.base_layer.weight"].tolist() == [[1.0, 0.0], [0.0, 1.0]], "training goes on from the old ones"

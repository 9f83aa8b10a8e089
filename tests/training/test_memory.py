"""What a run will need and what is chosen for the machine: metrics and memory by hand, and against what a real run holds."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import policies
from harness.policies import gradient_of, pairs_of_lengths, policy_of, run_of, with_facts
from harness.runs import flags_of, run_ranks, said, write_pairs
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from drdpo import distributed
from drdpo.cli import parse
from drdpo.config.training import TrainConfig
from drdpo.errors import DataError, UsageError
from drdpo.folder import write_manifest
from drdpo.kernels import packed_attention
from drdpo.training import engine, memory, run
from drdpo.training.data import Pair, form_batch
from drdpo.training.loop import train_alignment
from drdpo.training.losses import method_of
from drdpo.training.memory import GATHERED, Memory, advice, dry_run, predict, preflight, resolve_attention, shapes
from drdpo.training.objective import Population, objective
from drdpo.training.policy import recomputable_layers, set_recomputation, widen_values
from drdpo.training.reference import reference_key
from drdpo.training.run import check_inputs

PARAMETERS = 49_152 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32) + 32
"""Of the tiny policy: embeddings (the head is tied), two layers, the final norm."""


def config_of(path: Path | str = "-", **flags) -> TrainConfig:
    return policies.config_of(model_path=str(path), **{"train_batch_size": 4, "micro_batch_size": 1, **flags})


def open_config(path: Path | str = "-", **flags) -> TrainConfig:
    """What the machine chooses is left open."""
    return config_of(path, **{"dtype": "bfloat16", "micro_batch_size": None, **flags})


FOUR = pairs_of_lengths(*[(4, 2, 1)] * 4)


def memory_of(path: Path, pairs: list[Pair], **flags) -> tuple[int, int]:
    config = config_of(path, **flags)
    return dry_run(shapes(config), form_batch(pairs, range(len(pairs)), config.packing), method_of(config))


# The preflight.


def test_preflight_by_hand(tiny_policy, capsys):
    pairs = pairs_of_lengths((4, 2, 1), (6, 1, 1), (2, 3, 5), (1, 1, 1), (2, 2, 2))
    config = config_of(tiny_policy, max_epochs=3, max_len=8, lora_rank=1)
    _, shape = preflight(run_of(config, pairs, cut=2))
    printed = capsys.readouterr().out
    trained = 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)  # rank 1: inputs + outputs of seven maps a layer
    assert shape.trained == trained
    assert f"{PARAMETERS + trained:,} parameters, {trained:,} of them trained, in float32" in printed
    # Five pairs, four a step: the second step has the fifth, and three of 7, 8, 10, 3 and 6 tokens again.
    (tokens,) = re.findall(r"5 pairs, (\d+) tokens packed in the first 2 steps, 2 answers cut by --max_len=8", printed)
    assert int(tokens) in {34 + sum(three) for three in combinations((7, 8, 10, 3, 6), 3)}
    assert "3 steps of 4 pairs = 2.40 epochs; a step is 4 micro-batches of 1 on each of 1 process\n" in printed
    assert "at 50%, 90%, 99%, 100%: prompt 2 6 6 6; answer 1 3 5 5; pair 7 10 10 10" in printed
    assert re.search(r"predicted peak \d+\.\d\d GiB a process: weights", printed)


def test_a_model_that_does_not_fit_gets_a_warning(tiny_policy, capsys, monkeypatch):
    monkeypatch.setattr(memory, "_free", lambda: (1000, 2))
    preflight(run_of(config_of(tiny_policy), FOUR))
    assert re.search(r"warning +2 processes need \d.*, but 0\.00 GiB is free", capsys.readouterr().out)


def test_offload_is_advised_if_only_the_optimizer_does_not_fit(tiny_policy, capsys, monkeypatch):
    """Not if the rest would not fit either, nor if it is given already."""
    monkeypatch.setattr("drdpo.distributed.use_cuda", lambda: True)
    for short, offload, advised in ((1, False, True), (12 * PARAMETERS + 1, False, False), (1, True, False)):
        config = config_of(tiny_policy, optimizer_offload=offload, gradient_checkpointing=True)
        need = memory.predicted(config, method_of(config), shapes(config), FOUR[:1], 2).total
        monkeypatch.setattr(memory, "_free", lambda free=need - short: (free, 1))
        preflight(run_of(config, FOUR))
        (warning,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
        assert ("--optimizer_offload=true moves 0.02 GiB of it to the CPU's memory" in warning) == advised


def test_advice_names_a_flag_for_the_largest_part():
    nothing = Memory(0, 0, 0, 0, 0, 0, process=10**12)
    for part, flags, world, word in (
        ("activations", {"gradient_checkpointing": False}, 1, "--gradient_checkpointing=true"),
        ("activations", {"micro_batch_size": 4}, 1, "--micro_batch_size=2"),
        ("activations", {"packing": False}, 1, "--packing=true"),
        ("activations", {"wdpo_rho": 0.1, "wdpo_solver": "exact"}, 1, "--wdpo_solver=tangent with --packing=true"),
        ("head", {}, 1, "--max_len"),
        ("optimizer", {"zero_stage": 0}, 2, "--zero_stage=2"),
        ("optimizer", {}, 1, "--lora_rank=16"),
        ("gradients", {"lora_rank": 4}, 1, "--dtype=bfloat16"),
        ("weights", {}, 2, "--zero_stage=3"),
    ):
        text = advice(replace(nothing, **{part: 4 * 3 * GATHERED}), config_of(**flags), world)
        assert part in text and word in text, text
    on_gpu = replace(nothing, process=0, optimizer=10**12)
    for flags, world, word in (
        ({}, 1, "--optimizer_offload=true lowers"),
        ({"zero_stage": 1}, 2, "--zero_stage=2"),
        ({"zero_stage": 0}, 1, "--optimizer_offload=true with --zero_stage=2 lowers"),
        ({"optimizer_offload": True}, 1, "--lora_rank=16"),
    ):
        assert word in advice(on_gpu, config_of(**flags), world)
    small = replace(nothing, weights=4 * GATHERED)
    assert "--zero_stage=3" not in advice(small, config_of(), 2), "it keeps so many weights gathered that nothing is gained"


def test_a_dry_run_for_eight_processes_writes_nothing(tiny_policy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    data = write_pairs(tmp_path / "pairs")
    flags = {"micro_batch_size": 1, "dry_run": True, "dtype": "float32"}
    few, enough = (
        TrainConfig(str(tiny_policy), str(data), str(tmp_path / "out"), train_batch_size=size, **flags) for size in (16, 8)
    )
    with pytest.raises(DataError, match="10 usable train pairs, fewer than 16"):
        check_inputs(few, method_of(few))
    check_inputs(enough, method_of(enough))
    train_alignment(enough, method_of(enough))
    printed = capsys.readouterr().out
    assert "a step is 1 micro-batch of 1 on each of 8 processes" in printed
    assert "predicted peak" in printed
    assert list(tmp_path.iterdir()) == [data]


# The prediction.


def test_shares_of_zero_by_hand(tiny_policy):
    """Bytes a parameter: float32 or bfloat16 weights, moments, gradients, by stage, on four devices."""
    size = PARAMETERS
    for stage, dtype, expected in (
        (0, "float32", (4 * size, 4 * size, 8 * size, 0)),
        (1, "bfloat16", (2 * size, 4 * size + 2 * size, 12 * (size // 4), 4 * (size // 4))),
        (2, "bfloat16", (2 * size, 4 * (size // 4) + 2 * size, 12 * (size // 4), 4 * (size // 4))),
        (2, "float32", (4 * size, 8 * (size // 4) + 4 * size, 12 * (size // 4), 4 * (size // 4))),
        (3, "bfloat16", (2 * (size // 4 + size), 4 * (size // 4) + 2 * size, 12 * (size // 4), 4 * (size // 4))),
    ):
        config = config_of(tiny_policy, zero_stage=stage, dtype=dtype)
        found = predict(shapes(config), config, 4, activations=1000, head=500, process=77)
        assert (found.weights, found.gradients, found.optimizer, found.copies) == expected, (stage, dtype)
        assert (found.activations, found.head, found.process) == (1000, 500, 77)
        assert found.total == sum(expected) + 1577
    # A second micro-batch has its gradients in bfloat16 and as the float32 copy that is added to the sum.
    config = config_of(tiny_policy, zero_stage=2, dtype="bfloat16", train_batch_size=8)
    assert predict(shapes(config), config, 4, 0, 0, None).copies == (4 + 2) * (size // 4)
    # On a GPU the larger of activations and copies counts: they are alive one after the other.
    # And --optimizer_offload leaves neither optimizer nor copies there.
    config = config_of(tiny_policy, zero_stage=2)
    small, large = (predict(shapes(config), config, 4, alive, 0, None) for alive in (1, 10**9))
    assert (small.activations, small.copies) == (0, 4 * (size // 4))
    assert (large.activations, large.copies) == (10**9, 0)
    config = config_of(tiny_policy, zero_stage=2, optimizer_offload=True)
    assert [predict(shapes(config), config, 4, 1, 0, process).optimizer for process in (None, 1)] == [0, 12 * (size // 4)]
    # Adapters need no gradients of the weights.
    config = config_of(tiny_policy, lora_rank=2)
    found, trained = predict(shapes(config), config, 1, 0, 0, 0), 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)
    assert (found.weights, found.optimizer) == (4 * (size + trained), 12 * trained)


def test_the_dry_run_counts_what_a_forward_pass_keeps(tiny_policy):
    pairs = pairs_of_lengths((100, 150, 150))
    tokens = 400
    model, head = memory_of(tiny_policy, pairs, gradient_checkpointing=False)
    again, _ = memory_of(tiny_policy, pairs, gradient_checkpointing=True)
    double, _ = memory_of(tiny_policy, pairs * 2, gradient_checkpointing=False)
    exact, _ = memory_of(tiny_policy, pairs, gradient_checkpointing=False, wdpo_rho=0.1, wdpo_solver="exact")
    # A Llama layer keeps, in float32 values a token: twice the input's norm x / rms, and its product with the norm's weight
    # (4 D); its input and the middle of the layer (2 D); queries, keys, values, attended values (3 D here); MLP: 4 I.
    by_hand = 2 * tokens * 4 * (4 * 32 + 2 * 32 + 3 * 32 + 4 * 64)
    assert by_hand < model < 1.6 * by_hand
    assert again < 0.75 * model
    assert 1.9 < double / model < 2.1
    assert exact > 1.3 * model, "a double backward keeps more"
    # The output head: its gradient, and logits of a block of the vocabulary in float32, of which a few copies are alive.
    gradient, block = 4 * 49_152 * 32, 4 * sys.modules["drdpo.kernels.linear_logprob"]._BLOCK_ELEMENTS[True]
    assert gradient + block < head < gradient + 4 * block


@pytest.mark.parametrize(
    "flags",
    [
        {"kldpo_tau": 0.1}, {"drdpo_beta": 1.0}, {"wdpo_rho": 0.1, "wdpo_solver": "exact"},
        {"wdpo_rho": 0.1, "wdpo_solver": "exact", "wdpo_penalty": "root"}, {"wdpo_rho": 0.1, "wdpo_solver": "tangent"},
        {"packing": False}, {"wdpo_rho": 0.1, "wdpo_solver": "exact", "lora_rank": 2},
        {"wdpo_rho": 0.1, "wdpo_solver": "tangent", "lora_rank": 2}, {"dtype": "bfloat16", "lora_rank": 2, "zero_stage": 3},
        {"wdpo_rho": 0.1, "dtype": "bfloat16"}, {"wdpo_rho": 0.1, "dtype": "bfloat16", "lora_rank": 2},
        {"method": "group:0.5", "group_column": "group"}, {"loss_type": "sigmoid_norm", "packing": False},
        {"weight_column": "trust", "packing": False},
    ],
    ids=str,
)  # fmt: skip
def test_every_method_can_be_dry_run(flags, tiny_policy):
    model, head = memory_of(tiny_policy, with_facts(pairs_of_lengths((20, 30, 10), (5, 8, 40))), **flags)
    assert model + head > 2 * 49_152 * 32


@pytest.fixture(scope="module")
def middling(smollm, tmp_path_factory) -> Path:
    """A random model of 36M parameters: what a run holds beside its libraries is most of a GiB."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=49_152, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "middling"
    LlamaForCausalLM(settings).to(torch.bfloat16).save_pretrained(path)
    AutoTokenizer.from_pretrained(smollm).save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, {"lora_rank": 8}], ids=["whole", "lora"])
def test_the_predicted_peak_is_what_a_real_run_holds(lora, forks, middling, tmp_path):
    data, log, save = write_pairs(tmp_path / "pairs"), tmp_path / "log", tmp_path / "out"
    size = {"train_batch_size": 2, "micro_batch_size": 2, "max_steps": 2, "eval_steps": 0, "save_steps": 0}
    flags = flags_of(middling, data, save, save_resume=False, dtype="auto", **size, **lora)
    assert run_ranks(forks, flags, log, world=1) == [0], said(log)
    (peak, process) = map(float, *re.findall(r"predicted peak (\S+) GiB a process: .*process (\S+) GiB", said(log)))
    held = json.loads((save / "metrics.jsonl").read_text().splitlines()[-1])["peak_memory_gib"]
    # Little is held beside the libraries with LoRA, and how much of these is resident depends on the machine.
    assert held == pytest.approx(peak, rel=0.4 if lora else 0.25), (held, peak, process)
    # Whole weights take more than the libraries: the prediction is not those alone.
    assert lora or peak > 1.5 * process
    saved, base = (load_file(path / "model.safetensors") for path in (save / "global_step_2", middling))
    assert saved.keys() == base.keys()
    assert any(not torch.equal(saved[name], base[name]) for name in base)
    assert (save / "global_step_2" / "adapter" / "adapter_model.safetensors").is_file() == bool(lora)


# Choices for the machine: attention, rows, recomputation.


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setattr(distributed, "use_cuda", lambda: True)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(packed_attention, "check_varlen", lambda *given: None)


FAR = "head_dim must be at most 256"


@pytest.mark.parametrize(
    ("flags", "broken", "attn", "reason"),
    [
        ({}, None, "flash", None), ({"kldpo_tau": 0.1}, None, "flash", None), ({"attn": "sdpa"}, None, "sdpa", None),
        ({"packing": False}, None, "sdpa", None), ({"wdpo_rho": 0.1, "wdpo_solver": "exact"}, None, "eager", None),
        ({"dtype": "float32"}, None, "sdpa", "flash attention takes 16-bit numbers only"),
        ({"wdpo_rho": 0.1}, None, "sdpa", "--wdpo_solver=tangent attends in float32 to keep its accuracy"),
        ({"wdpo_rho": 0.1, "attn": "flash"}, None, "flash", None), ({}, FAR, "sdpa", FAR),
    ],
)  # fmt: skip
def test_packed_rows_attend_by_flash_on_cuda_or_a_line_says_why_not(
    flags, broken, attn, reason, tiny_policy, on_cuda, monkeypatch, capsys
):
    monkeypatch.setattr(packed_attention, "check_varlen", lambda *given: broken)
    found = resolve_attention(open_config(tiny_policy, **flags))
    assert found.attn == attn and found.packed_flash == (attn == "flash")
    assert capsys.readouterr().out == (f"--attn=auto: sdpa instead of flash, because {reason}\n" if reason else "")


def test_flash_that_a_flag_asks_for_is_refused_and_reference_log_probs_are_keyed_by_what_attends(
    tiny_policy, on_cuda, monkeypatch
):
    flash = run.arithmetic_of(resolve_attention(open_config(tiny_policy)))
    monkeypatch.setattr(packed_attention, "check_varlen", lambda *given: FAR)
    with pytest.raises(UsageError, match=rf"--attn=flash.*{FAR}; pass --attn=sdpa"):
        resolve_attention(open_config(tiny_policy, attn="flash"))
    monkeypatch.setattr(distributed, "use_cuda", lambda: False)
    assert resolve_attention(open_config(tiny_policy)).attn == "sdpa"
    sdpa = run.arithmetic_of(resolve_attention(open_config(tiny_policy)))
    assert reference_key("model", FOUR, sdpa) != reference_key("model", FOUR, flash)


def test_what_is_left_open_does_not_stop_a_run_that_resumes(on_cuda, monkeypatch):
    assert run._left_open(open_config()) == {"attn", "micro_batch_size", "micro_batch_tokens"}
    assert run._left_open(open_config(attn="sdpa", micro_batch_size=2)) == set()
    for given in ({"micro_batch_tokens": 9}, {"packing": False}, {"robust_scope": "micro", "kldpo_tau": 1.0}):
        assert not run.deals_by_tokens(open_config(**given))
    monkeypatch.setattr(distributed, "use_cuda", lambda: False)
    assert run._left_open(open_config()) == {"attn"}
    # The same numbers come out with and without recomputation: see below.
    config = open_config("no such folder", deterministic=True)
    made_by = run._made_by(config, method_of(config))
    assert "gradient_checkpointing" not in made_by and made_by["deterministic"]


@pytest.fixture
def bytes_a_token(monkeypatch):
    """A token of a row takes one byte with recomputation and four without."""

    def predicted(config, method, policy, pairs, recompute):
        return SimpleNamespace(total=config.micro_batch_tokens * (1 if recompute else 4))

    monkeypatch.setattr(memory, "predicted", predicted)


def test_rows_hold_what_fits_and_always_the_longest_pair(bytes_a_token):
    def rows(size: float, **flags) -> int:
        config = open_config(**{"max_len": 512, **flags})
        return memory.rows_that_fit(config, method_of(config), None, int(size / memory.MARGIN) + 1)

    assert [rows(4 * 16_384), rows(4 * 16_384 - 10), rows(16_384)] == [16_384, 8_192, 4_096]
    # 4,096 tokens without recomputation rather than 16,384 with it, unless a flag asks for it.
    assert rows(16_384, gradient_checkpointing="true") == 16_384
    assert rows(16_384, gradient_checkpointing="false") == 4_096
    assert [rows(1024), rows(0), rows(0, max_len=20_000), rows(10**9, max_len=20_000)] == [1024, 1024, 40_000, 40_000]
    # Short rows do not keep a GPU busy: better longer ones with recomputation.
    assert [rows(4 * 2_048), rows(4 * 2_048, gradient_checkpointing="false")] == [8_192, 2_048]
    for asked in ("true", "false"):
        sizes = [rows(size, gradient_checkpointing=asked) for size in range(0, 10**5, 500)]
        assert sizes == sorted(sizes) and set(sizes) == set(memory.ROWS)


def test_a_resumed_run_keeps_its_rows_whatever_recomputes_and_whatever_the_gpu(
    bytes_a_token, on_cuda, tmp_path, monkeypatch
):
    config = TrainConfig("-", "-", str(tmp_path), dtype="bfloat16", train_batch_size=4, max_len=512)

    def rows(gib: float, **flags) -> int | None:
        properties = SimpleNamespace(total_memory=int(gib / memory.MARGIN) + 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(memory, "shapes", lambda config: None)
        return memory.resolve_rows(replace(config, **flags), method_of(config)).micro_batch_tokens

    started = replace(config, micro_batch_tokens=rows(16_384))
    assert started.micro_batch_tokens == 4_096 and rows(16_384, gradient_checkpointing="true") == 16_384
    write_manifest(tmp_path, "train", run._made_by(started, method_of(started)))
    for flags in ({}, {"gradient_checkpointing": "true"}, {"gradient_checkpointing": "false"}):
        assert [rows(16_384, **flags), rows(10**6, **flags)] == [4_096, 4_096]
    assert rows(10**6, resume="never") == 16_384


def test_the_row_that_is_predicted_is_full():
    for tokens in memory.ROWS:
        assert 0.95 * tokens < sum(pair.row_tokens() for pair in memory._row_of(tokens)) <= tokens


def test_the_fewest_layers_recompute(tiny_policy, monkeypatch, capsys):
    pairs = pairs_of_lengths(*[(40, 20, 30)] * 4)
    run = run_of(open_config(tiny_policy), pairs)
    policy = memory.shapes(run.config)
    peaks = [memory.predicted(run.config, run.method, policy, pairs, layers, 1).total for layers in (0, 1, 2)]
    assert peaks[0] > peaks[1] >= peaks[2]
    monkeypatch.setattr(memory, "_resident", lambda: 1)
    for limit, expected in ((peaks[0], 0), (peaks[0] - 1, 1), (peaks[1], 1), (0, 2)):
        monkeypatch.setattr(memory, "_free", lambda limit=limit: (limit * 2, 1))
        found, _ = preflight(run)
        assert found.recompute == expected
        assert found.config.gradient_checkpointing == "auto", "the flag stays, for a repeated run on another machine"
        assert ("recompute off: without" in capsys.readouterr().out) == (expected == 0)
    for asked, layers in (("true", 2), ("false", 0)):
        assert preflight(run_of(open_config(tiny_policy, gradient_checkpointing=asked), pairs))[0].recompute == layers
    monkeypatch.setattr(memory, "_free", lambda: (2 * peaks[1], 1))
    capsys.readouterr()
    preflight(run)
    assert "recompute on for 1 of 2 layers: without recomputation the predicted peak of" in capsys.readouterr().out
    assert [memory.fewest_layers(30, limit, lambda layers: 100 - layers) for limit in (99, 93, 70, 0)] == [1, 7, 30, 30]


def test_a_command_line_may_ask_for_it_either_way():
    words = ["--model_path=m", "--dataset_path=d", "--save_path=s"]
    assert parse(TrainConfig, "", words).gradient_checkpointing == "auto"
    for word, recompute in (("true", True), ("false", False), ("auto", True)):
        assert parse(TrainConfig, "", [*words, f"--gradient_checkpointing={word}"]).recompute is recompute
    assert open_config(gradient_checkpointing=False).gradient_checkpointing == "false"


@pytest.mark.parametrize(
    "flags",
    [{}, {"dtype": "float32"}, {"kldpo_tau": 0.1}, {"packing": False}, {"wdpo_rho": 0.1},
     {"wdpo_rho": 0.1, "dtype": "float32"}, {"wdpo_rho": 0.1, "wdpo_solver": "exact"},
     {"wdpo_rho": 0.1, "packing": False, "dtype": "float32"}],
    ids=str,
)  # fmt: skip
def test_recomputation_changes_no_bit(flags, tiny_policy):
    """So a run that started without recomputation may resume with it."""
    pairs, found = pairs_of_lengths((7, 5, 9), (12, 3, 4), (2, 20, 6)), []
    config = open_config(tiny_policy, **flags)
    for layers in (0, 1, 2):
        policy = policy_of(tiny_policy, config, dtype=getattr(torch, config.dtype))
        set_recomputation(policy.language_model, layers)
        assert [layer.gradient_checkpointing for layer in recomputable_layers(policy)] == [layers > 0, layers > 1]
        if config.wide_values:
            widen_values(policy)
        batch, method = form_batch(pairs, [0, 1, 2], config.packing), method_of(config)
        population = Population(torch.tensor([0.1, 0.9, 0.5])) if method.weights else None
        calls: Counter[int] = Counter()
        for number, layer in enumerate(recomputable_layers(policy)):
            layer.register_forward_pre_hook(lambda *_, number=number, calls=calls: calls.update([number]))
        total = objective(policy, batch, torch.zeros(3, 2), method, population).total
        found.append((total.detach(), gradient_of(policy, total)))
        if method.penalty is None:
            assert calls == {number: 1 + (number < layers) for number in (0, 1)}
    assert float(found[0][1].abs().max()) > 0
    assert all(torch.equal(*both) for again in found[1:] for both in zip(found[0], again, strict=True))


def test_deterministic_kernels_are_asked_for_or_the_flag_is_refused(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        engine.be_deterministic()
        assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
    with pytest.raises(UsageError, match=r"--deterministic=true with --attn=flash and --packing=false.*pass --attn=sdpa"):
        open_config(deterministic=True, packing=False, attn="flash")

"""What the machine decides where flags leave it open: attention, rows, recomputation; and what depends on it."""

from dataclasses import dataclass, replace

import pytest
import torch

from drdpo import distributed
from drdpo.cli import parse
from drdpo.config import TrainConfig
from drdpo.errors import UsageError
from drdpo.kernels import packed_attention
from drdpo.training import engine, memory, run
from drdpo.training.data import Pair, form_batch
from drdpo.training.losses import method_of
from drdpo.training.memory import resolve_attention, rows_that_fit
from drdpo.training.objective import Population, objective
from drdpo.training.policy import load_policy, widen_first_tokens
from drdpo.training.reference import reference_key
from drdpo.training.run import Run, arithmetic_of


def config_of(path="-", **flags) -> TrainConfig:
    return TrainConfig(str(path), "-", "-", **{"dtype": "bfloat16", "train_batch_size": 4, **flags})


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setattr(distributed, "use_cuda", lambda: True)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(packed_attention, "check_varlen", lambda *given: None)


def test_packed_rows_attend_by_flash_on_cuda_and_by_sdpa_on_a_cpu(tiny_policy, on_cuda, monkeypatch, capsys):
    config = config_of(tiny_policy)
    assert resolve_attention(config).attn == "flash"
    assert resolve_attention(replace(config, kldpo_tau=0.1)).packed_flash
    assert resolve_attention(replace(config, attn="sdpa")).attn == "sdpa"
    assert resolve_attention(replace(config, packing=False)).attn == "sdpa"
    assert resolve_attention(config_of(tiny_policy, wdpo_rho=0.1, wdpo_solver="exact")).attn == "eager"
    assert not capsys.readouterr().out
    monkeypatch.setattr(distributed, "use_cuda", lambda: False)
    assert resolve_attention(config).attn == "sdpa"
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"dtype": "float32"}, "flash attention takes 16-bit numbers only"),
        ({"wdpo_rho": 0.1}, "--wdpo_solver=tangent attends in float32 to keep its accuracy"),
    ],
)
def test_where_flash_does_not_fit_a_run_one_line_says_why(flags, reason, tiny_policy, on_cuda, capsys):
    assert resolve_attention(config_of(tiny_policy, **flags)).attn == "sdpa"
    assert capsys.readouterr().out == f"--attn=auto: sdpa instead of flash, because {reason}\n"


def test_flash_that_a_flag_asks_for_is_used_or_refused(tiny_policy, on_cuda, monkeypatch, capsys):
    asked = config_of(tiny_policy, attn="flash")
    assert resolve_attention(replace(asked, wdpo_rho=0.1)).packed_flash
    monkeypatch.setattr(packed_attention, "check_varlen", lambda *given: "head_dim must be at most 256")
    with pytest.raises(UsageError, match=r"--attn=flash.*head_dim must be at most 256; pass --attn=sdpa"):
        resolve_attention(asked)
    assert resolve_attention(replace(asked, attn="auto")).attn == "sdpa"
    assert "because head_dim must be at most 256" in capsys.readouterr().out


def test_reference_log_probs_are_keyed_by_what_attends(tiny_policy, on_cuda, monkeypatch):
    config, pairs = config_of(tiny_policy), [Pair([1], [2], [3])]
    flash = reference_key("model", pairs, arithmetic_of(resolve_attention(config)))
    monkeypatch.setattr(distributed, "use_cuda", lambda: False)
    assert reference_key("model", pairs, arithmetic_of(resolve_attention(config))) != flash


def test_what_is_left_open_does_not_stop_a_run_that_resumes(on_cuda, monkeypatch):
    assert run._left_open(config_of()) == {"attn", "micro_batch_size", "micro_batch_tokens"}
    assert run._left_open(config_of(attn="sdpa", micro_batch_size=2)) == set()
    for given in ({"micro_batch_tokens": 9}, {"packing": False}, {"robust_scope": "micro", "kldpo_tau": 1.0}):
        assert not run.deals_by_tokens(config_of(**given))
    monkeypatch.setattr(distributed, "use_cuda", lambda: False)
    assert run._left_open(config_of()) == {"attn"}
    # The same numbers come out with and without recomputation: see below.
    assert "gradient_checkpointing" not in run._made_by(config_of("no such folder"))
    assert run._made_by(config_of("no such folder", deterministic=True))["deterministic"]


@dataclass
class _Need:
    total: float


def test_rows_hold_what_fits_and_always_the_longest_pair(monkeypatch):
    """A token takes one byte with recomputation and four without."""
    config = config_of(max_len=512)
    monkeypatch.setattr(
        memory, "predicted",
        lambda config, policy, pairs, recompute: _Need(config.micro_batch_tokens * (1 if recompute else 4)),
    )  # fmt: skip

    def rows(memory: float, **flags) -> int:
        return rows_that_fit(replace(config, **flags), None, int(memory / memory.MARGIN) + 1)

    assert [rows(4 * 16_384), rows(4 * 16_384 - 10), rows(16_384)] == [16_384, 8_192, 4_096]
    # 4,096 tokens without recomputation rather than 16,384 with it, unless a flag asks for it.
    assert rows(16_384, gradient_checkpointing="true") == 16_384
    assert rows(16_384, gradient_checkpointing="false") == 4_096
    assert [rows(1024), rows(0), rows(0, max_len=20_000), rows(10**9, max_len=20_000)] == [1024, 1024, 40_000, 40_000]
    # Short rows do not keep a GPU busy: better longer ones with recomputation.
    assert [rows(4 * 2_048), rows(4 * 2_048, gradient_checkpointing="false")] == [8_192, 2_048]
    for asked in ("true", "false"):
        sizes = [rows(memory, gradient_checkpointing=asked) for memory in range(0, 10**5, 500)]
        assert sizes == sorted(sizes) and set(sizes) == set(memory.ROWS)


@pytest.mark.parametrize("flags", [{}, {"wdpo_rho": 0.1}, {"wdpo_rho": 0.1, "wdpo_prompt": "once"}], ids=str)
def test_the_row_that_is_predicted_is_full(flags):
    config = config_of(**flags)
    for tokens in memory.ROWS:
        pairs = memory._row_of(tokens, config)
        assert 0.95 * tokens < sum(pair.row_tokens(config.prompt_once) for pair in pairs) <= tokens


class _Tokenizer:
    pad_token_id = 0


@pytest.mark.parametrize(("free", "expected", "told"), [(10**12, "false", "off: without"), (10**6, "true", "on: without")])
def test_activations_are_kept_where_memory_allows(free, expected, told, tiny_policy, tmp_path, monkeypatch, capsys):
    pairs = [Pair([5] * 40, [6] * 20, [7] * 30)] * 4
    monkeypatch.setattr(memory, "_free", lambda: (free, 1))
    for asked in ("auto", "true", "false"):
        config = config_of(tiny_policy, gradient_checkpointing=asked)
        found, _ = memory.preflight(
            Run(config, method_of(config), tmp_path, _Tokenizer(), pairs, pairs, {"train": {"answer cut": 0}}, {})
        )
        assert found.config.gradient_checkpointing == (expected if asked == "auto" else asked)
        assert (f"recompute {told}" in capsys.readouterr().out) == (asked == "auto")


def test_a_command_line_may_ask_for_it_either_way():
    words = ["--model_path=m", "--dataset_path=d", "--save_path=s"]
    assert parse(TrainConfig, "", words).gradient_checkpointing == "auto"
    for word, recompute in (("true", True), ("false", False), ("auto", True)):
        assert parse(TrainConfig, "", [*words, f"--gradient_checkpointing={word}"]).recompute is recompute
    assert config_of(gradient_checkpointing=False).gradient_checkpointing == "false"


@pytest.mark.parametrize(
    "flags",
    [{}, {"dtype": "float32"}, {"kldpo_tau": 0.1}, {"packing": False}, {"wdpo_rho": 0.1},
     {"wdpo_rho": 0.1, "dtype": "float32"}, {"wdpo_rho": 0.1, "wdpo_solver": "exact"},
     {"wdpo_rho": 0.1, "packing": False, "dtype": "float32"}],
    ids=str,
)  # fmt: skip
def test_recomputation_changes_no_bit(flags, tiny_policy):
    """So a run may resume with it where it started without."""
    generator = torch.Generator().manual_seed(0)
    pairs = [Pair(*(torch.randint(300, (length,), generator=generator).tolist() for length in lengths))
             for lengths in ((7, 5, 9), (12, 3, 4), (2, 20, 6))]  # fmt: skip
    found = []
    for recompute in (False, True):
        config = config_of(tiny_policy, gradient_checkpointing=recompute, beta=0.5, **flags)
        policy = load_policy(
            str(tiny_policy), getattr(torch, config.dtype), config.attention, recompute, config.second_derivative
        )
        if config.wide_first_tokens:
            widen_first_tokens(policy)
        batch = form_batch(pairs, [0, 1, 2], config.packing, config.prompt_once)
        population = Population(torch.tensor([0.1, 0.9, 0.5])) if method_of(config).weights else None
        part = objective(policy, batch, torch.zeros(3, 2), method_of(config), population)
        part.total.backward()
        found.append([part.total.detach(), *(parameter.grad for parameter in policy.parameters())])
    assert all(float(grad.abs().max()) > 0 for grad in found[0])
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))


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
        config_of(deterministic=True, packing=False, attn="flash")

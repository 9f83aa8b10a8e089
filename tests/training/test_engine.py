"""A step's population and its survey, and what of the flags reaches DeepSpeed and the model."""

import math
from types import SimpleNamespace

import pytest
import torch
from harness.policies import config_of
from transformers import LlamaConfig

from drdpo.config.training import TrainConfig
from drdpo.kernels.packed_attention import SHARED_PREFIX
from drdpo.training.data import form_batch
from drdpo.training.engine import engine_config, largest_vector
from drdpo.training.loop import train_step
from drdpo.training.losses import method_of
from drdpo.training.memory import shapes
from drdpo.training.objective import survey
from drdpo.training.policy import Answers, load_policy


class HandPolicy(torch.nn.Module):
    """A policy whose chosen answers have the log-probs that are its parameters and whose rejected ones have 0."""

    watch = None

    def __init__(self, margins_M: torch.Tensor) -> None:
        super().__init__()
        self.margins_M = torch.nn.Parameter(margins_M)
        self.with_graph: list[bool] = []

    def forward(self, batch) -> Answers:
        self.with_graph.append(torch.is_grad_enabled())
        chosen_B = self.margins_M[batch.indices_B]
        return Answers(torch.cat([chosen_B, torch.zeros_like(chosen_B)]), torch.zeros(0))


# Losses, in units of ln 2: sigmoid(0) = 1/2 is 1, sigmoid(-ln 3) = 1/4 is 2, sigmoid(-ln 15) = 1/16 is 4.
LN_2, MARGINS = math.log(2), [0.0, -math.log(3), 0.0, -math.log(15)]


@pytest.mark.parametrize(
    ("flags", "expected", "passes"),
    # Passes: losses first, without a graph, then gradients; the authors' population and one micro-batch need no survey.
    [
        # Means 1.5 and 2.5; exp((l - mean) / tau), the last capped from exp(3).
        ({"kldpo_tau": LN_2, "robust_scope": "micro"}, [math.exp(-0.5), math.exp(0.5), math.exp(-1.5), math.exp(1.5)],
         [True, True]),
        ({"kldpo_tau": LN_2 / 2, "robust_scope": "micro"}, [math.exp(-1), math.exp(1), math.exp(-3), 10.0],
         [True, True]),
        # Mean 2 over the step.
        ({"kldpo_tau": LN_2}, [math.exp(-1), 1.0, math.exp(-1), math.exp(2)], [False, False, True, True]),
        ({"kldpo_tau": LN_2, "micro_batch_size": 4}, [math.exp(-1), 1.0, math.exp(-1), math.exp(2)], [True]),
        # 2^-l over its mean: of (1/2, 1/4) and (1/2, 1/16), or of all four, 21/64.
        ({"drdpo_beta": 1.0, "robust_scope": "micro"}, [4 / 3, 2 / 3, 16 / 9, 2 / 9], [True, True]),
        ({"drdpo_beta": 1.0}, [32 / 21, 16 / 21, 32 / 21, 4 / 21], [False, False, True, True]),
    ],
)  # fmt: skip
def test_weights_of_a_step_by_hand(flags, expected, passes):
    config, policy = config_of(**{"beta": 1.0, "train_batch_size": 4, **flags}), HandPolicy(torch.tensor(MARGINS))
    engine = SimpleNamespace(
        module=policy, device=torch.device("cpu"), backward=lambda total, scale_wrt_gas: None, step=lambda: None,
        set_gradient_accumulation_boundary=lambda last: None,
    )  # fmt: skip
    rows = torch.arange(4).split(config.micro_batch_size or 2)
    batches = [(SimpleNamespace(indices_B=indices_B, columns={}), torch.zeros(len(indices_B), 2)) for indices_B in rows]
    weights = torch.cat([part.weights_B for part in train_step(engine, batches, config, method_of(config))])
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)
    assert policy.with_graph == passes


@pytest.mark.parametrize("packing", [True, False])
def test_a_survey_keeps_no_graph_and_sends_answers_alone_to_the_head(packing, tiny_policy, pairs, monkeypatch):
    config = config_of(kldpo_tau=0.1, packing=packing)
    policy = load_policy(str(tiny_policy), torch.float32, config.attention, gradient_checkpointing=False)
    batches = [(form_batch(pairs, rows, config.packing), torch.zeros(2, 2)) for rows in ([0, 1], [2, 3])]
    sent, known, head = [], [], policy.head.forward

    def spy(kernel, hidden_ND, *arguments, **options):
        logprob_N = head(kernel, hidden_ND, *arguments, **options)
        sent.append(len(hidden_ND))
        known.append(hidden_ND.requires_grad or logprob_N.requires_grad)
        return logprob_N

    monkeypatch.setattr(policy.head, "forward", spy)
    population = survey(policy, batches, method_of(config))
    answers = [len(pair.chosen) + len(pair.rejected) for pair in pairs[:4]]
    assert sent == [answers[0] + answers[1], answers[2] + answers[3]]
    assert known == [False, False] and not population.losses_P.requires_grad
    assert population.losses_P.shape == (4,)


def test_flags_reach_deepspeed():
    settings = engine_config(config_of(optimizer_offload=True, zero_stage=1), 1)
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "offload_optimizer" not in engine_config(config_of(), 1)["zero_optimization"]


def test_zero_3_leaves_whole_what_the_tangent_pass_reads_itself(tmp_path):
    """The weights of norms, however wide: of a model of width 120,000 too, beyond DeepSpeed's own threshold."""
    for width, expected in ((120_000, 120_000), (64, 100_000)):
        LlamaConfig(
            vocab_size=16, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, architectures=["LlamaForCausalLM"],
        ).save_pretrained(tmp_path)  # fmt: skip
        config = TrainConfig(str(tmp_path), "-", "-", zero_stage=3, dtype="bfloat16")
        policy = shapes(config)
        assert largest_vector(policy) == width
        settings = engine_config(config, 1, 10**9, largest_vector(policy))["zero_optimization"]
        assert settings["stage3_param_persistence_threshold"] == expected
        read = [module.weight for name, module in policy.named_modules() if name.endswith("norm")]
        assert len(read) == 3 and all(weight.numel() <= expected for weight in read)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({}, SHARED_PREFIX), ({"attn": "sdpa"}, SHARED_PREFIX), ({"wdpo_rho": 0.1}, SHARED_PREFIX),
        ({"wdpo_rho": 0.1, "wdpo_solver": "exact"}, "eager"), ({"packing": False, "wdpo_rho": 0.1}, "eager"),
        ({"packing": False}, "sdpa"), ({"packing": False, "attn": "eager"}, "eager"),
        ({"packing": False, "attn": "flex"}, "flex_attention"),
        ({"packing": False, "attn": "flash", "dtype": "bfloat16"}, "flash_attention_2"),
    ],
)  # fmt: skip
def test_the_attention_that_flags_choose(flags, name):
    config = config_of(**flags)
    assert config.attention == name and config.packing == (name == SHARED_PREFIX)


def test_a_model_is_checked_on_the_cpu_and_then_attends_as_asked(tiny_policy):
    policy = load_policy(str(tiny_policy), torch.float32, "flex_attention", gradient_checkpointing=False)
    assert policy.language_model.config._attn_implementation == "flex_attention"

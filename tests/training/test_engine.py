"""The engine's promises: the step's population whatever the split, offload, ZeRO-3 checkpoints."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness.policies import config_of, random_pairs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from drdpo.config.training import TrainConfig
from drdpo.kernels.packed_attention import SHARED_PREFIX
from drdpo.training.data import Pair, form_batch
from drdpo.training.engine import engine_config, largest_vector
from drdpo.training.loop import train_step
from drdpo.training.losses import method_of
from drdpo.training.memory import shapes
from drdpo.training.objective import survey
from drdpo.training.policy import Answers, load_policy

COMMON = {"beta": 0.5, "learning_rate": 1e-3, "train_batch_size": 8, "warmup_ratio": 0.0, "dtype": "float32", "steps": 2}
ROBUST = {"kldpo": {"kldpo_tau": 0.1}, "drdpo": {"drdpo_beta": 0.1}}
POPULATION = {
    f"{method} {form} {micro} a rank": {**COMMON, **ROBUST[method], "packing": form == "packed", "micro_batch_size": micro}
    for method in ROBUST
    for form in ("packed", "padded")
    for micro in (1, 4, 8)
}
MICRO = {
    f"{method} micro": {**COMMON, **ROBUST[method], "micro_batch_size": 2, "robust_scope": "micro"} for method in ROBUST
}
# Four micro-batches a step, or as many rows as the lengths make, fewer than DeepSpeed expects.
KINDS = {
    "float32": {"micro_batch_size": 2}, "bfloat16": {"micro_batch_size": 2, "dtype": "bfloat16"},
    "float32 rows": {"micro_batch_tokens": 60},
}  # fmt: skip
OFFLOAD = {
    f"{kind} zero{stage} {'offloaded' if offload else 'kept'}": {
        **COMMON, **flags, "zero_stage": stage, "steps": 3, "optimizer_offload": offload,
    }
    for kind, flags in KINDS.items()
    for stage in (1, 2, 3)
    for offload in (False, True)
}  # fmt: skip
ACCUMULATED = {
    f"accumulated zero{stage}": {**COMMON, "dtype": "bfloat16", "zero_stage": stage, "micro_batch_size": 1}
    for stage in (1, 2, 3)
}
SAVED = {
    head: {**COMMON, "dtype": "bfloat16", "zero_stage": 3, "micro_batch_size": 2, "save": True}
    for head in ("tied", "untied")
}


@pytest.fixture(scope="module")
def pairs() -> list[list[list[int]]]:
    return random_pairs(seed=4, count=24)


@pytest.fixture(scope="module")
def untied(tiny_policy, tmp_path_factory) -> Path:
    """The tiny policy with an output head of its own."""
    path = tmp_path_factory.mktemp("models") / "untied"
    settings = AutoModelForCausalLM.from_pretrained(tiny_policy).config
    settings.tie_word_embeddings = False
    torch.manual_seed(1)
    LlamaForCausalLM(settings).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def one_rank(pairs, engine_work) -> Path:
    return engine_work(POPULATION | MICRO | OFFLOAD | ACCUMULATED, pairs, 1)


@pytest.fixture(scope="module")
def two_ranks(pairs, untied, engine_work) -> Path:
    saved = {name: {**case, "model": str(untied)} if name.startswith("untied") else case for name, case in SAVED.items()}
    few = {name: case for name, case in POPULATION.items() if name.endswith(("packed 4 a rank", "1 a rank"))}
    return engine_work(few | saved, pairs)


def flat(path: Path) -> torch.Tensor:
    return torch.cat([value.double().flatten() for _, value in sorted(load_file(path).items())])


def figures(folder: Path, case: str) -> dict[str, list[float]]:
    return json.loads((folder / f"{case}.0.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("method", ROBUST)
def test_parameters_do_not_depend_on_micro_batches_ranks_or_packing(method, one_rank, two_ranks):
    """1x8, 2x4 and 8x1 pairs on one rank, 1x4 and 4x1 on each of two, packed and padded."""
    expected = flat(one_rank / f"{method} packed 8 a rank.safetensors")
    found = [folder / f"{case}.safetensors" for folder in (one_rank, two_ranks) for case in POPULATION if method in case]
    there = [path for path in found if path.is_file()]
    assert len(there) == 6 + 3
    for path in there:
        assert float((flat(path) - expected).norm() / expected.norm()) < 1e-6, path
    # The authors' population is another objective: an error of this kind would show.
    micro = flat(one_rank / f"{method} micro.safetensors")
    assert float((micro - expected).norm() / expected.norm()) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", [f"{kind} zero{stage}" for kind in KINDS for stage in (1, 2, 3)])
def test_offloaded_optimizer_states_change_no_number(case, one_rank, tiny_policy):
    kept, offloaded = (figures(one_rank, f"{case} {how}") for how in ("kept", "offloaded"))
    steps = len(kept["losses"])
    assert len(offloaded["sizes"]) == len(kept["sizes"]) > 2 * steps, "several micro-batches a step"
    assert offloaded["losses"][0] == kept["losses"][0], "the same weights make the first step's losses"
    assert offloaded["norms"][0] == pytest.approx(kept["norms"][0], rel=1e-5), "the same gradients, summed in another order"
    weights, expected = flat(one_rank / f"{case} offloaded.safetensors"), flat(one_rank / f"{case} kept.safetensors")
    if case.startswith("float32"):
        assert offloaded["losses"] == pytest.approx(kept["losses"], abs=1e-6)
        assert offloaded["norms"] == pytest.approx(kept["norms"], rel=1e-5)
        assert float((weights - expected).norm() / expected.norm()) < 1e-6
        return
    # The same sums in another order: their float32 results, a last bit apart, seldom round to different bfloat16 numbers.
    # How many do depends on the CPU; other gradients would change about half of the weights that were trained.
    start = flat(tiny_policy / "model.safetensors").bfloat16().double()
    trained = (expected != start) | (weights != start)
    assert int(trained.sum()) > 10_000
    assert float((weights != expected)[trained].double().mean()) < 1e-2


@pytest.mark.slow
def test_stages_sum_bfloat16_micro_batches_alike(one_rank):
    """DeepSpeed's stage 1 added the first of eight gradients eight times, the second seven times."""
    norms = [figures(one_rank, f"accumulated zero{stage}")["norms"][0] for stage in (1, 2, 3)]
    assert norms == pytest.approx([norms[1]] * 3, rel=5e-3)
    start = flat(one_rank / "accumulated zero2.safetensors")
    apart = (flat(one_rank / "accumulated zero1.safetensors") - start).norm()
    assert float(apart / start.norm()) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", SAVED)
def test_what_zero_3_saves_reloads_bit_equal(case, two_ranks):
    gathered, folder = load_file(two_ranks / f"{case}.safetensors"), two_ranks / f"{case} saved"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    loaded = dict(model.named_parameters())
    assert loaded.keys() == gathered.keys()
    for name, value in gathered.items():
        assert loaded[name].dtype == value.dtype == torch.bfloat16
        assert torch.equal(loaded[name], value), name
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is table) == (case == "tied")
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (case == "untied")


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
    pairs = [Pair(*row) for row in pairs]
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
        ({}, SHARED_PREFIX),
        ({"attn": "sdpa"}, SHARED_PREFIX),
        ({"wdpo_rho": 0.1}, SHARED_PREFIX),
        ({"wdpo_rho": 0.1, "wdpo_solver": "exact"}, "eager"),
        ({"packing": False}, "sdpa"),
        ({"packing": False, "attn": "eager"}, "eager"),
        ({"packing": False, "wdpo_rho": 0.1}, "eager"),
        ({"packing": False, "attn": "flex"}, "flex_attention"),
        ({"packing": False, "attn": "flash", "dtype": "bfloat16"}, "flash_attention_2"),
    ],
)
def test_the_attention_that_flags_choose(flags, name):
    config = config_of(**flags)
    assert config.attention == name and config.packing == (name == SHARED_PREFIX)


def test_a_model_is_checked_on_the_cpu_and_then_attends_as_asked(tiny_policy):
    policy = load_policy(str(tiny_policy), torch.float32, "flex_attention", gradient_checkpointing=False)
    assert policy.language_model.config._attn_implementation == "flex_attention"

"""docs/own.md's method in one file: its numbers by hand, its gradient, its refusals, and a real run of it."""

import json
import os
import subprocess
from dataclasses import replace

import pytest
import torch
from harness import ROOT
from harness.policies import REFERENCE_M2, apart, gradient_of, policy_of
from harness.runs import flags_of, words_of
from own_method import CvarConfig, cvar

from drdpo.config.training import TrainConfig
from drdpo.errors import DataError, UsageError
from drdpo.training.data import collate, form_batch
from drdpo.training.losses import TOKENS, Method, Pairs, Penalty, method_of
from drdpo.training.memory import _row_of
from drdpo.training.objective import _check_loss, check_tangent, objective, survey
from drdpo.training.policy import load_policy, pairs_of
from drdpo.training.run import check_inputs

PATHS = {"model_path": "-", "dataset_path": "-", "save_path": "-"}


def config_of(**flags) -> CvarConfig:
    return CvarConfig(**PATHS, **{"beta": 0.5, "dtype": "float32", "packing": False} | flags)


def pairs_with(margins: list[float], **columns: list[float]) -> Pairs:
    tensors = {name: torch.tensor(column) for name, column in columns.items()}
    return Pairs(torch.tensor(margins), torch.zeros(2 * len(margins)), tensors)


def test_losses_and_weights_by_hand():
    pairs, method = pairs_with([0.0, 1.0, 4.0, -2.0]), cvar(config_of(cvar_share=0.5))
    # 1 - 0.5 h
    assert method.loss(pairs).tolist() == [1.0, 0.5, 0.0, 2.0]
    population = torch.tensor([3.0, 1.0, 2.0, 0.0])
    assert method.weights(population, population, pairs).tolist() == [2, 0, 2, 0]
    one = method.weights(population[:1], population, pairs_with([0.0]))
    assert one.tolist() == [2], "a micro-batch asks for the weights of its own pairs"
    same = torch.ones(4)
    assert method.weights(same, same, pairs).tolist() == [1, 1, 1, 1], "ties share: at the start it is the plain mean"
    assert cvar(config_of(cvar_share=1.0)).weights(population, population, pairs).tolist() == [1, 1, 1, 1]
    assert method.needs_population and method.label == "hinge CVaR (cvar_share=0.5)"


def by_trust(losses_B, population_P, pairs):
    return pairs.columns["trust"].square()


def squared_trust(config):
    return replace(method_of(config), name="squared trust", weights=by_trust, population=False, reads=("trust",))


def test_weights_by_a_function_of_a_field_need_no_survey(tiny_policy, pairs):
    """The page's second example."""
    config = config_of()
    method = squared_trust(config)
    part = objective(policy_of(tiny_policy, config), collate(pairs, range(4), 0), REFERENCE_M2, method)
    assert part.weights_B.tolist() == [0.25, 2.25, 6.25, 0.25]
    assert not method.needs_population and method.weighted


def test_a_loss_may_read_its_group(tiny_policy):
    """Pairs that are made up to check a method, or to predict its memory, have the column too."""
    method = Method("own", lambda pairs: (1 + pairs.columns["domain"]) * -pairs.margins_B, group="domain")
    assert method.columns == ("domain",)
    _check_loss(method)
    assert _row_of(30, method.columns)[0].columns == {"domain": 0.0}


def hinge(pairs):
    return (1 - pairs.margins_B).clamp(min=0)


def mean_length(columns):
    return (columns["chosen_tokens"] + columns["rejected_tokens"]).mean()


def by_length(losses_B, population_P, pairs):
    return 2 * pairs.state["mean"] / (pairs.state["mean"] + sum(pairs.lengths_S.chunk(2)))


def moved_mean(state, population_P, columns):
    return {"mean": 0.9 * state["mean"] + 0.1 * mean_length(columns)}


def begin(columns):
    return {"mean": mean_length(columns)}


SHORTER = Method("shorter pairs", hinge, by_length, reads=TOKENS, begin=begin, update=moved_mean)


def test_a_method_keeps_a_state(tiny_policy, pairs):
    """The page's third example."""
    method, policy = SHORTER, policy_of(tiny_policy, config_of())
    tokens_B = torch.tensor([float(len(pair.chosen) + len(pair.rejected)) for pair in pairs[:2]])
    policy.method_state = {"mean": torch.tensor(10.0)}
    population = survey(policy, [(collate(pairs, [row], 0), REFERENCE_M2[[row]].float()) for row in (0, 1)], method)
    mean = 9 + float(tokens_B.mean()) / 10
    assert float(population.state["mean"]) == pytest.approx(mean)
    part = objective(policy, collate(pairs, [0, 1], 0), REFERENCE_M2[:2].float(), method, population)
    assert part.weights_B.tolist() == pytest.approx((2 * mean / (mean + tokens_B)).tolist())
    assert float(part.state["mean"]) == pytest.approx(mean)


def test_its_step_is_the_mean_over_the_hardest_pairs(tiny_policy, pairs):
    config, batch = config_of(cvar_share=0.5), collate(pairs, range(4), 0)
    policy = policy_of(tiny_policy, config)
    whole = objective(policy, batch, REFERENCE_M2, cvar(config), None)
    margins = pairs_of(policy(batch).logprob_S, REFERENCE_M2, batch).margins_B
    hardest = torch.sort(torch.relu(1 - 0.5 * margins), descending=True).values[:2]
    assert (gradient_of(policy, whole.total) - gradient_of(policy, hardest.mean())).abs().max() < 1e-6
    assert sorted(whole.weights_B.tolist()) == [0, 0, 2, 2]
    # Two micro-batches, weights from the whole step.
    halves = [(collate(pairs, rows, 0), REFERENCE_M2[rows]) for rows in ([0, 1], [2, 3])]
    population = survey(policy, halves, cvar(config))
    split = torch.cat([objective(policy, *half, cvar(config), population).weights_B for half in halves])
    assert split.tolist() == whole.weights_B.tolist()


def test_wdpo_penalises_a_loss_of_ones_own_in_both_solvers(tiny_policy, pairs):
    found = []
    for solver in ("exact", "tangent"):
        config = TrainConfig(**PATHS, beta=0.5, dtype="float32", wdpo_rho=0.1, wdpo_solver=solver, micro_batch_size=4)
        method = replace(method_of(config), loss=lambda pairs: torch.sqrt(1 + (1 - 0.5 * pairs.margins_B).square()))
        policy = policy_of(tiny_policy, config)
        part = objective(policy, form_batch(pairs, range(4), config.packing), REFERENCE_M2, method)
        found.append((gradient_of(policy, part.total), part.penalties_B))
        assert part.losses_B.tolist() == method.loss(part.pairs).tolist()
    (exact, penalties), (ours, our_penalties) = found
    torch.testing.assert_close(our_penalties, penalties, rtol=1e-5, atol=1e-12)
    assert apart(ours, exact) < 1e-5


def test_the_tangent_solver_refuses_a_loss_of_more_than_the_margin(tiny_policy):
    """Its gradient would be wrong without a sign of it."""
    config = TrainConfig(str(tiny_policy), "-", "-", dtype="float32", wdpo_rho=0.1)
    method = replace(method_of(config), loss=lambda pairs: pairs.log_ratios_S.view(2, -1).square().sum(dim=0))
    policy = load_policy(str(tiny_policy), torch.float32, config.attention, False)
    with pytest.raises(DataError, match=r"depends on the log-ratios.*--wdpo_solver=exact"):
        check_tangent(policy, config.model_path, method)


def test_flags_and_method_that_do_not_belong_together_are_refused():
    """What a row holds, what is checked and what the manifest says follow the flags. A class without a function of its own,
    or with a changed loss alone, would be taken for the known method's run."""
    plain, config, weighted = TrainConfig(**PATHS, dtype="float32"), config_of(), config_of(weight_column="trust")
    for flags, method, words in (
        (plain, replace(method_of(plain), penalty=Penalty(0.1)), "pass --wdpo_rho"),
        (
            weighted,
            replace(method_of(config), name="CVaR"),
            "--weight_column is trust; make it with replace",
        ),
        (config, replace(method_of(weighted), name="CVaR"), "CVaR has weight_column trust"),
        (config, method_of(config), "CvarConfig is a command line of its own.*docs/own.md"),
        (config, replace(method_of(config), loss=cvar(config).loss), "CvarConfig is a command line of its own"),
    ):
        with pytest.raises(UsageError, match=words):
            check_inputs(flags, method)
    with pytest.raises(ValueError, match="weights or a penalty"):
        Method("both", lambda pairs: pairs.margins_B, lambda losses_B, population_P, pairs: losses_B, penalty=Penalty(0.1))


@pytest.mark.parametrize(
    ("flags", "words"),
    [({"cvar_share": 0.0}, "cvar_share"), ({"kldpo_tau": 0.1}, "kldpo_tau"), ({"loss_type": "ipo"}, "hinge")],
)
def test_refusals(flags, words):
    with pytest.raises(UsageError, match=words):
        config_of(**flags)


@pytest.mark.slow
def test_it_trains_by_its_wrapper(tiny_policy, forks, data, tmp_path):
    environment = {**os.environ, "DRDPO_PROCESSES": "1", "DRDPO_ENV": str(forks.environment(tmp_path / "an environment"))}
    own = {"cvar_share": 0.25, "micro_batch_size": 2, "learning_rate": 1e-2, "warmup_ratio": 0.25}
    words = words_of(flags_of(tiny_policy, data, tmp_path / "a run", **own))
    command = ["bash", str(ROOT / "experiments" / "own_method.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "a run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == 1.0 and lines[0]["effective_sample_size"] == 4.0
    # docs/troubleshooting.md: the warm-up's first rate is 0, so the second step begins where the first did.
    assert lines[0]["lr"] == 0 and lines[1]["lr"] > 0
    assert lines[1]["loss"] == 1.0 and lines[2]["loss"] != 1.0
    assert lines[-1]["effective_sample_size"] == 1.0, "one pair of four is the hardest"
    assert lines[-1]["objective"] > lines[-1]["loss"], "the hardest pair's loss is above the mean"
    assert (tmp_path / "a run" / "global_step_4" / "model.safetensors").is_file()
    manifest = json.loads((tmp_path / "a run" / "manifest.json").read_text())["train"]["made_by"]
    assert manifest["method"] == "hinge CVaR (cvar_share=0.25)" and manifest["cvar_share"] == 0.25

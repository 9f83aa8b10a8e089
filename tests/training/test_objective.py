"""The objective on a real (tiny) Llama: penalty gradient against finite differences, laws, independence of the split."""

from functools import partial

import pytest
import torch
from harness import policies
from harness.policies import REFERENCE_M2

from drdpo.training.data import Pair, collate, columns_of
from drdpo.training.losses import gradient_penalty, method_of
from drdpo.training.objective import objective, survey
from drdpo.training.policy import Policy, load_policy, pairs_of

config_of = partial(policies.config_of, packing=False)  # other forms: test_packing.py, test_wdpo_solvers.py


def policy_of(path, checkpointing: bool = False, second_derivative: bool = True) -> Policy:
    return load_policy(str(path), torch.float32, "eager", checkpointing, second_derivative).double().train()


@pytest.fixture(scope="module")
def policy(tiny_policy) -> Policy:
    return policy_of(tiny_policy)


def gradients(policy: Policy, total: torch.Tensor) -> list[torch.Tensor]:
    parameters = [p for p in policy.parameters() if p.requires_grad]
    return list(torch.autograd.grad(total, parameters))


def relative_error(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Llama keeps its norms and softmax in float32 even in a float64 model, so equal means about 1e-7 of the norm."""
    flat = [torch.cat([g.flatten() for g in side]) for side in (ours, theirs)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def losses_of(policy: Policy, batch, reference_B2: torch.Tensor = REFERENCE_M2) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] losses of DPO, and the input embeddings they depend on."""
    logprob_S, embeds_STD = policy(batch)
    return method_of(config_of()).loss(pairs_of(logprob_S, reference_B2, batch)), embeds_STD


def whole(policy: Policy, pairs: list[Pair], **flags):
    return objective(policy, collate(pairs, range(4), 0), REFERENCE_M2, method_of(config_of(**flags)), None)


def test_penalty_gradient_equals_finite_differences(policy, pairs):
    """d/dtheta of mean |grad_e l|^2 along random directions, central differences in float64."""
    batch = collate(pairs, range(4), 0)

    def penalty(create_graph: bool) -> torch.Tensor:
        losses_B, embeds_STD = losses_of(policy, batch)
        return gradient_penalty(losses_B, embeds_STD, create_graph).mean()

    exact = gradients(policy, penalty(create_graph=True))
    parameters = [p for p in policy.parameters() if p.requires_grad]
    for seed in range(3):
        torch.manual_seed(seed)
        directions = [torch.randn_like(p) for p in parameters]
        step = 1e-4
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p += sign * step * d
            ends.append(penalty(create_graph=False).item())
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p -= sign * step * d
        slope = (ends[0] - ends[1]) / (2 * step)
        expected = sum((g * d).sum() for g, d in zip(exact, directions, strict=True)).item()
        assert slope == pytest.approx(expected, rel=2e-4), seed


def test_wdpo_with_vanishing_rho_is_dpo(policy, pairs):
    dpo = gradients(policy, whole(policy, pairs).total)
    wdpo = gradients(policy, whole(policy, pairs, wdpo_rho=1e-300).total)
    assert relative_error(wdpo, dpo) < 1e-6


@pytest.mark.parametrize(
    "flags",
    [
        {}, {"kldpo_tau": 0.3}, {"kldpo_tau": 0.3, "kldpo_normalize": True}, {"drdpo_beta": 0.3}, {"wdpo_rho": 0.1},
        {"wdpo_rho": 0.1, "wdpo_penalty": "root"}, {"wdpo_rho": 0.1, "weight_column": "trust"},
        {"wdpo_rho": 0.1, "wdpo_penalty": "root", "weight_column": "trust"}, {"kldpo_tau": 0.3, "weight_column": "trust"},
        {"method": "tv:0.3"}, {"method": "chi2:0.3"}, {"method": "cvar:0.3", "loss_type": "ipo_norm"}, {"method": "ropo:14"},
        {"method": "holder:2"}, {"method": "robust_label:0.3"}, {"method": "dpo_pro:0.3"},
        {"method": "group:0.5,1", "group_column": "group"},
    ],
    ids=lambda flags: " ".join(map(str, flags.values())) or "dpo",
)  # fmt: skip
def test_gradient_does_not_depend_on_the_micro_batch_split(policy, pairs, flags):
    method = method_of(config_of(**flags))
    parts = [(collate(pairs, rows, 0), REFERENCE_M2[rows]) for rows in ([3], [0], [2], [1])]
    policy.method_state = method.begin(columns_of(pairs)) if method.begin else {}
    population = survey(policy, parts, method) if method.needs_population else None
    total = sum(objective(policy, batch, reference, method, population).total for batch, reference in parts) / 4
    assert relative_error(gradients(policy, total), gradients(policy, whole(policy, pairs, **flags).total)) < 1e-6


def test_figures_of_a_step_keep_no_graph_and_no_embeddings(policy, pairs):
    part = whole(policy, pairs, wdpo_rho=0.1).detached()
    tensors = [part.total, part.losses_B, *part.pairs[:2], part.weights_B, part.penalties_B]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_a_loaded_policy_recomputes_activations(tiny_policy):
    """transformers loads models in evaluation mode, in which gradient checkpointing does nothing."""
    loaded = load_policy(str(tiny_policy), torch.float32, "sdpa", gradient_checkpointing=True)
    layers = loaded.language_model.base_model.layers
    assert all(layer.training and layer.gradient_checkpointing for layer in layers)

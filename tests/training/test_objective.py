"""The objective on a real (tiny) Llama: penalty gradient against finite differences, laws, independence of the split."""

from functools import partial

import pytest
import torch
from harness import policies
from harness.policies import REFERENCE_M2, apart, gradient_of, policy_of, step

from drdpo.training.data import Pair, collate, columns_of
from drdpo.training.losses import gradient_penalty, method_of
from drdpo.training.objective import objective
from drdpo.training.policy import Policy, pairs_of

config_of = partial(policies.config_of, packing=False)


@pytest.fixture(scope="module")
def policy(tiny_policy) -> Policy:
    return policy_of(tiny_policy, config_of(wdpo_rho=0.1))


def whole(policy: Policy, pairs: list[Pair], **flags):
    return objective(policy, collate(pairs, range(4), 0), REFERENCE_M2, method_of(config_of(**flags)), None)


def test_penalty_gradient_equals_finite_differences(policy, pairs):
    """d/dtheta of mean |grad_e l|^2 along random directions, central differences in float64."""
    batch = collate(pairs, range(4), 0)

    def penalty(create_graph: bool) -> torch.Tensor:
        logprob_S, embeds_STD = policy(batch)
        losses_B = method_of(config_of()).loss(pairs_of(logprob_S, REFERENCE_M2, batch))
        return gradient_penalty(losses_B, embeds_STD, create_graph).mean()

    exact = torch.autograd.grad(penalty(create_graph=True), list(policy.parameters()))
    parameters = [p for p in policy.parameters() if p.requires_grad]
    for seed in range(3):
        torch.manual_seed(seed)
        directions = [torch.randn_like(p) for p in parameters]
        step = 1e-4
        ends = []
        for move in (step, -2 * step):
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p += move * d
            ends.append(penalty(create_graph=False).item())
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
        slope = (ends[0] - ends[1]) / (2 * step)
        expected = sum((g * d).sum() for g, d in zip(exact, directions, strict=True)).item()
        assert slope == pytest.approx(expected, rel=2e-4), seed


def test_wdpo_with_vanishing_rho_is_dpo(policy, pairs):
    dpo, wdpo = (gradient_of(policy, whole(policy, pairs, **flags).total) for flags in ({}, {"wdpo_rho": 1e-300}))
    assert apart(wdpo, dpo) < 1e-6


@pytest.fixture(scope="module")
def packed(tiny_policy) -> Policy:
    """With gradient checkpointing, whose recomputation must attend by the plan as well."""
    return policy_of(tiny_policy, policies.config_of(), checkpointing=True)


@pytest.mark.parametrize(
    "flags",
    [
        {}, {"loss_type": "ipo"}, {"loss_type": "sigmoid_norm"}, {"kldpo_tau": 0.3}, {"drdpo_beta": 0.3},
        {"kldpo_tau": 0.3, "kldpo_normalize": True}, {"kldpo_tau": 0.3, "weight_column": "trust"},
        {"method": "tv:0.3"}, {"method": "chi2:0.3"}, {"method": "cvar:0.3", "loss_type": "ipo_norm"},
        {"method": "cvar:0.6", "weight_column": "trust"}, {"method": "ropo:14"}, {"method": "holder:2"},
        {"method": "robust_label:0.3"}, {"method": "dpo_pro:0.3"}, {"method": "group:0.5,1", "group_column": "group"},
        *({"wdpo_rho": 0.1, **more} for more in (
            {}, {"weight_column": "trust"}, {"wdpo_prompt": "once"}, {"wdpo_penalty": "root"}, {"loss_type": "ipo"},
            {"wdpo_penalty": "root", "weight_column": "trust"}, {"wdpo_penalty": "root", "wdpo_prompt": "once"},
            {"loss_type": "robust", "label_smoothing": 0.2},
        )),
    ],
    ids=lambda flags: " ".join(map(str, flags.values())) or "dpo",
)  # fmt: skip
def test_a_step_depends_neither_on_its_micro_batches_nor_on_their_form(policy, packed, pairs, flags):
    """WDPO is solved by double backward on padded rows, which is exact, and by tangents on packed ones."""
    found = []
    for form, split in (
        (policy, [[0, 1, 2, 3]]), (policy, [[3], [0], [2], [1]]), (packed, [[0, 1, 2, 3]]), (packed, [[3, 0], [1, 2]]),
    ):  # fmt: skip
        config = policies.config_of(packing=form is packed, **flags)
        method = method_of(config)
        form.method_state = method.begin(columns_of(pairs)) if method.begin else {}
        value, gradient, parts = step(form, pairs, split, config)
        order = torch.tensor([row for rows in split for row in rows]).argsort()
        figures = [torch.cat([part.losses_B for part in parts])[order]]
        if config.wdpo_rho:
            figures.append(torch.cat([part.penalties_B for part in parts])[order])
        if config.wdpo_rho and form is packed:
            assert max(part.errors_B.max().item() for part in parts) < 1e-5
        found.append((value, gradient, figures))
    value, gradient, figures = found[0]
    for ours, our_gradient, our_figures in found[1:]:
        assert ours == pytest.approx(value, rel=1e-6)
        # Llama keeps its norms and softmax in float32 even in a float64 model: equal means about 1e-6.
        assert apart(our_gradient, gradient) < 1e-5
        torch.testing.assert_close(our_figures, figures, rtol=1e-5, atol=1e-12)
    for whole_step, split_step in (found[:2], found[2:]):
        assert apart(split_step[1], whole_step[1]) < 1e-6


def test_figures_of_a_step_keep_no_graph_and_no_embeddings(policy, pairs):
    part = whole(policy, pairs, wdpo_rho=0.1).detached()
    tensors = [part.total, part.losses_B, *part.pairs[:2], part.weights_B, part.penalties_B]
    assert not any(tensor.requires_grad for tensor in tensors)

"""A micro-batch's contribution to the step: weighted losses and, for WDPO, the gradient penalty.

WDPO's tangent solver finds the gradient of l + rho |g|^2, g = grad_e l, for Llama-like policies on packed rows, without a
double backward. A pair's loss depends on its input embeddings e through its margin m alone, so g = l'(m) q with
q = grad_e m. For any weight

    d (rho |g|^2) = 2 rho l' l'' |q|^2 d m + d <q, t>,    t = 2 rho l'^2 q held fixed,

and <q, t> is dm, the derivative of m along t. So there are four passes over the layers:

    1  values     x of every layer, and the losses
    2  adjoints   lambda of every layer, the derivative of m for x, down to the embeddings: q
    3  tangents   dx of every layer, the derivative of x along t, on the values of pass 1, up to dm
    4  gradients  of (l' + 2 rho l' l'' |q|^2) m + dm for all weights

The adjoint of dx in dm is lambda itself, which pass 2 has found. So pass 4 propagates mu alone, the adjoint of x. At a
linear map y = W x

    mu_x = W^T mu_y,    the gradient for W is mu_y x^T + lambda_y dx^T

while a norm, gate or attention f adds to J^T mu_y the derivative of <lambda_y, f'(x) dx> for x (drdpo.kernels.tangent). With
F for the products of a forward pass, the passes cost 1 + 1 + 1 + 3 F, a DPO step 3 F. Pass 4 is an ordinary backward pass of
autograd through a graph whose values are known: its nodes compute nothing on the way forward, and the gradients of weights
arrive as any others, as ZeRO requires.

What is kept of a layer between the passes is its border (Layer.border) or, without gradient checkpointing, its inside too.
What is not kept is computed again when a pass comes by.

With --wdpo_prompt=per_sequence a prompt, whose values are the same in both sequences, has an adjoint and a tangent in each.
So values and mu are in one row in which the prompt stands once ("once", N rows), adjoints and tangents in one with the
sequences apart ("apart", M rows). With --wdpo_prompt=once both are the same.

A layer's part of the passes is in drdpo.training.passes; here are both ends of them, and what a policy must be.

Shape suffixes: B pairs of a micro-batch, P pairs of the population, S = 2B sequences, T tokens of a padded row, N tokens of
the packed row, M with the sequences apart, A answer tokens, D width.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from drdpo import distributed
from drdpo.errors import DataError
from drdpo.kernels.linear_logprob import Known, logprob_and_slope, tangent_logprob
from drdpo.kernels.tangent import rms_norm, rms_norm_second
from drdpo.models import tangent_problem, tangent_refusal
from drdpo.training.data import AnyBatch, Batch, PackedBatch, Pair, pack
from drdpo.training.losses import NO_STATE, Method, Pairs, Penalty, State, gradient_penalty
from drdpo.training.passes import LINEAR, Layer, Node, Row, halves_of
from drdpo.training.patches import linear_by
from drdpo.training.policy import Policy, pairs_of, sum_by_sequence


class Population(NamedTuple):
    """What the robust terms need to know of all pairs of the population, which includes this micro-batch."""

    losses_P: Tensor | None = None
    mean_penalty: Tensor | None = None
    """Mean of w |grad l|^2, for the root penalty."""
    state: State = NO_STATE
    """What the method's weights of this step see, of a method that keeps something between steps."""


class Objective(NamedTuple):
    total: Tensor
    """Scalar: the micro-batch's share of the step times its mean of w l + c w |grad l|^2, c being rho; for the root penalty
    rho / (2 sqrt M): the gradient is then right, though the value is not the root's. With the tangent solver the gradient is
    right only if the backward pass begins with 1."""
    losses_B: Tensor
    """[B] plain losses."""
    pairs: Pairs
    weights_B: Tensor
    penalties_B: Tensor | None = None
    """[B] |grad l|^2 if the micro-batch has the penalty."""
    errors_B: Tensor | None = None
    """[B] with the tangent solver: relative difference between two estimates of the margin's slope along the gradient, zero
    without rounding."""
    conditions_B: Tensor | None = None
    """[B] with the tangent solver: how many times rounding is magnified in the margin's slope along the gradient."""
    state: State = NO_STATE
    """The population's."""

    def detached(self) -> "Objective":
        """The numbers alone, without a graph."""
        return self._replace(total=self.total.detach(), losses_B=self.losses_B.detach(), pairs=self.pairs.detached())


def survey(policy: Policy, batches: list[tuple[AnyBatch, Tensor]], method: Method) -> Population:
    """The population of a whole optimizer step, over all its micro-batches and ranks, before any of its gradients: for a
    method that needs one, from this rank's micro-batches with their reference log-probs [B, 2], by the bare module."""
    if method.penalty is not None:
        penalties = []
        for batch, reference_B2 in batches:
            if method.penalty.solver == "exact":
                penalties_B = _penalties(policy, batch, reference_B2, method, create_graph=False)[1]
            else:
                penalties_B = input_gradient(policy, batch, reference_B2, method).penalties_B
            penalties.append(_by_column(penalties_B, method, batch))
        return Population(mean_penalty=distributed.gather(torch.cat(penalties)).mean())
    with torch.no_grad():
        local = [method.loss(pairs_of(policy(batch).logprob_S, reference_B2, batch)) for batch, reference_B2 in batches]
    return _population(torch.cat(local), [batch.columns for batch, _ in batches], method, policy)


def _population(losses_B: Tensor, columns: Sequence[Mapping[str, Tensor]], method: Method, policy: Policy) -> Population:
    """The population of which this rank has these losses and columns, and what the method's weights are to see."""
    losses_P = distributed.gather(losses_B)
    if method.update is None:
        return Population(losses_P)
    columns_P = {name: distributed.gather(torch.cat([part[name] for part in columns])) for name in columns[0]}
    return Population(losses_P, state=method.update(_bare(policy).method_state, losses_P, columns_P))


def penalty_scales(count: int, fraction: float, seed: int, step: int) -> list[float]:
    """What multiplies the penalty of each of a rank's `count` micro-batches of a step: zero, or the inverse of the chance
    that a micro-batch has it, so that the gradient's expectation is the whole penalty's. At least one of them has it. All
    ranks draw alike; `step` others are done."""
    chosen = max(1, round(fraction * count))
    drawn = random.Random(f"{seed}/penalty/{step}").sample(range(count), chosen)
    return [count / chosen if number in drawn else 0.0 for number in range(count)]


def objective(
    policy: Policy,
    batch: AnyBatch,
    reference_B2: Tensor,
    method: Method,
    population: Population | None = None,
    penalty_scale: float = 1.0,
    share: float = 1.0,
) -> Objective:
    """The differentiable objective of one micro-batch of B pairs.

    Args:
        policy: the bare module, or unless the exact solver is used the DeepSpeed engine around it.
        reference_B2: reference log-probs of the chosen and rejected answers.
        population: from `survey`; None if this micro-batch, over all ranks, is the population.
        penalty_scale: from `penalty_scales`.
        share: what the micro-batch counts for in the step. A factor of `total`, which must not be scaled later.
    """
    if method.penalty is not None and penalty_scale > 0:
        solve = _exact if method.penalty.solver == "exact" else _tangent
        factor = partial(_factor, penalty=method.penalty, population=population, scale=penalty_scale)
        return solve(policy, batch, reference_B2, method, factor, share)
    pairs = pairs_of(policy(batch).logprob_S, reference_B2, batch)
    losses_B = method.loss(pairs)
    weights_B, state = _weights(losses_B, pairs, method, population, policy)
    weights_B = _by_column(weights_B, method, batch)
    return Objective(share * (weights_B * losses_B).mean(), losses_B, pairs, weights_B, state=state)


def _weights(
    losses_B: Tensor, pairs: Pairs, method: Method, population: Population | None, policy: Policy
) -> tuple[Tensor, State]:
    """[B] the method's own weights, and what they have seen of the method's state."""
    if method.weights is None:
        return torch.ones_like(losses_B), NO_STATE
    if population is None:
        population = _population(losses_B, [pairs.columns], method, policy) if method.population else Population(losses_B)
    assert population.losses_P is not None
    seen = pairs.detached()._replace(state=population.state)
    return method.weights(losses_B.detach(), population.losses_P.detach(), seen), population.state


def _by_column(terms_B: Tensor, method: Method, batch: AnyBatch) -> Tensor:
    """[B] terms of pairs, times the numbers in the column of weights if the run has one."""
    return terms_B if method.weight_column is None else terms_B * batch.columns[method.weight_column]


def _bare(policy: Policy) -> Policy:
    """The bare module of a policy or of the engine around it."""
    return policy if isinstance(policy, Policy) else policy.module


def _exact(
    policy: Policy, batch: AnyBatch, reference_B2: Tensor, method: Method, factor: Callable[[Tensor], Tensor], share: float
) -> Objective:
    """WDPO by a double backward of torch's own operations: the plain reference, for any architecture."""
    losses_B, penalties_B, pairs = _penalties(policy, batch, reference_B2, method, create_graph=True)
    charged_B = _by_column(penalties_B, method, batch)
    total = _by_column(losses_B, method, batch).mean() + factor(charged_B) * charged_B.mean()
    weights_B = _by_column(torch.ones_like(losses_B), method, batch)
    return Objective(share * total, losses_B, pairs, weights_B, penalties_B.detach())


def _tangent(
    policy: Policy, batch: AnyBatch, reference_B2: Tensor, method: Method, factor: Callable[[Tensor], Tensor], share: float
) -> Objective:
    """WDPO by the tangent solver: the gradient of l + c |g|^2, g = l'(m) q, by passes along 2 c l'^2 q, held fixed.

    |q|^2 is the largest (q . v)^2 of all unit v, so what rounding does to q changes the slope along it to second order only,
    whereas |q| has all of it: the reported penalty is that of the slope.
    """
    # Taken outside the engine, which would mistake it for the backward pass of the step.
    gradient = input_gradient(_bare(policy), batch, reference_B2, method)
    strength = factor(_by_column(gradient.penalties_B, method, batch))
    norms_B = gradient.margin_slopes_B
    scale_B = share / len(norms_B) * 2 * _by_column(strength * gradient.loss_slopes_B.square(), method, batch)
    logprob_S, slope_S = policy(batch, run=lambda bare: tangent_answers(bare, batch, gradient, scale_B))
    pairs = pairs_of(logprob_S, reference_B2, batch)
    losses_B = method.loss(pairs)
    (loss_slopes_B,) = torch.autograd.grad(losses_B.sum(), pairs.margins_B, create_graph=True)
    chosen_B, rejected_B = slope_S.chunk(2)
    moved_B, expected_B = chosen_B - rejected_B, scale_B * norms_B
    slopes_B = torch.where(expected_B > 0, moved_B.detach() / expected_B, norms_B)
    penalties_B = (loss_slopes_B * slopes_B).square()
    total = share * _by_column(losses_B + strength * penalties_B, method, batch).mean()
    # Zero, with the gradient of the slopes, which may not be scaled any more: lambda was not.
    moved = moved_B.sum()
    total = total + Node.apply(_checked, (torch.zeros_like(moved),), moved)
    errors_B = torch.where(norms_B > 0, (slopes_B - norms_B).abs() / norms_B, torch.zeros_like(norms_B))
    conditions_B = torch.where(expected_B > 0, gradient.passes.rounding_bound(len(norms_B)) / expected_B / norms_B, 0.0)
    weights_B, pairs = _by_column(torch.ones_like(norms_B), method, batch), pairs.detached()
    return Objective(total, losses_B.detach(), pairs, weights_B, penalties_B.detach(), errors_B, conditions_B)


def _factor(penalties_B: Tensor, penalty: Penalty, population: Population | None, scale: float) -> Tensor:
    """What multiplies the mean of w |grad l|^2."""
    if not penalty.root:
        return torch.tensor(penalty.rho * scale, dtype=penalties_B.dtype)
    # d rho sqrt(M) = rho / (2 sqrt M) dM, with M the population's mean: the square root's slope is a constant here.
    mean = population.mean_penalty if population else None
    mean = distributed.gather(penalties_B).mean() if mean is None else mean
    # Chosen on the device: an if would wait for it.
    return torch.where(mean > 0, penalty.rho / (2 * mean.sqrt()), torch.zeros_like(mean))


def _penalties(
    policy: Policy, batch: AnyBatch, reference_B2: Tensor, method: Method, create_graph: bool
) -> tuple[Tensor, Tensor, Pairs]:
    """([B] losses, [B] |grad l|^2, pairs) of a padded batch."""
    assert isinstance(batch, Batch) and method.penalty is not None, "TrainConfig refuses the packed form"
    logprob_S, embeds_STD = policy(batch)
    pairs = pairs_of(logprob_S, reference_B2, batch)
    losses_B = method.loss(pairs)
    shared_BT = batch.prompt_mask_BT if method.penalty.prompt_once else None
    return losses_B, gradient_penalty(losses_B, embeds_STD, create_graph, shared_BT), pairs


# The tangent solver: both ends of the passes ----------------------------------------------------------------------------


class Passes:
    """The four passes of the bare module over a micro-batch: `values`, `adjoints`, `tangents` and `graph`, in this order.
    Has a prompt one gradient (prompt_once), or one in each of its sequences?"""

    def __init__(self, policy: Policy, batch: PackedBatch, prompt_once: bool) -> None:
        decoder = policy.language_model.get_decoder()
        with torch.no_grad():
            self._embeds_ND = self._embedded(policy, batch).detach()
            self.row = Row(policy, batch, self._embeds_ND, prompt_once)
        self.norm = decoder.norm
        self.layers: list[Layer] = []
        for module in decoder.layers:
            self.layers.append(Layer(module, self.row, self.layers[-1] if self.layers else None))
        for norm in [self.norm, *(norm for layer in self.layers for norm in (*layer.norms, *layer.head_norms))]:
            # ZeRO-3 leaves a norm's weight whole once it has been gathered (engine_config).
            if not norm.weight.numel():
                norm.weight.all_gather()

    @staticmethod
    def _embedded(policy: Policy, batch: AnyBatch) -> Tensor:
        embeds_ND = policy.embed(batch)[0]
        return embeds_ND.float() if policy.wide_values else embeds_ND

    @torch.no_grad()
    def values(self, policy: Policy, batch: PackedBatch) -> Known:
        """Pass 1: of the answers' tokens, log-probabilities and their slopes for the hidden states."""
        x_ND = self._embeds_ND
        del self._embeds_ND
        for layer in self.layers:
            x_ND = layer.values(x_ND)
        self._x_AD = x_ND.index_select(0, self.row.once.states_A)
        self.hidden_AD = rms_norm("forward", self.norm, self._x_AD).to(policy.head.weight.dtype)
        return policy.head(logprob_and_slope, self.hidden_AD, batch.targets_A)

    @torch.no_grad()
    def adjoints(self, for_hidden_AD: Tensor) -> Tensor:
        """Pass 2: lambda of the input embeddings [M, D]."""
        self._for_hidden_AD = for_hidden_AD.to(self._x_AD.dtype)
        lambda_MD = self._for_last_x()
        self._sizes: list[Tensor] = []
        for layer in reversed(self.layers):
            self._sizes.append(lambda_MD.norm(dim=1))
            lambda_MD = layer.adjoints(lambda_MD)
        return lambda_MD

    def _for_last_x(self) -> Tensor:
        """[M, D] lambda of the last layer's output."""
        for_x_AD = rms_norm("backward", self.norm, self._x_AD, self._for_hidden_AD)
        lambda_MD = for_x_AD.new_zeros(len(self.row.pair_M), for_x_AD.shape[1])
        return lambda_MD.index_add_(0, self.row.apart.states_A, for_x_AD)

    @torch.no_grad()
    def tangents(self, direction_MD: Tensor) -> Tensor:
        """Pass 3: tangents of the hidden states, [A, D]."""
        moved = []
        for layer in self.layers:
            direction_MD = layer.tangents(direction_MD)
            moved.append(direction_MD.norm(dim=1))
        self._sizes_LM = torch.stack(self._sizes[::-1]) * torch.stack(moved)
        self._dx_AD = direction_MD.index_select(0, self.row.apart.states_A)
        return rms_norm("tangent", self.norm, self._x_AD, self._dx_AD, self.hidden_AD.dtype)

    def rounding_bound(self, pairs: int) -> Tensor:
        """[B] after pass 3, by pair the root of the sum over tokens of (|lambda| |dx|)^2, at the layer where it is largest:
        the terms <lambda, dx> of a layer's tokens sum to dm, and this bounds what their rounding does to it."""
        sums_LB = self._sizes_LM.new_zeros(len(self.layers), pairs)
        return sums_LB.index_add_(1, self.row.pair_M, self._sizes_LM.square()).sqrt().amax(dim=0)

    def graph(self, policy: Policy, batch: AnyBatch) -> Tensor:
        """Pass 4 is a backward pass through this: hidden_AD with a graph."""
        parts: tuple[Tensor, ...] = (self._embedded(policy, batch),)
        for layer in self.layers:
            parts = layer.graph(*parts)
        return Node.apply(self._last_norm, (self.hidden_AD,), *parts, self.norm.weight)

    def _last_norm(self, wanted: Sequence[bool], grad_AD: Tensor) -> list[Tensor | None]:
        known = self._x_AD, self._dx_AD, grad_AD.to(self._x_AD.dtype), self._for_hidden_AD
        for_x_AD, for_weight_D = rms_norm_second(self.norm, *known, wanted[-1])
        grad_ND = for_x_AD.new_zeros(len(self.row.once.cos_N1E), for_x_AD.shape[1])
        grad_ND.index_add_(0, self.row.once.states_A, for_x_AD)
        self.layers[-1].recall(self._for_last_x())
        return [*[grad_ND] * (len(wanted) - 1), for_weight_D]


class InputGradient(NamedTuple):
    """Of B pairs, all without a graph."""

    gradient_MD: Tensor
    """[M, D] q."""
    margin_slopes_B: Tensor
    """[B] |q|, the margin's slope along the unit vector of q."""
    loss_slopes_B: Tensor
    """[B] l'(m)."""
    head: Known
    passes: Passes
    """Of which two are done."""

    @property
    def penalties_B(self) -> Tensor:
        """[B] |grad_e l|^2."""
        return (self.loss_slopes_B * self.margin_slopes_B).square()


def input_gradient(policy: Policy, batch: AnyBatch, reference_B2: Tensor, method: Method) -> InputGradient:
    """The gradient of every pair's margin with respect to its input embeddings: passes 1 and 2 of the bare module.

    Pairs do not attend to each other: q of the summed margins separates by pair. No gradient of a parameter is computed. The
    method has a penalty, and its loss is a function of the margins.
    """
    assert isinstance(batch, PackedBatch) and method.penalty is not None, "TrainConfig refuses the padded form"
    passes = Passes(policy, batch, method.penalty.prompt_once)
    head = passes.values(policy, batch)
    # The margin is the chosen answer's log-prob less the rejected one's.
    signs_A = 1 - 2 * (batch.sequence_A >= len(batch.indices_B)).to(head.slope_ND.dtype)
    gradient_MD = passes.adjoints(head.slope_ND * signs_A[:, None]).to(head.logprob_N.dtype)
    squares_M = gradient_MD.square().sum(dim=1)
    norm_B = squares_M.new_zeros(len(batch.indices_B)).index_add(0, passes.row.pair_M, squares_M).sqrt()
    pairs = pairs_of(sum_by_sequence(head.logprob_N, batch.sequence_A, batch), reference_B2, batch)
    with torch.enable_grad():
        margins_B = pairs.margins_B.detach().requires_grad_()
        (loss_slopes_B,) = torch.autograd.grad(method.loss(pairs._replace(margins_B=margins_B)).sum(), margins_B)
    return InputGradient(gradient_MD, norm_B, loss_slopes_B, head, passes)


def tangent_answers(policy: Policy, batch: AnyBatch, gradient: InputGradient, scale_B: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [S] of the answers, and their derivatives [S] along c q, c = scale_B: pass 3, and the graph of pass
    4, in which the gradient for the derivatives must be 1 for chosen answers and -1 for rejected ones."""
    passes = gradient.passes
    direction_MD = scale_B[passes.row.pair_M][:, None] * gradient.gradient_MD
    dhidden_AD = passes.tangents(direction_MD.to(passes.row.wide))
    pair_2AD = torch.stack([passes.graph(policy, batch), dhidden_AD])
    logprob_A, slope_A = policy.head(tangent_logprob, pair_2AD, batch.targets_A, gradient.head)
    return sum_by_sequence(logprob_A, batch.sequence_A, batch), sum_by_sequence(slope_A, batch.sequence_A, batch)


def _checked(wanted: Sequence[bool], grad: Tensor) -> list[Tensor]:
    torch._assert_async(grad == 1, "the objective with the tangent solver must not be scaled; pass its share to `objective`")
    return [grad]


# May a policy be trained by the tangent solver? By its modules, and by numbers on a small row -----------------------------


def check_tangent(policy: Policy, model_path: str, method: Method) -> None:
    """Refuse a policy, before DeepSpeed takes it, or a loss that the tangent solver would get wrong.

    Raises:
        DataError: another architecture, an adapter that is not linear, values or slopes on a small row that are not the
            policy's own, or a loss that depends on more than the margins.
    """
    if reason := tangent_problem(policy.language_model):
        raise tangent_refusal(model_path, reason)
    try:
        _check_loss(method)
        for layer in policy.language_model.get_decoder().layers:
            for part, names in LINEAR.items():
                for name in names:
                    _check_linear(getattr(getattr(layer, part), name), f"{part}.{name}")
        with torch.random.fork_rng(devices=[]):
            _check_numbers(policy, method)
    except DataError as error:
        raise tangent_refusal(model_path, str(error)) from error


def _check_linear(module: nn.Module, name: str) -> None:
    """Twice the input must come out at twice the size, exactly: a power of two rounds nothing."""
    base, adapter = halves_of(module)
    for part in (base, *(adapter[:2] if adapter else ())):
        width = getattr(part, "in_features", None)
        if not isinstance(width, int):
            raise DataError(f"its {name} is a {type(module).__name__}, which is not known to be linear")
        weight = next(part.parameters())
        probe_1D = torch.ones(1, width, device=weight.device, dtype=weight.dtype)
        with torch.no_grad(), linear_by(lambda linear, x, weight, bias=None: linear(x, weight)):
            once, twice = part(probe_1D), part(2 * probe_1D)
        if not torch.equal(twice, 2 * once):
            raise DataError(f"its {name} is not linear")


def _check_loss(method: Method) -> None:
    """Its gradient must come through the margins alone, as input_gradient assumes."""
    columns = {name: torch.ones(1) for name in method.columns}
    with torch.enable_grad():
        loss_B = method.loss(Pairs(torch.zeros(1), torch.zeros(2, requires_grad=True), columns))
    if loss_B.requires_grad:
        raise DataError("the loss depends on the log-ratios, not on the margins alone")


def _check_numbers(policy: Policy, method: Method) -> None:
    """Hidden states and the margin's gradient must be those of the policy's own passes, the slope along it its square."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = policy.head.weight.shape[0]
    ids = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (6, 9, 5)]
    device = policy.head.weight.device
    batch = pack([Pair(ids[0], ids[1], ids[2], columns=dict.fromkeys(method.columns, 1.0))], [0]).to(device)
    ours = input_gradient(policy, batch, torch.zeros(1, 2, device=device), method)
    with torch.no_grad():
        chosen, rejected = tangent_answers(policy, batch, ours, torch.ones(1, device=device))[1]
    embeds_1ND = policy.embed(batch).detach().requires_grad_()
    with torch.enable_grad():
        hidden_AD = policy.answer_states(batch, embeds_1ND)[0]
    signs_A = 1 - 2 * batch.sequence_A.to(hidden_AD.dtype)
    (grad_1ND,) = torch.autograd.grad(hidden_AD, embeds_1ND, ours.head.slope_ND * signs_A[:, None])
    tolerance = 0.1 if embeds_1ND.dtype == torch.bfloat16 else 1e-3
    if not _relative_error(ours.passes.hidden_AD, hidden_AD.detach()) <= tolerance:
        raise DataError("its hidden states are not those of Llama's formulas")
    slope_error = _relative_error(chosen - rejected, ours.margin_slopes_B[0].square())
    if not max(_relative_error(ours.passes.row.sum(ours.gradient_MD), grad_1ND[0]), slope_error) <= tolerance:
        raise DataError("its derivatives are not those of Llama's formulas")


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())

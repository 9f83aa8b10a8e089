"""Methods, and the losses and penalty they consist of: pure functions of small tensors.

Nothing here knows a process group, a device or a file. The family (arXiv 2502.01930; Dr. DPO: 2407.07880) minimizes, with h
the margin of implicit log-ratios,

    total = mean_i( w_i l(h_i) + rho |grad_{e_i} l_i|^2 ),

where KLDPO and Dr. DPO choose the weights w (detached) and WDPO the penalty. A Method is one choice of l, w and penalty;
`method_of` makes it from the flags. The weights, and the losses of --method, are in drdpo.training.robust;
drdpo.training.objective sums them up.

Shape suffixes: B pairs of a micro-batch, P pairs of the population, S = 2B sequences (all chosen rows, then all rejected),
T tokens, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from drdpo.training import robust

if TYPE_CHECKING:
    from drdpo.config.training import TrainConfig


TOKENS = ("chosen_tokens", "rejected_tokens")
"""Columns that are no fields of the rows: tokens of the answers, as they are trained on."""

State = Mapping[str, Tensor]
"""What a method keeps between steps."""
NO_STATE: State = {}


class Pairs(NamedTuple):
    """What a method may know of B pairs."""

    margins_B: Tensor
    """[B] h = [log pi(y_w) - log ref(y_w)] - [log pi(y_l) - log ref(y_l)], log-probs summed over the answer."""
    log_ratios_S: Tensor
    """[S] log pi - log ref of every answer, chosen first."""
    columns: Mapping[str, Tensor]
    """[B] float32 each: the fields of the preference rows that Method.reads and Method.group name."""
    state: State = NO_STATE
    """Of a method that keeps one, for its weights."""

    @property
    def lengths_S(self) -> Tensor:
        """[S] tokens of every answer, for a method that reads TOKENS."""
        return torch.cat([self.columns[name] for name in TOKENS])

    def detached(self) -> "Pairs":
        """The same without a graph."""
        return self._replace(margins_B=self.margins_B.detach(), log_ratios_S=self.log_ratios_S.detach())


@dataclass(frozen=True)
class Penalty:
    """WDPO's penalty on g_i, the gradient of a pair's loss with respect to its input embeddings."""

    rho: float
    """Radius."""
    root: bool = False
    """False: mean of rho |g|^2, as in the authors' code. True: rho sqrt(mean |g|^2), Algorithm 1."""
    prompt_once: bool = False
    """See gradient_penalty."""
    solver: Literal["exact", "tangent"] = "tangent"
    fraction: float = 1.0
    """Share of a step's micro-batches that have the penalty."""


@dataclass(frozen=True)
class Method:
    """What an optimizer step minimizes; with weights or a penalty, not both (ValueError)."""

    name: str
    """In the progress bar and the summary."""
    loss: Callable[[Pairs], Tensor]
    """[B] differentiable losses. Under a penalty with the tangent solver, a function of the margins alone."""
    weights: Callable[[Tensor, Tensor, Pairs], Tensor] | None = None
    """(losses_B, population_P, pairs), all detached -> [B] weights; None: all 1."""
    population: bool = True
    """Do the weights depend on population_P, the losses of all pairs of the population? If not, it is the micro-batch, and
    the step is spared the forward passes that collect it."""
    penalty: Penalty | None = None
    reads: tuple[str, ...] = ()
    """Number fields of the preference rows that loss or weights use, e.g. chosen_score; both splits must have them. And
    TOKENS."""
    group: str | None = None
    """Field of the preference rows that names a pair's group; its column has the groups' numbers, from 0."""
    weight_column: str | None = None
    """The one of `reads` that multiplies a pair's term, penalty included: numbers that are not negative."""
    begin: Callable[[Mapping[str, Tensor]], State] | None = None
    """From the columns of all training pairs [M]: what the method keeps between steps, at first."""
    update: Callable[[State, Tensor, Mapping[str, Tensor]], State] | None = None
    """(what was kept, population_P, its columns) -> what the weights of this step see, kept for the next."""
    strength: Mapping[str, float] = field(default_factory=dict)
    """The method's own flags, for the label in the manifest and the reports."""

    def __post_init__(self) -> None:
        if self.weights is not None and self.penalty is not None:
            raise ValueError(f"{self.name}: a method has weights or a penalty, not both")
        if self.weight_column is not None and self.weight_column not in self.reads:
            raise ValueError(f"{self.name}: reads does not name {self.weight_column}, the column of weights")

        if (self.begin is None) != (self.update is None):
            raise ValueError(f"{self.name}: what is kept between steps needs begin and update")
        if self.update is not None and not (self.weights is not None and self.population):
            raise ValueError(f"{self.name}: what is kept between steps is for weights, with population=True")

    @property
    def weighted(self) -> bool:
        """May pairs have unequal weights?"""
        return self.weights is not None or self.weight_column is not None

    @property
    def label(self) -> str:
        """Name and strength, e.g. `KLDPO (kldpo_tau=0.05)`."""
        strength = ", ".join(f"{flag}={number}" for flag, number in self.strength.items())
        return f"{self.name} ({strength})" if strength else self.name

    @property
    def needs_population(self) -> bool:
        """Does a pair's term depend on other pairs?"""
        root = self.penalty is not None and self.penalty.root
        return root or (self.weights is not None and self.population)


def method_of(config: "TrainConfig") -> Method:
    """The method that the flags choose; without any of their own flags it is DPO."""
    # sigmoid_norm and ipo_norm are losses of the margin per token.
    kind, by_token = config.loss_type.removesuffix("_norm"), config.loss_type.endswith("_norm")

    def loss(pairs: Pairs) -> Tensor:
        margins_B = robust.normalised_margins(pairs.log_ratios_S, pairs.lengths_S) if by_token else pairs.margins_B
        return pair_losses(margins_B, config.beta, config.label_smoothing, kind)

    method = Method("DPO", loss, reads=TOKENS if by_token else ())
    tau, rho, temperature = config.kldpo_tau, config.wdpo_rho, config.drdpo_beta
    if tau is not None:
        weights = partial(robust.kl_weights, tau=tau, normalize=config.kldpo_normalize)
        method = _weighted(method, "KLDPO", weights, {"kldpo_tau": tau})
    elif temperature is not None:
        weights = partial(robust.drdpo_weights, temperature=temperature)
        method = _weighted(method, "Dr. DPO", weights, {"drdpo_beta": temperature})
    elif rho is not None:
        once = config.wdpo_prompt == "once"
        penalty = Penalty(rho, config.wdpo_penalty == "root", once, config.solver, config.wdpo_fraction)
        method = replace(method, name="WDPO", penalty=penalty, strength={"wdpo_rho": rho})
    elif config.named_method is not None:
        method = _named(*config.named_method, config.beta, config.group_column or "", method)
    if config.weight_column is None:
        return method
    reads = dict.fromkeys([*method.reads, config.weight_column])
    return replace(method, reads=tuple(reads), weight_column=config.weight_column)


def _weighted(plain: Method, name: str, weights: Callable[..., Tensor], strength: Mapping[str, float]) -> Method:
    """`plain` with weights(losses_B, population_P)."""
    return replace(plain, name=name, weights=lambda losses, population, _: weights(losses, population), strength=strength)


def _named(name: str, strength: Mapping[str, float], beta: float, group: str, plain: Method) -> Method:
    """A --method of the flags; one that weights pairs has the loss of `plain`."""
    losses: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "ropo": ("ROPO", robust.ropo_losses),
        "holder": ("Hölder-DPO", robust.holder_losses),
        "robust_label": ("robust label", robust.robust_label_losses),
    }
    weights: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "tv": ("TV-DRO", robust.tv_weights),
        "chi2": ("chi-square DRO", robust.chi2_weights),
        "cvar": ("CVaR", robust.cvar_weights),
    }
    if name in losses:
        title, function = losses[name]
        return Method(title, lambda pairs: function(pairs.margins_B, beta, **strength), strength=strength)
    if name in weights:
        title, function = weights[name]
        return _weighted(plain, title, partial(function, **strength), strength)
    if name == "group":
        return replace(
            plain, name="group DRO", strength=strength, group=group,
            weights=lambda losses_B, population_P, pairs: robust.group_weights(
                pairs.columns[group], pairs.state["weights"], pairs.state["present"]
            ),
            begin=lambda columns: robust.group_state(columns[group]),
            update=lambda state, population_P, columns: robust.group_step(
                dict(state), population_P, columns[group], **strength
            ),
        )  # fmt: skip
    if name != "dpo_pro":
        raise ValueError(f"config.METHODS has {name}, this function does not")
    scores = ("chosen_score", "rejected_score")

    def uncertain(pairs: Pairs) -> Tensor:
        labels_B = robust.soft_labels(pairs.columns[scores[0]], pairs.columns[scores[1]], strength["scale"])
        return robust.soft_label_losses(pairs.margins_B, labels_B, beta, strength["radius"])

    return Method("DPO-PRO", uncertain, reads=scores, strength=strength)


def pair_losses(margins_B: Tensor, beta: float, smoothing: float = 0.0, kind: str = "sigmoid") -> Tensor:
    """Pointwise preference loss of every pair.

    With h = margins_B, see Pairs, and e = `smoothing`, the assumed rate of flipped labels (not for ipo):

        sigmoid  -(1-e) log s(beta h) - e log s(-beta h): DPO (2305.18290, eq. 7) and, with e > 0, cDPO; ln 2 at h = 0
        ipo      (h - 1/(2 beta))^2 (2310.12036, eq. 17)
        robust   [-(1-e) log s(beta h) + e log s(-beta h)] / (1 - 2e): rDPO (2403.00409, eq. 12); ln 2 at h = 0
    """
    if kind == "ipo":
        return (margins_B - 1 / (2 * beta)).square()
    right_B, wrong_B = -logsigmoid(beta * margins_B), -logsigmoid(-beta * margins_B)
    if kind == "sigmoid":
        return (1 - smoothing) * right_B + smoothing * wrong_B
    if kind == "robust":
        return ((1 - smoothing) * right_B - smoothing * wrong_B) / (1 - 2 * smoothing)
    raise ValueError(f"unknown kind of loss {kind!r}")


def gradient_penalty(
    losses_B: Tensor, embeds_STD: Tensor, create_graph: bool, shared_prompt_BT: Tensor | None = None
) -> Tensor:
    """WDPO's |grad_{e_i} l_i|^2 of every pair, over the prompt and answer embeddings of both its sequences.

    The pairs do not attend to each other, so the gradient of the summed losses separates by pair (appendix F of
    2502.01930, per-sample squared form). On the prompt, which both sequences hold, the gradients are g_c and g_r: the
    authors' two rows count |g_c|^2 + |g_r|^2, the paper's z = (prompt, chosen, rejected) counts |g_c + g_r|^2.

    Args:
        losses_B, embeds_STD: losses, and the input embeddings [S, T, D] on which they depend, both sequences of a pair
            aligned at their start.
        create_graph: keep the graph, so that the penalty can be differentiated.
        shared_prompt_BT: [B, T] True on prompt positions, to count the prompt once; None counts it per sequence.

    Returns:
        [B] squared norms, float32 (float64 for float64 losses).
    """
    (grad_STD,) = torch.autograd.grad(losses_B.sum(), embeds_STD, create_graph=create_graph, retain_graph=True)
    chosen_BTD, rejected_BTD = grad_STD.to(losses_B.dtype).split(len(losses_B))
    squares_B = (chosen_BTD.square() + rejected_BTD.square()).sum(dim=(1, 2))
    if shared_prompt_BT is None:
        return squares_B
    return squares_B + 2 * ((chosen_BTD * rejected_BTD).sum(dim=2) * shared_prompt_BT).sum(dim=1)


def effective_sample_size(weights_P: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2, between 1 (one pair has all the weight) and P (equal weights); 0 if all weights are."""
    return weights_P.sum().square() / weights_P.square().sum().clamp(min=torch.finfo(weights_P.dtype).tiny)

"""May a policy be trained by WDPO's tangent solver? Told from its modules, and from numbers on a small row."""

from typing import Any

import torch
from torch import Tensor, nn

from drdpo.config import TrainConfig
from drdpo.errors import DataError
from drdpo.training.data import Pair
from drdpo.training.input_gradient import input_gradient
from drdpo.training.packing import pack
from drdpo.training.policy import Policy
from drdpo.training.tangent_pass import LINEAR, NORMS, answer_pairs, decoder_of, tangent_answers

ADVICE = "give --wdpo_solver=exact, or finite_difference with --dtype=float32"


def check_tangent(policy: Policy, config: TrainConfig) -> None:
    """Refuse a policy that drdpo.training.tangent_pass does not compute.

    Args:
        policy: as loaded, before DeepSpeed takes it.
        config: of the run.

    Raises:
        DataError: a layer is not built as Llama's, or values or slopes on a small row are not the policy's own.
    """
    try:
        decoder = decoder_of(policy)
        for layer in decoder.layers:
            _check_layer(layer, config.zero_stage == 3)
        _check_norm(decoder.norm, "norm")
        with torch.random.fork_rng(devices=[]):
            _check_numbers(policy, config)
    except DataError as error:
        raise DataError(
            f"{config.model_path}: --wdpo_solver=tangent cannot differentiate this model: {error}; {ADVICE}"
        ) from error


def _check_layer(layer: Any, partitioned: bool) -> None:
    for part, names in LINEAR.items():
        for name in names:
            module = getattr(getattr(layer, part, None), name, None)
            if not isinstance(module, nn.Module):
                raise DataError(f"its layers have no {part}.{name} as Llama's have")
            _check_linear(module, f"{part}.{name}", partitioned)
    for name in NORMS:
        _check_norm(getattr(layer, name, None), name)
    extra = [name for name, _ in layer.self_attn.named_children() if name not in LINEAR["self_attn"]]
    extra += [name for name, _ in layer.mlp.named_children() if name not in (*LINEAR["mlp"], "act_fn")]
    extra += [name for name, _ in layer.named_children() if name not in (*LINEAR, *NORMS)]
    if extra:
        raise DataError(f"its layers have {', '.join(extra)}, which Llama's have not")
    if not isinstance(layer.mlp.act_fn, nn.SiLU) and "silu" not in type(layer.mlp.act_fn).__name__.lower():
        raise DataError(f"its layers gate by {type(layer.mlp.act_fn).__name__}, not by SiLU")


def _check_norm(module: Any, name: str) -> None:
    if not hasattr(module, "variance_epsilon") or [key for key, _ in module.named_parameters()] != ["weight"]:
        raise DataError(f"its {name} is no RMSNorm as Llama's is")


def _check_linear(module: nn.Module, name: str, partitioned: bool) -> None:
    """A map without a bias is linear when doubling the input doubles the output, exactly: a power of two rounds nothing."""
    biased = [key for key, _ in module.named_parameters() if key.endswith("bias")]
    if biased and (not isinstance(module, nn.Linear) or partitioned):
        raise DataError(f"its {name} has a bias inside an adapter, or under --zero_stage=3")
    if biased:
        return
    width = getattr(module, "in_features", None)
    if not isinstance(width, int):
        raise DataError(f"its {name} is a {type(module).__name__}, which is not known to be linear")
    weight = next(module.parameters())
    probe_1D = torch.ones(1, width, device=weight.device, dtype=_dtype(module))
    with torch.no_grad():
        if not torch.equal(module(2 * probe_1D), 2 * module(probe_1D)):
            raise DataError(f"its {name} is not linear")


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _check_numbers(policy: Policy, config: TrainConfig) -> None:
    """Hidden states must be those of the policy's own forward pass, the margin's slope that of its own backward pass."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = policy.head.weight.shape[0]
    ids = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (6, 9, 5)]
    embedding = policy.language_model.get_input_embeddings().weight
    batch = pack([Pair(*ids)], [0], prompt_once=config.wdpo_prompt == "once").to(embedding.device)
    found = input_gradient(policy, batch, torch.zeros(1, 2, device=embedding.device), config)
    with torch.no_grad():
        embeds_1ND = policy.embed(batch)
        own_AD = policy.answer_states(batch, embeds_1ND)[0]
        ours_AD = answer_pairs(policy, batch, embeds_1ND, found.direction)[0]
        chosen, rejected = tangent_answers(policy, batch, found)[1]
    tolerance = 0.1 if embeds_1ND.dtype == torch.bfloat16 else 1e-3
    if not _apart(ours_AD, own_AD) <= tolerance:
        raise DataError("its hidden states are not those of Llama's formulas")
    if not _apart(chosen - rejected, found.margin_slopes_B[0]) <= tolerance:
        raise DataError("its derivatives are not those of Llama's formulas")


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())

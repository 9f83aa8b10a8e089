"""May a policy be trained by WDPO's tangent solver? Told from its modules, and from numbers on a small row."""

import torch
from torch import Tensor, nn

from drdpo.config import TrainConfig
from drdpo.errors import DataError
from drdpo.training.data import Pair
from drdpo.training.input_gradient import input_gradient
from drdpo.training.packing import pack
from drdpo.training.policy import Policy, decoder_of
from drdpo.training.tangent_pass import DECODERS, LINEAR, answer_pairs, linear_pair, tangent_answers


def check_architecture(policy: Policy, config: TrainConfig) -> None:
    """Refuse an architecture that drdpo.training.tangent_pass does not compute.

    Args:
        policy: as loaded, or on the meta device.
        config: of the run.

    Raises:
        DataError: it is not one of DECODERS, or gates otherwise than they do by default.
    """
    try:
        decoder = decoder_of(policy)
        name = type(decoder).__name__
        if name not in DECODERS:
            raise DataError(f"it is a {name}, and the solver knows {', '.join(DECODERS)}")
        for layer in decoder.layers:
            if "silu" not in type(layer.mlp.act_fn).__name__.lower():
                raise DataError(f"its layers gate by {type(layer.mlp.act_fn).__name__}, not by SiLU")
    except DataError as error:
        raise _refusal(error, config) from error


def check_tangent(policy: Policy, config: TrainConfig) -> None:
    """Refuse a policy that drdpo.training.tangent_pass does not compute.

    Args:
        policy: as loaded, before DeepSpeed takes it.
        config: of the run.

    Raises:
        DataError: its architecture is another, an adapter is not linear, or values or slopes on a small row are not the
            policy's own.
    """
    check_architecture(policy, config)
    try:
        for layer in decoder_of(policy).layers:
            for part, names in LINEAR.items():
                for name in names:
                    _check_linear(getattr(getattr(layer, part), name), f"{part}.{name}")
        with torch.random.fork_rng(devices=[]):
            _check_numbers(policy, config)
    except DataError as error:
        raise _refusal(error, config) from error


def _refusal(error: DataError, config: TrainConfig) -> DataError:
    solver = "auto, which is tangent for packed rows," if config.wdpo_solver == "auto" else "tangent"
    exact = "--wdpo_solver=exact with --packing=false" + (" and --zero_stage=2" if config.zero_stage == 3 else "")
    return DataError(f"{config.model_path}: --wdpo_solver={solver} cannot differentiate this model: {error}; give {exact}")


def _check_linear(module: nn.Module, name: str) -> None:
    """A tangent of twice the size must come out at twice the size, exactly: a power of two rounds nothing."""
    width = getattr(module, "in_features", None)
    if not isinstance(width, int):
        raise DataError(f"its {name} is a {type(module).__name__}, which is not known to be linear")
    weight = next(module.parameters())
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
    probe_1D = torch.ones(1, width, device=weight.device, dtype=dtype)
    with torch.no_grad():
        once, twice = (linear_pair(module, torch.stack([probe_1D, size * probe_1D]))[1] for size in (1, 2))
    if not torch.equal(twice, 2 * once):
        raise DataError(f"its {name} is not linear")


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
        ours_AD = answer_pairs(policy, batch, embeds_1ND, found.direction_1ND)[0]
        chosen, rejected = tangent_answers(policy, batch, found)[1]
    tolerance = 0.1 if embeds_1ND.dtype == torch.bfloat16 else 1e-3
    if not _apart(ours_AD, own_AD) <= tolerance:
        raise DataError("its hidden states are not those of Llama's formulas")
    if not _apart(chosen - rejected, found.margin_slopes_B[0]) <= tolerance:
        raise DataError("its derivatives are not those of Llama's formulas")


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())

"""The policy: a causal language model that computes the log-probability of every answer, and its margins to the reference.

In order: the policy itself; loading a model as one; and what a model must be to serve as one, checked by its numbers on a
few tokens.

Shape suffixes: B pairs, S = 2B sequences, T tokens, N tokens of a packed row or of answers, D width, V vocabulary.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from drdpo import distributed
from drdpo.errors import DataError, UsageError, one_line
from drdpo.kernels.linear_logprob import linear_logprob, plain_logprob
from drdpo.kernels.packed_attention import SHARED_PREFIX, PackedRow, PrefixPlan, register_shared_prefix
from drdpo.models import positions_of, quiet
from drdpo.training.data import AnyBatch, PackedBatch, Pair
from drdpo.training.losses import NO_STATE, Pairs, State
from drdpo.training.patches import widen


class Answers(NamedTuple):
    logprob_S: Tensor
    """[S] log pi(answer | prompt), summed over the answer's tokens, float32."""
    embeds: Tensor
    """[S, T, D], packed [1, N, D]: the input embeddings they were computed from."""


class FiniteWatch:
    """Records, on the device, which micro-batches of a step have numbers that are not finite."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bad: list[Tensor] = []

    def next_batch(self) -> None:
        """Start the step's next micro-batch."""
        self._bad.append(torch.zeros((), dtype=torch.bool, device=self._device))

    def look(self, numbers: Tensor) -> None:
        """Record whether these are finite, e.g. the gradient of the embeddings, into which all others flow."""
        self._bad[-1] = self._bad[-1] | ~torch.isfinite(numbers.detach()).all()

    @property
    def bad_M(self) -> Tensor:
        """[M] bool, by micro-batch."""
        return torch.stack(self._bad)


class OutputHead(nn.Module):
    """The output head as a map from hidden states to log-probabilities.

    A module of its own with the (possibly tied) weight, so that ZeRO-3 gathers it here as for any other layer.
    """

    def __init__(self, weight_VD: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_VD

    def forward(self, kernel: Callable[..., Any], hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        """One of drdpo.kernels on hidden states and this head: kernel(hidden, weight, ...)."""
        return kernel(hidden, self.weight, *arguments, **options)


class Policy(nn.Module):
    """Wraps a transformers causal language model; only answer positions reach the output head.

    With `second_derivative` the log-probabilities' gradient can be differentiated again; the language model must attend by
    "eager" then.
    """

    def __init__(self, language_model: Any, second_derivative: bool = False) -> None:
        super().__init__()
        self.language_model = language_model
        self.second_derivative = second_derivative
        self.flash_attention = False
        """Do packed rows attend by flash attention (varlen_attention), which runs on CUDA only?"""
        self.wide_values = False
        """Do packed rows run with values in float32? See widen_values."""
        self.method_state: State = NO_STATE
        """What the method keeps between steps."""
        self.generation_config: bytes | None = None
        """The model's generation_config.json, for checkpoints: transformers does not write all that it reads."""
        self.watch: FiniteWatch | None = None
        """Checks every gradient with respect to the input embeddings."""
        self.head = OutputHead(language_model.get_output_embeddings().weight)

    @property
    def attention_dtype(self) -> torch.dtype:
        """float32 where values are; flash attention takes none."""
        return torch.float32 if self.wide_values and not self.flash_attention else self.language_model.dtype

    def forward(self, batch: AnyBatch, run: Callable[["Policy"], Any] | None = None) -> Any:
        """Answers: the log-probabilities of those of a batch, B pairs as S = 2B padded rows or as one packed row; or what
        `run` returns of this policy: a DeepSpeed engine around it passes on forward alone."""
        if run is not None:
            return run(self)
        embeds = self.embed(batch)
        return Answers(self.logprob(batch, embeds), embeds)

    def embed(self, batch: AnyBatch) -> Tensor:
        """[S, T, D], packed [1, N, D]: the input embeddings of a batch."""
        ids = batch.input_ids_1N if isinstance(batch, PackedBatch) else batch.input_ids_ST
        embeds = self.language_model.get_input_embeddings()(ids)
        # Of a frozen table too: WDPO differentiates with respect to the embeddings.
        if torch.is_grad_enabled():
            embeds.requires_grad_()
            if self.watch is not None:
                embeds.register_hook(self.watch.look)
        return embeds

    def logprob(self, batch: AnyBatch, embeds: Tensor) -> Tensor:
        """[S] log-probabilities of the answers of a batch from (changed) input embeddings."""
        hidden_ND, targets_N, sequence_N = self.answer_states(batch, embeds)
        kernel = plain_logprob if self.second_derivative else linear_logprob
        return sum_by_sequence(self.head(kernel, hidden_ND, targets_N), sequence_N, batch)

    def answer_states(self, batch: AnyBatch, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [N, D] that predict the answers' tokens, these tokens [N], and the sequence of each [N]."""
        if isinstance(batch, PackedBatch):
            plan = PrefixPlan(batch.groups, embeds.device, self.attention_dtype, self.flash_attention)
            if self.wide_values:
                embeds = embeds.float()
            hidden_ND = self.language_model.base_model(
                inputs_embeds=embeds, position_ids=batch.positions_1N, use_cache=False, prefix_plan=plan
            ).last_hidden_state[0]
        else:
            hidden_STD = self.language_model.base_model(
                inputs_embeds=embeds, attention_mask=batch.attention_mask_ST, use_cache=False
            ).last_hidden_state
            hidden_ND = hidden_STD.flatten(0, 1)
        return hidden_ND[batch.states_A].to(self.head.weight.dtype), batch.targets_A, batch.sequence_A


def widen_values(policy: Policy) -> None:
    """Compute values in float32, in the policy, its reference and its evaluation alike: before the first step all margins
    are zero only if both come from the same arithmetic. The tangent solver must know the policy, with its adapters."""
    widen(policy.language_model.get_decoder().layers)
    policy.wide_values = True


def pairs_of(logprob_S: Tensor, reference_B2: Tensor, batch: AnyBatch) -> Pairs:
    """What a method may know of B pairs, from log-probs [S] of the answers under the policy, and [B, 2] of the chosen and
    the rejected ones under the frozen reference."""
    log_ratios_S = logprob_S - torch.cat([reference_B2[:, 0], reference_B2[:, 1]])
    chosen_B, rejected_B = log_ratios_S.chunk(2)
    return Pairs(chosen_B - rejected_B, log_ratios_S, batch.columns)


def sum_by_sequence(terms_N: Tensor, sequence_N: Tensor, batch: AnyBatch) -> Tensor:
    """[S] sums over each sequence of its answer tokens' terms [N]."""
    zeros_S = torch.zeros(batch.sequences, dtype=terms_N.dtype, device=terms_N.device)
    return zeros_S.index_add(0, sequence_N, terms_N)


# Loading ---------------------------------------------------------------------------------------------------------------


def load_policy(
    path: str,
    dtype: torch.dtype,
    attention: str,
    gradient_checkpointing: bool,
    second_derivative: bool = False,
    quantize: Literal["none", "nf4"] = "none",
) -> Policy:
    """Load a causal language model as a policy.

    Args:
        path: a Hugging Face folder with safetensors, or a hub id.
        attention: transformers' name of the attention implementation.
        gradient_checkpointing: recompute the activations of all layers; see set_recomputation.
        quantize: "nf4" loads the linear layers of the blocks in 4 bits, on this process's device.

    Raises:
        DataError: no such model, or as check_numbers. What config.json says drdpo.models has refused.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import cached_file

    register_shared_prefix()
    # The checks run on the CPU, where CUDA's attention kernels do not work, or with nf4 where the weights are.
    checked = "sdpa" if attention in ("flex_attention", "flash_attention_2") else attention
    quantized = _four_bit_options(dtype) if quantize == "nf4" else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=checked, use_safetensors=True, trust_remote_code=False, **quantized
        )
        for module in model.modules() if quantized else ():
            # On CPUs with AVX512_BF16, bitsandbytes repacks weights when first evaluated: values change, gradients stop.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        check_numbers(model, path)
        if checked != attention:
            model.set_attn_implementation(attention)
        own = cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    except KeyError as error:
        raise DataError(f"{path}: the model knows no attention called {error}; pass --packing=false") from error
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{path}: the model could not be loaded ({one_line(str(error), 300)})") from error
    try:
        if own is None:
            model.generation_config.validate(strict=True)  # made of config.json, and written with every checkpoint
    except ValueError as error:
        raise DataError(
            f"{path}: config.json contains settings of generation that transformers refuses to write; move them to a "
            f"generation_config.json, which is copied ({one_line(str(error), 200)})"
        ) from error
    set_recomputation(model, ALL_LAYERS if gradient_checkpointing else 0)
    policy = Policy(model, second_derivative)
    policy.generation_config = None if own is None else Path(own).read_bytes()
    return policy.train()


ALL_LAYERS = sys.maxsize


def set_recomputation(model: Any, layers: int) -> None:
    """Recompute the activations of a model's first layers in the backward pass, and keep the others', which it needs first.

    The results are the same bits. It is the non-reentrant form, which has a second derivative.
    """
    if not layers:
        model.gradient_checkpointing_disable()
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for number, layer in enumerate(recomputable_layers(model)):
        layer.gradient_checkpointing = number < layers


def recomputable_layers(model: Any) -> list[nn.Module]:
    """A model's layers of which each may recompute its activations or keep them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _four_bit_options(dtype: torch.dtype) -> dict[str, Any]:
    """Options of from_pretrained for QLoRA's frozen weights (2305.14314): NF4 codes with double quantization."""
    quiet_bitsandbytes()
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": settings, "device_map": {"": distributed.device()}}


def quiet_bitsandbytes() -> None:
    """Hide its warning about an optional inference kernel, which training does not use. Call before peft is imported."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


# What a model must be --------------------------------------------------------------------------------------------------


def check_numbers(model: Any, path: str) -> None:
    """Switch dropout off, and refuse a model in which a sequence depends on the others of its micro-batch.

    Dropout would give policy and reference different log-probs, and activations are recomputed in training mode only. What
    is known from config.json drdpo.models has refused; this compares hidden states with those of plain attention, each
    sequence alone.

    Raises:
        DataError: training mode, a packed row or padding on the right changes a sequence's hidden states.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(min(1000, model.config.get_text_config().vocab_size), (18,), generator=generator).tolist()
    # Shorter than sliding windows, of which packed rows know nothing.
    sequences = [ids_T[:7], [*ids_T[:3], *ids_T[7:12]], ids_T[12:]]
    attention = model.config._attn_implementation
    together = _packed_states if attention == SHARED_PREFIX else _padded_states
    try:
        with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            training, evaluating = (together(model.train(mode), sequences) for mode in (True, False))
            model.set_attn_implementation("eager")
            alone = [_states(model, torch.tensor([ids_T]))[0] for ids_T in sequences]
            model.set_attn_implementation(attention)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: the model cannot be trained so ({error}); pass --packing=false") from error
    if not all(map(torch.equal, training, evaluating)):
        raise DataError(f"{path}: the model drops values out in training mode; set the dropouts in its config.json to 0")
    tolerance = 0.1 if model.dtype == torch.bfloat16 else 1e-3
    for ours_TD, alone_TD in zip(evaluating, alone, strict=True):
        if not float((ours_TD - alone_TD).norm()) <= tolerance * float(alone_TD.norm()):
            form = "packed sequences of this model see each other; pass --packing=false"
            raise DataError(f"{path}: {form if together is _packed_states else 'padding changes its log-probs'}")


def _states(model: Any, ids_ST: Tensor, **options: Any) -> Tensor:
    return model.base_model(input_ids=ids_ST.to(model.device), use_cache=False, **options).last_hidden_state.float()


def _packed_states(model: Any, sequences: list[list[int]]) -> list[Tensor]:
    """Hidden states of three sequences, of which the first two begin with the same three tokens, in one row."""
    row = PackedRow([(3, sequences[:2]), (0, sequences[2:])])
    positions_1N = torch.tensor([row.positions], device=model.device)
    plan = PrefixPlan(row.groups, model.device, model.dtype)
    states_ND = _states(model, torch.tensor([row.token_ids]), position_ids=positions_1N, prefix_plan=plan)[0]
    places = ([row.index(number, place) for place in range(len(ids_T))] for number, ids_T in enumerate(sequences))
    return [states_ND[place] for place in places]


def _padded_states(model: Any, sequences: list[list[int]]) -> list[Tensor]:
    ids_ST = pad_sequence([torch.tensor(ids_T) for ids_T in sequences], batch_first=True)
    mask_ST = pad_sequence([torch.ones(len(ids_T), dtype=torch.int64) for ids_T in sequences], batch_first=True)
    states_STD = _states(model, ids_ST, attention_mask=mask_ST.to(model.device))
    return [states_TD[: len(ids_T)] for states_TD, ids_T in zip(states_STD, sequences, strict=True)]


# Do pairs fit? And rotary positions that depend on a micro-batch's longest sequence.
#
# Of transformers' kinds, "dynamic" (dynamic NTK) and "longrope" choose their frequencies in every forward pass, by the
# largest position in it: beyond a length that the model's config.json gives, a sequence's log-prob depends on the other
# sequences of the batch, and for "dynamic" on earlier batches. Up to that length the frequencies are the initial ones, in
# packed rows, whose positions restart with every pair, as in padded ones. All other kinds are fixed.


def check_pairs(policy: Policy, pairs: Sequence[Pair], model_path: str) -> None:
    """Refuse pairs with tokens that the policy has no row for, or so long that its table of positions ends before, or that
    the frequencies of its rotary positions change with the batch. The policy may be on the meta device.

    Raises:
        DataError: such a token.
        UsageError: such a length.
    """
    rows = policy.language_model.get_input_embeddings().num_embeddings
    largest = max((max(pair.prompt + pair.chosen + pair.rejected) for pair in pairs), default=0)
    if largest >= rows:
        raise DataError(f"{model_path}: a pair has the token id {largest}, and the model's embedding has {rows} rows")
    longest = max(map(len, pairs), default=0)
    for module in policy.language_model.modules():
        for kind, limit in _limits(module):
            if longest > limit:
                raise UsageError(
                    f"{model_path}: beyond {limit} tokens the model's rotary positions ({kind}) are those of the longest "
                    "sequence in a batch, so a pair's log-probs, packed or padded, would depend on the pairs beside it; the "
                    f"longest pair has {longest}: pass --max_len={limit}"
                )
    positions, learned = positions_of(policy.language_model)
    if learned and positions is not None and longest > positions:
        raise UsageError(
            f"{model_path}: the longest pair has {longest} tokens, and its table of positions {positions} rows: pass "
            f"--max_len={positions}"
        )


def fix_rotary(policy: Policy) -> None:
    """Keep the initial frequencies, which are right for pairs that check_pairs has passed: a policy on the meta device has
    no positions to choose by."""
    for module in policy.language_model.modules():
        if _limits(module):
            kinds = module.rope_type
            module.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"


def _limits(module: Any) -> list[tuple[str, int]]:
    """[(kind, longest sequence with the initial frequencies)] of a module of rotary positions."""
    kinds = getattr(module, "rope_type", None)
    settings = getattr(getattr(module, "config", None), "rope_parameters", None)
    # Gemma 3 and others have one kind for each type of layer.
    by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
    limits = []
    for layer, kind in by_layer.items():
        if kind == "longrope" and settings is not None:
            own = settings if layer is None else settings[layer]
            limits.append((kind, int(own["original_max_position_embeddings"])))
        elif isinstance(kind, str) and "dynamic" in kind:
            limits.append((kind, int(module.original_max_seq_len)))
    return limits

"""The policy: a causal language model that computes the log-probability of every answer, and its margins to the reference.

In order: the policy itself; loading a model as one; and what a model must be to serve as one, checked by its numbers on a
few tokens.

Shape suffixes: B pairs, S = 2B sequences, T tokens, N tokens of a packed row or of answers, D width, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from drdpo import distributed
from drdpo.errors import DataError, UsageError
from drdpo.kernels.linear_logprob import linear_logprob, plain_logprob
from drdpo.kernels.packed_attention import SHARED_PREFIX, PackedRow, PrefixPlan, register_shared_prefix
from drdpo.training.data import AnyBatch, PackedBatch, Pair
from drdpo.training.losses import NO_STATE, Pairs, State
from drdpo.training.patches import WideRows, first_rows, widen


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

    Args:
        language_model: of transformers.
        second_derivative: compute log-probabilities whose gradient can be differentiated again; the language model must
            attend by "eager".
    """

    def __init__(self, language_model: Any, second_derivative: bool = False) -> None:
        super().__init__()
        self.language_model = language_model
        self.second_derivative = second_derivative
        self.flash_attention = False
        """Do packed rows attend by drdpo.kernels.packed_attention, which runs on CUDA only?"""
        self.wide_first = False
        """Do packed rows run with their sequences' first tokens in float32? See widen_first_tokens."""
        self.method_state: State = NO_STATE
        """What the method keeps between steps."""
        self.watch: FiniteWatch | None = None
        """Checks every gradient with respect to the input embeddings."""
        self.head = OutputHead(language_model.get_output_embeddings().weight)

    @property
    def attention_dtype(self) -> torch.dtype:
        """float32 where first tokens are: their keys, rounded, shift all weights alike; flash attention takes none."""
        return torch.float32 if self.wide_first and not self.flash_attention else self.language_model.dtype

    def forward(self, batch: AnyBatch, run: Callable[["Policy"], Any] | None = None) -> Any:
        """Log-probabilities of the answers of a batch.

        Args:
            batch: B pairs as S = 2B padded rows, or as one packed row.
            run: a function of this policy to call instead; a DeepSpeed engine around it passes on forward alone.

        Returns:
            Answers, or what `run` returns.
        """
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

    def answer_states(self, batch: AnyBatch, embeds: Tensor, frozen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [N, D] that predict the answers' tokens, these tokens [N], and the sequence of each [N].

        `frozen`: only the gradient with respect to the embeddings will be computed.
        """
        if isinstance(batch, PackedBatch):
            plan = PrefixPlan(batch.groups, embeds.device, self.attention_dtype, self.flash_attention)
            options = {}
            if self.wide_first:
                embeds, options["wide_rows"] = embeds.float(), WideRows(first_rows(batch.groups, embeds.device), frozen)
            hidden_ND = self.language_model.base_model(
                inputs_embeds=embeds, position_ids=batch.positions_1N, use_cache=False, prefix_plan=plan, **options
            ).last_hidden_state[0]
        else:
            hidden_STD = self.language_model.base_model(
                inputs_embeds=embeds, attention_mask=batch.attention_mask_ST, use_cache=False
            ).last_hidden_state
            hidden_ND = hidden_STD.flatten(0, 1)
        return hidden_ND[batch.states_A].to(self.head.weight.dtype), batch.targets_A, batch.sequence_A


def decoder_of(policy: Policy) -> Any:
    """The module that holds layers, final norm and rotary positions, inside whatever wraps it.

    Raises:
        DataError: there is none.
    """
    for module in policy.language_model.modules():
        if all(hasattr(module, name) for name in ("layers", "norm", "rotary_emb")):
            return module
    raise DataError("it has no layers, norm and rotary_emb as Llama has")


def widen_first_tokens(policy: Policy) -> None:
    """Compute sequences' first tokens in float32, in the policy, its reference and its evaluation alike: before the first
    step all margins are zero only if both come from the same arithmetic.

    Args:
        policy: of an architecture that check_architecture has passed, with its adapters.
    """
    widen(decoder_of(policy).layers)
    policy.wide_first = True


def pairs_of(logprob_S: Tensor, reference_B2: Tensor, batch: AnyBatch) -> Pairs:
    """What a method may know of the pairs of a batch.

    Args:
        logprob_S: [S] log-probs of the answers under the policy.
        reference_B2: [B, 2] those of the chosen and rejected answers under the frozen reference.
        batch: B pairs.
    """
    log_ratios_S = logprob_S - torch.cat([reference_B2[:, 0], reference_B2[:, 1]])
    chosen_B, rejected_B = log_ratios_S.chunk(2)
    return Pairs(chosen_B - rejected_B, log_ratios_S, batch.columns)


def sum_by_sequence(terms_N: Tensor, sequence_N: Tensor, batch: AnyBatch) -> Tensor:
    """[S] sums over each sequence of its answer tokens' terms [N]."""
    zeros_S = torch.zeros(2 * len(batch.indices_B), dtype=terms_N.dtype, device=terms_N.device)
    return zeros_S.index_add(0, sequence_N, terms_N)


# Loading ---------------------------------------------------------------------------------------------------------------

CUDA_ATTENTION = ("flex_attention", "flash_attention_2")
"""What transformers calls attentions that run on CUDA only."""


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
        dtype: of weights and activations.
        attention: transformers' name of the attention implementation.
        gradient_checkpointing: recompute activations; non-reentrant, the form that has a second derivative.
        second_derivative: see Policy.
        quantize: "nf4" loads the linear layers of the blocks in 4 bits, on this process's device.

    Raises:
        DataError: no such model, one whose weights are stored quantized or whose logits are not hidden states times the
            output head, or, for packed rows, one that mixes tokens otherwise than by causal attention.
    """
    from transformers import AutoModelForCausalLM

    register_shared_prefix()
    # The checks run on the CPU, where CUDA's attention kernels do not work, or with nf4 where the weights are.
    checked = "sdpa" if attention in CUDA_ATTENTION else attention
    quantized = _four_bit_options(dtype) if quantize == "nf4" else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=checked, use_safetensors=True, trust_remote_code=False, **quantized
        )
        refuse_quantized(model, path)
        if quantized:
            _keep_codes(model)
        if attention == SHARED_PREFIX:
            check_packing(model, path)
        check_plain_head(model, path)
        switch_off_dropout(model, path)
        if checked != attention:
            model.set_attn_implementation(attention)
    except KeyError as error:
        raise DataError(f"{path}: the model knows no attention called {error}; pass --packing=false") from error
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{path}: the model could not be loaded ({' '.join(str(error).split())[:300]})") from error
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(model, second_derivative).train()


def _four_bit_options(dtype: torch.dtype) -> dict[str, Any]:
    """Options of from_pretrained for QLoRA's frozen weights (2305.14314): NF4 codes with double quantization."""
    quiet_bitsandbytes()
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": settings, "device_map": {"": distributed.device()}}


def _keep_codes(model: Any) -> None:
    """On CPUs with AVX512_BF16, bitsandbytes repacks weights at their first evaluation: values change, gradients stop."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quiet_bitsandbytes() -> None:
    """Hide its warning about an optional inference kernel, which training does not use. Call before peft is imported."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


# What a model must be --------------------------------------------------------------------------------------------------


def refuse_quantized(model: Any, path: str) -> None:
    """Refuse weights that are stored quantized: they cannot be trained, nor can adapters be merged into them."""
    if getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False):
        raise DataError(
            f"{path}: the weights are stored quantized; pass the model in full precision (--lora_rank with "
            "--lora_quantize=nf4 loads its frozen weights in 4 bits)"
        )


def switch_off_dropout(model: Any, path: str) -> None:
    """Dropout would give policy and reference different log-probs, and activations are recomputed in training mode only."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    ids_ST = torch.arange(16, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        training, evaluating = (model.train(mode).base_model(input_ids=ids_ST, use_cache=False)[0] for mode in (True, False))
    if not torch.equal(training, evaluating):
        raise DataError(f"{path}: the model drops values out in training mode; set the dropouts in its config.json to 0")


def check_packing(model: Any, path: str) -> None:
    """Refuse a model in which packed sequences affect each other: sliding windows, recurrent or convolutional layers."""
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(min(1000, model.config.vocab_size), (24,), generator=generator).tolist()
    sequences = [[*ids_T[:5], *ids_T[5:9]], [*ids_T[:5], *ids_T[9:16]], ids_T[16:]]
    row = PackedRow([(5, sequences[:2]), (0, sequences[2:])])
    plan = PrefixPlan(row.groups, model.device, model.dtype)
    packed_1N, position_1N, *alone_1T = (
        torch.tensor([values], device=model.device) for values in (row.token_ids, row.positions, *sequences)
    )
    try:
        with torch.no_grad():
            packed_ND = model.base_model(
                input_ids=packed_1N, position_ids=position_1N, use_cache=False, prefix_plan=plan
            ).last_hidden_state[0].float()  # fmt: skip
            alone = [model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[0].float() for ids_1T in alone_1T]
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: the model cannot be packed ({error}); pass --packing=false") from error
    tolerance = 0.1 if model.dtype == torch.bfloat16 else 1e-3
    for number, alone_TD in enumerate(alone):
        error_TD = packed_ND[[row.index(number, place) for place in range(len(alone_TD))]] - alone_TD
        if not float(error_TD.norm()) <= tolerance * float(alone_TD.norm()):
            raise DataError(f"{path}: packed sequences of this model see each other; pass --packing=false")


def check_plain_head(model: Any, path: str) -> None:
    """Refuse soft-capped, scaled or biased logits, which linear_logprob does not compute."""
    ids_ST = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad():
        hidden_TD = model.base_model(input_ids=ids_ST, use_cache=False).last_hidden_state[0]
        ours_T = linear_logprob(hidden_TD, model.get_output_embeddings().weight, ids_ST[0])
        logits_TV = model(input_ids=ids_ST, use_cache=False).logits[0].float()
        theirs_T = logits_TV.log_softmax(dim=1).gather(1, ids_ST[0][:, None]).squeeze(1)
    if not torch.allclose(ours_T.float(), theirs_T, rtol=0.02, atol=0.02):
        raise DataError(
            f"{path}: the model's logits are not its hidden states times its output head (soft-capped, scaled or biased "
            "logits are not supported)"
        )


# Rotary positions that depend on a micro-batch's longest sequence.
#
# Of transformers' kinds, "dynamic" (dynamic NTK) and "longrope" choose their frequencies in every forward pass, by the
# largest position in it: beyond a length that the model's config.json gives, a sequence's log-prob depends on the other
# sequences of the batch, and for "dynamic" on earlier batches. Up to that length the frequencies are the initial ones, in
# packed rows, whose positions restart with every pair, as in padded ones. All other kinds are fixed.


def check_rotary(policy: Policy, pairs: Sequence[Pair], model_path: str) -> None:
    """Refuse pairs so long that the frequencies of the policy's rotary positions change with the batch.

    Args:
        policy: as loaded, or on the meta device.
        pairs: of the run.
        model_path: for the message.

    Raises:
        UsageError: there are such pairs.
    """
    longest = max(map(len, pairs), default=0)
    for module in policy.language_model.modules():
        for kind, limit in _limits(module):
            if longest > limit:
                raise UsageError(
                    f"{model_path}: beyond {limit} tokens the model's rotary positions ({kind}) are those of the "
                    f"longest sequence in a "
                    f"batch, so a pair's log-probs, packed or padded, would depend on the pairs beside it; "
                    f"the longest pair has {longest}: pass --max_len={limit}"
                )


def fix_rotary(policy: Policy) -> None:
    """Keep the initial frequencies, which are right for pairs that check_rotary has passed: a policy on the meta device has
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

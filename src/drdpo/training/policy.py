"""The policy: a causal language model that gives the log-probability of every sequence's answer.

Shape suffixes: S sequences, T tokens, D width, V vocabulary, N answer tokens.
"""

import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from drdpo import distributed
from drdpo.config import TrainConfig
from drdpo.errors import DataError
from drdpo.kernels.linear_logprob import linear_logprob, plain_logprob
from drdpo.kernels.shared_prefix import NAME as SHARED_PREFIX
from drdpo.kernels.shared_prefix import PrefixPlan
from drdpo.training.batches import Batch
from drdpo.training.finite import FiniteWatch
from drdpo.training.packing import PackedBatch
from drdpo.training.policy_checks import check_packing, check_plain_head, refuse_quantized, switch_off_dropout
from drdpo.training.wide_rows import WideRows, first_rows, widen

CUDA_ATTENTION = ("flex_attention", "flash_attention_2")
"""What transformers calls attentions that run on CUDA only."""


class Answers(NamedTuple):
    logprob_S: Tensor
    """[S] log pi(answer | prompt), summed over the answer's tokens, float32."""
    embeds: Tensor
    """[S, T, D], packed [1, N, D]: the input embeddings it was computed from."""


class OutputHead(nn.Module):
    """The output head as a map from hidden states to log-probabilities.

    A module of its own that holds the (possibly tied) weight, so that ZeRO-3 gathers it here as for any other layer.
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
        """Do packed rows attend by drdpo.kernels.varlen_attention, which runs on CUDA only?"""
        self.wide_first = False
        """Do packed rows run with their sequences' first tokens in float32? See widen_first_tokens."""
        self.watch: FiniteWatch | None = None
        """Looks at every gradient for the embeddings that this policy gives out."""
        self.head = OutputHead(language_model.get_output_embeddings().weight)

    @property
    def attention_dtype(self) -> torch.dtype:
        """float32 where first tokens are: their keys, rounded, shift all weights alike; flash attention takes none."""
        return torch.float32 if self.wide_first and not self.flash_attention else self.language_model.dtype

    def forward(self, batch: Batch | PackedBatch, run: Callable[["Policy"], Any] | None = None) -> Any:
        """Log-probabilities of the answers of a batch.

        Args:
            batch: B pairs as S = 2B padded rows, or as one packed row.
            run: what to do in place of that with this policy; a DeepSpeed engine around it lets only forward through.

        Returns:
            Answers, or what `run` returns.
        """
        if run is not None:
            return run(self)
        embeds = self.embed(batch)
        return Answers(self.logprob(batch, embeds), embeds)

    def embed(self, batch: Batch | PackedBatch) -> Tensor:
        """[S, T, D], packed [1, N, D]: the input embeddings of a batch."""
        ids = batch.input_ids_1N if isinstance(batch, PackedBatch) else batch.input_ids_ST
        embeds = self.language_model.get_input_embeddings()(ids)
        # Of a frozen table too: WDPO differentiates for the embeddings.
        if torch.is_grad_enabled():
            embeds.requires_grad_()
            if self.watch is not None:
                embeds.register_hook(self.watch.look)
        return embeds

    def logprob(self, batch: Batch | PackedBatch, embeds: Tensor) -> Tensor:
        """[S] log-probabilities of the answers of a batch from (changed) input embeddings."""
        hidden_ND, targets_N, sequence_N = self.answer_states(batch, embeds)
        kernel = plain_logprob if self.second_derivative else linear_logprob
        return sum_by_sequence(self.head(kernel, hidden_ND, targets_N), sequence_N, batch)

    def answer_states(
        self, batch: Batch | PackedBatch, embeds: Tensor, frozen: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [N, D] that predict the answers' tokens, these tokens [N], and the sequence of each [N].

        `frozen`: the gradient for the embeddings alone will be asked for.
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


def widen_first_tokens(policy: Policy, config: TrainConfig) -> None:
    """Let a run whose penalty needs it compute sequences' first tokens in float32, in the policy, its reference and its
    evaluation alike: before the first step all margins are zero only if both come from the same arithmetic.

    Args:
        policy: of an architecture that check_architecture has passed, with its adapters.
        config: of the run.
    """
    if config.wide_first_tokens:
        widen(decoder_of(policy).layers)
        policy.wide_first = True


def sum_by_sequence(values_N: Tensor, sequence_N: Tensor, batch: Batch | PackedBatch) -> Tensor:
    """[S] sums of answer tokens' values [N] over each sequence."""
    zeros_S = torch.zeros(2 * len(batch.indices_B), dtype=values_N.dtype, device=values_N.device)
    return zeros_S.index_add(0, sequence_N, values_N)


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
            output head, or, for packed rows, one that mixes tokens in another way than causal attention does.
    """
    from transformers import AutoModelForCausalLM

    # The checks run on the CPU, which CUDA's attention kernels do not know, or with nf4 where the weights are.
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
        raise DataError(f"{path}: the model knows no attention called {error}; give --packing=false") from error
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


def compile_layers(policy: Policy) -> None:
    """Compile every decoder layer in place (regional compilation), once for all row lengths; names of parameters stay.

    Checkpointing wraps the layer from outside, so the recomputation is compiled as well. A packed row's attention loops over
    its groups, whose lengths change from row to row: traced, each row would be compiled anew, so it stays outside.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if policy.language_model.config._attn_implementation == SHARED_PREFIX:
        ALL_ATTENTION_FUNCTIONS.register(SHARED_PREFIX, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[SHARED_PREFIX]))
    layers = getattr(policy.language_model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise DataError(
            "--torch_compile=true: the model has no list of decoder layers to compile; leave out --torch_compile"
        )
    for layer in layers:
        layer.compile(dynamic=True)

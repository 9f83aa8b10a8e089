"""The policy: a causal language model that gives the log-probability of every sequence's answer.

Shape suffixes: S sequences, T tokens, D width, V vocabulary, N answer tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from drdpo.errors import DataError
from drdpo.kernels import linear_logprob
from drdpo.kernels.shared_prefix import NAME as SHARED_PREFIX
from drdpo.kernels.shared_prefix import PackedRow, PrefixPlan
from drdpo.training.batches import Batch
from drdpo.training.packing import PackedBatch


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

    def forward(self, hidden_ND: Tensor, targets_N: Tensor, twice: bool) -> Tensor:
        return linear_logprob(hidden_ND, self.weight, targets_N, twice=twice)


class Policy(nn.Module):
    """Wraps a transformers causal language model; only answer positions reach the output head.

    Args:
        language_model: of transformers.
        plain_attention: for packed batches, attention that is twice differentiable.
    """

    def __init__(self, language_model: Any, plain_attention: bool = False) -> None:
        super().__init__()
        self.language_model = language_model
        self.plain_attention = plain_attention
        self.head = OutputHead(language_model.get_output_embeddings().weight)

    def forward(self, batch: Batch | PackedBatch, twice: bool = False) -> Answers:
        """Log-probabilities of the answers of a batch.

        Args:
            batch: B pairs as S = 2B padded rows, or as one packed row.
            twice: the log-probabilities' gradient will be differentiated again.
        """
        return self._packed(batch, twice) if isinstance(batch, PackedBatch) else self._padded(batch, twice)

    def _packed(self, batch: PackedBatch, twice: bool) -> Answers:
        embeds_1ND = self.language_model.get_input_embeddings()(batch.input_ids_1N)
        plan = PrefixPlan(batch.groups, embeds_1ND.device, embeds_1ND.dtype, self.plain_attention)
        hidden_ND = self.language_model.base_model(
            inputs_embeds=embeds_1ND, position_ids=batch.positions_1N, use_cache=False, prefix_plan=plan
        ).last_hidden_state[0]
        logprob_A = self.head(hidden_ND[batch.states_A], batch.targets_A, twice)
        zeros_S = torch.zeros(2 * len(batch.indices_B), dtype=logprob_A.dtype, device=logprob_A.device)
        return Answers(zeros_S.index_add(0, batch.sequence_A, logprob_A), embeds_1ND)

    def _padded(self, batch: Batch, twice: bool) -> Answers:
        embeds_STD = self.language_model.get_input_embeddings()(batch.input_ids_ST)
        hidden_STD = self.language_model.base_model(
            inputs_embeds=embeds_STD, attention_mask=batch.attention_mask_ST, use_cache=False
        ).last_hidden_state
        # The state at t predicts token t + 1.
        answer_mask_ST = batch.answer_mask_ST[:, 1:]
        targets_N = batch.input_ids_ST[:, 1:][answer_mask_ST]
        logprob_N = self.head(hidden_STD[:, :-1][answer_mask_ST], targets_N, twice)
        row_N = answer_mask_ST.nonzero()[:, 0]
        zeros_S = torch.zeros(len(batch.input_ids_ST), dtype=logprob_N.dtype, device=logprob_N.device)
        return Answers(zeros_S.index_add(0, row_N, logprob_N), embeds_STD)


def load_policy(
    path: str, dtype: torch.dtype, attention: str, gradient_checkpointing: bool, plain_attention: bool = False
) -> Policy:
    """Load a causal language model as a policy.

    Args:
        path: a Hugging Face folder with safetensors, or a hub id.
        dtype: of weights and activations.
        attention: transformers' name of the attention implementation.
        gradient_checkpointing: recompute activations; non-reentrant, the form that has a second derivative.
        plain_attention: see Policy.

    Raises:
        DataError: no such model, one whose logits are not hidden states times the output head, or, for packed rows, one
            that mixes tokens in another way than causal attention does.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{path}: the model could not be loaded ({' '.join(str(error).split())[:300]})") from error
    if attention == SHARED_PREFIX:
        _check_packing(model, path)
    _check_plain_head(model, path)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Recomputation works in training mode only. Dropout would give policy and reference different log-probs.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return Policy(model, plain_attention).train()


def _check_packing(model: Any, path: str) -> None:
    """Refuse a model in which packed sequences would see each other: sliding windows, recurrent or convolutional layers."""
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(min(1000, model.config.vocab_size), (24,), generator=generator).tolist()
    sequences = [[*ids_T[:5], *ids_T[5:9]], [*ids_T[:5], *ids_T[9:16]], ids_T[16:]]
    row = PackedRow([(5, sequences[:2]), (0, sequences[2:])])
    plan = PrefixPlan(row.groups, model.device, model.dtype)
    try:
        with torch.no_grad():
            packed_ND = model.base_model(
                input_ids=torch.tensor([row.token_ids]), position_ids=torch.tensor([row.positions]), use_cache=False,
                prefix_plan=plan,
            ).last_hidden_state[0].float()  # fmt: skip
            alone = [model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0].float()
                     for ids in sequences]  # fmt: skip
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: the model cannot be packed ({error}); give --packing=false") from error
    tolerance = 0.1 if model.dtype == torch.bfloat16 else 1e-3
    for number, alone_TD in enumerate(alone):
        apart = packed_ND[[row.index(number, place) for place in range(len(alone_TD))]] - alone_TD
        if not float(apart.norm()) <= tolerance * float(alone_TD.norm()):
            raise DataError(f"{path}: packed sequences of this model see each other; give --packing=false")


def _check_plain_head(model: Any, path: str) -> None:
    """Refuse soft-capped, scaled or biased logits, which linear_logprob does not compute."""
    ids_ST = torch.arange(8)[None] % model.config.vocab_size
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

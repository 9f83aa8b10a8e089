"""What a loaded model must be to serve as a policy: told from its numbers on a few tokens.

Shape suffixes: S sequences, T tokens, N tokens of a packed row, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import nn

from drdpo.errors import DataError
from drdpo.kernels.linear_logprob import linear_logprob
from drdpo.kernels.shared_prefix import PackedRow, PrefixPlan


def refuse_quantized(model: Any, path: str) -> None:
    """Refuse weights that are stored in few bits: they cannot be trained, nor can adapters be merged into them."""
    if getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False):
        raise DataError(
            f"{path}: the weights are stored quantized; give the model in full precision (--lora_rank with "
            "--lora_quantize=nf4 holds its frozen weights in 4 bits)"
        )


def switch_off_dropout(model: Any, path: str) -> None:
    """Dropout would give policy and reference different log-probs, and recomputation works in training mode only."""
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
    """Refuse a model in which packed sequences would see each other: sliding windows, recurrent or convolutional layers."""
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
        raise DataError(f"{path}: the model cannot be packed ({error}); give --packing=false") from error
    tolerance = 0.1 if model.dtype == torch.bfloat16 else 1e-3
    for number, alone_TD in enumerate(alone):
        apart = packed_ND[[row.index(number, place) for place in range(len(alone_TD))]] - alone_TD
        if not float(apart.norm()) <= tolerance * float(alone_TD.norm()):
            raise DataError(f"{path}: packed sequences of this model see each other; give --packing=false")


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

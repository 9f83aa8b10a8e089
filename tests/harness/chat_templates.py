"""Tiny tokenizers, and chat templates in the shapes that model families use, written after their conventions."""

import json
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = [
    f"Name the number {i} in words, please. Seven is one.\nThe number is {i} and fine.\n\nI do not know {i}."
    for i in range(20)
]


class Shape(NamedTuple):
    """A template and what its tokenizer needs."""

    template: str
    special: tuple[str, ...]
    """Added tokens that are marked special, in the order of their ids."""
    eos: str
    bos: str | None = None
    added: tuple[str, ...] = ()
    """Added tokens that are not special."""
    sentencepiece: bool = False
    rstrip: bool = False
    """Do special tokens swallow the white space behind them?"""


def turns(before: str, after: str, prompt: str, role: str = "m.role") -> str:
    """A template that puts every message between two texts (jinja expressions), and ends a prompt with a third."""
    loop = "{% for m in messages %}{{ " + before.replace("ROLE", role) + " + m.content + " + after + " }}{% endfor %}"
    return loop + "{% if add_generation_prompt %}{{ " + prompt + " }}{% endif %}"


CHATML = turns(r"'<|im_start|>' + ROLE + '\n'", r"'<|im_end|>\n'", r"'<|im_start|>assistant\n'")
ML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
THOUGHT = "{% set words = m.content.split('</think>')[-1].strip() if m.role == 'assistant' else m.content %}"

SHAPES = {
    "ChatML": Shape(CHATML, ML, "<|im_end|>"),
    "Llama 3": Shape(
        r"{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        r"{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        r"{% if loop.first %}{{ 'Today Date: ' + date_string + '\n\n' }}{% endif %}{{ m.content | trim + '<|eot_id|>' }}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    "Gemma": Shape(
        "{{ bos_token }}" + NO_SYSTEM + turns(
            r"'<start_of_turn>' + ROLE + '\n'", r"'<end_of_turn>\n'", r"'<start_of_turn>model\n'",
            "('model' if m.role == 'assistant' else m.role)",
        ),
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<bos>",
        ("\n\n", "<table>"),
        sentencepiece=True,
    ),
    "Phi-3": Shape(
        turns(r"'<|' + ROLE + '|>\n'", r"'<|end|>\n'", r"'<|assistant|>\n'") +
        "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        ("<|endoftext|>", "<s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|endoftext|>",
        sentencepiece=True,
        rstrip=True,
    ),
    "phi-4": Shape(
        turns("'<|im_start|>' + ROLE + '<|im_sep|>'", "'<|im_end|>'", "'<|im_start|>assistant<|im_sep|>'"),
        (*ML, "<|im_sep|>"), "<|endoftext|>",
    ),
    "Zephyr": Shape(
        turns(r"'<|' + ROLE + '|>\n'", r"eos_token + '\n'", r"'<|assistant|>\n'"),
        ("<unk>", "<s>", "</s>"), "</s>", "<s>", sentencepiece=True,
    ),
    "Mistral": Shape(
        "{{ bos_token }}{% for m in messages %}{{ ('[INST] ' + m.content + ' [/INST]') if m.role == 'user' else "
        "(' ' + m.content + eos_token) }}{% endfor %}",
        ("<unk>", "<s>", "</s>"), "</s>", "<s>", sentencepiece=True,
    ),
    "Qwen3": Shape(
        r"{% for m in messages %}" + THOUGHT + r"{{ '<|im_start|>' + m.role + '\n' }}"
        r"{% if m.role == 'assistant' and loop.last %}"
        r"{{ '<think>\n' + m.content.split('</think>')[0].split('<think>')[-1].strip() * ('</think>' in m.content) + "
        r"'\n</think>\n\n' }}{% endif %}{{ words + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        r"{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
        r"{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
        ML, "<|im_end|>", added=("<think>", "</think>"),
    ),
    "R1": Shape(
        "{{ bos_token }}{% for m in messages %}" + THOUGHT + "{{ '<|User|>' + m.content if m.role == 'user' else "
        r"'<|Assistant|>' + words + eos_token }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
        ("<|begin|>", "<|end|>"), "<|end|>", "<|begin|>", added=("<|User|>", "<|Assistant|>", "<think>", "</think>"),
    ),
    "gpt-oss": Shape(
        r"{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}{% for m in messages %}"
        "{{ ('<|start|>user<|message|>' + m.content + '<|end|>') if m.role == 'user' else "
        "('<|start|>assistant<|channel|>final<|message|>' + m.content + "
        "('<|return|>' if loop.last else '<|end|>')) }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        ("<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"), "<|return|>",
    ),
    "system required": Shape(
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system message must come first') }}{% endif %}" + CHATML,
        ML, "<|im_end|>",
    ),
    "turn end that is not special": Shape(CHATML, ("<|endoftext|>",), "<|endoftext|>", added=ML[1:]),
    "ChatML without its tokens": Shape(CHATML, ("<|endoftext|>",), "<|endoftext|>"),
    "turns without tokens": Shape(
        turns(r"m.role | upper + ': '", r"'\n'", "'ASSISTANT:'"), ("<|endoftext|>",), "<|endoftext|>",
    ),
    "prompt that ends in a space": Shape(
        turns(r"m.role | upper + ': '", r"'\n'", "'ASSISTANT: '"), ("<|endoftext|>",), "<|endoftext|>",
    ),
    "counted turns": Shape("{{ messages | length }}" + CHATML, ML, "<|im_end|>"),
    "multimodal": Shape(
        r"{% for m in messages %}{{ m.role | capitalize + ':' }}{% for part in m.content %}{% if part.type == 'text' %}"
        r"{{ ' ' + part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        ML, "<|im_end|>",
    ),
    "broken": Shape("{% for m in messages %}{{ m.content }}", ML, "<|im_end|>"),
}  # fmt: skip


def write_tokenizer(folder: Path, shape: Shape, **config: object) -> str:
    """A folder with a tokenizer of 400 words, byte-level BPE or SentencePiece BPE with bytes, and the template; its path.
    `config`: more of tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, pieces = Tokenizer(models.BPE(byte_fallback=shape.sentencepiece)), []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if shape.sentencepiece:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450 + len(pieces), special_tokens=[*shape.special, *pieces], show_progress=False,
        initial_alphabet=[] if shape.sentencepiece else byte_level.alphabet(),
    )  # fmt: skip
    # SentencePiece merges within words, which begin with its space.
    tokenizer.train_from_iterator(["▁" + text.replace(" ", " ▁") if pieces else text for text in WORDS], trainer)
    if shape.sentencepiece:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in shape.added])
    stored = json.loads(tokenizer.to_str())
    stored["added_tokens"] = [
        {**token, "rstrip": shape.rstrip} for token in stored["added_tokens"] if token["content"] not in pieces
    ]  # bytes are words of the model, and no special tokens
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    named = {"eos_token": shape.eos} | ({"bos_token": shape.bos} if shape.bos else {})
    whole = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096, **named, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(whole))
    (folder / "chat_template.jinja").write_text(shape.template)
    return str(folder)

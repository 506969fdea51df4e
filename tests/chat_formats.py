"""Small tokenizers built as those of the common chat formats are; `hostile.json` has their tokens and templates.

What differs between families is where special tokens live: beside the model's vocabulary or in it, within reach of
its merges or not; and what a text meets before it is encoded.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

HOSTILE = json.loads((Path(__file__).parent / "unit" / "hostile.json").read_text(encoding="utf-8"))
FORMATS: dict[str, dict[str, Any]] = HOSTILE["formats"]
_BYTES = [f"<0x{i:02X}>" for i in range(256)]
_CHARACTERS = ["▁", *map(chr, range(33, 127)), "\n", "é", "你"]


@cache
def tokenizer(name: str) -> Any:
    """The tokenizer of a format, or `town` for the embedded world's own."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    if name == "town":
        from cai_ray.town import tokenizer as town

        return town.build()
    data = FORMATS[name]
    backend = _BACKENDS[data["model"]](data)
    strips = data.get("strips", False)  # Phi-3's turn marks swallow the blanks after them
    backend.add_special_tokens([AddedToken(t, rstrip=strips, special=True) for t in data["special"]])
    backend.add_tokens([AddedToken(t, normalized=False) for t in data["added"]])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=data["eos"],
        unk_token="<unk>" if "<unk>" in data["special"] else None,
    )
    made.chat_template = data["template"]
    return made


def _byte_level(data: dict[str, Any]) -> Any:
    """GPT-2, Qwen, DeepSeek: special tokens are added behind the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("<", "|"), ("|", ">"), ("<", "/")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    in_vocabulary = data["model"].endswith("in vocabulary")
    if in_vocabulary:
        vocab |= {t: len(vocab) + i for i, t in enumerate(data["special"])}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=in_vocabulary))
    # Llama 3 looks every word up before it merges: a pre-tokenizer that splits little gives it whole tokens.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not in_vocabulary)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(data: dict[str, Any]) -> Any:
    """Llama 2, Mistral, Gemma: one word without end, bytes for what is unknown, special tokens in the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {t: i for i, t in enumerate([*data["special"], *_BYTES, *_CHARACTERS])}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁")]
    for token in data.get("merged", []):  # conversions that made merges of all pieces
        merges += [(token[:i], token[i]) for i in range(1, len(token))]
    merges = list(dict.fromkeys(merges))
    vocab |= {t: len(vocab) + i for i, t in enumerate(a + b for a, b in merges if a + b not in vocab)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    blanks = normalizers.Replace(" ", "▁")
    prepend = data.get("prepend", False)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prepend else blanks
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepend else steps)
    return backend


def _unigram(data: dict[str, Any]) -> Any:
    """T5 and its kin: whatever is in the vocabulary is found in a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = [(t, 0.0) for t in data["special"]] + [(t, -20.0) for t in _BYTES]
    pieces += [(t, -8.0) for t in _CHARACTERS] + [("▁the", -4.0), ("ing", -4.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=data["special"].index("<unk>"), byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


_BACKENDS = {
    "byte-level": _byte_level,
    "byte-level in vocabulary": _byte_level,
    "sentencepiece": _sentencepiece,
    "unigram": _unigram,
}

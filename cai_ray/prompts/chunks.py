"""Where a text may be cut without changing its tokens, so that ids of its parts can be kept for the next text."""

from __future__ import annotations

import re
from itertools import product
from typing import Any, NamedTuple

from cai_ray.prompts.tokenizers import Place, PlainText


class _Cut(NamedTuple):
    before: re.Pattern[str]
    """Finds what stands before such a place. It begins with a character of its own: a search for a place alone would
    try every one of a text."""
    crosses: re.Pattern[str]
    """Finds a token of a vocabulary that goes over such a place. Byte-level ones write a line break as Ċ."""


# Before the first letter of a line; or before line breaks, for tokenizers that split blanks by what follows them.
_CUTS = (
    _Cut(re.compile(r"\n(?=[A-Za-z0-9_#])"), re.compile("[\nĊ][A-Za-z0-9_#]")),
    _Cut(re.compile(r"[!-~](?=\n)"), re.compile("[!-~][\nĊ]")),
)
_ENDS = ("word", "word.", "x = 7", "你好", "é", "(y)", "end:", "a/", "'", "`", "_", "two  ", "| -")
_BREAKS = ("\n", "\n\n", "\n\n\n", " \n", "\r\n", "\n \n", "\t\n", "\n  ", "\n\t")
_STARTS = ("word", "Word", "# Title", "7 up", "_x", "s", "2024-01", "##", "#!", "'s", "/", ")", "你")


class Chunks:
    """Cuts texts at lines, for a tokenizer that encodes a line as it does beside other lines.

    That is so if no token of its vocabulary goes over such a border, and its pre-tokenizer, which is tried, does not
    look over it either. For other tokenizers a text is one chunk.
    """

    def __init__(self, plain: PlainText):
        self.cut = next((cut.before for cut in _CUTS if _changes_nothing(cut, plain)), None)

    def __call__(self, text: str) -> list[str]:
        return _parts(text, self.cut) if self.cut else [text]


def _parts(text: str, before_cut: re.Pattern[str]) -> list[str]:
    places = [found.end() for found in before_cut.finditer(text)]
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def _changes_nothing(cut: _Cut, plain: PlainText) -> bool:
    backends: dict[Place, Any] = dict(plain.backends)
    if any(cut.crosses.search(token) for token in backends["start"].get_vocab(with_added_tokens=True)):
        return False
    for sample in map("".join, product(_ENDS, _BREAKS, _STARTS)):
        ids: list[int] = []
        for number, part in enumerate(_parts(sample, cut.before)):
            ids += backends["text" if number else "start"].encode(part, add_special_tokens=False).ids
        if ids != backends["start"].encode(sample, add_special_tokens=False).ids:
            return False
    return True

"""Where a text may be cut without changing its tokens, so that ids of its parts can be kept for the next text."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

from cai_ray.prompts.tokenizers import PlainText

_LINE_START = re.compile(r"(?<=\n)(?=[A-Za-z0-9_#])")
# A token of a vocabulary that goes on behind a line break. Byte-level vocabularies write it as Ċ.
_CROSSES = re.compile("[\nĊ][A-Za-z0-9_#]")
_LINE_ENDS = ("word", "word.", "x = 7", "你好", "é", "(y)", "end:", "a/", "'", "`", "_", "two  ", "| -")
_BREAKS = ("\n", "\n\n", "\n\n\n", " \n", "\r\n", "\n \n", "\t\n")
_LINE_STARTS = ("word", "Word", "# Title", "7 up", "_x", "s", "2024-01", "##", "#!")


class Chunks:
    """Cuts texts at the beginnings of lines, for a tokenizer that encodes a line as it does behind other lines.

    That is so if no token of its vocabulary goes over such a border, and its pre-tokenizer, which is tried, does not
    look over it either. For other tokenizers a text is one chunk.
    """

    def __init__(self, plain: PlainText):
        self.cuts = _keeps_lines_apart(plain)

    def __call__(self, text: str) -> list[str]:
        return _LINE_START.split(text) if self.cuts and "\n" in text else [text]


def _keeps_lines_apart(plain: PlainText) -> bool:
    start, behind = plain.backends["start"], plain.backends["text"]
    if any(_CROSSES.search(token) for token in start.get_vocab(with_added_tokens=True)):
        return False

    def ids(backend: Any, text: str) -> list[int]:
        return list(backend.encode(text, add_special_tokens=False).ids)

    befores = ["".join(parts) for parts in product(_LINE_ENDS, _BREAKS)]
    rests = {line: ids(behind, line) for line in _LINE_STARTS}
    return all(
        ids(start, before + line) == ids(start, before) + rest
        for before in befores
        for line, rest in rests.items()
    )

"""Texts that a token limit cut off: the character that the cut left incomplete is dropped.

Many tokens are single bytes, so that a limit may fall within a character. Decoded as it is, such a text ends in U+FFFD,
the mark of a character that cannot be read. The model did not write that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cai_ray.prompts.renderer import Renderer

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_LONGEST = 4
"""Bytes of the longest character in UTF-8."""


def decode_answer(renderer: Renderer, ids: Sequence[int], truncated: bool) -> str:
    """The text of an answer, without the incomplete character that it may end with if it was cut off.

    A U+FFFD that the model wrote stays.

    Args:
        truncated: whether the token limit ended the answer.
    """
    text = renderer.decode(ids)
    if not truncated or not text.endswith(_REPLACEMENT):
        return text
    pieces = [str(piece) for piece in renderer.tokenizer.convert_ids_to_tokens(list(ids[-_LONGEST:]))]
    incomplete = _incomplete_bytes(b"".join(_bytes(piece) for piece in pieces))
    if not incomplete:
        return text
    if _BYTE_TOKEN.fullmatch(pieces[-1]):
        # Tokenizers with byte fallback decode a run of bytes as a whole: with an incomplete character in it, complete
        # ones are lost, too. Each byte is a token of its own.
        return renderer.decode(ids[:-incomplete])
    return text[:-1]  # byte-level tokenizers decode an incomplete character as one U+FFFD


def without_incomplete_end(text: str) -> str:
    """A text that was cut off elsewhere, where its bytes cannot be seen: it ends with a complete character.

    An incomplete character leaves one to three U+FFFD, by the tokenizer.
    """
    return re.sub(f"{_REPLACEMENT}{{1,3}}$", "", text)


def _bytes(piece: str) -> bytes:
    """The bytes of a token: of a byte-level vocabulary, of byte fallback, or of plain text."""
    if byte := _BYTE_TOKEN.fullmatch(piece):
        return bytes.fromhex(byte[1])
    alphabet = _alphabet()
    if all(c in alphabet for c in piece):
        return bytes(alphabet[c] for c in piece)
    return piece.encode("utf-8", "replace")


def _incomplete_bytes(data: bytes) -> int:
    """How many bytes at the end of `data` begin a character of UTF-8 that does not end there."""
    for count in range(1, min(_LONGEST, len(data) + 1)):
        byte = data[-count]
        if byte & 0xC0 != 0x80:  # not a byte that continues a character, so this one begins it
            length = 1 + (byte >= 0xC2) + (byte >= 0xE0) + (byte >= 0xF0)
            return count if byte <= 0xF4 and length > count else 0
    return 0


@cache
def _alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (GPT-2's): printable ones for themselves, the
    others from U+0100 on, in their order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}

"""Messages. Their contents are plain text, or pieces of which some come from a template set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict


class Piece(NamedTuple):
    """Part of a message. `literal` text comes from a template set and may hold special tokens."""

    text: str
    literal: bool


class Message(TypedDict):
    role: str
    content: str | list[Piece]


Messages = Sequence[Mapping[str, Any]]


def plain_messages(messages: Messages) -> list[dict[str, str]]:
    """Messages with their pieces joined, for display, records, and engines that render messages themselves."""
    return [
        {
            "role": m["role"],
            "content": c if isinstance(c := m["content"], str) else "".join(p.text for p in c),
        }
        for m in messages
    ]

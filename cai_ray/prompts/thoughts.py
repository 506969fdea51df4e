"""Thoughts in rendered prompts: where the template begins one, what closes it, and the marks of one that is kept."""

from __future__ import annotations

from collections.abc import Sequence

from cai_ray.prompts.messages import Piece
from cai_ray.prompts.spans import Spans
from cai_ray.prompts.templates import Thinking


def open_thought(prompt: Sequence[Piece], thinking: Thinking | None) -> str:
    """The template's own text from where it opens a thought, if it leaves it open at the prompt's end; else empty."""
    if thinking is None or not prompt or not prompt[-1].literal:
        return ""
    _, mark, rest = prompt[-1].text.rpartition(thinking.open)
    return "" if rest.strip() else mark + rest


def close_thought(begun: str, thinking: Thinking | None) -> str:
    """What closes a thought that the template has begun; empty if it has begun none."""
    if not begun or thinking is None:
        return ""
    line_break = "" if begun.endswith("\n") else "\n"
    return f"{line_break}{thinking.close}\n\n"


def thought_spans(answer: str, thinking: Thinking | None, begun: str) -> Spans:
    """An answer that begins with a thought, with its marks as literal text; empty for any other answer.

    Args:
        begun: the beginning of the thought that the prompt has already.
    """
    text = answer.lstrip()
    if thinking is None or not text.startswith(thinking.open):
        return []
    head, mark, rest = text.partition(thinking.close)
    thought = head.removeprefix(begun if begun and head.startswith(begun) else thinking.open)
    opening = [] if begun else [Piece(thinking.open, True)]
    return [*opening, Piece(thought, False), Piece(mark, True), Piece(rest, False)]

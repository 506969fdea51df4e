"""A rendered prompt as text whose parts remember where they come from: the structure, or a content."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cai_ray.prompts.messages import Piece

Spans = list[Piece]
"""Parts of a text in order. A literal part may hold control tokens; any other part is plain text whatever it says."""


def joined(spans: Iterable[Piece]) -> Spans:
    """The same text with neighbours of one kind put together and empty parts left out."""
    out: Spans = []
    for span in spans:
        if not span.text:
            continue
        if out and out[-1].literal == span.literal:
            out[-1] = Piece(out[-1].text + span.text, span.literal)
        else:
            out.append(span)
    return out


def text_of(spans: Iterable[Piece]) -> str:
    return "".join(span.text for span in spans)


def after(spans: Sequence[Piece], length: int) -> Spans:
    """What remains behind the first `length` characters."""
    out: Spans = []
    for span in spans:
        if length < len(span.text):
            out.append(Piece(span.text[length:], span.literal))
        length = max(0, length - len(span.text))
    return out


def stripped(spans: Sequence[Piece], left: str | None = "", right: str | None = "") -> Spans:
    """The spans without characters at their ends, as `str.strip` takes them: None takes all blanks, "" takes none."""
    out = list(spans)
    for side, characters in ((0, left), (-1, right)):
        while out and characters != "":
            text = out[side].text.lstrip(characters) if side == 0 else out[side].text.rstrip(characters)
            if text:
                out[side] = Piece(text, out[side].literal)
                break
            del out[side]
    return out


def message_spans(content: str | list[Piece]) -> Spans:
    """The content of a message, of which only the pieces of a template set are literal."""
    return [Piece(content, False)] if isinstance(content, str) else list(content)

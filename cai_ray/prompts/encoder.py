"""Encodes a rendered prompt as the tokenizer encodes the whole text, except that contents are plain text.

Control tokens are looked for in the structure alone. The text between two of them, structure and contents together, is
encoded at once by a copy of the tokenizer in which nothing is special: so words and blanks merge across the border of a
content as they do in the whole text, and no content can become a control token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from cai_ray.errors import RowError
from cai_ray.prompts.chunks import Chunks
from cai_ray.prompts.messages import Piece
from cai_ray.prompts.spans import Spans, joined, text_of
from cai_ray.prompts.tokenizers import Place, without_control_tokens

# The texts whose ids are kept, in characters: all of them together, and the longest one.
CACHED_CHARACTERS = 4_000_000
_LONGEST_CACHED = 20_000
_ENTRY = 100  # what an entry takes beside its text and ids counts as so many

# What a control token that swallows blanks takes for one. Python's own idea of a blank is a little wider.
_BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


class End(NamedTuple):
    """Where an encoded text ends, which decides how what follows it is encoded."""

    place: Place
    swallows: bool = False
    """Whether a control token has swallowed the blanks behind it and goes on to."""


START = End("start")


class Literal(NamedTuple):
    """A literal text, with the ids of all of it that do not depend on what stands around it."""

    head: str
    """What stands before the first control token; the whole text if there is none."""
    ids: list[int]
    """From the first control token to the last, with the text between them."""
    tail: str
    """What stands after the last one."""
    ends: End
    """Where `ids` end."""
    first_stop: int
    """Where the first control token ends, in characters."""
    swallowed_before: bool
    """Whether the first one has swallowed the blanks before it from the beginning of the literal, and goes on to."""


class TextCache:
    """Ids of the texts that were encoded last, bounded by their characters."""

    def __init__(self, characters: int = CACHED_CHARACTERS):
        self.limit, self.characters = characters, 0
        self._ids: OrderedDict[tuple[Place, str], list[int]] = OrderedDict()

    def get(self, key: tuple[Place, str]) -> list[int] | None:
        ids = self._ids.get(key)
        if ids is not None:
            self._ids.move_to_end(key)
        return ids

    def put(self, key: tuple[Place, str], ids: list[int]) -> None:
        if len(key[1]) > _LONGEST_CACHED or key in self._ids:  # long texts seldom come twice
            return
        self._ids[key] = ids
        self.characters += len(key[1]) + _ENTRY
        while self.characters > self.limit:
            (_, text), _ = self._ids.popitem(last=False)
            self.characters -= len(text) + _ENTRY


class SpanEncoder:
    """Encodes spans for one tokenizer.

    Args:
        control: ids that no content may become.
    """

    def __init__(self, tokenizer: Any, control: set[int]):
        self.tokenizer, self.control = tokenizer, control
        self._plain = without_control_tokens(tokenizer, control)
        self._added = {i: t for i, t in tokenizer.added_tokens_decoder.items() if i not in self._plain.kept}
        self._literal = lru_cache(maxsize=4096)(self._split_literal)
        self._chunks = Chunks(self._plain)
        self.cache = TextCache()

    def encode(self, spans: Iterable[Piece], begins: End = START) -> tuple[list[int], End]:
        """Ids of spans, and where they end.

        Args:
            begins: where the text before them ended.

        Raises:
            RowError: a text is not valid Unicode, or has a character that the tokenizer does not know.
        """
        ids: list[int] = []
        segment: Spans = []
        end = begins
        for span in joined(spans):
            literal = self._literal(span.text) if span.literal else None
            _append(segment, literal.head if literal else span.text, span.literal, end)
            if literal is None or not literal.ids:
                continue
            if literal.swallowed_before:
                segment = _without_last_blanks(segment)
            ids += self._segment_ids(segment, end.place)
            ids += literal.ids
            segment, end = [], literal.ends
            _append(segment, literal.tail, True, end)
        if segment:
            ids += self._segment_ids(segment, end.place)
            end = End("text")
        return ids, end

    def first_token(self, literal: str) -> tuple[int, int] | None:
        """The first control token in a literal text and where it ends, in characters; None if there is none."""
        split = self._literal(literal)
        return (split.ids[0], split.first_stop) if split.ids else None

    def encode_content(self, text: str) -> list[int]:
        """Ids of a content that stands alone."""
        return self._segment_ids([Piece(text, False)], "start")

    def _segment_ids(self, segment: Spans, place: Place) -> list[int]:
        """Ids of the text between two control tokens."""
        ids: list[int] = []
        if not segment:
            return ids
        for text in self._chunks(text_of(segment)):
            known = self.cache.get((place, text))
            if known is None:
                known = self._encode(text, place)
                if not self.control.isdisjoint(known):
                    self._check(segment, place, known)
                self.cache.put((place, text), known)
            ids += known
            place = "text"
        return ids

    def _encode(self, text: str, place: Place) -> list[int]:
        try:
            ids: list[int] = self._plain.backends[place].encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as e:
            raise RowError("text is not valid Unicode (a lone surrogate)") from e
        return ids

    def _check(self, segment: Spans, place: Place, ids: list[int]) -> None:
        """Raises RowError if a content holds what became a control token, such as the one for unknown characters."""
        if self.control & set(ids) != {self.tokenizer.unk_token_id}:
            raise RowError("text encodes to a control token of this tokenizer")
        for span in segment:
            if not span.literal and self.tokenizer.unk_token_id in self._encode(span.text, place):
                raise RowError("text holds a character that this tokenizer does not know")

    def _split_literal(self, text: str) -> Literal:
        """A literal text around the control tokens in it."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = []
        head, ends, place, first_stop, before = text, START, 0, 0, False
        for number, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            token = self._added.get(number)
            if token is None:
                continue
            between, found = text[place:start], text[start:stop]
            if not ids:
                head, first_stop = between, stop
                before = token.lstrip and start == 0 and found != found.lstrip()
            elif between:
                ids += self._segment_ids([Piece(between, True)], ends.place)
            ids.append(number)
            swallows = token.rstrip and stop == len(text) and found != found.rstrip()
            ends, place = End("text" if token.normalized else "token", swallows), stop
        return Literal(head, ids, text[place:] if ids else "", ends, first_stop, before)


def _append(segment: Spans, text: str, literal: bool, end: End) -> None:
    """Adds a text to the segment that follows `end`."""
    if end.swallows and not segment:
        text = text.lstrip(_BLANKS)
    if text:
        segment.append(Piece(text, literal))


def _without_last_blanks(segment: Spans) -> Spans:
    while segment and not (text := segment[-1].text.rstrip(_BLANKS)):
        segment = segment[:-1]
    return [*segment[:-1], Piece(text, segment[-1].literal)] if segment else []

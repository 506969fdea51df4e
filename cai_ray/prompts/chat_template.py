"""Renders a model's chat template around contents that never meet it.

Marks stand in the place of contents while the template is rendered, and the contents are put there afterwards. So no
content can change what a template does. What a template does to every content, such as trimming it, is seen from how
it treats the marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from cai_ray.errors import InputError, RowError
from cai_ray.prompts.messages import Messages, Piece
from cai_ray.prompts.spans import Spans, joined, message_spans, stripped, text_of

# Private-use characters. A content that holds a mark is harmless, since contents never meet the template.
_MARK = re.compile("\ue000([0-9]+)\ue001")

_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

# Blanks around a mark show what a template strips: nothing, line breaks, or all blanks. The inner one is a rare blank
# that stands in no template.
_PROBE = "\n\u2005"
_STRIPS: dict[str, str | None] = {"\n\u2005": "", "\u2005": "\n", "": None}


class Rendered(NamedTuple):
    """A conversation as the template writes it."""

    spans: Spans
    """Everything up to the end of the last message's content, or up to where the model begins to write."""
    tail: str
    """What the template writes after that."""


class _Skeleton(NamedTuple):
    """The template's own text around the contents."""

    literals: list[str]
    """One before each content, and one after the last."""
    order: list[int]
    """Which message stands in each place."""
    strips: list[tuple[str | None, str | None]]
    """What is stripped from the beginning and the end of the content in each place (`spans.stripped`)."""


def choose_template(tokenizer: Any, name: str | None, fallback: str | None) -> str:
    """One of a tokenizer's own chat templates.

    Args:
        name: its name, where the tokenizer has several. By default the one named `default`.
        fallback: a template for a tokenizer that has none.

    Raises:
        InputError: there is none, or none of that name.
    """
    own, model = tokenizer.chat_template, tokenizer.name_or_path
    templates = own if isinstance(own, dict) else {"default": own} if own else {}
    template = templates.get(name or "default", None if templates else fallback)
    if template:
        return str(template)
    if not templates:
        raise InputError(
            f"model {model}: its tokenizer has no chat template; name one with `chat_template` in the template set"
        )
    raise InputError(
        f"model {model}: its tokenizer has no chat template named {name or 'default'!r}; set `chat_template` to one "
        f"of: {', '.join(sorted(templates))}"
    )


class ChatTemplate:
    """A chat template with its arguments and its date.

    Args:
        args: further arguments of the template, such as `enable_thinking`.
        today: the day that the template is told if it asks (`strftime_now`). Defaults to today.
    """

    def __init__(self, tokenizer: Any, text: str, args: Mapping[str, Any], today: date | None = None):
        self.tokenizer, self.text, self.given, self.today = tokenizer, text, dict(args), today
        dated = today is not None and "strftime_now" in text
        self.args = ({"strftime_now": today.strftime} if today is not None and dated else {}) | self.given
        self._skeleton = lru_cache(maxsize=256)(self._make_skeleton)

    def render(self, messages: Messages, generation: bool) -> Rendered:
        """Renders messages.

        Args:
            generation: whether the assistant's turn is to be begun after the last message. If it is not, the last
                message's content ends the spans.

        Raises:
            RowError: the template refuses the roles, or leaves out or repeats a message.
        """
        contents = [message_spans(m["content"]) for m in messages]
        # An empty content meets the template, which may write such a turn differently.
        marked = [bool(text_of(c)) for c in contents]
        if not generation:  # where the last content ends must be seen
            marked[-1] = True
        roles = tuple(m["role"] for m in messages)
        literals, order, strips = self._skeleton(roles, tuple(marked), generation)
        spans: Spans = []
        last = None if generation else len(messages) - 1
        for literal, place, strip in zip(literals, order, strips, strict=False):
            spans += [Piece(literal, True), *stripped(contents[place], *strip)]
            if place == last:
                break
        tail = literals[len(order)] if last is None else literals[order.index(last) + 1]
        if last is None:
            return Rendered(joined([*spans, Piece(tail, True)]), "")
        return Rendered(joined(spans), tail)

    def standalone(self) -> str:
        """The template with its arguments and its date as part of the text. Arguments of a request still win."""
        sets = "".join(
            f"{{%- set {name} = {name} if {name} is defined else {_literal(value)} %}}{{{{ '' }}}}"
            for name, value in self.given.items()
        )
        if self.today is None:
            return sets + self.text
        today = self.today
        return sets + _DATE.sub(lambda call: json.dumps(today.strftime(call[2])), self.text)

    def strips_of_last(self, roles: Sequence[str]) -> tuple[str | None, str | None]:
        """What the template strips from the last message's content of a conversation with these roles."""
        skeleton = self._skeleton(tuple(roles), (True,) * len(roles), False)
        return skeleton.strips[skeleton.order.index(len(roles) - 1)]

    def _make_skeleton(self, roles: tuple[str, ...], marked: tuple[bool, ...], generation: bool) -> _Skeleton:
        literals, order = self._around_marks(roles, marked, generation, "")
        if sorted(order) != [i for i, mark in enumerate(marked) if mark]:
            raise RowError(f"the chat template drops or repeats a message of {list(roles)}")
        probed, probed_order = self._around_marks(roles, marked, generation, _PROBE)
        if probed_order != order:  # it looks at more than the ends of a content
            return _Skeleton(literals, order, [("", "")] * len(order))
        beside = [_strips(*pair) for pair in zip(probed, literals, strict=True)]
        strips = [(beside[i][1], beside[i + 1][0]) for i in range(len(order))]
        return _Skeleton(literals, order, strips)

    def _around_marks(
        self, roles: tuple[str, ...], marked: tuple[bool, ...], generation: bool, probe: str
    ) -> tuple[list[str], list[int]]:
        """The template's own text around the marks, and the number of the mark in each place."""
        messages = [
            {"role": role, "content": f"{probe}\ue000{i}\ue001{probe[::-1]}" if mark else ""}
            for i, (role, mark) in enumerate(zip(roles, marked, strict=True))
        ]
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=generation,
                **self.args,
            )
        except Exception as e:  # the template's author chooses what it raises
            raise RowError(f"the chat template refuses the roles {list(roles)}: {e}") from e
        pieces = _MARK.split(text)
        return pieces[0::2], [int(i) for i in pieces[1::2]]


def _strips(probed: str, literal: str) -> tuple[str | None, str | None]:
    """What is stripped from the end of the content before a literal, and from the beginning of the one behind it.

    Args:
        probed: the literal, with what is left of the blanks around the marks on both sides of it.
    """
    for (left, before), (right, behind) in product(_STRIPS.items(), repeat=2):
        if left[::-1] + literal + right == probed:
            return before, behind
    return "", ""


def _literal(value: Any) -> str:
    """Plain data as an expression of Jinja."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value)

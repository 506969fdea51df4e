"""Reads which fields of a request an endpoint refuses.

Servers say it in many shapes: OpenAI's {"error": {"message", "param", "code"}}, a list of such, pydantic's
{"detail": [{"loc", "msg", "type"}]}, a plain sentence, or one of these as text inside another. What they repeat of the
request itself is not read, since that is the text of a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

# The field as such is refused, whatever its value.
_UNSUPPORTED = re.compile(
    r"unsupported|unknown|unrecogni[sz]ed|unexpected|extra (?:inputs?|fields?|keys?|param)|extraneous|extra_forbidden"
    r"|(?:not|n['’]t) (?:be )?(?:currently |yet )?(?:support|permit|allow|accept|recogni[sz]|implement|enabled)"
    r"|not available|not a valid|no longer|deprecated|cannot find|no such|please remove|disallowed|forbidden"
    r"|wrong_api_format",
    re.IGNORECASE,
)
# Its value is refused.
_VALUE = re.compile(
    r"invalid|must|should|only|cannot|can't|maximum|max |at most|at least|up to|limit|exceed|above|below|greater|less"
    r"|more than|fewer|between|too (?:large|high|many|big)|out of range|in (?:the )?range|[<>]=|[≤≥]",
    re.IGNORECASE,
)
_TOO_MUCH = re.compile(r"too (?:large|high|many|big|long)|exceed", re.IGNORECASE)
# What comes after these names fields that are right, or repeats the request.
_NOT_REFUSED = re.compile(
    r"expected one of|did you mean|(?:valid|supported|allowed) (?:fields|param\w*|arguments|keys|properties) are"
    r"|['\"]input['\"]\s*:|input_value\s*=",
    re.IGNORECASE,
)
_USE_INSTEAD = re.compile(r"\buse ['\"`]?\w+['\"`]? instead(?: of)?", re.IGNORECASE)
# Something in the request is not taken, without a name; and what says that it is the text of the row.
_GENERAL = re.compile(
    r"bad request|invalid|unprocessable|validation|param|argument|field|propert|extra|unsupported", re.I
)
_OF_THE_ROW = re.compile(
    r"context|token|length|too long|content|filter|safety|polic|moderat|flag|role|message|prompt", re.I
)
# A number on its own, and not part of a name such as gpt-4.
_NUMBER = re.compile(r"(?:(?<![\w.\-])|(?<=\b[01]-))\d+(?![\w\-]|\.\d)")
_SENTENCE = re.compile(r"(?<=[.!?;])\s+")

_SAYS = ("message", "msg", "description", "detail", "error", "title")
_HOLDS = ("error", "errors", "detail", "details", "message", "metadata", "raw", "fieldViolations", "msg")
_POINTS = ("param", "parameter", "loc", "field")
_DEPTH = 6
# What a row fills, so that a fault in it is the row's; and the model.
_OWN = {"messages", "prompt", "input", "input_tokens", "model"}


class Refused(NamedTuple):
    """What an endpoint says of one field."""

    unsupported: bool
    """It does not take the field, rather than this value of it."""
    limit: int | None
    """The largest number that it allows, if it names one below what was sent."""


class _Complaint(NamedTuple):
    text: str
    points_at: tuple[str, ...]
    """The fields of the request that are named as such, outside the text."""


def read_refusals(body: str, sent: dict[str, Any]) -> dict[str, Refused]:
    """The fields of a request that an error response refuses, by name; empty if it concerns something else.

    Args:
        body: the response's text.
        sent: the fields of the request.
    """
    refused: dict[str, Refused] = {}
    for complaint in _complaints(_parse(body)):
        for field in _named(complaint, sent.keys() - {"messages", "model"}):
            before = refused.get(field, Refused(False, None))
            of = "top_logprobs" if field == "logprobs" and "top_logprobs" in sent else field
            limit = _limit(complaint.text, sent[of])
            unsupported = limit is None and bool(_UNSUPPORTED.search(complaint.text))
            unsupported = unsupported and not _TOO_MUCH.search(complaint.text)
            refused[field] = Refused(before.unsupported or unsupported, before.limit or limit)
    return refused


def refuses_model(body: str) -> bool:
    """Whether an error response says that the endpoint does not have the model."""
    return any("model" in c.points_at or "model_not_found" in c.text for c in _complaints(_parse(body)))


def refuses_something(body: str) -> bool:
    """Whether an error response may be about a field, though it names none."""
    text = " ".join(" ".join([c.text, *c.points_at]) for c in _complaints(_parse(body)))
    return not _OF_THE_ROW.search(text) and (not text.strip() or bool(_GENERAL.search(text)))


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _complaints(node: Any, depth: int = 0) -> Iterator[_Complaint]:
    """Every place of a response that says something, from the outside in."""
    if isinstance(node, str):
        inner = _parse(node) if node.lstrip()[:1] in ("{", "[") else node
        if isinstance(inner, str):
            text = _USE_INSTEAD.sub("unsupported:", _NOT_REFUSED.split(inner)[0])
            yield _Complaint(text, _pointed_at(_locations(inner)))
        elif depth < _DEPTH:
            yield from _complaints(inner, depth + 1)
    elif isinstance(node, list) and depth < _DEPTH:
        for item in node:
            yield from _complaints(item, depth + 1)
    elif isinstance(node, dict) and depth < _DEPTH:
        points_at = _pointed_at(node.get(key) for key in _POINTS)
        said = [node[key] for key in _SAYS if isinstance(node.get(key), str)]
        kinds = [node[key] for key in ("code", "type") if isinstance(node.get(key), str)]
        for text in said or [""]:
            for complaint in _complaints(text, depth + 1):
                words = [*(kind for kind in kinds if _says_more(kind)), complaint.text]
                yield _Complaint(" ".join(words), points_at + complaint.points_at)
        for key in _HOLDS:
            if isinstance(node.get(key), (dict, list)) or (key == "raw" and key in node):
                yield from _complaints(node[key], depth + 1)


def _says_more(kind: str) -> bool:
    """Whether a code or type tells more than that the request is at fault."""
    return (
        bool(_UNSUPPORTED.search(kind.replace("_", " ")) or _UNSUPPORTED.search(kind)) or "not_found" in kind
    )


def _locations(text: str) -> list[list[str]]:
    """pydantic's places of errors, in the text of its errors."""
    found = re.findall(r"""['"]loc['"]\s*:\s*[\[(]([^\])]*)[\])]""", text)
    return [re.findall(r"[\w.]+", place) for place in found]


def _pointed_at(places: Any) -> tuple[str, ...]:
    """The field of the request that each place (a path, or its parts) begins with."""
    fields = []
    for place in places:
        parts = (
            place
            if isinstance(place, list)
            else re.split(r"[.\[\]/$]+", place)
            if isinstance(place, str)
            else []
        )
        names = [str(part) for part in parts if str(part) not in ("", "body", "None", "null")]
        fields += names[:1]
    return tuple(fields)


def _named(complaint: _Complaint, fields: Collection[str]) -> list[str]:
    """Those of the fields that a complaint is about."""
    if pointed_at := [field for field in fields if field in complaint.points_at]:
        return pointed_at
    if _OWN.intersection(complaint.points_at):
        return []
    named = []
    for sentence in _SENTENCE.split(complaint.text):
        if _UNSUPPORTED.search(sentence) or _VALUE.search(sentence):
            named += [field for field in fields if _mentions(sentence, field)]
    return list(dict.fromkeys(named))


def _mentions(text: str, field: str) -> bool:
    first, *rest = field.split("_")
    names = {field, first + "".join(word.capitalize() for word in rest)}
    return any(re.search(rf"(?<![\w\-]){re.escape(name)}(?![\w\-])", text) for name in names)


def _limit(text: str, value: Any) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool) or not _VALUE.search(text):
        return None
    return max((n for n in map(int, _NUMBER.findall(text)) if 0 < n < value), default=None)

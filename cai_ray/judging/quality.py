"""Quality of generated texts: what part is the answer, and what is wrong with a revision. Pure functions on text.

The rules depend on the language and the model family, so they are data of the template set: marks of thinking blocks
(`thinking`), openings and endings that do not belong to a revision (`prefixes`, `suffixes`), and openings of a critique
(`critiques`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from cai_ray.config.run import RunConfig
from cai_ray.errors import RowError
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.templates import TemplateSet, Thinking

Kind = Literal["sound", "critique", "loop", "copy"]

# Scripts without spaces count by character. A very long word counts by its parts, as it may be a loop itself.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w{1,30}")
_RUN = re.compile(r"(\S{1,40}?)\1{4,}")

# A text is a loop if half of its sequences of LOOP_NGRAM words occurred before, or LOOP_CHARACTERS characters in a row
# repeat a shorter piece. A text of fewer than LOOP_WORDS is not: greetings, refrains and lists repeat themselves too.
LOOP_NGRAM = 4
LOOP_WORDS = 40
LOOP_CHARACTERS = 200
# An afterword is at most this many characters at the end of a revision.
LONGEST_AFTERWORD = 1500
_LINE_BREAK = re.compile(r"\n\s*")
# Lines that set a revision apart from what stands before or after it.
_RULE_ABOVE = re.compile(r"\s*(?:[-*_=][^\S\n]*){3,}\n")
_RULE_BELOW = re.compile(r"\n\s*(?:[-*_=][^\S\n]*){3,}\s*\Z")
_WRAPPINGS = (('"', '"'), ("“", "”"), ("«", "»"), ("**", "**"))
# A revision and its critique are the same text if they share this many of their three-word sequences (Jaccard).
SAME_TEXT = 0.6


def run_templates(config: RunConfig, name: str | None = None) -> TemplateSet:
    """A template set, by default the run's, without the marks of thinking if the run keeps thinking blocks."""
    templates = load_templates(name or config.templates)
    return templates if config.thinking == "strip" else templates.model_copy(update={"thinking": None})


def without_thinking(text: str, thinking: Thinking | None, truncated: bool = False) -> str:
    """The answer after the thinking blocks that a text begins with; a text without any stays as it is.

    Only the beginning counts: further on, an answer may mention the marks. If the opening mark is missing, the chat
    template has begun the block. If a text was cut off within a block, its answer is empty.

    Args:
        truncated: whether the token limit ended the text.

    Raises:
        RowError: the model ended its turn within a block, so there is no answer.
    """
    if thinking is None:
        return text
    head, ends, rest = text.partition(thinking.close)
    opens = head.lstrip().startswith(thinking.open)
    if not ends and (opens or thinking.begun):
        return _unended(truncated)
    if not ends or (thinking.open in head and not opens):
        return text
    while rest.lstrip().startswith(thinking.open):
        _, ends, rest = rest.partition(thinking.close)
        if not ends:
            return _unended(truncated)
    return rest.strip()


def _unended(truncated: bool) -> str:
    if not truncated:
        raise RowError("a thinking block does not end; raise max_tokens of this step")
    return ""


def without_prefix(text: str, rules: Sequence[str]) -> str:
    """A revision without its introductions, such as "Here is a revised response:"."""
    rest = text
    while match := next((m for rule in rules if (m := re.match(rule, rest)) and m.end()), None):
        rest = rest[match.end() :]
        if rule := _RULE_ABOVE.match(rest):
            rest = rest[rule.end() :]
    return rest.strip() if len(rest) < len(text) else text


def without_suffix(text: str, rules: Sequence[str]) -> str:
    """A revision without its afterwords, such as "(Note: I removed the threat.)"; one that is nothing else stays."""
    rest = text.rstrip()
    while start := next((i for i in _last_parts(rest) if any(re.fullmatch(r, rest[i:]) for r in rules)), 0):
        rest = _RULE_BELOW.sub("", rest[:start]).rstrip()
    return rest.strip() if len(rest) < len(text.rstrip()) else text


def revision_alone(text: str, templates: TemplateSet) -> str:
    """What a model wrote as a revision, without introductions and afterwords, and without the quotation marks that then
    surround it as a whole."""
    rest = without_suffix(without_prefix(text, templates.prefixes), templates.suffixes)
    return _unwrapped(rest) if rest != text else text


def _last_parts(text: str) -> list[int]:
    """Where the last lines of a text begin, and a parenthesis that ends it; the earliest comes first."""
    earliest = len(text) - LONGEST_AFTERWORD
    starts = [m.end() for m in _LINE_BREAK.finditer(text, max(1, earliest))]
    if opening := {")": "(", "]": "["}.get(text[-1:]):
        starts.append(text.rfind(opening))
    return [i for i in starts if i >= max(1, earliest) and text[:i].strip()]


def _unwrapped(text: str) -> str:
    for opening, closing in _WRAPPINGS:
        inner = text[len(opening) : -len(closing)]
        if text == opening + inner + closing and opening not in inner and closing not in inner:
            return inner.strip()
    lines = text.splitlines()
    if all(line.startswith(">") or not line.strip() for line in lines):
        return "\n".join(re.sub("^> ?", "", line) for line in lines).strip()
    return text


def kind(revision: str, before: str, critique: str, rules: Sequence[str]) -> Kind:
    """The kind of a revision; the worst one if several apply.

    A `copy` of the response before is right if the critique finds nothing wrong.

    Args:
        before: the response that was to be revised.
        rules: regular expressions for how a critique begins.
    """
    if is_loop(revision):
        return "loop"
    if any(re.match(rule, revision) for rule in rules) or is_same(revision, critique):
        return "critique"
    return "copy" if revision.casefold().split() == before.casefold().split() else "sound"


def is_refusal(response: str, rules: Sequence[str]) -> bool:
    """Whether a response declines, by the template set's `refusals`."""
    return any(re.match(rule, response) for rule in rules)


def is_loop(text: str) -> bool:
    if any(len(run[0]) >= LOOP_CHARACTERS for run in _RUN.finditer(text)):
        return True
    grams = _ngrams(words := _WORD.findall(text.casefold()), LOOP_NGRAM)
    return len(words) >= LOOP_WORDS and len(set(grams)) <= len(grams) / 2


def is_same(one: str, other: str) -> bool:
    """Whether two texts are nearly the same words in the same order."""
    first, second = ([*_WORD.findall(t.casefold())] for t in (one, other))
    if min(len(first), len(second)) < 3:
        return bool(first) and first == second
    a, b = set(_ngrams(first, 3)), set(_ngrams(second, 3))
    return len(a & b) >= SAME_TEXT * len(a | b)


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))

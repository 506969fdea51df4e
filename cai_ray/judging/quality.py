"""Quality of generated texts: what part is the answer, and what is wrong with a revision. Pure functions on text.

The rules depend on the language and the model family, so they are data of the template set: marks of thinking blocks
(`thinking`), openings that do not belong to a revision (`prefixes`), and openings of a critique (`critiques`).
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
# A revision and its critique are the same text if they share this many of their three-word sequences (Jaccard).
SAME_TEXT = 0.6


def run_templates(config: RunConfig, name: str | None = None) -> TemplateSet:
    """A template set, by default the run's, without the marks of thinking if the run keeps thinking blocks."""
    templates = load_templates(name or config.templates)
    return templates if config.thinking == "strip" else templates.model_copy(update={"thinking": None})


def without_thinking(text: str, thinking: Thinking | None) -> str:
    """The answer after the thinking blocks that a text begins with; a text without any stays as it is.

    Only the beginning counts: further on, an answer may mention the marks. If the opening mark is missing, the chat
    template has begun the block.

    Raises:
        RowError: a block does not end, so there is no answer.
    """
    if thinking is None:
        return text
    head, ends, rest = text.partition(thinking.close)
    opens = head.lstrip().startswith(thinking.open)
    if not ends and (opens or thinking.begun):
        raise RowError("a thinking block does not end; raise max_tokens of this step")
    if not ends or (thinking.open in head and not opens):
        return text
    while rest.lstrip().startswith(thinking.open):
        _, ends, rest = rest.partition(thinking.close)
        if not ends:
            raise RowError("a thinking block does not end; raise max_tokens of this step")
    return rest.strip()


def without_prefix(text: str, rules: Sequence[str]) -> str:
    """A revision without its introductions, such as "Here is a revised response:"."""
    rest = text
    while match := next((m for rule in rules if (m := re.match(rule, rest)) and m.end()), None):
        rest = rest[match.end() :]
    return rest.strip() if len(rest) < len(text) else text


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

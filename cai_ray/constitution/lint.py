"""Finds faults of a constitution by reading it: in its form, its wording and its balance.

A finding names the principle, what is wrong and the remedy. An error would harm a run; a warning is what a careful
author would change; a note is what is missing and may stay so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from statistics import median_low
from typing import Literal, NamedTuple

from rensa import RMinHash, RMinHashDeduplicator

from cai_ray.constitution.document import Constitution, Principle

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
TEXTS = ("text", "critique_request", "revision_request", "comparison")
NEAR = 0.7
"""Overlap of two principles' sets of 5-grams (Jaccard) at which they count as near-duplicates."""
LONG_TEXT, LONG_SENTENCE = 80, 45
"""Numbers of words above which a small model loses the thread."""
UNEQUAL, HEAVY = 4.0, 5.0
"""The factor by which the lengths of two requests may differ, and a weight may differ from the median."""

GUESSES = 10
"""The number of misspelt words that get a guess. Each takes a hundredth of a second."""

# The marks by which template sets and chat formats separate the parts of a prompt. A text cannot break them, but a
# model that reads such a mark inside a principle may take it for the next part.
MARKS = re.compile(
    r"<\|[^|>]*\|>|\[/?INST\]|</?s>|^\s*#{1,6} |\([AB]\)|^\s*(?:system|user|assistant|human|person)\s*:|\{[a-z_]+\}",
    re.IGNORECASE | re.MULTILINE,
)
# "Which response is worse / more harmful / less honest", and not "less harmful", "less likely to".
GOOD = r"helpful|honest|kind|safe|fair|truthful|respectful|accurate|candid|careful|harmless|private"
BAD = r"harmful|dangerous|cruel|toxic|biased|racist|sexist|unethical|illegal|deceptive|dishonest|rude|hurtful|unsafe"
ASKS_FOR_THE_WORSE = re.compile(
    rf"\b(worse|worst|more (?:{BAD})|most (?:{BAD})|less (?:{GOOD})|least (?:{GOOD}))\b", re.I
)


class Finding(NamedTuple):
    level: Level
    check: str
    principle: str | None
    """The principle's id; None if the finding concerns the document."""
    message: str
    remedy: str


def lint(document: Constitution) -> list[Finding]:
    """All findings: errors first, then in the order of the document."""
    findings = [f for check in CHECKS for f in check(document)]
    order = {p.id: i for i, p in enumerate(document.principles)}
    return sorted(findings, key=lambda f: (LEVELS.index(f.level), order.get(f.principle or "", -1)))


def duplicates(document: Constitution) -> Iterator[Finding]:
    """Texts that are equal, or nearly (MinHash over 5-grams, all against all by locality-sensitive hashing)."""
    same: dict[tuple[str, str], str] = {}
    finders = {name: RMinHashDeduplicator(NEAR, 128, use_lsh=True, seed=0) for name in TEXTS}
    for p in document.principles:
        for name in TEXTS:
            text = _plain(getattr(p, name))
            if (first := same.setdefault((name, text), p.id)) != p.id:
                yield Finding(
                    "error",
                    "duplicate",
                    p.id,
                    f"{name} is the same as that of {first!r}",
                    "leave one of them out, or reword it",
                )
                continue
            signature = RMinHash(128, 0)
            signature.update(sorted({text[i : i + 5] for i in range(max(1, len(text) - 4))}))
            near = finders[name].get_duplicates(signature)
            if near:
                yield Finding(
                    "warning",
                    "near_duplicate",
                    p.id,
                    f"{name} is nearly the same as that of {sorted(near)[0]!r}",
                    "say what sets them apart, or merge them",
                )
            finders[name].add(p.id, signature)


def sides(document: Constitution) -> Iterator[Finding]:
    """Critique and revision requests that do not belong together, and comparisons that ask for the wrong side."""
    for p in document.principles:
        critique, revision = len(p.critique_request.split()), len(p.revision_request.split())
        if max(critique, revision) > UNEQUAL * min(critique, revision):
            yield Finding(
                "warning",
                "unequal_sides",
                p.id,
                f"critique_request has {critique} words and revision_request {revision}",
                "ask for the same thing on both sides",
            )
        worse = ASKS_FOR_THE_WORSE.search(p.comparison)
        if worse and p.form == "positive":
            yield Finding(
                "error",
                "asks_for_the_worse",
                p.id,
                f"comparison asks for what is {worse[0]!r}, but its answer counts as the better response",
                "ask for the better response, or set `form: negative`",
            )
        elif p.form == "negative" and not worse:
            yield Finding(
                "warning",
                "asks_for_the_better",
                p.id,
                "form is negative, but comparison does not seem to ask for the worse response",
                "ask for the worse response, or leave `form` out",
            )


def lengths(document: Constitution) -> Iterator[Finding]:
    """Texts and sentences that are too long."""
    for p in document.principles:
        for name in TEXTS:
            words = getattr(p, name).split()
            sentence = max((len(s.split()) for s in re.split(r"(?<=[.!?])\s+", getattr(p, name))), default=0)
            if len(words) > LONG_TEXT:
                yield Finding(
                    "warning",
                    "length",
                    p.id,
                    f"{name} has {len(words)} words",
                    f"say it in {LONG_TEXT} words or fewer",
                )
            elif sentence > LONG_SENTENCE:
                yield Finding(
                    "warning", "length", p.id, f"{name} has a sentence of {sentence} words", "split it"
                )


def weights(document: Constitution) -> Iterator[Finding]:
    """Principles that outweigh all others together, or whose weight is far from the others'."""
    enabled = document.enabled
    total = sum(p.weight for p in enabled)
    middle = median_low(p.weight for p in enabled)
    for p in enabled:
        if len(enabled) > 2 and p.weight > total / 2:
            message = f"its weight {p.weight:g} is more than all other weights together"
        elif p.weight > HEAVY * middle or p.weight * HEAVY < middle:
            message = f"its weight {p.weight:g} is far from the median weight, {middle:g}"
        else:
            continue
        yield Finding(
            "warning",
            "weight",
            p.id,
            message,
            "choose a weight nearer to the others, or give the reason in its source",
        )


def marks(document: Constitution) -> Iterator[Finding]:
    """Marks that look like the structure of a prompt."""
    for p in document.principles:
        for name in TEXTS:
            if mark := MARKS.search(getattr(p, name)):
                yield Finding(
                    "warning",
                    "mark",
                    p.id,
                    f"{name} contains {mark[0].strip()!r}, which a model may take for the next part of its prompt",
                    "say it in words",
                )


def sections(document: Constitution) -> Iterator[Finding]:
    """Texts of sections, which an author may take for principles."""
    for section in document.sections:
        yield Finding(
            "note",
            "section",
            None,
            f"no model reads the text of section {section.title!r}",
            "give what models should follow a heading of its own",
        )


def evidence(document: Constitution) -> Iterator[Finding]:
    """Principles without a source or without examples of both kinds, and a document without a source."""
    for p in document.principles:
        if not p.source:
            yield Finding("note", "source", p.id, "no source", "name what it draws on")
        for side in ("violates", "follows"):
            if not getattr(p.examples, side):
                message = f"no example that {side} it"
                yield Finding(
                    "note",
                    "example",
                    p.id,
                    message,
                    f"add one under `examples.{side}`, for `constitution test`",
                )
    if not document.source and not document.sources:
        yield Finding("note", "source", None, "the document names no source", "add `source` or `sources`")


def spelling(document: Constitution) -> Iterator[Finding]:
    """English words that no dictionary knows, by pyspellchecker (extra `lint`)."""
    if find_spec("spellchecker") is None:
        yield Finding("note", "spelling", None, "not checked", "pip install 'cai_ray[lint]'")
        return
    from spellchecker import SpellChecker

    words = sorted({(p.id, word) for p in document.principles for word in _words(p)})
    speller = SpellChecker(distance=1)
    unknown = speller.unknown({word for _, word in words})
    unknown -= {word for word in unknown if speller.known(_american(word))}
    guesses = {word: speller.correction(word) for word in sorted(unknown)[:GUESSES]}
    for name, word in words:
        if word in unknown:
            guess = guesses.get(word, word)
            remedy = f"did you mean {guess!r}?" if guess and guess != word else "is it a word?"
            yield Finding("warning", "spelling", name, f"{word!r} is not in the dictionary", remedy)


CHECKS: Sequence[Callable[[Constitution], Iterator[Finding]]] = (
    duplicates, sides, lengths, weights, marks, sections, evidence, spelling,
)  # fmt: skip


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _american(word: str) -> set[str]:
    """How the American dictionary may write a word of British spelling."""
    pairs = (("our", "or"), ("is", "iz"), ("ys", "yz"), ("ll", "l"), ("tre", "ter"), ("ence", "ense"))
    return {word.replace(british, american) for british, american in pairs}


def _words(p: Principle) -> set[str]:
    """Words in lower case. Names and abbreviations are left out, since no dictionary has them all."""
    texts = " ".join(getattr(p, name) for name in TEXTS)
    return set(re.findall(r"(?<![\w'-])[a-z]{3,}(?![\w'-])", texts))

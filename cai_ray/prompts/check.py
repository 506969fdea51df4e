"""Checks template sets: that each step is asked with what it is about, and with nothing that it does not have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from cai_ray.config.judge import JudgeConfig
from cai_ray.errors import InputError
from cai_ray.prompts.templates import FIELD, TemplateSet

# For each step: the fields that it must use, and those that it may use. Every step may use `{transcript}`.
_STEPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "answer": ((), ()),
    "critique": (("response", "critique_request"), ()),
    "revision": (("response", "revision_request"), ("critique", "critique_request")),
    "direct": (("response", "revision_request"), ()),
    "feedback": (("response_a", "response_b", "comparison"), ()),
    "reasoning": (("response_a", "response_b", "comparison"), ()),
    "verdict": (("response_a", "response_b", "comparison", "reasoning"), ()),
    "rating": (("response", "principle"), ()),
    "red_team": ((), ()),
}

# The parts that a judge's settings need beside those that every set has.
_JUDGE_PARTS = {
    ("ask", "response"): ("rating", "scores"),
    ("answer", "reasoned"): ("reasoning", "verdict"),
}
_JUDGE_DEFAULTS = {"ask": "pair", "answer": "logprob"}


def check_templates(templates: TemplateSet, where: str | Path) -> None:
    """Raises InputError if a template set is not valid."""
    problem = next(_problems(templates), None)
    if problem:
        raise InputError(f"template set {where}: {problem}; see cai_ray/templates/general.yaml")


def check_judge(templates: TemplateSet, judge: JudgeConfig, key: str) -> None:
    """Raises InputError if the set does not have a part that a judge needs.

    Args:
        key: the setting that describes the judge, for the error message.
    """
    for (setting, value), parts in _JUDGE_PARTS.items():
        missing = [part for part in parts if not getattr(templates, part)]
        if getattr(judge, setting) == value and missing:
            raise InputError(
                f"{key}.{setting}={value}: template set {templates.name} has no {' and no '.join(missing)}; add what "
                f"is missing (see cai_ray/templates/general.yaml), or use {key}.{setting}: {_JUDGE_DEFAULTS[setting]}"
            )


def check_direct(templates: TemplateSet) -> None:
    """Raises InputError if the set cannot ask for a revision without a critique."""
    if templates.direct is None:
        raise InputError(
            f"revise.critique=false: template set {templates.name} has no direct; add it (see "
            "cai_ray/templates/general.yaml), or leave revise.critique on"
        )


def _problems(templates: TemplateSet) -> Iterator[str]:
    for step in _STEPS:
        if getattr(templates, step) is not None:  # some steps are optional
            yield from _step_problems(templates, step)
    if templates.scores is not None and len(templates.scores) != 10:
        yield f"scores has {len(templates.scores)} texts; list ten, from the worst to the best"
    yield from _transcript_problems(templates)
    for key in ("prefixes", "suffixes", "critiques", "refusals", "reasons"):
        yield from _rule_problems(key, getattr(templates, key))


def _step_problems(templates: TemplateSet, step: str) -> Iterator[str]:
    (needed, optional), items = _STEPS[step], getattr(templates, step)
    if not items:
        yield f"{step} is empty; list its messages"
    used = set()
    for i, item in enumerate(items):
        if item == "conversation":
            continue
        for key in ("role", "content"):
            if key not in item:
                yield f"{step}.{i} has no `{key}`; a message has `role` and `content`"
        if item["role"] not in ("system", "user", "assistant"):
            yield f"{step}.{i}: role {item['role']!r} is not one of system, user, assistant"
        used |= set(FIELD.findall(item["content"]))
    for name in needed:
        if name not in used:
            yield f"{step} does not use {{{name}}}; put it in one of its messages"
    for name in sorted(used - {*needed, *optional, "transcript"}):
        yield f"{step} has no {{{name}}}; leave it out"
    if "conversation" not in items and (step == "answer" or "transcript" not in used):
        yield f"{step} does not have the item `conversation`" + (
            " or {transcript}" if step != "answer" else ""
        )


def _transcript_problems(templates: TemplateSet) -> Iterator[str]:
    quoted = any(
        "transcript" in FIELD.findall(item["content"])
        for step in _STEPS
        for item in getattr(templates, step) or ()
        if item != "conversation"
    )
    for role in ("user", "assistant", "system"):
        text = templates.transcript.get(role)
        if text is None and quoted:
            yield f"transcript has no `{role}`, but a step uses {{transcript}}; say how such a turn looks"
        if text is not None and role != "system" and "{content}" not in text:
            yield f"transcript.{role} does not have {{content}}; put it where the turn's text belongs"


def _rule_problems(key: str, rules: Sequence[str]) -> Iterator[str]:
    for i, rule in enumerate(rules):
        try:
            matches_empty = re.match(rule, "")
        except (re.error, OverflowError, RecursionError) as e:
            yield f"{key}.{i}: {rule!r} is not a regular expression ({e}); correct it"
        else:
            if matches_empty:
                yield f"{key}.{i}: {rule!r} matches an empty text; say what has to be there"

"""What can be wrong with a template set."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from cai_ray.config.judge import JudgeConfig
from cai_ray.errors import InputError
from cai_ray.prompts.templates import FIELD, TemplateSet

# What each step is given: the fields it must ask with, and those it may also use. `{transcript}` every step has.
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
    """Raises InputError where a step would ask without what it is about, or with what it does not have."""
    fault = next(_faults(templates), None)
    if fault:
        raise InputError(f"template set {where}: {fault}; see cai_ray/templates/general.yaml")


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
    """Raises InputError where the set cannot ask for a revision without a critique."""
    if templates.direct is None:
        raise InputError(
            f"revise.critique=false: template set {templates.name} has no direct; add it (see "
            "cai_ray/templates/general.yaml), or leave revise.critique on"
        )


def _faults(templates: TemplateSet) -> Iterator[str]:
    quoted = False
    for step, (needed, optional) in _STEPS.items():
        items, found = getattr(templates, step), set()
        if items is None:  # a part that not everyone needs
            continue
        if not items:
            yield f"{step} is empty; list its messages"
        for i, item in enumerate(items):
            if item == "conversation":
                continue
            for key in ("role", "content"):
                if key not in item:
                    yield f"{step}.{i} lacks `{key}`; a message has `role` and `content`"
            if item["role"] not in ("system", "user", "assistant"):
                yield f"{step}.{i}: role {item['role']!r} is none of system, user, assistant"
            found |= set(FIELD.findall(item["content"]))
        for name in needed:
            if name not in found:
                yield f"{step} lacks {{{name}}}; put it in one of its messages"
        for name in sorted(found - {*needed, *optional, "transcript"}):
            yield f"{step} has no {{{name}}}; leave it out"
        if "conversation" not in items and (step == "answer" or "transcript" not in found):
            yield f"{step} lacks the item `conversation`" + (" or {transcript}" if step != "answer" else "")
        quoted |= "transcript" in found
    if templates.scores is not None and len(templates.scores) != 10:
        yield f"scores has {len(templates.scores)} texts; list ten, from the worst to the best"
    for role in ("user", "assistant", "system"):
        text = templates.transcript.get(role)
        if text is None and quoted:
            yield f"transcript lacks `{role}`, and a step quotes {{transcript}}; say how such a turn looks"
        if text is not None and role != "system" and "{content}" not in text:
            yield f"transcript.{role} lacks {{content}}"
    for key in ("prefixes", "critiques", "refusals", "reasons"):
        for i, rule in enumerate(getattr(templates, key)):
            try:
                everything = re.match(rule, "")
            except (re.error, OverflowError, RecursionError) as e:
                yield f"{key}.{i}: {rule!r} is no regular expression ({e}); mend it"
            else:
                if everything:
                    yield f"{key}.{i}: {rule!r} matches an empty text; say what has to stand there"

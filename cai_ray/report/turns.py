"""Turns of a conversation, as the page shows them: who says what, and how it differs from what was said before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cai_ray.report.roles import colour_of, in_order, title_of
from cai_ray.report.text import signed
from cai_ray.report.word_diff import Span, diff
from cai_ray.stages import POLICIES


class Passage(NamedTuple):
    speaker: str
    pieces: list[Span]
    style: str = ""
    """Class of the page's style."""
    note: str = ""


def prompt(item: Mapping[str, Any]) -> list[Passage]:
    """The messages that a policy answers."""
    return [
        _turn("prompt" if message["role"] == "user" else message["role"], message["content"])
        for message in item["messages"]
    ]


def revision(item: Mapping[str, Any]) -> list[Passage]:
    """The turns from a prompt to its last revision."""
    turns, before = [*prompt(item), _turn("first answer", item["response"])], item["response"]
    for step in item["steps"]:
        number, title = step["round"], step["title"]
        if step["critique"]:
            unused = ", cut off and not used" if step.get("critique_unused") else ""
            turns.append(_turn(f"critique {number}", step["critique"], "critique", note=title + unused))
        cut = ", cut off" if step.get("revision_cut") else ""
        if step["changed"]:
            pieces = diff(before, step["revision"])
            turns.append(Passage(f"revision {number}", pieces, "changed", note=title + cut))
        else:
            why = f": {step['left_out']}" if step.get("left_out") else ""
            turns.append(_turn(f"revision {number}", f"unchanged{why}", "same", note=title + cut))
        before = step["revision"]
    return turns


def comparison(item: Mapping[str, Any]) -> list[Passage]:
    """The two responses of a comparison with its votes; nothing if there is none."""
    pair = item.get("comparison")
    if not pair:
        return []
    votes = ", ".join(f"{vote['title']} {vote['p_a']:.2f}" for vote in pair["votes"])
    preferred = f"preferred with probability {pair['p_a']:.2f}"
    return [
        _turn("compared: A", pair["response_a"], note=preferred),
        Passage("compared: B", diff(pair["response_a"], pair["response_b"]), note=f"votes for A: {votes}"),
    ]


def final_answers(item: Mapping[str, Any]) -> list[Passage]:
    """What each policy answers after training, with its reward."""
    turns = []
    for policy in in_order(item["answers"]):
        answer = item["answers"][policy]
        reward = "" if answer["reward"] is None else f"reward {signed(answer['reward'])}"
        turns.append(_turn(title_of(policy), answer["text"], colour_of(policy), note=reward))
    return turns


def judged_answers(item: Mapping[str, Any]) -> list[Passage]:
    """What each policy answers to a held-out prompt and how it was judged, the later ones compared with the first."""
    turns: list[Passage] = []
    first: str | None = None
    for policy, answer in item["policies"].items():
        pieces = [Span(answer["text"])] if first is None else diff(first, answer["text"])
        first = answer["text"] if first is None else first
        style = policy if policy in POLICIES else "control"
        turns.append(Passage(title_of(policy), pieces, style, note=", ".join(_verdicts(answer))))
    return turns


def _verdicts(answer: Mapping[str, Any]) -> list[str]:
    verdicts = [name for name in ("harmful", "helpful", "refused", "evasive", "malformed") if answer[name]]
    if answer["principle_named"]:
        verdicts.append(f"names {answer['principle_named']}")
    if answer["reward"] is not None:
        verdicts.append(f"reward {signed(answer['reward'])}")
    return verdicts


def _turn(speaker: str, text: str | None, style: str = "", note: str = "") -> Passage:
    return Passage(speaker, [Span(text or "")], style, note)

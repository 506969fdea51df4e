"""The page's transcripts: a few from end to end, and a browser of many with filters (page.js)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cai_ray.report import turns
from cai_ray.report.turns import Passage

KINDS = {"revision": "critique and revision", "answer": "answers of the policies"}


class Entry(NamedTuple):
    """One conversation of the browser, with what the filters look at."""

    kind: str
    family: str
    principles: list[str]
    """Ids of those that changed an answer, or that an answer names."""
    outcome: str
    head: str
    turns: list[Passage]
    id: str


def transcripts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A few conversations from end to end, to what each policy says in the end."""
    return [
        {
            "head": item["messages"][-1]["content"][:120],
            "turns": [*turns.revision(item), *turns.final_answers(item), *turns.comparison(item)],
        }
        for item in report["transcripts"]
    ]


def section(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Filters and entries of revised prompts and of judged answers; None where a run has none."""
    sample = report.get("explorer") or {"revisions": [], "answers": [], "total": {}}
    entries = [_revision(item) for item in sample["revisions"]]
    entries += [_answers(item) for item in sample["answers"]]
    if not entries:
        return None
    return {
        "shown": {kind: len(sample[kind]) for kind in ("revisions", "answers")},
        "total": sample["total"],
        "filters": [
            {"name": "kind", "label": "All kinds", "options": KINDS},
            {"name": "family", "label": "All families", "options": _options(e.family for e in entries)},
            {
                "name": "principle",
                "label": "All principles",
                "options": {p["id"]: p["title"] for p in report["constitution"]["principles"]},
            },
            {"name": "outcome", "label": "All outcomes", "options": _options(e.outcome for e in entries)},
        ],
        "entries": entries,
    }


def _revision(item: Mapping[str, Any]) -> Entry:
    """A prompt with its first answer, critiques and revisions, and how two answers to it were compared."""
    conversation = turns.revision(item) + turns.comparison(item)
    return _entry(item, "revision", item["changed_by"], conversation, item["id"])


def _answers(item: Mapping[str, Any]) -> Entry:
    """A held-out prompt with what each policy answers."""
    named = {answer["principle_named"] for answer in item["policies"].values() if answer["principle_named"]}
    conversation = turns.prompt(item) + turns.judged_answers(item)
    return _entry(item, "answer", sorted(named), conversation, item["prompt_id"])


def _entry(
    item: Mapping[str, Any], kind: str, principles: list[str], conversation: list[Passage], id: str
) -> Entry:
    head = item["messages"][-1]["content"][:140]
    return Entry(kind, item["family"] or "", principles, item["outcome"], head, conversation, id)


def _options(values: Iterable[str]) -> dict[str, str]:
    """The different values of a filter, each shown as it is."""
    return {value: value for value in sorted(set(values)) if value}

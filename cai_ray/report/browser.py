"""The page's browser of transcripts: revised prompts and judged answers, with filters (page.js)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cai_ray.report.text import name_of, safe
from cai_ray.report.words import diff
from cai_ray.stages import POLICIES

KINDS = {"revision": "critique and revision", "answer": "answers of the policies"}


def section(report: Mapping[str, Any]) -> str:
    """Filters and entries; empty where a run has none."""
    found = report.get("explorer") or {"revisions": [], "answers": [], "total": {}}
    entries = [revision(entry) for entry in found["revisions"]] + [
        answer(entry) for entry in found["answers"]
    ]
    if not entries:
        return ""
    titles = {p["id"]: p["title"] for p in report["constitution"]["principles"]}
    everything = [*found["revisions"], *found["answers"]]
    filters = "".join(
        _select(name, label, values)
        for name, label, values in (
            ("kind", "All kinds", KINDS),
            ("family", "All families", _counted(e["family"] for e in everything)),
            ("principle", "All principles", titles),
            ("outcome", "All outcomes", _counted(e["outcome"] for e in everything)),
        )
    )
    total = found["total"]
    about = (
        f"A sample of {len(found['revisions']):,} of {total['revisions']:,.0f} revised prompts and of "
        f"{len(found['answers']):,} of {total['answers']:,.0f} prompts that the policies were judged on. "
        "What a revision takes out is struck through, what it puts in is underlined."
    )
    return (
        f'<p>{about}</p><form class="filters" role="search" hidden>{filters}'
        '<input type="search" name="text" placeholder="Search texts ( / )" aria-label="Search texts">'
        '<output aria-live="polite"></output></form>'
        f'<div class="entries">{"".join(entries)}</div><button type="button" class="more" hidden>Show more</button>'
    )


def revision(item: Mapping[str, Any]) -> str:
    """A prompt with its first answer, critiques and revisions, and how two answers to it were compared."""
    return _entry(item, "revision", " ".join(item["changed_by"]), revised(item) + compared(item), item["id"])


def revised(item: Mapping[str, Any]) -> list[str]:
    """The turns from a prompt to its last revision."""
    turns, before = [*_prompt(item), turn("first answer", safe(item["response"]))], item["response"]
    for step in item["steps"]:
        number, title = step["round"], step["title"]
        if step["critique"]:
            turns.append(turn(f"critique {number}", safe(step["critique"]), "critique", note=title))
        shown = diff(before, step["revision"]) if step["changed"] else "unchanged"
        turns.append(turn(f"revision {number}", shown, "changed" if step["changed"] else "same", note=title))
        before = step["revision"]
    return turns


def answer(item: Mapping[str, Any]) -> str:
    """A held-out prompt with what each policy answers, the later ones beside the first."""
    turns, first, named = _prompt(item), None, set()
    for model, said in item["policies"].items():
        marks = [name for name in ("harmful", "helpful", "refused", "evasive", "malformed") if said[name]]
        if said["principle_named"]:
            named.add(said["principle_named"])
            marks.append(f"names {said['principle_named']}")
        if said["reward"] is not None:
            marks.append(f"reward {said['reward']:+.2f}")
        body = safe(said["text"]) if first is None else diff(first, said["text"])
        first = said["text"] if first is None else first
        style = model if model in POLICIES else "control"
        turns.append(turn(name_of(model), body, style, note=", ".join(marks)))
    return _entry(item, "answer", " ".join(sorted(named)), turns, item["prompt_id"])


def compared(item: Mapping[str, Any]) -> list[str]:
    """The turns of a comparison, where there is one."""
    pair = item.get("comparison")
    if not pair:
        return []
    votes = ", ".join(f"{v['title']} {v['p_a']:.2f}" for v in pair["votes"])
    return [
        turn("compared: A", safe(pair["response_a"]), note=f"preferred with probability {pair['p_a']:.2f}"),
        turn("compared: B", diff(pair["response_a"], pair["response_b"]), note=f"votes for A: {votes}"),
    ]


def turn(who: str, body: str, style: str = "", note: str = "") -> str:
    """What somebody said; `body` is HTML."""
    above = f"<em>{safe(note)}</em>" if note else ""
    return f'<div class="turn {style}"><b>{safe(who)}</b><div dir="auto">{above}{body}</div></div>'


def _prompt(item: Mapping[str, Any]) -> list[str]:
    return [
        turn("prompt" if m["role"] == "user" else m["role"], safe(m["content"])) for m in item["messages"]
    ]


def _entry(item: Mapping[str, Any], kind: str, principles: str, turns: list[str], name: str) -> str:
    data = {"kind": kind, "family": item["family"] or "", "principle": principles, "outcome": item["outcome"]}
    marks = "".join(f' data-{key}="{safe(value)}"' for key, value in data.items())
    tags = "".join(f"<i>{safe(t)}</i>" for t in (item["family"], item["outcome"]) if t)
    head = safe(item["messages"][-1]["content"][:140])
    return (
        f'<details class="card entry"{marks}><summary>{head}{tags}</summary>'
        f'<div>{"".join(turns)}<p class="soft"><code>cai-ray explain RUN {safe(name)}</code></p></div></details>'
    )


def _counted(values: Iterable[str | None]) -> dict[str, str]:
    found = sorted({value for value in values if value})
    return {value: value for value in found}


def _select(name: str, label: str, values: Mapping[str, str]) -> str:
    options = "".join(
        f'<option value="{safe(value)}">{safe(shown)}</option>' for value, shown in values.items()
    )
    return f'<select name="{name}" aria-label="{label}"><option value="">{label}</option>{options}</select>'

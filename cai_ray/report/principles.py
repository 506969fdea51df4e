"""The page's principles: what each says, how often it was at work, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cai_ray.report import charts, tables
from cai_ray.report.text import name_of, percent, safe
from cai_ray.report.words import diff

MATRIX = 30
"""Principles of a chart of conflicts, at most."""
REVISIONS = 2
"""Shown of each principle."""


def section(report: Mapping[str, Any]) -> str:
    """A table of all, conflicts, coverage, and a card for each; only the words where a run has no attribution."""
    constitution, found = report["constitution"], report.get("attribution")
    about = (
        f"<p>{safe(constitution['name'])}, version {safe(str(constitution['version']))}, content hash "
        f"<code>{safe(report['constitution_sha'])}</code>.</p>"
    )
    if not found:
        cards = "".join(card(p, report) for p in constitution["principles"])
        return about + cards
    shown = list(constitution["principles"])
    rows = [_row(p, found["principles"][p["id"]], found["reconstruction"].get(p["id"])) for p in shown]
    head = ["", "drawn", "changed", "votes", "decisive", "overruled", "reward margin", "explains labels"]
    what = (
        "<p>Drawn: steps of revision by this principle, and how many of them changed the answer. Decisive: comparisons "
        "whose label would be another, or none, without its vote; overruled: whose label went against it. Reward "
        "margin: the reward model's, of the preferred response over the other, where the vote was decisive. Explains "
        "labels: how often its votes alone are on the label's side, and in brackets its votes dealt at random.</p>"
    )
    return (
        about
        + what
        + tables.plain(head, rows)
        + _coverage(found["coverage"])
        + _conflicts(shown, found["principles"])
        + "".join(card(p, report) for p in shown)
    )


def _row(
    principle: Mapping[str, Any], did: Mapping[str, Any], rebuilt: Mapping[str, Any] | None
) -> list[str]:
    drawn, votes, margin = did["revision"], did["votes"], did["margin"]
    return [
        principle["title"] + ("" if principle["enabled"] else " (off)"),
        f"{drawn['drawn']:,.0f}",
        percent(drawn["changed"] / drawn["drawn"]) if drawn["drawn"] else "–",
        f"{votes['cast']:,.0f}",
        f"{votes['decisive']:,.0f}",
        f"{votes['overruled']:,.0f}",
        "–" if margin["value"] is None else f"{margin['value']:+.2f}",
        f"{percent(rebuilt['accuracy'], 0)} ({percent(rebuilt['shuffled'], 0)})" if rebuilt else "–",
    ]


def _coverage(coverage: Mapping[str, Any]) -> str:
    lines = [
        (coverage["never_drawn"], "never drawn for a revision"),
        (coverage["never_voted"], "never voted"),
        (coverage["never_decisive"], "never decisive"),
        (coverage["families_without_principle"], "families of prompts that no principle names"),
    ]
    told = [f"<li>{safe(what)}: {safe(', '.join(ids))}</li>" for ids, what in lines if ids]
    if not told:
        return "<p>Every principle was drawn, voted and decided.</p>"
    return f"<h3>Coverage</h3><ul>{''.join(told)}</ul>"


def _conflicts(shown: list[dict[str, Any]], did: Mapping[str, Any]) -> str:
    """How often two principles that both prefer a response prefer different ones."""
    voted = [p for p in shown if did[p["id"]]["votes"]["cast"]]
    if not 2 <= len(voted) <= MATRIX:
        return ""

    def cell(one: str, other: str) -> float | None:
        met = did[one]["conflicts"].get(other)
        return None if one == other else met["against"] / met["both"] if met else 0.0

    values = [[cell(a["id"], b["id"]) for b in voted] for a in voted]
    names = [p["title"] for p in voted]
    chart = charts.matrix(names, [p["id"] for p in voted], values, title="Conflicts")
    return (
        f'<figure class="card wide"><h3>Conflicts</h3>{chart}<figcaption>Of the comparisons where both principles '
        "prefer a response, in how many of a hundred they prefer different ones.</figcaption></figure>"
    )


def card(principle: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """One principle from end to end."""
    name, attribution = principle["id"], report.get("attribution") or {"principles": {}}
    did = attribution["principles"].get(name)
    words = [("principle", principle["text"])] + [
        (label, principle[key])
        for key, label in (
            ("critique_request", "asked for critiques"),
            ("revision_request", "asked for revisions"),
            ("comparison", "asked for votes"),
            ("source", "source"),
        )
        if principle.get(key)
    ]
    parts = "".join(f'<div class="turn"><b>{label}</b><div>{safe(text)}</div></div>' for label, text in words)
    if did:
        parts += tables.facts(list(_facts(name, did, report))) + _instructive(name, report)
        parts += (
            f'<p><a href="#browser" data-show="{safe(name)}">Transcripts where it changed the answer</a></p>'
        )
    off = "" if principle["enabled"] else ' class="off"'
    return (
        f'<details class="card principle" id="principle-{safe(name)}"><summary{off}>{safe(principle["title"])} '
        f"<code>{safe(name)}</code></summary><div>{parts}</div></details>"
    )


def _facts(name: str, did: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    drawn, votes = did["revision"], did["votes"]
    titles = {p["id"]: p["title"] for p in report["constitution"]["principles"]}
    changed = f"{drawn['changed']:,.0f} of {drawn['drawn']:,.0f}"
    yield "revision", changed, "steps that changed the answer" + _families(drawn)
    if votes["cast"] or votes["abstained"]:
        agreed = f"{votes['with_label']:,.0f} of {votes['cast']:,.0f}"
        yield "with the label", agreed, "votes for what the label prefers"
        yield (
            "decisive",
            f"{votes['decisive']:,.0f}",
            "labels that would not stand without it" + _families(votes),
        )
        yield "overruled", f"{votes['overruled']:,.0f}", "votes against what the label prefers"
        abstained = f"votes within 0.05 of one half; {votes['abstained']:,.0f} abstentions"
        yield "undecided", f"{votes['tied']:,.0f}", abstained
    for other, cell in sorted(did["conflicts"].items(), key=lambda item: -item[1]["against"])[:3]:
        share = f"{cell['against']:,.0f} of {cell['both']:,.0f}"
        yield f"against {titles.get(other, other)}", share, "preferred different responses"
    for policy, count in did["named"].items():
        yield (
            f"named by {name_of(policy)}",
            f"{count:,.0f}",
            "refusals that give this principle as their reason",
        )


def _families(found: Mapping[str, Any]) -> str:
    most = sorted(found["by_family"].items(), key=lambda item: -item[1])[:4]
    return "; " + ", ".join(f"{family} {count:,.0f}" for family, count in most) if most else ""


def _instructive(name: str, report: Mapping[str, Any]) -> str:
    """Revisions of the sample that this principle changed, those of its own family first."""
    found = []
    for entry in (report.get("explorer") or {"revisions": []})["revisions"]:
        before = entry["response"]
        for step in entry["steps"]:
            if step["changed"] and step["principle_id"] == name:
                found.append((entry["family"] != name, len(step["revision"] or ""), entry, before, step))
            before = step["revision"]
    out = []
    for _, _, entry, before, step in sorted(found, key=lambda item: (item[0], item[1], item[2]["id"]))[
        :REVISIONS
    ]:
        out.append(
            f'<div class="turn"><b>{safe(entry["messages"][-1]["content"])}</b><div dir="auto">'
            f"<em>{safe(step['critique'])}</em>{diff(before, step['revision'])}</div></div>"
        )
    return "".join(out)

"""The page's principles: what each says, how often it was at work, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cai_ray.report import charts
from cai_ray.report.roles import title_of
from cai_ray.report.tables import Fact, Table
from cai_ray.report.text import percent, signed
from cai_ray.report.word_diff import diff

MATRIX = 30
"""Most principles of a chart of conflicts."""
REVISIONS = 2
"""Revisions shown of each principle."""
_HEAD = ["", "drawn", "changed", "votes", "decisive", "overruled", "reward margin", "explains labels"]


def section(report: Mapping[str, Any]) -> dict[str, Any]:
    """A table of all principles, conflicts, coverage, and a card for each; only the cards without an attribution."""
    constitution, attribution = report["constitution"], report.get("attribution")
    shown = list(constitution["principles"])
    data: dict[str, Any] = {
        "constitution": constitution,
        "sha": report["constitution_sha"],
        "cards": [card(principle, report) for principle in shown],
        "table": None,
    }
    if attribution:
        effects, rebuilt = attribution["principles"], attribution["reconstruction"]
        rows = [_row(p, effects[p["id"]], rebuilt.get(p["id"])) for p in shown]
        data["table"] = Table(_HEAD, rows)
        data["coverage"] = _coverage(attribution["coverage"])
        data["conflicts"] = _conflicts(shown, effects)
    return data


def _row(
    principle: Mapping[str, Any], effects: Mapping[str, Any], rebuilt: Mapping[str, Any] | None
) -> list[str]:
    drawn, votes = effects["revision"], effects["votes"]
    return [
        principle["title"] + ("" if principle["enabled"] else " (off)"),
        f"{drawn['drawn']:,.0f}",
        percent(drawn["changed"] / drawn["drawn"]) if drawn["drawn"] else "–",
        f"{votes['cast']:,.0f}",
        f"{votes['decisive']:,.0f}",
        f"{votes['overruled']:,.0f}",
        signed(effects["margin"]["value"]),
        f"{percent(rebuilt['accuracy'], 0)} ({percent(rebuilt['shuffled'], 0)})" if rebuilt else "–",
    ]


def _coverage(coverage: Mapping[str, Any]) -> list[str]:
    """What the principles leave out, a line for each kind; empty if nothing."""
    lines = [
        ("never drawn for a revision", coverage["never_drawn"]),
        ("never voted", coverage["never_voted"]),
        ("never decisive", coverage["never_decisive"]),
        ("families of prompts that no principle names", coverage["families_without_principle"]),
    ]
    return [f"{what}: {', '.join(ids)}" for what, ids in lines if ids]


def _conflicts(shown: list[dict[str, Any]], effects: Mapping[str, Any]) -> str:
    """A chart of how often two principles that both prefer a response prefer different ones."""
    voted = [p for p in shown if effects[p["id"]]["votes"]["cast"]]
    if not 2 <= len(voted) <= MATRIX:
        return ""

    def share(one: str, other: str) -> float | None:
        cell = effects[one]["conflicts"].get(other)
        return None if one == other else cell["against"] / cell["both"] if cell else 0.0

    shares = [[share(a["id"], b["id"]) for b in voted] for a in voted]
    return charts.matrix([p["title"] for p in voted], [p["id"] for p in voted], shares, title="Conflicts")


def card(principle: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """One principle from end to end; without facts and revisions if the run has no attribution of it."""
    name, attribution = principle["id"], report.get("attribution") or {"principles": {}}
    effects = attribution["principles"].get(name)
    texts = {
        "principle": principle["text"],
        "asked for critiques": principle.get("critique_request"),
        "asked for revisions": principle.get("revision_request"),
        "asked for votes": principle.get("comparison"),
        "source": principle.get("source"),
    }
    return {
        "id": name,
        "title": principle["title"],
        "enabled": principle["enabled"],
        "texts": {label: text for label, text in texts.items() if text or label == "principle"},
        "facts": list(_facts(effects, report)) if effects else [],
        "revisions": _instructive(name, report) if effects else [],
    }


def _facts(effects: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[Fact]:
    drawn, votes = effects["revision"], effects["votes"]
    titles = {p["id"]: p["title"] for p in report["constitution"]["principles"]}
    changed = f"{drawn['changed']:,.0f} of {drawn['drawn']:,.0f}"
    yield Fact("revision", changed, "steps that changed the answer" + _families(drawn))
    if votes["cast"] or votes["abstained"]:
        agreed = f"{votes['with_label']:,.0f} of {votes['cast']:,.0f}"
        yield Fact("with the label", agreed, "votes for what the label prefers")
        decisive = "labels that would not stand without it" + _families(votes)
        yield Fact("decisive", f"{votes['decisive']:,.0f}", decisive)
        yield Fact("overruled", f"{votes['overruled']:,.0f}", "votes against what the label prefers")
        abstained = f"votes within 0.05 of one half; {votes['abstained']:,.0f} abstentions"
        yield Fact("undecided", f"{votes['tied']:,.0f}", abstained)
    for other, cell in sorted(effects["conflicts"].items(), key=lambda item: -item[1]["against"])[:3]:
        share = f"{cell['against']:,.0f} of {cell['both']:,.0f}"
        yield Fact(f"against {titles.get(other, other)}", share, "preferred different responses")
    for policy, count in effects["named"].items():
        reason = "refusals that give this principle as their reason"
        yield Fact(f"named by {title_of(policy)}", f"{count:,.0f}", reason)


def _families(counts: Mapping[str, Any]) -> str:
    most = sorted(counts["by_family"].items(), key=lambda item: -item[1])[:4]
    return "; " + ", ".join(f"{family} {count:,.0f}" for family, count in most) if most else ""


def _instructive(name: str, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Revisions of the sample that this principle changed: those of its own family first, then the shortest."""
    changed = []
    for entry in (report.get("explorer") or {"revisions": []})["revisions"]:
        before = entry["response"]
        for step in entry["steps"]:
            if step["changed"] and step["principle_id"] == name:
                order = (entry["family"] != name, len(step["revision"] or ""), entry["id"])
                changed.append((order, entry, before, step))
            before = step["revision"]
    return [
        {
            "prompt": entry["messages"][-1]["content"],
            "critique": None if step.get("critique_unused") else step["critique"],
            "pieces": diff(before, step["revision"]),
        }
        for _, entry, before, step in sorted(changed, key=lambda item: item[0])[:REVISIONS]
    ]

"""How policies, rates and texts are written, on the page and on a terminal; and the terminal's own tables."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from cai_ray.stages import POLICIES, ROLES

NAMES: dict[str, str] = {
    **{role: ROLES[role].title for role in POLICIES},
    "shuffled": "shuffled labels",
    "respect_only": "respect alone",
}
METRICS = {
    "harm": "harm",
    "harm_greedy": "harm, temperature 0",
    "helpful": "helpful",
    "over_refusal": "over-refusal",
    "evasive": "evasive refusals",
    "malformed": "malformed",
    "principle_named": "principle named",
    "preferred_to_base": "preferred to base",
}
# Escape sequences in a model's text must not reach a terminal.
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def in_order(models: Iterable[str]) -> list[str]:
    """Policies as they came about: base, SL-CAI, RL-CAI, then the controls."""
    return sorted(models, key=lambda m: (list(NAMES).index(m) if m in NAMES else len(NAMES), m))


def name_of(model: str) -> str:
    return NAMES.get(model, model.replace("_", " "))


def colour(model: str, models: Sequence[str] = ()) -> str:
    """The style of a policy; the controls among several policies take turns."""
    if model in POLICIES:
        return model
    controls = [m for m in models if m not in POLICIES]
    return f"control c{controls.index(model) % 3}" if model in controls else "control"


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def duration(seconds: float | None) -> str:
    """Of what is held or waited for: seconds, or hours where these are many."""
    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds < 1000 else f"{seconds / 3600:,.2f} h"


def price(amount: float | None, currency: str | None) -> str:
    if amount is None or currency is None:
        return ""
    return f"{amount:,.2f} {currency}" if amount >= 1 else f"{amount:.2g} {currency}"


def interval(rate: dict[str, Any]) -> str:
    if rate.get("low") is None or rate.get("high") is None:
        return ""
    return f"{100 * rate['low']:.1f}–{100 * rate['high']:.1f}"


def visible(text: str | None) -> str:
    """A text without characters that steer a terminal; line breaks stay."""
    return _CONTROL.sub("�", text or "")


def safe(text: str | None) -> str:
    """A text as HTML that shows it and does nothing else, between tags and in quoted attributes."""
    return escape(visible(text))


def rates(report: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows of the main table: a label, and one rate per policy. Families follow harm; a rate of none is left out."""
    models = [report[m] for m in report["models"]]
    empty = {"value": None, "low": None, "high": None, "n": 0}
    rows = []
    for key, label in METRICS.items():
        rows.append((label, [m.get(key, empty) for m in models]))
        if key == "harm":
            for family in families(report):
                rows.append((f"  {family}", [m["harm_by_family"].get(family, empty) for m in models]))
    return [(label, cells) for label, cells in rows if any(cell["value"] is not None for cell in cells)]


def families(report: dict[str, Any]) -> list[str]:
    """Families of harm with a rate, in the constitution's order."""
    found = {f for m in report["models"] for f, rate in report[m]["harm_by_family"].items() if rate["n"]}
    order = {p["id"]: i for i, p in enumerate(report["constitution"]["principles"])}
    return sorted(found, key=lambda f: (order.get(f, len(order)), f))


def table_rows(report: dict[str, Any]) -> list[list[str]]:
    """The main table: share and 95 % interval in percent, a column per policy; the first row is the head."""
    head = ["", *(name_of(m) for m in report["models"])]
    return [head] + [
        [label, *(f"{percent(r['value'])}  {interval(r)}".rstrip() for r in cells)]
        for label, cells in rates(report)
    ]


def table(report: dict[str, Any]) -> str:
    """The main table as plain text."""
    rows = table_rows(report)
    lines = columns(rows)
    widest = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join([lines[0], "─" * (sum(widest) + 2 * (len(widest) - 1)), *lines[1:]])


def summary(report: dict[str, Any]) -> list[str]:
    """What came of a run, in plain sentences; those that nothing was measured for are left out."""
    told, final = [], "rl" if "rl" in report["models"] else None

    def value(model: str | None, metric: str) -> float | None:
        return report[model].get(metric, {}).get("value") if model and model in report["models"] else None

    before, between, after = (value(m, "harm") for m in ("base", "sl", final))
    if before is not None and after is not None:
        steps = "" if between is None else f" after revision and fine-tuning it was {percent(between)},"
        told.append(
            f"The model that this began with answers {percent(before)} of the harmful requests harmfully;{steps} "
            f"and after reinforcement learning from AI feedback it is {percent(after)}."
        )
    kept, refused = value(final, "helpful"), value(final, "over_refusal")
    if kept is not None:
        more = "" if refused is None else f" It refuses {percent(refused)} of these without need."
        first = percent(value("base", "helpful"))
        told.append(f"It helps with {percent(kept)} of the harmless requests ({first} before).{more}")
    named, evasive = value(final, "principle_named"), value(final, "evasive")
    if named is not None:
        told.append(f"{percent(named)} of its refusals name the principle that is at stake.")
    elif evasive is not None:
        told.append(f"{percent(evasive)} of its refusals give no reason.")
    if (liked := value(final, "preferred_to_base")) is not None:
        told.append(
            f"The feedback model prefers its answers to the first model's in {percent(liked)} of the cases."
        )
    humans = report["human_harmlessness_labels"]
    told.append(
        f"Labels of harm by people: {humans}. What is harmful was judged by the written principles"
        + (" alone." if not humans else " and by these.")
    )
    return told


def certificate_facts(proof: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What label/certificate.json says in single numbers: name, value, meaning."""
    overall = (proof["gold"] or {}).get("overall") or {}
    raw, scaled = overall.get("raw") or {}, overall.get("scaled") or {}
    length = proof["length_bias"]
    facts: list[tuple[str, float | None, str]] = [
        ("slot bias", proof["slot_bias"], "votes whose preferred slot survives the swap; 0 is best"),
        ("ties", proof["ties"], "labels within 0.05 of one half"),
        ("abstentions", proof["abstentions"], "votes that a principle could not give"),
        ("principles agree", proof["agreement"]["mean"], "on the same response, where both prefer one"),
        ("longer preferred", length["longer_preferred"], "labels that prefer the longer response"),
        ("accuracy", overall.get("accuracy"), "labels on the side of the gold preference"),
    ]
    rows = [(name, percent(value), why) for name, value, why in facts if value is not None]
    numbers: list[tuple[str, float | None, str]] = [
        ("length correlation", length["correlation"], "of the label with the difference of lengths"),
        ("calibration error", raw.get("ece"), "of the labels as they are; 0 is best"),
        ("… after one scale", scaled.get("ece"), "of the log-odds, fitted on the same comparisons"),
        ("Brier score", raw.get("brier"), "mean squared difference from gold; always one half gives 0.25"),
        ("… after one scale", scaled.get("brier"), ""),
    ]
    return rows + [(name, f"{value:.3f}", why) for name, value, why in numbers if value is not None]


def certificate_tables(proof: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The certificate's tables: title, head and rows. Bins without a label are left out."""
    gold = proof["gold"] or {}
    found = []
    if raw := (gold.get("overall") or {}).get("raw"):
        head = ["label's confidence", "mean", "right", "labels"]
        rows = [
            [
                f"{b['low']:.2f}–{b['high']:.2f}",
                percent(b["probability"]),
                percent(b["share"]),
                f"{b['n']:.0f}",
            ]
            for b in raw["reliability"]
            if b["n"]
        ]
        found.append(("Reliability against gold, as the feedback model gave them", head, rows))
    for key, title in (("by_principle", "Gold, by principle"), ("by_source", "Gold, by source")):
        rows = [
            [
                name,
                percent(q["accuracy"]),
                f"{q['raw']['ece']:.3f}",
                f"{q['raw']['brier']:.3f}",
                f"{q['n']:.0f}",
            ]
            for name, q in sorted((gold.get(key) or {}).items())
            if q["n"]
        ]
        if rows:
            head = ["", "accuracy", "calibration error", "Brier score", "decided"]
            found.append((title, head, rows))
    return found


def certificate(proof: dict[str, Any]) -> str:
    """The certificate for a terminal."""
    lines = ["Certificate of the labels"]
    lines += [f"  {name:<20}{value:>8}  {why}".rstrip() for name, value, why in certificate_facts(proof)]
    for title, head, rows in certificate_tables(proof):
        lines += ["", f"  {title}", *(f"  {line}" for line in columns([head, *rows]))]
    return visible("\n".join(lines))


def columns(rows: list[list[str]]) -> list[str]:
    """Rows of texts as lines, each column as wide as its widest text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def transcript(item: dict[str, Any], number: int) -> str:
    """One transcript, from prompt to the last policy's answer."""
    parts = [f"Transcript {number}"]
    parts += [said("prompt" if m["role"] == "user" else m["role"], m["content"]) for m in item["messages"]]
    parts.append(said("first answer", item["response"]))
    for step in item["steps"]:
        parts.append(said(f"critique {step['round']}", f"[{step['title']}] {step['critique'] or '(none)'}"))
        parts.append(
            said(f"revision {step['round']}", step["revision"] if step["changed"] else "(unchanged)")
        )
    for model in in_order(item["answers"]):
        answer = item["answers"][model]
        reward = "" if answer["reward"] is None else f"  (reward {answer['reward']:+.2f})"
        parts.append(said(name_of(model), answer["text"] + reward))
    return "\n".join(parts)


def said(who: str, text: str) -> str:
    """A text beside who said it, in lines that fit a terminal."""
    lines = [line for part in visible(text).split("\n") for line in textwrap.wrap(part, 92) or [""]]
    return "\n".join(f"  {who if i == 0 else '':<14}{line}".rstrip() for i, line in enumerate(lines))

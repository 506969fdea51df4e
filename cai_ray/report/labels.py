"""The page's quality of labels and reward model, and the labels' certificate."""

from __future__ import annotations

from typing import Any

from cai_ray.report import charts, tables
from cai_ray.report.text import certificate_facts, certificate_tables, percent, safe


def quality(report: dict[str, Any]) -> str:
    label, rm = report["label"], report["rm"]
    critic = (report.get("critic") or {}).get("all") or {}
    decided = "where the judge has a preference"
    known = [
        (
            "label accuracy",
            label.get("accuracy"),
            _percent,
            f"AI labels on the right side of one half, {decided}",
        ),
        (
            "calibration error",
            label.get("ece"),
            _three,
            "of the labels, after one scale fitted on development pairs",
        ),
        ("… raw", label.get("ece_raw"), _three, "as the feedback model gave them"),
        (
            "slot bias, decisive",
            label.get("slot_bias"),
            _percent,
            f"preferred slot survives a swap, {decided}",
        ),
        ("slot bias, all", label.get("slot_bias_all"), _percent, "over all votes"),
        (
            "critic's recall",
            (critic.get("recall") or {}).get("value"),
            _percent,
            "steps whose principle the answer broke that changed it, as the judge sees it",
        ),
        (
            "critic's precision",
            (critic.get("precision") or {}).get("value"),
            _percent,
            "steps that changed an answer which broke their principle",
        ),
        (
            "reward model, AI labels",
            rm.get("accuracy_ai"),
            _percent,
            "held-out pairs ordered as their AI labels",
        ),
        (
            "reward model, gold",
            rm.get("accuracy_gold"),
            _percent,
            "pairs of answers ordered as by the judge",
        ),
    ]
    rows = [(name, form(value), why) for name, value, form, why in known if value is not None]
    return tables.facts(rows) if rows else ""


def certificate(report: dict[str, Any]) -> str:
    proof = report["certificate"]
    if not proof:
        return ""
    parts = [tables.facts(certificate_facts(proof))]
    if cells := (((proof["gold"] or {}).get("overall") or {}).get("raw") or {}).get("reliability"):
        chart = charts.diagonal(
            [(c["probability"], c["share"], c["n"]) for c in cells if c["n"]],
            title="Calibration of the labels",
        )
        parts.append(
            f'<figure class="card small">{chart}<figcaption>Confidence of a label and how often it is right; on the '
            "line it is as right as it says.</figcaption></figure>"
        )
    for title, head, rows in certificate_tables(proof):
        parts.append(f"<h3>{safe(title)}</h3>{tables.plain(head, rows)}")
    return (
        "<p>What was measured of the labels before the reward model was trained on them "
        f"(<code>label/certificate.json</code>).</p>{''.join(parts)}"
    )


def _percent(value: float) -> str:
    return percent(value)


def _three(value: float) -> str:
    return f"{value:.3f}"

"""How good the labels and the reward model are: single numbers, and the certificate of the labels."""

from __future__ import annotations

from typing import Any

from cai_ray.report import charts
from cai_ray.report.tables import Fact, Table
from cai_ray.report.text import percent


def quality(report: dict[str, Any]) -> list[Fact]:
    """Labels, critic and reward model, as far as each was measured."""
    return [*_labels(report["label"]), *_critic(report.get("critic") or {}), *_reward_model(report["rm"])]


def _labels(label: dict[str, Any]) -> list[Fact]:
    decided = "where the judge has a preference"
    return [
        *_shares(
            ("label accuracy", label.get("accuracy"), f"AI labels on the right side of one half, {decided}")
        ),
        *_numbers(
            (
                "calibration error",
                label.get("ece"),
                "of the labels, after one scale fitted on development pairs",
            ),
            ("… raw", label.get("ece_raw"), "as the feedback model gave them"),
        ),
        *_shares(
            (
                "slot bias, decisive",
                label.get("slot_bias"),
                f"votes for the same slot after a swap, {decided}",
            ),
            ("slot bias, all", label.get("slot_bias_all"), "over all votes"),
        ),
    ]


def _critic(critic: dict[str, Any]) -> list[Fact]:
    rates = critic.get("all") or {}
    recall, precision = ((rates.get(name) or {}).get("value") for name in ("recall", "precision"))
    return _shares(
        (
            "critic's recall",
            recall,
            "of the steps whose principle the answer broke (by the judge), those that changed it",
        ),
        (
            "critic's precision",
            precision,
            "of the steps that changed an answer, those whose principle it broke",
        ),
    )


def _reward_model(rm: dict[str, Any]) -> list[Fact]:
    return _shares(
        ("reward model, AI labels", rm.get("accuracy_ai"), "held-out pairs ordered as their AI labels"),
        ("reward model, gold", rm.get("accuracy_gold"), "pairs of answers ordered as the judge orders them"),
    )


def certificate_section(report: dict[str, Any]) -> dict[str, Any] | None:
    """The page's certificate of the labels: facts, a calibration chart, and tables."""
    certificate = report["certificate"]
    if not certificate:
        return None
    bins = (((certificate["gold"] or {}).get("overall") or {}).get("raw") or {}).get("reliability") or []
    chart = charts.diagonal(
        [(b["probability"], b["share"], b["n"]) for b in bins if b["n"]], title="Calibration of the labels"
    )
    return {
        "facts": certificate_facts(certificate),
        "chart": chart,
        "tables": certificate_tables(certificate),
    }


def certificate_facts(certificate: dict[str, Any]) -> list[Fact]:
    """What label/certificate.json says in single numbers."""
    overall = (certificate["gold"] or {}).get("overall") or {}
    raw, scaled = overall.get("raw") or {}, overall.get("scaled") or {}
    length = certificate["length_bias"]
    return [
        *_shares(
            (
                "slot bias",
                certificate["slot_bias"],
                "votes for the same slot after the swap; 0 is best",
            ),
            ("ties", certificate["ties"], "labels within 0.05 of one half"),
            ("abstentions", certificate["abstentions"], "votes that a principle could not give"),
            (
                "principles agree",
                certificate["agreement"]["mean"],
                "pairs of votes for the same response, where both prefer one",
            ),
            ("longer preferred", length["longer_preferred"], "labels that prefer the longer response"),
            ("accuracy", overall.get("accuracy"), "labels on the side of the gold preference"),
        ),
        *_numbers(
            (
                "length correlation",
                length["correlation"],
                "of the label with the difference of lengths",
            ),
            ("calibration error", raw.get("ece"), "of the labels as they are; 0 is best"),
            (
                "… after one scale",
                scaled.get("ece"),
                "of the log-odds, fitted on the same comparisons",
            ),
            (
                "Brier score",
                raw.get("brier"),
                "mean squared difference from gold; always one half gives 0.25",
            ),
            ("… after one scale", scaled.get("brier"), ""),
        ),
    ]


def certificate_tables(certificate: dict[str, Any]) -> list[tuple[str, Table]]:
    """The certificate's tables with their titles. Bins and groups without a label are left out."""
    gold = certificate["gold"] or {}
    tables = []
    if raw := (gold.get("overall") or {}).get("raw"):
        bins = [
            [
                f"{b['low']:.2f}–{b['high']:.2f}",
                percent(b["probability"]),
                percent(b["share"]),
                f"{b['n']:.0f}",
            ]
            for b in raw["reliability"]
            if b["n"]
        ]
        title = "Reliability against gold, as the feedback model gave them"
        tables.append((title, Table(["label's confidence", "mean", "right", "labels"], bins)))
    for key, title in (("by_principle", "Gold, by principle"), ("by_source", "Gold, by source")):
        groups = [
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
        if groups:
            head = ["", "accuracy", "calibration error", "Brier score", "decided"]
            tables.append((title, Table(head, groups)))
    return tables


def _shares(*measured: tuple[str, float | None, str]) -> list[Fact]:
    return [Fact(name, percent(value), meaning) for name, value, meaning in measured if value is not None]


def _numbers(*measured: tuple[str, float | None, str]) -> list[Fact]:
    return [Fact(name, f"{value:.3f}", meaning) for name, value, meaning in measured if value is not None]

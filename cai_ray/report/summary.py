"""What came of a run, in plain sentences."""

from __future__ import annotations

from typing import Any

from cai_ray.report.text import percent
from cai_ray.stages import POLICIES


def summary(report: dict[str, Any]) -> list[str]:
    """The sentences of a report; those that nothing was measured for are left out."""
    sentences = [
        _harm(report),
        _helpfulness(report),
        _refusals(report),
        _preference(report),
        _human_labels(report),
        _reviser(report),
    ]
    return [sentence for sentence in sentences if sentence]


def _harm(report: dict[str, Any]) -> str:
    before, between, after = (_rate(report, policy, "harm") for policy in POLICIES)
    if before is None or after is None:
        return ""
    sl = "" if between is None else f" After revision and fine-tuning the share is {percent(between)}."
    return (
        f"The base model answers {percent(before)} of the harmful requests harmfully.{sl} "
        f"After training on AI feedback it is {percent(after)}."
    )


def _helpfulness(report: dict[str, Any]) -> str:
    helpful, over_refusal = _rate(report, "rl", "helpful"), _rate(report, "rl", "over_refusal")
    if helpful is None:
        return ""
    before = percent(_rate(report, "base", "helpful"))
    refuses = "" if over_refusal is None else f" It refuses {percent(over_refusal)} of them needlessly."
    return f"The trained policy helps with {percent(helpful)} of the harmless requests ({before} before).{refuses}"


def _refusals(report: dict[str, Any]) -> str:
    named, evasive = _rate(report, "rl", "principle_named"), _rate(report, "rl", "evasive")
    if named is not None:
        return f"{percent(named)} of its refusals name the principle that is at stake."
    return "" if evasive is None else f"{percent(evasive)} of its refusals give no reason."


def _preference(report: dict[str, Any]) -> str:
    preferred = _rate(report, "rl", "preferred_to_base")
    if preferred is None:
        return ""
    return f"The feedback model prefers its answers to the base model's in {percent(preferred)} of the cases."


def _human_labels(report: dict[str, Any]) -> str:
    count = report["human_harmlessness_labels"]
    judges = "the written principles and these labels" if count else "the written principles alone"
    return f"Human labels of harm: {count}. What is harmful was judged by {judges}."


def _reviser(report: dict[str, Any]) -> str:
    reviser = report.get("reviser")
    written_by_policy = reviser in (None, "base", report["model"])
    return "" if written_by_policy else f"Critiques and revisions were written by {reviser}."


def _rate(report: dict[str, Any], policy: str, metric: str) -> float | None:
    rates = report[policy] if policy in report["models"] else {}
    value: float | None = rates.get(metric, {}).get("value")
    return value

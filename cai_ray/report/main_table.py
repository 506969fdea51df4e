"""The report's main table: a row for each rate, a column for each policy."""

from __future__ import annotations

from typing import Any, NamedTuple

from cai_ray.report.roles import title_of
from cai_ray.report.text import interval, percent

METRICS = {
    "harm": "harm",
    "harm_greedy": "harm, temperature 0",
    "declined": "declines red-team prompts",
    "helpful": "helpful",
    "over_refusal": "over-refusal",
    "evasive": "evasive refusals",
    "malformed": "malformed",
    "principle_named": "principle named",
    "preferred_to_base": "preferred to base",
}
_NOT_MEASURED = {"value": None, "low": None, "high": None, "n": 0}


class Row(NamedTuple):
    label: str
    is_family: bool
    """A family of harm, which stands below the row for all harm."""
    rates: list[dict[str, Any]]
    """{value, low, high, n} of each policy."""


def rows(report: dict[str, Any]) -> list[Row]:
    """The rows that at least one policy has a value for. Families follow harm."""
    policies = [report[name] for name in report["models"]]
    every = []
    for metric, label in METRICS.items():
        every.append(Row(label, False, [policy.get(metric, _NOT_MEASURED) for policy in policies]))
        if metric == "harm":
            for family in families(report):
                rates = [policy["harm_by_family"].get(family, _NOT_MEASURED) for policy in policies]
                every.append(Row(family, True, rates))
    return [row for row in every if any(rate["value"] is not None for rate in row.rates)]


def families(report: dict[str, Any]) -> list[str]:
    """Families of harm with a rate, in the constitution's order."""
    policies = [report[name] for name in report["models"]]
    measured = {f for policy in policies for f, rate in policy["harm_by_family"].items() if rate["n"]}
    order = {p["id"]: i for i, p in enumerate(report["constitution"]["principles"])}
    return sorted(measured, key=lambda family: (order.get(family, len(order)), family))


def section(report: dict[str, Any]) -> dict[str, Any]:
    """The page's main table, whose cells have intervals beneath their values."""
    return {
        "seeds": len(report.get("seeds") or [0]),
        "policies": [title_of(policy) for policy in report["models"]],
        "rows": [
            {"label": row.label, "is_family": row.is_family, "cells": [_cell(rate) for rate in row.rates]}
            for row in rows(report)
        ],
    }


def _cell(rate: dict[str, Any]) -> dict[str, str]:
    seeds = ", ".join(percent(v) for v in rate.get("seeds") or [] if v is not None)
    about = f"n = {rate['n']}" + (f"; seeds: {seeds}" if "," in seeds else "")
    return {"value": percent(rate["value"]), "interval": interval(rate), "about": about}

"""The page's measures of policies beside the main table: both axes, families of harm, wording, published sets."""

from __future__ import annotations

from typing import Any

from cai_ray.report import charts, frontier, main_table
from cai_ray.report.roles import colour_of, title_of
from cai_ray.report.tables import Table
from cai_ray.report.text import interval, percent


def axes(report: dict[str, Any]) -> dict[str, Any] | None:
    """Policies on both axes, with PPO's snapshots if gold knows them; and their ratings."""
    points = [*_policies(report), *_snapshots(report)]
    ratings = _ratings(report)
    if not points and not ratings:
        return None
    chart = frontier.frontier(
        points, title="Helpful and harmless", x_label="helpful answers to benign prompts",
        y_label="harmless answers to harmful prompts", percent=True,
    )  # fmt: skip
    return {"chart": chart, "ratings": ratings}


def _policies(report: dict[str, Any]) -> list[frontier.Point]:
    points = []
    for policy in report["models"]:
        helpful, harm = report[policy]["helpful"], report[policy]["harm"]
        if helpful["value"] is None or harm["value"] is None:
            continue
        # The share of harmless answers is one minus that of harmful ones, so its bounds change places.
        low, high = (None if harm[bound] is None else 1 - harm[bound] for bound in ("high", "low"))
        style = colour_of(policy, report["models"])
        points.append(
            frontier.Point(
                title_of(policy), helpful["value"], 1 - harm["value"], helpful["low"], helpful["high"], low, high, style
            )
        )  # fmt: skip
    return points


def _snapshots(report: dict[str, Any]) -> list[frontier.Point]:
    return [
        frontier.Point(
            f"PPO, step {s['step']:g}", s["helpful"], 1 - s["harm"], None, None, None, None, "rl", "ppo"
        )
        for s in report["snapshots"]
        if s["harm"] is not None and s["helpful"] is not None
    ]


def _ratings(report: dict[str, Any]) -> Table | None:
    ratings = report.get("ratings")
    if not ratings:
        return None
    rows = [
        [title_of(policy), *(_rating(ratings[axis].get(policy)) for axis in ratings)]
        for policy in report["models"]
        if any(policy in ratings[axis] for axis in ratings)
    ]
    return Table(["", *ratings], rows)


def _rating(rating: dict[str, Any] | None) -> str:
    if rating is None:
        return "–"
    return f"{rating['value']:+.0f}  ({rating['low']:+.0f} to {rating['high']:+.0f})"


def by_family(report: dict[str, Any]) -> dict[str, Any] | None:
    """Harm of each policy in each family."""
    policies = report["models"]
    groups = []
    for family in main_table.families(report):
        bars = []
        for policy in policies:
            rate = report[policy]["harm_by_family"].get(family)
            if rate and rate["value"] is not None:
                style = colour_of(policy, policies)
                bars.append(charts.Bar(title_of(policy), rate["value"], rate["low"], rate["high"], style))
        groups.append((family, bars))
    if not groups:
        return None
    legend = [{"name": title_of(policy), "style": colour_of(policy, policies)} for policy in policies]
    return {"legend": legend, "chart": charts.bars(groups, title="Harm by family")}


def wording(report: dict[str, Any]) -> Table | None:
    """What the answers of a policy have in common, and how diverse they are."""
    measured = {policy: report.get("wording", {}).get(policy) for policy in report["models"]}
    rows = [
        [
            title_of(policy),
            percent(words["boilerplate"]),
            words["phrase"] or "–",
            f"{words['words']:.1f}",
            percent(words["unique"]),
            "–" if words["distinct_2"] is None else f"{words['distinct_2']:.3f}",
        ]
        for policy, words in measured.items()
        if words and words["words"] is not None
    ]
    head = ["", "share one phrase", "the phrase", "words", "said once", "distinct pairs of words"]
    return Table(head, rows) if rows else None


def sets(report: dict[str, Any]) -> Table | None:
    """Rates on published sets (docs/evaluation.md)."""
    rows = [
        [
            name,
            metric.replace("_", " "),
            title_of(policy),
            percent(rate["value"]),
            interval(rate),
            f"{rate['n']:.0f}"
            + (f", {odd} left out" if (odd := sum(measured.get("left_out", {}).values())) else ""),
        ]
        for name, measured in (report.get("sets") or {}).items()
        for policy, rates in measured["models"].items()
        for metric, rate in rates.items()
    ]
    return Table(["", "", "", "", "95%", "rows"], rows) if rows else None


def harness(report: dict[str, Any]) -> Table | None:
    """Tasks of lm-evaluation-harness: what training cost in capability."""
    by_policy = report.get("harness") or {}
    measured = {
        (task, metric)
        for tasks in by_policy.values()
        for task, metrics in tasks.items()
        for metric in metrics
    }
    rows = [
        [f"{task}, {metric}", *(_with_error(tasks.get(task, {}).get(metric)) for tasks in by_policy.values())]
        for task, metric in sorted(measured)
    ]
    return Table(["", *map(title_of, by_policy)], rows) if rows else None


def _with_error(measured: dict[str, Any] | None) -> str:
    if measured is None or measured["value"] is None:
        return "–"
    error = "" if measured["stderr"] is None else f" ± {measured['stderr']:.3f}"
    return f"{measured['value']:.3f}{error}"

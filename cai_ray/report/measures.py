"""The page's measures of policies beside the main table: both axes, wording, published sets, capability kept."""

from __future__ import annotations

from typing import Any

from cai_ray.report import charts, tables
from cai_ray.report.text import colour, interval, name_of, percent


def axes(report: dict[str, Any]) -> str:
    """Policies on both axes, with PPO's snapshots where gold knows them; and their ratings."""
    parts, points = [], []
    for model in report["models"]:
        x, y = report[model]["helpful"], report[model]["harm"]
        if x["value"] is not None and y["value"] is not None:
            # Of what is not harmful, the bounds change places.
            low, high = (None if y[k] is None else 1 - y[k] for k in ("high", "low"))
            points.append(
                charts.Point(
                    name_of(model), x["value"], 1 - y["value"], x["low"], x["high"], low, high,
                    colour(model, report["models"]),
                )
            )  # fmt: skip
    for shot in report["snapshots"]:
        if shot["harm"] is not None and shot["helpful"] is not None:
            name = f"PPO, step {shot['step']:g}"
            points.append(
                charts.Point(name, shot["helpful"], 1 - shot["harm"], None, None, None, None, "rl", "ppo")
            )
    if points:
        chart = charts.frontier(
            points, title="Helpful and harmless", x_label="helpful answers to benign prompts",
            y_label="harmless answers to harmful prompts",
            percent=True,
        )  # fmt: skip
        parts.append(
            f'<figure class="card wide">{chart}<figcaption>Up and to the right is better.</figcaption></figure>'
        )
    if found := report.get("ratings"):
        rows = [
            [name_of(m), *(_points(found[axis].get(m)) for axis in found)]
            for m in report["models"]
            if any(m in found[axis] for axis in found)
        ]
        parts.append(
            "<p>Every two policies compared on every prompt: points of a Bradley-Terry model on the Elo scale above "
            "the base model (400 points are odds of ten to one), with 95 % intervals over prompts.</p>"
            + tables.plain(["", *found], rows)
        )
    return "".join(parts)


def _points(rating: dict[str, Any] | None) -> str:
    return (
        "–" if rating is None else f"{rating['value']:+.0f}  ({rating['low']:+.0f} to {rating['high']:+.0f})"
    )


def wording(report: dict[str, Any]) -> str:
    """What policies' answers have in common, and how diverse they are."""
    found = {m: report.get("wording", {}).get(m) for m in report["models"]}
    rows = [
        [
            name_of(model),
            percent(said["boilerplate"]),
            said["phrase"] or "–",
            f"{said['words']:.1f}",
            percent(said["unique"]),
            "–" if said["distinct_2"] is None else f"{said['distinct_2']:.3f}",
        ]
        for model, said in found.items()
        if said and said["words"] is not None
    ]
    if not rows:
        return ""
    head = ["", "share one phrase", "the phrase", "words", "said once", "distinct pairs of words"]
    return tables.plain(head, rows)


def sets(report: dict[str, Any]) -> str:
    """Rates on published sets (docs/evaluation.md)."""
    rows = []
    for name, found in (report.get("sets") or {}).items():
        for model, rates in found["models"].items():
            for metric, rate in rates.items():
                rows.append(
                    [
                        name,
                        metric.replace("_", " "),
                        name_of(model),
                        percent(rate["value"]),
                        interval(rate),
                        f"{rate['n']:.0f}",
                    ]
                )
    return tables.plain(["", "", "", "", "95 %", "rows"], rows) if rows else ""


def harness(report: dict[str, Any]) -> str:
    """Tasks of lm-evaluation-harness: what training cost in capability."""
    found = report.get("harness") or {}
    cells = {
        (task, metric) for tasks in found.values() for task, metrics in tasks.items() for metric in metrics
    }
    rows = []
    for task, metric in sorted(cells):
        values = [found[m].get(task, {}).get(metric) for m in found]
        rows.append([f"{task}, {metric}", *(_with_error(value) for value in values)])
    return tables.plain(["", *map(name_of, found)], rows) if rows else ""


def _with_error(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["value"] is None:
        return "–"
    return f"{cell['value']:.3f}" + ("" if cell["stderr"] is None else f" ± {cell['stderr']:.3f}")

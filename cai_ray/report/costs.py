"""What the run cost: each stage, an accepted label, and an accepted revision."""

from __future__ import annotations

from typing import Any

from cai_ray.cluster import cost as cluster_cost
from cai_ray.cluster.cost import Spent
from cai_ray.judging.certificate import is_tie
from cai_ray.report.roles import MEASURED
from cai_ray.report.tables import Table
from cai_ray.report.text import duration, price, token_counts
from cai_ray.stages import has_stage
from cai_ray.storage.run import Run

ACCEPTED = {
    "label": "An accepted label (no error, so that a principle at least has voted, and no tie)",
    "revision": "An accepted revision (of a red-team prompt, without an error)",
}
_KINDS = ("wall_seconds", "cpu_seconds", "gpu_seconds")


def read(run: Run) -> dict[str, Any]:
    """The run's cost as it stands in report.json.

    Returns:
        currency (None without prices); stages: name to wall_seconds, cpu_seconds, gpu_seconds, money and endpoint
        (tokens by kind); set_aside: the same for attempts whose result is not in the run any more; total: all of it;
        label and revision: how many were accepted, and what one took of its stage: the same, and tokens. None if it is
        not known.
    """
    prices, names = run.config.prices, [name for name in MEASURED if has_stage(run.config.method, name)]
    manifests = {name: manifest for name in names if (manifest := run.manifest(name))}
    by_stage = cluster_cost.by_stage(run, manifests)
    current = {manifest["id"] for manifest in manifests.values() if "id" in manifest}
    outdated = [attempt for attempt in cluster_cost.attempts(run) if attempt.made not in current]
    aside = [_row(attempt.spent, attempt.stage, prices) for attempt in outdated]
    stages = {name: _row(spent, name, prices) for name, spent in by_stage.items()}
    return {
        "currency": prices.currency if prices else None,
        "stages": stages,
        "set_aside": _sum(aside),
        "total": _sum([*stages.values(), *aside]),
        "label": _each(manifests.get("label"), stages.get("label"), _labels(run)),
        "revision": _each(manifests.get("revise"), stages.get("revise"), _revisions(run)),
    }


def _row(spent: Spent, stage: str, prices: Any) -> dict[str, Any]:
    numbers: dict[str, Any] = {kind: getattr(spent, kind) for kind in _KINDS}
    return {
        **numbers,
        "endpoint": spent.endpoint._asdict(),
        "money": cluster_cost.money(spent, stage, prices),
    }


def _sum(rows: list[dict[str, Any]]) -> dict[str, Any]:
    summed: dict[str, Any] = {kind: sum(row[kind] for row in rows) for kind in _KINDS}
    summed["endpoint"] = {
        kind: sum(row["endpoint"][kind] for row in rows)
        for kind in ("prompt", "cached", "generated", "calls")
    }
    amounts = [row["money"] for row in rows if row["money"] is not None]
    return {**summed, "money": sum(amounts) if amounts else None}


def _each(
    manifest: dict[str, Any] | None, stage: dict[str, Any] | None, accepted: int
) -> dict[str, Any] | None:
    if manifest is None or not accepted or not manifest.get("tokens"):
        return None
    spent = stage or {"wall_seconds": manifest["seconds"]}
    count = sum(manifest["tokens"].get(kind, 0) for kind in ("prompt", "generated"))
    kinds = (*_KINDS, "money")
    each = {kind: spent[kind] / accepted if spent.get(kind) is not None else None for kind in kinds}
    return {"accepted": accepted, **each, "tokens": count / accepted}


def _labels(run: Run) -> int:
    if run.manifest("label") is None:
        return 0
    rows = run.each_row("label", ["p_a_raw", "error"])
    return sum(row["error"] is None and not is_tie(row["p_a_raw"]) for row in rows)


def _revisions(run: Run) -> int:
    if run.manifest("revise") is None:
        return 0
    rows = run.each_row("revise", ["kind", "error"])
    return sum(row["error"] is None and row["kind"] == "red_team" for row in rows)


def section(report: dict[str, Any]) -> dict[str, Any] | None:
    """The page's part: a table, and what one label and one revision took."""
    cost = report["cost"]
    if not report["stages"]:
        return None
    rows = [_cells(name, report["stages"].get(name, {}), cost) for name in _names(report)]
    if cost["set_aside"]["wall_seconds"]:
        rows.append(["set aside", *_numbers(cost["set_aside"], cost), "", ""])
    total = cost["total"]
    if not total["wall_seconds"]:  # no attempt left a record: manifests alone tell the time
        total = {"wall_seconds": sum(stage["seconds"] for stage in report["stages"].values())}
    rows.append(["all", *_numbers(total, cost), "", ""])
    head = ["", "wall time", "CPU", "GPU", "money", "rows", "tokens"]
    used = [i for i in range(len(head)) if i < 2 or any(row[i] for row in rows)]
    table = Table([head[i] for i in used], [[row[i] for i in used] for row in rows])
    return {"table": table, "sentences": [s for name in ACCEPTED if (s := _sentence(name, cost))]}


def side_by_side(a: dict[str, Any], b: dict[str, Any]) -> list[list[str]]:
    """Two runs' stages and sums, each cell of both; empty if neither has records."""
    rows = []
    for name in [n for n in MEASURED if n in a["stages"] or n in b["stages"]] + ["all"]:
        both = [cost["total"] if name == "all" else cost["stages"].get(name, {}) for cost in (a, b)]
        cells = [_numbers(spent, cost) for spent, cost in zip(both, (a, b), strict=True)]
        pairs = zip(*cells, strict=True)
        rows.append([name, *(", ".join(x or "–" for x in pair) if any(pair) else "" for pair in pairs)])
    return rows if len(rows) > 1 else []


def _names(report: dict[str, Any]) -> list[str]:
    """Stages with a manifest or a record, in their order, which JSON does not keep."""
    recorded = report["cost"]["stages"]
    return [name for name in MEASURED if name in report["stages"] or name in recorded]


def _cells(name: str, stage: dict[str, Any], cost: dict[str, Any]) -> list[str]:
    spent = cost["stages"].get(name) or {"wall_seconds": stage["seconds"]}
    rows = stage.get("rows_out")
    count = "" if rows is None else f"{rows:,.0f}"
    return [name, *_numbers(spent, cost), count, token_counts(stage.get("tokens"))]


def _numbers(spent: dict[str, Any], cost: dict[str, Any]) -> list[str]:
    times = [duration(spent.get(f"{kind}_seconds")) for kind in ("wall", "cpu", "gpu")]
    if not cost["total"]["gpu_seconds"]:
        times[2] = ""
    return [*times, price(spent.get("money"), cost["currency"])]


def _sentence(name: str, cost: dict[str, Any]) -> str:
    one = cost[name]
    if one is None:
        return ""
    parts = [f"{one['wall_seconds']:.3g} s"]
    for kind in ("cpu", "gpu"):
        if one[f"{kind}_seconds"]:
            parts.append(f"{one[f'{kind}_seconds']:.3g} s of a {kind.upper()}")
    parts.append(f"{one['tokens']:,.0f} tokens")
    parts += [text for text in [price(one["money"], cost["currency"])] if text]
    return f"{ACCEPTED[name]} took {', '.join(parts)}; there are {one['accepted']:,.0f}."

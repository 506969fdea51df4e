"""What the run cost, stage by stage, and what an accepted label and an accepted revision did."""

from __future__ import annotations

from typing import Any

from cai_ray.cluster import cost
from cai_ray.cluster.cost import Spent
from cai_ray.judging.certificate import is_tie
from cai_ray.report import tables
from cai_ray.report.text import duration, price
from cai_ray.stages import has_stage, stages_that
from cai_ray.storage.run import Run

ACCEPTED = {
    "label": "An accepted label (no error, so that a principle at least has voted, and no tie)",
    "revision": "An accepted revision (of a red-team prompt, without an error)",
}


def read(run: Run) -> dict[str, Any]:
    """For report.json.

    Returns:
        currency (None without prices); stages: name to wall_seconds, cpu_seconds, gpu_seconds, money and endpoint
        (tokens by kind); set_aside: the same of attempts that nothing here was made by; total: all of it; label and
        revision: how many were accepted, and what one took of its stage: the four, and tokens. None where it is not
        known.
    """
    prices, names = run.config.prices, [name for name in measured() if has_stage(run.config.method, name)]
    manifests = {name: found for name in names if (found := run.manifest(name))}
    by_stage = cost.by_stage(run, manifests)
    made = {manifest["id"] for manifest in manifests.values() if "id" in manifest}
    rest = [a for a in cost.attempts(run) if a.made not in made]
    aside = [_row(a.spent, a.stage, prices) for a in rest]
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
    held = ("wall_seconds", "cpu_seconds", "gpu_seconds")
    numbers: dict[str, Any] = {name: getattr(spent, name) for name in held}
    return {**numbers, "endpoint": spent.endpoint._asdict(), "money": cost.money(spent, stage, prices)}


def _sum(rows: list[dict[str, Any]]) -> dict[str, Any]:
    summed: dict[str, Any] = {
        name: sum(row[name] for row in rows) for name in ("wall_seconds", "cpu_seconds", "gpu_seconds")
    }
    summed["endpoint"] = {
        kind: sum(row["endpoint"][kind] for row in rows)
        for kind in ("prompt", "cached", "generated", "calls")
    }
    known = [row["money"] for row in rows if row["money"] is not None]
    return {**summed, "money": sum(known) if known else None}


def _each(
    manifest: dict[str, Any] | None, stage: dict[str, Any] | None, accepted: int
) -> dict[str, Any] | None:
    if manifest is None or not accepted or not manifest.get("tokens"):
        return None
    held = stage or {"wall_seconds": manifest["seconds"]}
    tokens = sum(manifest["tokens"].get(kind, 0) for kind in ("prompt", "generated"))
    names = ("wall_seconds", "cpu_seconds", "gpu_seconds", "money")
    each = {name: held[name] / accepted if held.get(name) is not None else None for name in names}
    return {"accepted": accepted, **each, "tokens": tokens / accepted}


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


def section(report: dict[str, Any]) -> str:
    """The page's part: a table, and what one label and one revision took."""
    found = report["cost"]
    if not report["stages"]:
        return ""
    rows = [_cells(name, report["stages"].get(name, {}), found) for name in _names(report)]
    if found["set_aside"]["wall_seconds"]:
        rows.append(["set aside", *_numbers(found["set_aside"], found), "", ""])
    rows.append(["all", *_numbers(found["total"], found), "", ""])
    if not found["total"]["wall_seconds"]:  # made before there were such records
        seconds = sum(stage["seconds"] for stage in report["stages"].values())
        rows[-1] = ["all", duration(seconds), "", "", "", "", ""]
    head = ["", "wall time", "CPU", "GPU", "money", "rows", "tokens"]
    keep = [i for i, _ in enumerate(head) if i < 2 or any(row[i] for row in rows)]
    table = tables.plain([head[i] for i in keep], [[row[i] for i in keep] for row in rows])
    return (
        table
        + "<p>CPU and GPU time is that for which engines and training workers held them, over all attempts. Set aside "
        "is what led to nothing that is here now: stages that were made again or given up.</p>"
        + "".join(_sentence(name, found) for name in ACCEPTED)
    )


def measured() -> list[str]:
    """The stages that a report says something about, of both methods: all but the report itself."""
    return stages_that("generates", "trains")


def side_by_side(a: dict[str, Any], b: dict[str, Any]) -> list[list[str]]:
    """Two runs' stages and sums, each cell of both; nothing where neither has records."""
    rows = []
    for name in [n for n in measured() if n in a["stages"] or n in b["stages"]] + ["all"]:
        both = [found["total"] if name == "all" else found["stages"].get(name, {}) for found in (a, b)]
        cells = [_numbers(held, found) for held, found in zip(both, (a, b), strict=True)]
        pairs = zip(*cells, strict=True)
        rows.append([name, *(", ".join(x or "–" for x in pair) if any(pair) else "" for pair in pairs)])
    return rows if len(rows) > 1 else []


def _names(report: dict[str, Any]) -> list[str]:
    held = report["cost"]["stages"]
    return [n for n in measured() if n in report["stages"] or n in held]  # JSON keeps no order


def _cells(name: str, stage: dict[str, Any], found: dict[str, Any]) -> list[str]:
    held = found["stages"].get(name) or {"wall_seconds": stage["seconds"]}
    rows = stage.get("rows_out")
    count = "" if rows is None else f"{rows:,.0f}"
    return [name, *_numbers(held, found), count, tables.tokens(stage.get("tokens"))]


def _numbers(held: dict[str, Any], found: dict[str, Any]) -> list[str]:
    times = [duration(held.get(f"{kind}_seconds")) for kind in ("wall", "cpu", "gpu")]
    if not found["total"]["gpu_seconds"]:
        times[2] = ""
    return [*times, price(held.get("money"), found["currency"])]


def _sentence(name: str, found: dict[str, Any]) -> str:
    one = found[name]
    if one is None:
        return ""
    parts = [f"{one['wall_seconds']:.3g} s"]
    for kind in ("cpu", "gpu"):
        if one[f"{kind}_seconds"]:
            parts.append(f"{one[f'{kind}_seconds']:.3g} s of a {kind.upper()}")
    parts.append(f"{one['tokens']:,.0f} tokens")
    parts += [text for text in [price(one["money"], found["currency"])] if text]
    return f"<p>{ACCEPTED[name]} took {', '.join(parts)}; there are {one['accepted']:,.0f}.</p>"

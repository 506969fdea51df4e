"""The snapshots of PPO: reward, second opinion and gold, over the distance from SL-CAI.

If reward rises while the others fall, the policy learns the reward and not what it stands for (Gao et al. 2022, arXiv
2210.10760, whose axis is the root of the KL).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cai_ray.report import charts
from cai_ray.report.tables import Table
from cai_ray.report.text import percent, signed
from cai_ray.storage.run import Run

GOLD = ("harm", "helpful", "over_refusal")


def read(run: Run, steps: Sequence[Mapping[str, Any]], gold: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry per snapshot, with None for gold that is not measured. Empty if PPO took none.

    Args:
        steps: PPO's metrics.
        gold: the exact judge's rates for each step, which is a text (`evaluate.gold.snapshots`).
    """
    if not run.config.watched:
        return []
    kl = {step["step"]: max(step.get("kl/reference") or 0.0, 0.0) for step in steps}
    rows_of_step: dict[int, list[dict[str, Any]]] = {}
    for row in run.rows("ppo", ["id", "step", "reward", "opinion"], "snapshot"):
        rows_of_step.setdefault(row["step"], []).append(row)
    chosen = (run.manifest("ppo") or {}).get("snapshot")
    return [
        {
            "step": step,
            "sqrt_kl": math.sqrt(kl.get(step, 0.0)),
            "reward": _mean([r["reward"] for r in rows]),
            "opinion": _mean([r["opinion"] for r in rows if r["opinion"] is not None]),
            "chosen": float(step == chosen),
            **{name: (gold.get(str(step)) or {}).get(name, {}).get("value") for name in GOLD},
        }
        for step, rows in sorted(rows_of_step.items())
    ]


def section(snapshots: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The table, and the curves over the distance from SL-CAI."""
    if not snapshots:
        return None
    return {"table": _table(snapshots), "proxy": _proxy(snapshots), "judged": _judged(snapshots)}


def _table(snapshots: Sequence[Mapping[str, Any]]) -> Table:
    measured = [name for name in GOLD if snapshots[0][name] is not None]
    head = ["step", "√KL", "reward", "second opinion", *(f"{n.replace('_', '-')} (gold)" for n in measured)]
    rows = [
        [
            f"{s['step']:g}" + (" (the result)" if s["chosen"] == 1 else ""),
            f"{s['sqrt_kl']:.2f}",
            signed(s["reward"]),
            "–" if s["opinion"] is None else f"{s['opinion']:.3f}",
            *(percent(s[name]) for name in measured),
        ]
        for s in snapshots
    ]
    return Table(head, rows)


def _proxy(snapshots: Sequence[Mapping[str, Any]]) -> str:
    reward = _line(snapshots, "reward", "rl", "reward at √KL")
    return charts.lines([reward], title="Reward over the root of the KL")


def _judged(snapshots: Sequence[Mapping[str, Any]]) -> str:
    return charts.lines(
        [
            _line(snapshots, "opinion", "sl", "second opinion at √KL"),
            _line(snapshots, "harm", "control", "harm (gold) at √KL"),
        ],
        title="Second opinion and gold over the root of the KL",
        percent=True,
        low=0.0,
    )


def _line(snapshots: Sequence[Mapping[str, Any]], key: str, style: str, name: str) -> charts.Line:
    by_distance = sorted(snapshots, key=lambda s: s["sqrt_kl"])
    return charts.Line([(s["sqrt_kl"], s[key]) for s in by_distance if s[key] is not None], style, name)


def overoptimised(snapshots: Sequence[Mapping[str, Any]], bound: float = 0.05) -> list[str]:
    """The first snapshot at which reward had risen further but gold had fallen, as a line; empty if there is none."""
    judged = [s for s in snapshots if s["harm"] is not None]
    if not judged:
        return []
    best = min(judged, key=lambda s: s["harm"])
    later = [s for s in judged if s["step"] > best["step"]]
    diverged = [s for s in later if s["reward"] > best["reward"] and s["harm"] > best["harm"] + bound]
    return [
        f"proxy and gold part at step {s['step']:g} (√KL {s['sqrt_kl']:.2f}): reward {best['reward']:+.2f} → "
        f"{s['reward']:+.2f}, harm {percent(best['harm'])} → {percent(s['harm'])}"
        for s in diverged[:1]
    ]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

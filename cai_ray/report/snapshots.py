"""The snapshots of PPO: the reward it trained on, the second opinion, and gold, over the distance from SL-CAI.

Where reward rises and the others fall, the policy learns the reward and not what it stands for (Gao et al. 2022, arXiv
2210.10760, whose axis is the root of the KL).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cai_ray.report import charts, tables
from cai_ray.report.text import percent
from cai_ray.storage.run import Run

GOLD = ("harm", "helpful", "over_refusal")


def read(run: Run, steps: Sequence[Mapping[str, Any]], gold: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry per snapshot; gold is None where nobody knows it. Empty where PPO took none.

    Args:
        steps: PPO's metrics.
        gold: of each step (as text), the exact judge's rates (`evaluate.gold.snapshots`).
    """
    if not run.config.watched:
        return []
    kl = {step["step"]: max(step.get("kl/reference") or 0.0, 0.0) for step in steps}
    found: dict[int, list[dict[str, Any]]] = {}
    for row in run.rows("ppo", ["id", "step", "reward", "opinion"], "snapshot"):
        found.setdefault(row["step"], []).append(row)
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
        for step, rows in sorted(found.items())
    ]


def section(snapshots: Sequence[Mapping[str, Any]]) -> str:
    """The table, and the curves where gold is known."""
    if not snapshots:
        return ""
    names = [n for n in GOLD if snapshots[0][n] is not None]
    head = ["step", "√KL", "reward", "second opinion", *(f"{n.replace('_', '-')} (gold)" for n in names)]
    rows = [
        [
            f"{s['step']:g}" + (" (the result)" if s["chosen"] == 1 else ""),
            f"{s['sqrt_kl']:.2f}",
            f"{s['reward']:+.2f}",
            "–" if s["opinion"] is None else f"{s['opinion']:.3f}",
            *(percent(s[n]) for n in names),
        ]
        for s in snapshots
    ]
    distance = sorted(snapshots, key=lambda s: s["sqrt_kl"])

    def curve(key: str, style: str, name: str) -> charts.Line:
        return charts.Line([(s["sqrt_kl"], s[key]) for s in distance if s[key] is not None], style, name)

    proxy = charts.lines([curve("reward", "rl", "reward at √KL")], title="Reward over the root of the KL")
    judged = charts.lines(
        [curve("opinion", "sl", "second opinion at √KL"), curve("harm", "control", "harm (gold) at √KL")],
        title="Second opinion and gold over the root of the KL",
        percent=True,
        low=0.0,
    )
    figures = "".join(
        f'<figure class="card">{chart}<figcaption>{caption}</figcaption></figure>'
        for chart, caption in (
            (proxy, "The proxy: reward, over √KL to SL-CAI"),
            (
                judged,
                "What it stands for, over √KL: second opinion (blue) and, where it is known, harm by gold",
            ),
        )
    )
    return (
        "<p>The policy on development prompts, every few steps. The second opinion is not what PPO trains on. Where "
        f"reward rises and the opinion falls, the policy learns the reward alone.</p>{tables.plain(head, rows)}"
        f'<div class="grid-2">{figures}</div>'
    )


def parted(snapshots: Sequence[Mapping[str, Any]], bound: float = 0.05) -> list[str]:
    """Where the reward went on rising and gold fell: the policy learned the reward, and not what it stands for."""
    known = [s for s in snapshots if s["harm"] is not None]
    if not known:
        return []
    best = min(known, key=lambda s: s["harm"])
    later = [s for s in known if s["step"] > best["step"]]
    apart = [s for s in later if s["reward"] > best["reward"] and s["harm"] > best["harm"] + bound]
    return [
        f"proxy and gold part at step {s['step']:g} (√KL {s['sqrt_kl']:.2f}): reward {best['reward']:+.2f} → "
        f"{s['reward']:+.2f}, harm {percent(best['harm'])} → {percent(s['harm'])}"
        for s in apart[:1]
    ]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

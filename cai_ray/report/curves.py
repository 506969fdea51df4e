"""The page's curves: harm over rounds of revision, and the metrics of reinforcement learning or DPO over steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cai_ray.report import charts


class Curve(NamedTuple):
    title: str
    meaning: str
    from_zero: bool = False
    """The vertical axis begins at zero."""


PPO = {
    "reward/mean": Curve("Reward", "mean score of a step's answers"),
    "kl/reference": Curve("KL to SL-CAI", "nats, against the reference policy", from_zero=True),
    "rollout/entropy": Curve("Entropy", "nats a token, of sampled answers", from_zero=True),
    "rollout/length": Curve("Length", "tokens of an answer", from_zero=True),
    "rollout/eos_rate": Curve("Ended by itself", "share of answers within the length limit"),
    "rollout/logprob_gap": Curve(
        "Engine against trainer", "mean absolute difference of log-probabilities", from_zero=True
    ),
}
DPO = {
    "dpo/loss": Curve("Loss", "of a step's comparisons", from_zero=True),
    "dpo/ai_accuracy": Curve("AI labels", "share of a step's comparisons ordered as their AI labels"),
    "dpo/ai_margin": Curve("Margin", "implicit reward of the preferred answer over the other's"),
    "dpo/ai_drift": Curve(
        "Drift from SL-CAI", "nats, mean of log p_ref - log p of a sampled answer", from_zero=True
    ),
}


def training(report: dict[str, Any], method: str, curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """A chart for each metric that a step has; of several seeds, each faintly behind their mean."""
    seeds = report[method].get("seeds") or []
    figures = []
    for key, (title, meaning, from_zero) in curves.items():
        mean = _points(report[method]["steps"], key)
        if not mean:
            continue
        faint = [charts.Line(_points(steps, key), "rl faint") for steps in seeds if len(seeds) > 1]
        lines = [*faint, charts.Line(mean, "rl", "step")]
        chart = charts.lines(lines, title=f"{title} by step", low=0.0 if from_zero else None)
        figures.append({"title": title, "chart": chart, "meaning": meaning, "key": key})
    return figures


def _points(steps: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [
        (float(step.get("step", number)), float(value))
        for number, step in enumerate(steps)
        if isinstance(value := step.get(key), int | float)
    ]


def revision(report: dict[str, Any]) -> dict[str, Any] | None:
    """Harm after each round of critique and revision; dashed, with the critic that repairs what a principle names."""
    harm, selective = report["revision_harm"], report["revision_harm_selective"]
    if not harm:
        return None
    lines = [charts.Line(list(enumerate(harm)), "rl", "round")]
    if selective:
        lines.insert(0, charts.Line(list(enumerate(selective)), "base dashed", "selective critic, round"))
    chart = charts.lines(
        lines, title="Harm by revision round", percent=True, low=0, high=1, width=640, height=230
    )
    return {"chart": chart, "selective": bool(selective)}

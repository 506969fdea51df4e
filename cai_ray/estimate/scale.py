"""From a stage of the sample to the whole one. Arithmetic alone.

What it takes until an engine answers, or a group of workers trains, is the same for few rows and for many; what comes
after that grows with the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from cai_ray.cluster.cost import Spent
from cai_ray.cluster.usage import Usage

Totals = Mapping[str, tuple[int, Usage]]
"""Of each kind of rows, how many and what they used."""


class Stage(NamedTuple):
    """What the whole stage is reckoned to take."""

    stage: str
    rows: int
    tokens: dict[str, int]
    spent: Spent
    start_seconds: float
    """Of the wall time, what does not grow with the rows."""
    how: str


def whole_usage(sample: Totals, rows: Mapping[str, int]) -> Usage:
    """What all rows use, where each uses as much as the mean of its kind in the sample; of a kind that the sample has
    not, as the mean of all."""
    everyone = sum(n for n, _ in sample.values()), sum((u for _, u in sample.values()), Usage())
    total = [0.0] * len(Usage._fields)
    for kind, count in rows.items():
        n, used = sample.get(kind, everyone)
        for i, amount in enumerate(used):
            total[i] += count * amount / max(1, n)
    return Usage(*(round(amount) for amount in total))


def scaled(sample: Spent, work: float, whole: float, endpoint: float = 1.0, at_once: int = 1) -> Spent:
    """
    Args:
        work: seconds of the sample's wall time that grow with the rows.
        whole: the same of the whole stage, by as many processes as the sample had.
        endpoint: how many times the sample's tokens the endpoints are asked for.
        at_once: so many times as many processes share the work of the whole stage.
    """
    start = max(0.0, sample.wall_seconds - work)
    wall = start + whole / at_once
    held = at_once * wall / max(sample.wall_seconds, 1e-9)
    used = Usage(*(round(n * endpoint) for n in sample.endpoint))
    return Spent(wall, sample.cpu_seconds * held, sample.gpu_seconds * held, endpoint=used)


def rate(steps: Sequence[Mapping[str, Any]]) -> float:
    """Tokens a second of training steps; the first one is left out where there are others."""
    speeds = [step["tokens/per_s"] for step in steps]
    return median(speeds[1:] or speeds)


def ppo_seconds(steps: Sequence[Mapping[str, Any]], warmup: int) -> tuple[float, float, float]:
    """Seconds of all steps, of one in which the value model alone is trained, and of one that trains both."""
    times = [sum(v for k, v in step.items() if _in_turn(k)) for step in steps]
    both = times[warmup:]
    first = times[0] if warmup else 0.0
    return sum(times), min(first, both[-1]), both[-1]


def _in_turn(name: str) -> bool:
    return name.startswith("time/") and name != "time/rollout_s"  # the engines' time is beside the trainer's

"""The arithmetic from a stage of the sample to the whole stage.

The time until an engine answers, or until a group of workers trains, is the same for few rows and for many. The time
after that grows with the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from cai_ray.cluster.cost import Spent
from cai_ray.cluster.usage import Usage

Totals = Mapping[str, tuple[int, Usage]]
"""By kind of rows: their number, and the tokens that they used."""


class StageEstimate(NamedTuple):
    """What a whole stage would take."""

    stage: str
    rows: int
    tokens: dict[str, int]
    spent: Spent
    start_seconds: float
    """The part of the wall time that does not grow with the rows."""
    how: str
    """The measurement that the estimate rests on."""


def whole_usage(sample: Totals, rows: Mapping[str, int]) -> Usage:
    """The tokens of all rows, if each uses as much as the mean of its kind in the sample.

    A kind that the sample does not have uses the mean of all kinds.
    """
    everyone = sum(n for n, _ in sample.values()), sum((u for _, u in sample.values()), Usage())
    total = [0.0] * len(Usage._fields)
    for kind, count in rows.items():
        n, used = sample.get(kind, everyone)
        for i, amount in enumerate(used):
            total[i] += count * amount / max(1, n)
    return Usage(*(round(amount) for amount in total))


def scaled(sample: Spent, work: float, whole: float, endpoint: float = 1.0, at_once: int = 1) -> Spent:
    """What the whole stage takes, from what its sample took.

    Args:
        work: seconds of the sample's wall time that grow with the rows.
        whole: the same for the whole stage, with as many processes as the sample had.
        endpoint: the endpoints' tokens in the whole stage, as a multiple of the sample's.
        at_once: the number of processes that share the whole stage's work, as a multiple of the sample's.
    """
    start = max(0.0, sample.wall_seconds - work)
    wall = start + whole / at_once
    held = at_once * wall / max(sample.wall_seconds, 1e-9)
    used = Usage(*(round(n * endpoint) for n in sample.endpoint))
    return Spent(wall, sample.cpu_seconds * held, sample.gpu_seconds * held, endpoint=used)


def rate(steps: Sequence[Mapping[str, Any]]) -> float:
    """Tokens per second of training steps, without the first step if there are others."""
    speeds = [step["tokens/per_s"] for step in steps]
    return median(speeds[1:] or speeds)


def ppo_seconds(steps: Sequence[Mapping[str, Any]], warmup: int) -> tuple[float, float, float]:
    """Seconds of all steps, of one step that trains the value model alone, and of one that trains both models."""
    times = [sum(v for k, v in step.items() if _sequential(k)) for step in steps]
    both = times[warmup:]
    first = times[0] if warmup else 0.0
    return sum(times), min(first, both[-1]), both[-1]


def _sequential(name: str) -> bool:
    return name.startswith("time/") and name != "time/rollout_s"  # the engines work while the trainer does

"""Rates with intervals, and the calibration of probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def rate(flags: Sequence[float]) -> dict[str, Any]:
    """Share of true flags with its 95 % Wilson score interval (Wilson 1927); value None over no flags.

    A flag may be true in part, such as an answer that ties with another.
    """
    n = len(flags)
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    return {**wilson(sum(flags) / n, n), "n": n}


def wilson(p: float, n: float) -> dict[str, float]:
    """A share of n with its 95 % Wilson score interval."""
    z = 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Rounding must not put the ends of the scale outside their own interval.
    return {"value": p, "low": max(0.0, min(p, centre - half)), "high": min(1.0, max(p, centre + half))}


def rightness(p: float, outcome: bool) -> float:
    """1 where a probability is on the outcome's side of one half, 0 on the other; one half itself is half right."""
    return 0.5 if p == 0.5 else float((p > 0.5) == outcome)


def brier(p: Sequence[float], outcomes: Sequence[bool]) -> float:
    """Mean squared difference between probabilities and outcomes (Brier 1950); 0 over none."""
    return sum((x - y) ** 2 for x, y in zip(p, outcomes, strict=True)) / len(p) if p else 0.0


def reliability(p: Sequence[float], outcomes: Sequence[bool], bins: int = 10) -> list[dict[str, Any]]:
    """Confidence against accuracy in equal-width bins from one half to one (Guo et al. 2017, section 2).

    Args:
        p: probability that the outcome is true. The confidence is that of the likelier side.

    Returns:
        per bin low, high, probability (mean confidence), share (that was right) and n; None over none.
    """
    sums = [[0.0, 0.0, 0] for _ in range(bins)]
    for probability, outcome in zip(p, outcomes, strict=True):
        confidence = max(probability, 1 - probability)
        cell = sums[min(bins - 1, int((confidence - 0.5) * 2 * bins))]
        cell[0] += confidence
        cell[1] += rightness(probability, outcome)
        cell[2] += 1
    return [
        {
            "low": 0.5 + i / (2 * bins),
            "high": 0.5 + (i + 1) / (2 * bins),
            "probability": total / n if n else None,
            "share": right / n if n else None,
            "n": n,
        }
        for i, (total, right, n) in enumerate(sums)
    ]


def expected_calibration_error(p: Sequence[float], outcomes: Sequence[bool], bins: int = 10) -> float:
    """Mean gap between confidence and accuracy over the bins, weighted by rows (Guo et al. 2017, eq. 3)."""
    cells = [c for c in reliability(p, outcomes, bins) if c["n"]]
    return sum(c["n"] * abs(c["probability"] - c["share"]) for c in cells) / len(p) if cells else 0.0


def fit_scale(log_odds: Sequence[float], outcomes: Sequence[bool]) -> float:
    """The one factor on log-odds that makes the outcomes likeliest (temperature scaling, Guo et al. 2017).

    The loss is convex in the factor: a golden-section search over [0.01, 100] on a log scale.
    """

    def loss(scale: float) -> float:
        total = 0.0
        for z, outcome in zip(log_odds, outcomes, strict=True):
            d = scale * (z if outcome else -z)
            total += math.log1p(math.exp(-abs(d))) + max(-d, 0.0)
        return total

    low, high = math.log(0.01), math.log(100.0)
    shrink = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - shrink * (high - low), low + shrink * (high - low)
        if loss(math.exp(a)) < loss(math.exp(b)):
            high = b
        else:
            low = a
    return math.exp((low + high) / 2)

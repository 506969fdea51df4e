"""Shares and rates, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def share(flags: Iterable[bool]) -> float | None:
    """Share of true flags; None over no flags."""
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None


def rate(flags: Sequence[float]) -> dict[str, Any]:
    """Share of true flags with its 95% Wilson score interval (Wilson 1927); value None over no flags.

    A flag may be true in part, such as an answer that ties with another.
    """
    n = len(flags)
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    return {**wilson(sum(flags) / n, n), "n": n}


def wilson(p: float, n: float) -> dict[str, float]:
    """A share of n with its 95% Wilson score interval."""
    z = 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Rounding must not put the ends of the scale outside their own interval.
    return {"value": p, "low": max(0.0, min(p, centre - half)), "high": min(1.0, max(p, centre + half))}

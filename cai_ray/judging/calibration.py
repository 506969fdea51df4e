"""The calibration of probabilities: how well they agree with known outcomes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from cai_ray.judging.votes import logit, preference


def measure_calibration(pairs: Sequence[tuple[float, bool]], scale: float | None = None) -> dict[str, Any]:
    """Accuracy and calibration of probabilities whose outcomes are known.

    Args:
        pairs: probability that response a is the better one, and whether it is.
        scale: a factor on log-odds, after which calibration is measured again (`scaled`).

    Returns:
        n; accuracy, in which a probability of exactly one half is half right; raw and scaled, each with the Brier score
        (Brier 1950: mean squared difference), the expected calibration error and the reliability table behind it.
    """
    p, outcomes = [x for x, _ in pairs], [y for _, y in pairs]
    return {
        "n": len(pairs),
        "accuracy": statistics.fmean(map(rightness, p, outcomes)) if pairs else None,
        "raw": _scores(p, outcomes) if pairs else None,
        "scaled": _scores([scaled(x, scale) for x in p], outcomes) if pairs and scale else None,
    }


def _scores(p: Sequence[float], outcomes: Sequence[bool]) -> dict[str, Any]:
    return {
        "brier": brier(p, outcomes),
        "ece": expected_calibration_error(p, outcomes),
        "reliability": reliability(p, outcomes),
    }


def scaled(p: float, scale: float) -> float:
    """A probability with its log-odds multiplied (temperature scaling, Guo et al. 2017)."""
    return preference(scale * logit(p), 0.0)


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

"""The arithmetic of votes: from log-probabilities to a preference, and from several votes to one label."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cai_ray.judging.statistics import share
from cai_ray.storage.records import Vote


def preference(logprob_a: float, logprob_b: float) -> float:
    """Probability of a, normalised over {a, b}."""
    return 1 / (1 + math.exp(min(max(logprob_b - logprob_a, -700.0), 700.0)))


def combine(p: Sequence[float], weights: Sequence[float], how: str) -> float:
    """The probability that several votes make together.

    `mean`: the weighted mean of probabilities. `log_odds`: weighted log-odds added up, so that an undecided
    principle (1/2) weighs nothing.
    """
    if how == "mean":
        return sum(w * x for w, x in zip(weights, p, strict=True)) / sum(weights)
    total = sum(w * logit(x) for w, x in zip(weights, p, strict=True))
    return preference(total, 0.0)


def logit(p: float) -> float:
    p = min(max(p, 1e-9), 1 - 1e-9)
    return math.log(p / (1 - p))


def expected_score(logprobs: Sequence[float]) -> float:
    """The mean score 1, 2, …, n under the probabilities of its tokens, normalised over them.

    Direct scoring of Lee et al. 2023 (arXiv 2309.00267), there from 1 to 10.
    """
    top = max(logprobs)
    weights = [math.exp(x - top) for x in logprobs]
    return sum(score * w for score, w in enumerate(weights, 1)) / sum(weights)


def survives_swap(vote: Vote) -> bool | None:
    """Whether the vote prefers the same slot, and so the other response, after the swap; None if there was no swap."""
    a, b = vote.get("logprob_a"), vote.get("logprob_b")
    a_swapped, b_swapped = vote.get("logprob_a_swapped"), vote.get("logprob_b_swapped")
    if a is None or b is None or a_swapped is None or b_swapped is None:
        return None
    return (a > b) == (b_swapped > a_swapped)


def slot_bias(votes: Sequence[Vote]) -> float | None:
    """Share of votes whose preferred slot survives the swap; None where only one order was asked."""
    return share(s for v in votes if (s := survives_swap(v)) is not None)

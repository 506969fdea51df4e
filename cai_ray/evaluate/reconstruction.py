"""Labels reconstructed from single principles: how much of them each principle explains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cai_ray.evaluate.vote_counts import sides

SHUFFLES = 20


def reconstruct(
    probability: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """How well each principle's votes alone explain the labels, compared with the same votes in random order.

    Args:
        probability: votes for response a (N, K), NaN where there is none.
        labels: which response the label prefers (N), 1, -1 or 0; comparisons with 0 are left out.

    Returns:
        For each principle with a vote: accuracy, in which a tie is half right; shuffled, the mean accuracy over
        permutations of the votes, and shuffled_high, the highest of them; n.
    """
    rng = np.random.default_rng(0)
    accuracies = {}
    for i, name in enumerate(names):
        voted = ~np.isnan(probability[:, i]) & (labels != 0)
        if not voted.any():
            continue
        side, label = sides(probability[voted, i]), labels[voted]
        chance = [_right(rng.permutation(side), label) for _ in range(SHUFFLES)]
        accuracies[name] = {
            "accuracy": _right(side, label),
            "shuffled": float(np.mean(chance)),
            "shuffled_high": float(np.max(chance)),
            "n": int(voted.sum()),
        }
    return accuracies


def _right(side: np.ndarray, label: np.ndarray) -> float:
    return float(np.mean(np.where(side == 0, 0.5, side == label)))

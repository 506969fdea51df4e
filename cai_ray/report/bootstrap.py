"""Intervals of rates over prompts, by drawing the prompts again (Efron 1979)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bootstrap(
    seeds: Sequence[Sequence[tuple[str, int]]], draws: int, rng: np.random.Generator
) -> tuple[float | None, float | None, int]:
    """Bounds of the 95% interval of the mean over seeds of each seed's rate, and the number of prompts.

    Args:
        seeds: (prompt id, outcome) pairs of each seed. If a prompt is missing from a seed (in a rate over refusals,
            say), numerator and denominator are drawn again together.
    """
    prompts = sorted({prompt for pairs in seeds for prompt, _ in pairs})
    if not prompts:
        return None, None, 0
    column = {prompt: i for i, prompt in enumerate(prompts)}
    true = np.zeros((len(prompts), len(seeds)))  # P S
    count = np.zeros_like(true)
    for s, pairs in enumerate(seeds):
        for prompt, outcome in pairs:
            true[column[prompt], s] += outcome
            count[column[prompt], s] += 1
    equal = np.full(len(prompts), 1 / len(prompts))
    times_D_P = rng.multinomial(len(prompts), equal, size=draws)  # how often each draw has each prompt
    true_D_S, count_D_S = times_D_P @ true, times_D_P @ count
    rates = np.divide(true_D_S, count_D_S, out=np.full_like(true_D_S, np.nan), where=count_D_S > 0)
    means = np.nanmean(rates[~np.isnan(rates).all(axis=1)], axis=1)
    if not len(means):
        return None, None, len(prompts)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high), len(prompts)

"""Several seeds as one report: means, with intervals over prompts.

The prompts are a sample of what people ask, so the prompt is what is drawn again (bootstrap.py): all seeds' outcomes
on it are drawn together, because they are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cai_ray.errors import InputError
from cai_ray.evaluate.outcomes import outcomes
from cai_ray.report.bootstrap import bootstrap
from cai_ray.report.roles import METHODS, in_order

# Keys of the report whose numbers are averaged, beside the rates of the policies and the steps of training.
_MEANS = (
    "label", "certificate", "rm", "revision_harm", "revision_harm_selective", "snapshots", "ratings", "wording",
    "critic", "stages", "cost",
)  # fmt: skip


def mean_of_seeds(
    reports: Sequence[dict[str, Any]],
    rows: Sequence[list[Any]],
    *,
    draws: int = 4000,
    seed: int = 0,
) -> dict[str, Any]:
    """The mean of the seeds' reports, in the form of one.

    Args:
        reports: one per seed, as `report.stage.build` makes them. A policy may be missing from some.
        rows: their judged rows (schema `judgements`), in the same order.
        draws: bootstrap samples.

    Returns:
        A report in which each rate has value (the mean of the seeds' rates), low and high (2.5% and 97.5% of the
        bootstrap), n (prompts) and seeds (each seed's rate). A single seed keeps the intervals of its report.

    Raises:
        InputError: the reports are of different constitutions.
    """
    if len({r["constitution_sha"] for r in reports}) > 1:
        raise InputError("reports of different constitutions have no mean; combine runs of one constitution")
    first = reports[0]
    models = in_order({m for r in reports for m in r["models"]})
    rng = np.random.default_rng(seed)
    mean: dict[str, Any] = {
        **first,
        "models": models,
        "seeds": [r["seed"] for r in reports],
        **{name: _mean([r[name] for r in reports]) for name in _MEANS},
        **{
            method: {
                "steps": _mean([r[method]["steps"] for r in reports]),
                "seeds": [r[method]["steps"] for r in reports],
            }
            for method in METHODS
        },
        "human_harmlessness_labels": sum(r["human_harmlessness_labels"] for r in reports),
        "by_seed": [
            {k: r[k] for k in ("seed", "label", "rm", "revision_harm", "revision_harm_selective")}
            for r in reports
        ],
    }
    for model in models:
        seeds = [i for i, r in enumerate(reports) if model in r["models"]]
        judged = [outcomes(row for row in rows[i] if row["model"] == model) for i in seeds]
        mean[model] = _policy([reports[i][model] for i in seeds], judged, draws, rng)
    return mean


def _policy(
    measured: list[dict[str, Any]],
    judged: list[dict[str, list[tuple[str, bool]]]],
    draws: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """The mean rates of one policy."""

    def rate(per_seed: list[dict[str, Any]], metric: str) -> dict[str, Any]:
        values = [m["value"] for m in per_seed]
        if len(per_seed) == 1 or None in values:
            return {**per_seed[0], "value": _mean(values), "seeds": values}
        # A rate that no row of judgements holds has a mean and no interval.
        low, high, n = bootstrap([j.get(metric, []) for j in judged], draws, rng)
        return {"value": _mean(values), "low": low, "high": high, "n": n, "seeds": values}

    families = measured[0]["harm_by_family"]
    return {
        **{name: rate([m[name] for m in measured], name) for name in measured[0] if name != "harm_by_family"},
        "harm_by_family": {
            f: rate([m["harm_by_family"][f] for m in measured], f"harm_by_family.{f}") for f in families
        },
    }


def _mean(values: list[Any]) -> Any:
    """The mean of equal structures, number by number; what is not a number is taken from the first."""
    present = [v for v in values if v is not None]
    if not present:
        return None
    first = present[0]
    if isinstance(first, dict):
        return {k: _mean([v.get(k) for v in present]) for k in first}
    if isinstance(first, list):
        return [_mean(list(column)) for column in zip(*present, strict=False)]
    if isinstance(first, bool) or not isinstance(first, int | float):
        return first
    mean = sum(present) / len(present)
    return first if all(v == first for v in present) else mean

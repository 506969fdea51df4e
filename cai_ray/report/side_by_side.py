"""Two runs side by side (`cai-ray report A B`): behaviour of their policies, effect of their principles, labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cai_ray.constitution.differences import differences
from cai_ray.errors import InputError
from cai_ray.evaluate.attribution import attribution
from cai_ray.evaluate.outcomes import FAMILY, outcomes
from cai_ray.report import costs
from cai_ray.report.bootstrap import bootstrap
from cai_ray.report.html import document
from cai_ray.report.main_table import METRICS
from cai_ray.report.roles import in_order, title_of
from cai_ray.report.tables import Table
from cai_ray.report.text import columns, interval, percent
from cai_ray.storage.run import Run

DRAWS = 2000
COUNTS = ("drawn", "changed", "decisive", "overruled")


def compare(a: Run, b: Run) -> dict[str, Any]:
    """Run b beside run a.

    Returns:
        behaviour: policy to metric (or `harm_by_family.FAMILY`) to {a, b, value, low, high, n}: the rates, and their
        difference on the prompts that both have, with an interval over these (bootstrap). principles: id to {change:
        added, removed, changed, described or None; a, b: how often drawn, changed, decisive, overruled}. labels:
        comparisons of the same conversation and responses, how many of their labels prefer the same response, and the
        mean absolute difference of their probabilities. costs: of a and b (`costs.read`).

    Raises:
        InputError: a run is not evaluated.
    """
    for run in (a, b):
        if run.manifest("evaluate") is None:
            raise InputError(f"{run.root}: evaluate is not complete; run `cai-ray evaluate` first")
    return {
        "a": a.root,
        "b": b.root,
        "behaviour": _behaviour(a, b),
        "principles": _principles(a, b),
        "labels": _labels(a, b),
        "costs": {"a": costs.read(a), "b": costs.read(b)},
    }


def _behaviour(a: Run, b: Run) -> dict[str, Any]:
    """The rates of each policy that both runs have."""
    outcomes_a, outcomes_b = _outcomes(a), _outcomes(b)
    return {
        policy: {
            metric: _difference(dict(outcomes_a[policy][metric]), dict(pairs))
            for metric, pairs in outcomes_b[policy].items()
            if metric in outcomes_a[policy]
        }
        for policy in in_order(outcomes_b)
        if policy in outcomes_a
    }


def _outcomes(run: Run) -> dict[str, dict[str, list[tuple[str, bool]]]]:
    """Outcomes of each policy by metric, as pairs of prompt and outcome."""
    rows = run.rows("evaluate")
    models = dict.fromkeys(row["model"] for row in rows)
    return {model: outcomes(row for row in rows if row["model"] == model) for model in models}


def _difference(before: Mapping[str, bool], after: Mapping[str, bool]) -> dict[str, Any]:
    """Both rates and their difference on the prompts that both runs have, with its interval."""
    shared = [(prompt, int(after[prompt]) - int(before[prompt])) for prompt in after if prompt in before]
    low, high, n = bootstrap([shared], DRAWS, np.random.default_rng(0))
    value = float(np.mean([d for _, d in shared])) if shared else None
    rates = {name: float(np.mean(list(v.values()))) for name, v in (("a", before), ("b", after))}
    return {**rates, "value": value, "low": low, "high": high, "n": n}


def _principles(a: Run, b: Run) -> dict[str, Any]:
    documents = [run.constitution() for run in (a, b)]
    changes = {change.principle: change.what for change in differences(*documents)}
    effects_a, effects_b = (
        attribution(run, document)["principles"] for run, document in zip((a, b), documents, strict=True)
    )
    return {
        id: {"change": changes.get(id), "a": _counts(effects_a.get(id)), "b": _counts(effects_b.get(id))}
        for id in dict.fromkeys([*effects_a, *effects_b])
    }


def _counts(effects: Mapping[str, Any] | None) -> dict[str, int] | None:
    """How often a principle was at work; None if the run does not have it."""
    return {name: {**effects["revision"], **effects["votes"]}[name] for name in COUNTS} if effects else None


def _labels(a: Run, b: Run) -> dict[str, Any]:
    """How far the two runs agree on comparisons of the same responses."""

    def read(run: Run) -> dict[tuple[str, str, str], float]:
        columns = ["id", "response_a", "response_b", "p_a_raw", "error"]
        return {
            (row["id"], row["response_a"], row["response_b"]): row["p_a_raw"]
            for row in run.each_row("label", columns)
            if row["error"] is None
        }

    labels_a, labels_b = read(a), read(b)
    pairs = [(labels_a[key], p) for key, p in labels_b.items() if key in labels_a]
    decided = [(x, y) for x, y in pairs if x != 0.5 and y != 0.5]
    return {
        "shared": len(pairs),
        "same_side": float(np.mean([(x > 0.5) == (y > 0.5) for x, y in decided])) if decided else None,
        "difference": float(np.mean([abs(x - y) for x, y in pairs])) if pairs else None,
        "only_a": len(labels_a) - len(pairs),
        "only_b": len(labels_b) - len(pairs),
    }


def lines(comparison: dict[str, Any]) -> list[str]:
    """The comparison for a terminal."""
    out = [f"a  {comparison['a']}", f"b  {comparison['b']}"]
    for _, table in _tables(comparison):
        out += ["", *columns([table.head, *table.rows])]
    return [*out, "", _label_agreement(comparison["labels"])]


def page(comparison: dict[str, Any]) -> str:
    """The comparison as a page to read."""
    return document(
        "side_by_side.html",
        title="Two runs side by side",
        a=comparison["a"],
        b=comparison["b"],
        tables=list(_tables(comparison)),
        labels=_label_agreement(comparison["labels"]),
    )


def _tables(comparison: dict[str, Any]) -> Iterator[tuple[str, Table]]:
    """The tables with their titles: one for each policy, the principles, and the cost."""
    for policy, metrics in comparison["behaviour"].items():
        yield title_of(policy), _policy_table(policy, metrics)
    rows = []
    for principle, cell in comparison["principles"].items():
        numbers = [
            ", ".join("–" if cell[side] is None else str(cell[side][name]) for side in "ab")
            for name in COUNTS
        ]
        rows.append([principle, cell["change"] or "", *numbers])
    yield "Principles", Table(["principle", "", *(f"{name} a, b" for name in COUNTS)], rows)
    if rows := costs.side_by_side(comparison["costs"]["a"], comparison["costs"]["b"]):
        yield "Cost", Table(["cost", "wall time a, b", "CPU a, b", "GPU a, b", "money a, b"], rows)


def _policy_table(policy: str, metrics: dict[str, Any]) -> Table:
    rows = []
    for metric, cell in sorted(metrics.items(), key=lambda item: _place(item[0])):
        family = metric.removeprefix(FAMILY)
        points = "–" if cell["value"] is None else f"{100 * cell['value']:+.1f}"
        label = f"  {family}" if family != metric else METRICS.get(metric, metric)
        values = [percent(cell["a"]), percent(cell["b"]), points, interval(cell), str(cell["n"])]
        rows.append([label, *values])
    return Table([title_of(policy), "a", "b", "b - a", "", "prompts"], rows)


def _place(metric: str) -> tuple[int, str]:
    """Where a metric stands: in the order of the report's table, families beneath harm."""
    order = list(METRICS)
    return (order.index(metric) if metric in order else order.index("harm"), metric)


def _label_agreement(labels: dict[str, Any]) -> str:
    return (
        f"labels: {labels['shared']} of the same responses, {percent(labels['same_side'])} on the same side; "
        f"{labels['only_a']} in a alone, {labels['only_b']} in b alone"
    )

"""Two runs side by side (`cai-ray report A B`): what their policies do, what their principles did, how they label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cai_ray.constitution.differences import differences
from cai_ray.errors import InputError
from cai_ray.evaluate.attribution import attribution
from cai_ray.evaluate.outcomes import FAMILY, outcomes
from cai_ray.report import costs, tables
from cai_ray.report.combine import bootstrap
from cai_ray.report.html import document
from cai_ray.report.text import METRICS, columns, in_order, interval, name_of, percent, safe
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
    found: dict[str, dict[str, Any]] = {}
    judged = [_outcomes(run) for run in (a, b)]
    for model in in_order(judged[1]):
        if model not in judged[0]:
            continue
        before, after = judged[0][model], judged[1][model]
        found[model] = {
            metric: _difference(dict(before[metric]), dict(after[metric]))
            for metric in after
            if metric in before
        }
    return found


def _outcomes(run: Run) -> dict[str, dict[str, list[tuple[str, bool]]]]:
    rows = run.rows("evaluate")
    models = dict.fromkeys(row["model"] for row in rows)
    return {model: outcomes(row for row in rows if row["model"] == model) for model in models}


def _difference(before: Mapping[str, bool], after: Mapping[str, bool]) -> dict[str, Any]:
    shared = [(prompt, int(after[prompt]) - int(before[prompt])) for prompt in after if prompt in before]
    low, high, n = bootstrap([shared], DRAWS, np.random.default_rng(0))
    value = float(np.mean([d for _, d in shared])) if shared else None
    rates = {name: float(np.mean(list(v.values()))) for name, v in (("a", before), ("b", after))}
    return {**rates, "value": value, "low": low, "high": high, "n": n}


def _principles(a: Run, b: Run) -> dict[str, Any]:
    documents = [run.constitution() for run in (a, b)]
    changes = {change.principle: change.what for change in differences(*documents)}
    did = [attribution(run, document)["principles"] for run, document in zip((a, b), documents, strict=True)]
    ids = dict.fromkeys([*did[0], *did[1]])
    return {
        i: {"change": changes.get(i), "a": _counts(did[0].get(i)), "b": _counts(did[1].get(i))} for i in ids
    }


def _counts(found: Mapping[str, Any] | None) -> dict[str, int] | None:
    return {name: {**found["revision"], **found["votes"]}[name] for name in COUNTS} if found else None


def _labels(a: Run, b: Run) -> dict[str, Any]:
    def read(run: Run) -> dict[tuple[str, str, str], float]:
        columns = ["id", "response_a", "response_b", "p_a_raw", "error"]
        return {
            (row["id"], row["response_a"], row["response_b"]): row["p_a_raw"]
            for row in run.each_row("label", columns)
            if row["error"] is None
        }

    one, other = read(a), read(b)
    pairs = [(one[key], p) for key, p in other.items() if key in one]
    decided = [(x, y) for x, y in pairs if x != 0.5 and y != 0.5]
    return {
        "shared": len(pairs),
        "same_side": float(np.mean([(x > 0.5) == (y > 0.5) for x, y in decided])) if decided else None,
        "difference": float(np.mean([abs(x - y) for x, y in pairs])) if pairs else None,
        "only_a": len(one) - len(pairs),
        "only_b": len(other) - len(pairs),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """For a terminal."""
    out = [f"a  {found['a']}", f"b  {found['b']}"]
    for _, head, rows in _tables(found):
        out += ["", *columns([head, *rows])]
    return [*out, "", _about_labels(found["labels"])]


def page(found: dict[str, Any]) -> str:
    """The same as a page to read."""
    parts = [
        f"<section><h2>{safe(title)}</h2>{tables.plain(head, rows)}</section>"
        for title, head, rows in _tables(found)
    ]
    title = "Two runs side by side"
    about = f"a is <code>{safe(found['a'])}</code>, b is <code>{safe(found['b'])}</code>."
    labels = f"<section><h2>Labels</h2><p>{safe(_about_labels(found['labels']))}</p></section>"
    return document(title, f"<header><h1>{title}</h1><p>{about}</p></header>{''.join(parts)}{labels}")


def _tables(found: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows."""
    for model, metrics in found["behaviour"].items():
        rows = []
        for metric, cell in sorted(metrics.items(), key=lambda item: _place(item[0])):
            name = metric.removeprefix(FAMILY)
            points = "–" if cell["value"] is None else f"{100 * cell['value']:+.1f}"
            told = [percent(cell["a"]), percent(cell["b"]), points, interval(cell), str(cell["n"])]
            rows.append([f"  {name}" if name != metric else METRICS.get(metric, metric), *told])
        yield name_of(model), [name_of(model), "a", "b", "b - a", "", "prompts"], rows
    rows = []
    for principle, cell in found["principles"].items():
        numbers = [
            ", ".join("–" if cell[side] is None else str(cell[side][name]) for side in "ab")
            for name in COUNTS
        ]
        rows.append([principle, cell["change"] or "", *numbers])
    yield "Principles", ["principle", "", *(f"{name} a, b" for name in COUNTS)], rows
    if rows := costs.side_by_side(found["costs"]["a"], found["costs"]["b"]):
        yield "Cost", ["cost", "wall time a, b", "CPU a, b", "GPU a, b", "money a, b"], rows


def _place(metric: str) -> tuple[int, str]:
    """Metrics in the order of the report's table, families beneath harm."""
    known = list(METRICS)
    return (known.index(metric) if metric in known else known.index("harm"), metric)


def _about_labels(labels: dict[str, Any]) -> str:
    return (
        f"labels: {labels['shared']} of the same responses, {percent(labels['same_side'])} on the same side; "
        f"{labels['only_a']} in a alone, {labels['only_b']} in b alone"
    )

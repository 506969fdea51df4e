"""The labels' certificate: measures of their quality before a reward model is trained on them.

Without gold: slot bias, agreement between principles, ties, abstentions, length bias. Against gold comparisons:
accuracy, Brier score and calibration, overall, per principle and per source. Stage `label` writes it to
label/certificate.json; `label.gates` are bounds on it (gates.py).
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa

from cai_ray.data.gold_comparisons import GoldComparison
from cai_ray.judging.calibration import fit_scale, measure_calibration
from cai_ray.judging.statistics import share
from cai_ray.judging.votes import logit, survives_swap

TIE = 0.05
"""A probability this near to one half prefers neither response."""
COLUMNS = ["id", "response_a", "response_b", "votes", "p_a_raw", "error"]


class VoteFacts(NamedTuple):
    """What the certificate reads of a vote."""

    principle: str
    p: float | None
    """Probability of response a; None where the principle abstained."""
    stuck: bool | None
    """Whether the preferred slot survived the swap; None where one order was asked, or none."""


class LabelFacts(NamedTuple):
    """What the certificate reads of a label: a small part of the row."""

    p: float
    """Probability of response a, not clamped."""
    longer: int
    """Characters of response a minus those of response b."""
    votes: tuple[VoteFacts, ...]


def read(table: pa.Table) -> dict[str, LabelFacts | None]:
    """Labels of a table with COLUMNS, by id; None where the row has an error."""
    labels: dict[str, LabelFacts | None] = {}
    for batch in table.select(COLUMNS).to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            labels[row["id"]] = None if row["error"] is not None else _facts(row)
    return labels


def _facts(row: Mapping[str, Any]) -> LabelFacts:
    votes = tuple(
        VoteFacts(sys.intern(v["principle_id"]), v["p_a"], survives_swap(v)) for v in row["votes"] or ()
    )
    return LabelFacts(row["p_a_raw"], len(row["response_a"]) - len(row["response_b"]), votes)


def certificate(
    labels: Mapping[str, LabelFacts | None],
    gold: Sequence[GoldComparison] = (),
    gold_labels: Mapping[str, LabelFacts | None] = MappingProxyType({}),
) -> dict[str, Any]:
    """The certificate as one object; a share of nothing is None.

    Args:
        labels: the run's labels, by id.
        gold: the gold comparisons.
        gold_labels: the feedback model's labels of them, by id.
    """
    valid = [x for x in labels.values() if x is not None]
    # Equal responses get one half without a question: they say nothing about the labeller.
    voted = [x for x in valid if x.votes]
    votes = [v for x in voted for v in x.votes]
    return {
        "labels": len(voted),
        "equal_responses": len(valid) - len(voted),
        "errors": len(labels) - len(valid),
        "votes": len(votes),
        "slot_bias": slot_bias(votes),
        "ties": share(is_tie(x.p) for x in voted),
        "abstentions": share(v.p is None for v in votes),
        "agreement": agreement(voted),
        "length_bias": length_bias(voted),
        "principles": by_principle(votes),
        "gold": against_gold(gold, gold_labels) if gold else None,
    }


def is_tie(p: float) -> bool:
    return abs(p - 0.5) <= TIE


def slot_bias(votes: Iterable[VoteFacts]) -> float | None:
    """Share of votes whose preferred slot survives the swap (docs/method.md, item 5)."""
    return share(v.stuck for v in votes if v.stuck is not None)


def agreement(rows: Iterable[LabelFacts]) -> dict[str, Any]:
    """How often two principles that both prefer something prefer the same response.

    Returns:
        `pairs`: by one principle and the other, their agreement and n, the comparisons on which neither tied or
        abstained. `mean`: over the pairs, each counted once.
    """
    same: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        sides = [(v.principle, v.p > 0.5) for v in row.votes if v.p is not None and not is_tie(v.p)]
        for (a, prefers), (b, also) in combinations(sorted(sides), 2):
            same[a, b][0] += prefers == also
            same[a, b][1] += 1
    pairs: dict[str, dict[str, Any]] = defaultdict(dict)
    for (a, b), (k, n) in sorted(same.items()):
        pairs[a][b] = {"agreement": k / n, "n": n}
    shares = [k / n for k, n in same.values()]
    return {"mean": statistics.fmean(shares) if shares else None, "pairs": dict(pairs)}


def length_bias(rows: Iterable[LabelFacts]) -> dict[str, Any]:
    """How labels depend on length in characters; over labels that are not ties, of responses that differ in length.

    Returns:
        `longer_preferred`: share of labels that prefer the longer response. `correlation`: Pearson's, of the
        probability of a with how much longer a is; None where one of the two never varies.
    """
    pairs = [(x.p, x.longer) for x in rows if x.longer and not is_tie(x.p)]
    try:
        correlation = statistics.correlation([p for p, _ in pairs], [float(n) for _, n in pairs])
    except statistics.StatisticsError:  # fewer than two, or all alike
        correlation = None
    return {
        "longer_preferred": share((p > 0.5) == (n > 0) for p, n in pairs),
        "correlation": correlation,
        "n": len(pairs),
    }


def by_principle(votes: Iterable[VoteFacts]) -> dict[str, dict[str, Any]]:
    grouped: dict[str, list[VoteFacts]] = defaultdict(list)
    for vote in votes:
        grouped[vote.principle].append(vote)
    return {
        name: {
            "votes": len(own),
            "slot_bias": slot_bias(own),
            "ties": share(is_tie(v.p) for v in own if v.p is not None),
            "abstentions": share(v.p is None for v in own),
        }
        for name, own in sorted(grouped.items())
    }


def against_gold(gold: Sequence[GoldComparison], labels: Mapping[str, LabelFacts | None]) -> dict[str, Any]:
    """Compares the labels of gold comparisons with their gold preferences.

    Returns:
        `comparisons` and `errors`: counts. `scale`: the one factor on log-odds, fitted on the very comparisons that it
        is then measured on, which flatters it where they are few. `overall`, `by_source`, `by_principle`: see
        `measure_calibration`; a principle's votes are compared with its own gold preference. `slot_bias`: over votes
        on comparisons with a preference.
    """
    overall: list[tuple[float, bool]] = []
    sources: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    principles: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    decided: list[VoteFacts] = []
    errors = 0
    for row in gold:
        label = labels.get(row["id"])
        if label is None:
            errors += 1
            continue
        if row["gold"] != 0.5:
            overall.append((label.p, row["gold"] > 0.5))
            sources[str(row["source"])].append(overall[-1])
        by_principle = row["gold_by_principle"]
        for vote in label.votes:
            preferred = row["gold"] if by_principle is None else by_principle.get(vote.principle)
            if preferred is None or preferred == 0.5:
                continue
            decided.append(vote)
            if by_principle is not None and vote.p is not None:
                principles[vote.principle].append((vote.p, preferred > 0.5))
    scale = fit_scale([logit(p) for p, _ in overall], [g for _, g in overall]) if overall else None
    return {
        "comparisons": len(gold),
        "errors": errors,
        "scale": scale,
        "slot_bias": slot_bias(decided),
        "overall": measure_calibration(overall, scale),
        "by_source": {k: measure_calibration(v, scale) for k, v in sorted(sources.items())},
        "by_principle": {k: measure_calibration(v, scale) for k, v in sorted(principles.items())},
    }

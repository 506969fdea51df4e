"""The labels' certificate: what can be known of their quality before a reward model is trained on them.

Without gold: slot bias, agreement between principles, ties, abstentions, length bias. Against gold comparisons:
accuracy, Brier score and calibration, overall, per principle and per source. Stage `label` writes it to
label/certificate.json; `label.gates` are bounds on it, looked at before `rm` starts.
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

from cai_ray.config.generation import LabelGates
from cai_ray.errors import Stopped
from cai_ray.judging.statistics import brier, expected_calibration_error, fit_scale, reliability, rightness
from cai_ray.judging.votes import logit, preference, survives_swap
from cai_ray.storage.run import Run

TIE = 0.05
"""A probability this near to one half prefers neither response."""
COLUMNS = ["id", "response_a", "response_b", "votes", "p_a_raw", "error"]


class Vote(NamedTuple):
    principle: str
    p: float | None
    """Of response a; None where the principle abstained."""
    stuck: bool | None
    """Whether the preferred slot survived the swap; None where one order was asked, or none."""


class Labelled(NamedTuple):
    """What the certificate reads of a label, a fraction of the row."""

    p: float
    """Of response a, normalised and not clamped."""
    longer: int
    """Characters of response a less those of response b."""
    votes: tuple[Vote, ...]


def read(table: pa.Table) -> dict[str, Labelled | None]:
    """Labels of a table with COLUMNS, by id; None where the row has an error."""
    found: dict[str, Labelled | None] = {}
    for batch in table.select(COLUMNS).to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            found[row["id"]] = None if row["error"] is not None else _labelled(row)
    return found


def _labelled(row: Mapping[str, Any]) -> Labelled:
    votes = tuple(Vote(sys.intern(v["principle_id"]), v["p_a"], survives_swap(v)) for v in row["votes"] or ())
    return Labelled(row["p_a_raw"], len(row["response_a"]) - len(row["response_b"]), votes)


def certificate(
    labels: Mapping[str, Labelled | None],
    gold: Sequence[Mapping[str, Any]] = (),
    gold_labels: Mapping[str, Labelled | None] = MappingProxyType({}),
) -> dict[str, Any]:
    """The certificate as one object; a share of nothing is None.

    Args:
        labels: the run's labels, by id.
        gold: the gold comparisons: id, source, gold and gold_by_principle (or None).
        gold_labels: what the feedback model said of them, by id.
    """
    made = [x for x in labels.values() if x is not None]
    # Equal responses get one half without a question: they say nothing about the labeller.
    asked = [x for x in made if x.votes]
    votes = [v for x in asked for v in x.votes]
    return {
        "labels": len(asked),
        "equal_responses": len(made) - len(asked),
        "errors": len(labels) - len(made),
        "votes": len(votes),
        "slot_bias": slot_bias(votes),
        "ties": _share(is_tie(x.p) for x in asked),
        "abstentions": _share(v.p is None for v in votes),
        "agreement": agreement(asked),
        "length_bias": length_bias(asked),
        "principles": by_principle(votes),
        "gold": against_gold(gold, gold_labels) if gold else None,
    }


def is_tie(p: float) -> bool:
    return abs(p - 0.5) <= TIE


def slot_bias(votes: Iterable[Vote]) -> float | None:
    """Share of votes whose preferred slot survives the swap (docs/method.md, item 5)."""
    return _share(v.stuck for v in votes if v.stuck is not None)


def agreement(rows: Iterable[Labelled]) -> dict[str, Any]:
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


def length_bias(rows: Iterable[Labelled]) -> dict[str, Any]:
    """How the labels go with length in characters, over labels that are no tie and responses of different lengths.

    Returns:
        `longer_preferred`: share of labels that prefer the longer response. `correlation`: Pearson's, of the
        probability of a with how much longer a is; None where one of the two never varies.
    """
    found = [(x.p, x.longer) for x in rows if x.longer and not is_tie(x.p)]
    try:
        correlation = statistics.correlation([p for p, _ in found], [float(n) for _, n in found])
    except statistics.StatisticsError:  # fewer than two, or all the same
        correlation = None
    return {
        "longer_preferred": _share((p > 0.5) == (n > 0) for p, n in found),
        "correlation": correlation,
        "n": len(found),
    }


def by_principle(votes: Iterable[Vote]) -> dict[str, dict[str, Any]]:
    grouped: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        grouped[vote.principle].append(vote)
    return {
        name: {
            "votes": len(own),
            "slot_bias": slot_bias(own),
            "ties": _share(is_tie(v.p) for v in own if v.p is not None),
            "abstentions": _share(v.p is None for v in own),
        }
        for name, own in sorted(grouped.items())
    }


def against_gold(gold: Sequence[Mapping[str, Any]], labels: Mapping[str, Labelled | None]) -> dict[str, Any]:
    """The labels of gold comparisons against what is known of them.

    Returns:
        `comparisons` and `errors`, counted. `scale`: the one factor on log-odds, fitted on the very comparisons that it
        is then measured on, which flatters it where they are few. `overall`, `by_source`, `by_principle`: see
        `quality`; a principle's votes against its own gold preference. `slot_bias`: of votes on decided pairs alone.
    """
    overall: list[tuple[float, bool]] = []
    sources: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    principles: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    decisive: list[Vote] = []
    errors = 0
    for row in gold:
        label = labels.get(row["id"])
        if label is None:
            errors += 1
            continue
        if row["gold"] != 0.5:
            overall.append((label.p, row["gold"] > 0.5))
            sources[row["source"]].append(overall[-1])
        named = row["gold_by_principle"]
        for vote in label.votes:
            known = row["gold"] if named is None else named.get(vote.principle)
            if known is None or known == 0.5:
                continue
            decisive.append(vote)
            if named is not None and vote.p is not None:
                principles[vote.principle].append((vote.p, known > 0.5))
    scale = fit_scale([logit(p) for p, _ in overall], [g for _, g in overall]) if overall else None
    return {
        "comparisons": len(gold),
        "errors": errors,
        "scale": scale,
        "slot_bias": slot_bias(decisive),
        "overall": quality(overall, scale),
        "by_source": {k: quality(v, scale) for k, v in sorted(sources.items())},
        "by_principle": {k: quality(v, scale) for k, v in sorted(principles.items())},
    }


def quality(pairs: Sequence[tuple[float, bool]], scale: float | None = None) -> dict[str, Any]:
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
        "raw": _calibration(p, outcomes) if pairs else None,
        "scaled": _calibration([scaled(x, scale) for x in p], outcomes) if pairs and scale else None,
    }


def scaled(p: float, scale: float) -> float:
    """A probability with its log-odds multiplied (temperature scaling, Guo et al. 2017)."""
    return preference(scale * logit(p), 0.0)


def _calibration(p: Sequence[float], outcomes: Sequence[bool]) -> dict[str, Any]:
    return {
        "brier": brier(p, outcomes),
        "ece": expected_calibration_error(p, outcomes),
        "reliability": reliability(p, outcomes),
    }


def check_gates(run: Run) -> None:
    """Raises Stopped where the certificate does not pass a gate, InputError where it is missing or damaged."""
    gates = run.config.label.gates
    path = run.path("label", "certificate.json")
    if gates == LabelGates():
        return
    if faults := failed(run.facts("label", "certificate.json"), gates):
        raise Stopped(
            f"{'; '.join(faults)}; see {path}. The labels are kept: another bound needs no new ones"
        )


def failed(certificate: Mapping[str, Any], gates: LabelGates) -> list[str]:
    """The gates that are not passed: which one, the value, and by how much."""
    overall = (certificate["gold"] or {}).get("overall") or {}
    values = {
        "max_slot_bias": certificate["slot_bias"],
        "max_ece": (overall.get("raw") or {}).get("ece"),
        "min_accuracy": overall.get("accuracy"),
    }
    faults = []
    for name, value in values.items():
        bound = getattr(gates, name)
        if bound is None:
            continue
        if value is None:
            faults.append(f"label.gates.{name}={bound:g}: nothing was measured")
            continue
        over, side = (bound - value, "below") if name.startswith("min") else (value - bound, "above")
        if over > 0:
            what = name.partition("_")[2].replace("_", " ")
            faults.append(f"label.gates.{name}={bound:g}: {what} is {value:.4g}, {over:.2g} {side}")
    return faults


def _share(flags: Iterable[bool]) -> float | None:
    found = list(flags)
    return sum(found) / len(found) if found else None

"""The labels' certificate: measures of their quality before a reward model is trained on them.

Without gold: slot bias, agreement between principles, ties, abstentions, length bias. Against gold comparisons:
accuracy, Brier score and calibration, overall, per principle and per source. Stage `label` writes it to
label/certificate.json; `label.gates` are bounds on it (gates.py).
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from cai_ray.data.gold_comparisons import GoldComparison
from cai_ray.judging.calibration import fit_scale, measure_calibration
from cai_ray.judging.votes import logit, survives_swap

TIE = 0.05
"""A probability this near to one half prefers neither response."""
_VOTE = ("principle_id", "p_a", "logprob_a", "logprob_b", "logprob_a_swapped", "logprob_b_swapped")
COLUMNS = ["id", "response_a", "response_b", *(f"votes.list.element.{n}" for n in _VOTE), "p_a_raw", "error"]
"""What is read of labels: reasoning, the longest part of a vote, is left out."""


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


def read(tables: Iterable[pa.Table]) -> Iterator[tuple[str, LabelFacts | None]]:
    """Labels of tables with COLUMNS, each with its id; None where the row has an error."""
    for table in tables:
        lengths = (pc.utf8_length(table[name]) for name in ("response_a", "response_b"))
        longer = pc.subtract(*lengths).to_pylist()
        for row, more in zip(
            table.select(["id", "votes", "p_a_raw", "error"]).to_pylist(), longer, strict=True
        ):
            yield row["id"], None if row["error"] is not None else _facts(row, more)


def _facts(row: Mapping[str, Any], longer: int) -> LabelFacts:
    votes = tuple(
        VoteFacts(sys.intern(v["principle_id"]), v["p_a"], survives_swap(v)) for v in row["votes"] or ()
    )
    return LabelFacts(row["p_a_raw"], longer, votes)


def certificate(
    labels: Iterable[LabelFacts | None],
    gold: Sequence[GoldComparison] = (),
    gold_labels: Mapping[str, LabelFacts | None] = MappingProxyType({}),
) -> dict[str, Any]:
    """The certificate as one object; a share of nothing is None.

    Args:
        labels: the run's labels. They are read once and not kept.
        gold: the gold comparisons.
        gold_labels: the feedback model's labels of them, by id.
    """
    counts: Counter[str] = Counter()
    overall, principles = VoteTally(), defaultdict[str, VoteTally](VoteTally)
    agreement, length_bias = Agreement(), LengthBias()
    for label in labels:
        if label is None:
            counts["errors"] += 1
        elif (
            not label.votes
        ):  # equal responses get one half without a question: they say nothing about the labeller
            counts["equal_responses"] += 1
        else:
            counts.update(labels=1, ties=is_tie(label.p))
            agreement.add(label)
            length_bias.add(label)
            for vote in label.votes:
                overall.add(vote)
                principles[vote.principle].add(vote)
    return {
        "labels": counts["labels"],
        "equal_responses": counts["equal_responses"],
        "errors": counts["errors"],
        "votes": overall.votes,
        "slot_bias": overall.slot_bias,
        "ties": _share(counts["ties"], counts["labels"]),
        "abstentions": overall.abstentions,
        "agreement": agreement.summary(),
        "length_bias": length_bias.summary(),
        "principles": {name: principles[name].summary() for name in sorted(principles)},
        "gold": against_gold(gold, gold_labels) if gold else None,
    }


def is_tie(p: float) -> bool:
    return abs(p - 0.5) <= TIE


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


class VoteTally:
    """Counts over votes, taken one by one."""

    def __init__(self) -> None:
        self.votes = self.abstained = self.tied = self.swapped = self.stuck = 0

    def add(self, vote: VoteFacts) -> None:
        self.votes += 1
        if vote.p is None:
            self.abstained += 1
        elif is_tie(vote.p):
            self.tied += 1
        if vote.stuck is not None:
            self.swapped += 1
            self.stuck += vote.stuck

    @property
    def slot_bias(self) -> float | None:
        """Share of votes whose preferred slot survives the swap (docs/method.md, item 5)."""
        return _share(self.stuck, self.swapped)

    @property
    def abstentions(self) -> float | None:
        return _share(self.abstained, self.votes)

    def summary(self) -> dict[str, Any]:
        return {
            "votes": self.votes,
            "slot_bias": self.slot_bias,
            "ties": _share(self.tied, self.votes - self.abstained),
            "abstentions": self.abstentions,
        }


class Agreement:
    """How often two principles that both prefer something prefer the same response, over labels taken one by one."""

    def __init__(self) -> None:
        self.same: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def add(self, label: LabelFacts) -> None:
        sides = [(v.principle, v.p > 0.5) for v in label.votes if v.p is not None and not is_tie(v.p)]
        for (a, prefers), (b, also) in combinations(sorted(sides), 2):
            pair = self.same[a, b]
            pair[0] += prefers == also
            pair[1] += 1

    def summary(self) -> dict[str, Any]:
        """The agreement.

        Returns:
            `pairs`: by one principle and the other, their agreement and n, the comparisons on which neither tied or
            abstained. `mean`: over the pairs, each counted once.
        """
        pairs: dict[str, dict[str, Any]] = defaultdict(dict)
        for (a, b), (k, n) in sorted(self.same.items()):
            pairs[a][b] = {"agreement": k / n, "n": n}
        shares = [k / n for k, n in self.same.values()]
        return {"mean": statistics.fmean(shares) if shares else None, "pairs": dict(pairs)}


class LengthBias:
    """How labels depend on length in characters; over labels that are not ties, of responses that differ in length."""

    def __init__(self) -> None:
        self.n = self.longer_preferred = 0
        # Welford 1962: means, and sums of squares and products of the differences from them.
        self.mean_p = self.mean_longer = self.p_p = self.longer_longer = self.p_longer = 0.0

    def add(self, label: LabelFacts) -> None:
        p, longer = label.p, label.longer
        if not longer or is_tie(p):
            return
        self.n += 1
        self.longer_preferred += (p > 0.5) == (longer > 0)
        from_p, from_longer = p - self.mean_p, longer - self.mean_longer
        self.mean_p += from_p / self.n
        self.mean_longer += from_longer / self.n
        self.p_p += from_p * (p - self.mean_p)
        self.longer_longer += from_longer * (longer - self.mean_longer)
        self.p_longer += from_p * (longer - self.mean_longer)

    def summary(self) -> dict[str, Any]:
        """The bias.

        Returns:
            `longer_preferred`: share of labels that prefer the longer response. `correlation`: Pearson's, of the
            probability of a with how much longer a is; None where one of the two never varies.
        """
        spread = math.sqrt(self.p_p * self.longer_longer)
        return {
            "longer_preferred": _share(self.longer_preferred, self.n),
            "correlation": self.p_longer / spread if spread else None,
            "n": self.n,
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
    decided, errors = VoteTally(), 0
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
            decided.add(vote)
            if by_principle is not None and vote.p is not None:
                principles[vote.principle].append((vote.p, preferred > 0.5))
    scale = fit_scale([logit(p) for p, _ in overall], [g for _, g in overall]) if overall else None
    return {
        "comparisons": len(gold),
        "errors": errors,
        "scale": scale,
        "slot_bias": decided.slot_bias,
        "overall": measure_calibration(overall, scale),
        "by_source": {k: measure_calibration(v, scale) for k, v in sorted(sources.items())},
        "by_principle": {k: measure_calibration(v, scale) for k, v in sorted(principles.items())},
    }

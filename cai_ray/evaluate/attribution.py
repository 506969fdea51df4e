"""From principles to what they did: revision steps, votes, labels, rewards and refusals, counted over all rows.

Rows are read some thousands at a time, as columns: 200,000 comparisons with 16 votes each take seconds and little
memory. Of a vote: *tied* prefers neither response (`certificate.TIE`); *overruled* prefers the response that the label
does not; *decisive* means that without it the label would prefer the other response, or neither.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cai_ray.constitution import Constitution
from cai_ray.judging.certificate import TIE
from cai_ray.storage.run import Run
from cai_ray.storage.tables import iter_tables

SHUFFLES = 20
_EPSILON = 1e-9
_RECONSTRUCTED = 50_000
"""Comparisons that reconstruction looks at, at most: it keeps their votes in memory."""


def attribution(run: Run, constitution: Constitution) -> dict[str, Any]:
    """What each principle did in a run.

    Returns:
        principles: for each id `revision` (drawn, changed, by_family: of the changed), `votes` (cast, abstained, tied,
        with_label, overruled, decisive, by_family: of the decisive), `conflicts` (with which other principle it
        disagreed, and on how many of the comparisons where both preferred one), `margin` (mean and n of the reward of
        the preferred response less the other's where it was decisive), `named` (policy to refusals that name it).
        coverage: ids that were never drawn, never voted, never decisive, and families of red-team prompts that no
        principle names. reconstruction: see `reconstruct`. comparisons: how many were read.
    """
    names = [p.id for p in constitution.principles]
    revised, families = _revisions(run, names)
    voted = Votes(names, [p.weight for p in constitution.principles], run.config.label.combine)
    margins = _margins(run)
    for table in _tables(run, "label", ["id", "family", "votes", "p_a_raw", "error"]):
        voted.add(table.filter(pc.is_null(table["error"])), margins)
    named = _named(run)
    enabled = [p for p in constitution.principles if p.enabled]
    counted = voted.counts()
    cared_for = {f for p in enabled for f in (p.id, *p.families)}
    return {
        "principles": {
            name: {
                "revision": revised[name],
                **counted[name],
                "named": {policy: found[name] for policy, found in named.items() if found[name]},
            }
            for name in names
        },
        "coverage": {
            "never_drawn": [p.id for p in enabled if not revised[p.id]["drawn"]],
            "never_voted": [p.id for p in enabled if not counted[p.id]["votes"]["cast"]],
            "never_decisive": [p.id for p in enabled if not counted[p.id]["votes"]["decisive"]],
            "families_without_principle": sorted(families - cared_for),
        },
        "reconstruction": reconstruct(voted.kept, voted.labels, names),
        "comparisons": voted.comparisons,
    }


def _tables(run: Run, stage: str, columns: list[str], name: str = "part") -> Any:
    return iter_tables(run.path(stage), columns, name)


def _revisions(run: Run, names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """Of each principle how often it was drawn, and how often its revision is not the answer before it."""
    drawn: Counter[str] = Counter()
    changed: dict[str, Counter[str]] = defaultdict(Counter)
    families: set[str] = set()
    for table in _tables(run, "revise", ["kind", "family", "response", "steps", "error"]):
        table = table.filter(pc.and_(pc.is_null(table["error"]), pc.equal(table["kind"], "red_team")))
        families.update(f for f in pc.unique(table["family"]).to_pylist() if f is not None)
        steps = Flat(table["steps"])
        row, first = steps.row, steps.first
        revision = steps.field("revision")
        # What a step starts from: the step before, or the row's own answer.
        before = pc.if_else(
            pa.array(first), table["response"].combine_chunks().take(pa.array(row)), _shifted(revision)
        )
        differs = pc.not_equal(revision, before).to_numpy(zero_copy_only=False)
        principles = np.array(steps.field("principle_id").to_pylist(), dtype=object)
        family = (
            np.array(table["family"].to_pylist(), dtype=object)[row] if len(row) else np.array([], object)
        )
        drawn.update(principles.tolist())
        for principle, name in zip(principles[differs].tolist(), family[differs].tolist(), strict=True):
            changed[principle][name or ""] += 1
    return {
        name: {
            "drawn": drawn[name],
            "changed": changed[name].total(),
            "by_family": {f: n for f, n in changed[name].most_common() if f},
        }
        for name in names
    }, families


class Flat:
    """A column of lists of structs as columns of its parts."""

    def __init__(self, column: pa.ChunkedArray):
        whole = column.combine_chunks()
        self.row = pc.list_parent_indices(whole).to_numpy()
        """Of each part, the place of its row."""
        self.first = np.diff(self.row, prepend=-1) != 0
        self._parts = pc.list_flatten(whole)

    def field(self, name: str) -> pa.Array:
        return pc.struct_field(self._parts, name)


def _shifted(values: pa.Array) -> pa.Array:
    """Each value's predecessor; the first's is null."""
    return pa.concat_arrays([pa.nulls(min(1, len(values)), values.type), values[: max(0, len(values) - 1)]])


class Votes:
    """Counts over comparisons, added some at a time."""

    def __init__(self, names: Sequence[str], weights: Sequence[float], combine: str):
        self.names, self.weights, self.combine = list(names), np.array(weights), combine
        k = len(names)
        self._place = {name: i for i, name in enumerate(names)}
        self.comparisons = 0
        self.sums = {
            n: np.zeros(k, int) for n in ("cast", "abstained", "tied", "with_label", "overruled", "decisive")
        }
        self.against, self.both = np.zeros((k, k), int), np.zeros((k, k), int)
        self.by_family: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(k, int))
        self.margin_sum, self.margin_n = np.zeros(k), np.zeros(k, int)
        self._kept: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def add(self, table: pa.Table, margins: Mapping[str, float]) -> None:
        """Rows with id, family, votes and p_a_raw."""
        probability, abstained = self.matrix(table["votes"])
        label = table["p_a_raw"].to_numpy() - 0.5
        side, preferred = sides(probability), np.sign(np.where(np.abs(label) < _EPSILON, 0, label))
        agrees = side * preferred[:, None]
        decisive = self.decisive(probability, preferred)
        self.comparisons += len(label)
        for name, mask in (
            ("cast", ~np.isnan(probability)),
            ("abstained", abstained),
            ("tied", ~np.isnan(probability) & (side == 0)),
            ("with_label", agrees > 0),
            ("overruled", agrees < 0),
            ("decisive", decisive),
        ):
            self.sums[name] += mask.sum(0)
        a, b = (side > 0).astype(np.int32), (side < 0).astype(np.int32)
        self.against += a.T @ b + b.T @ a
        self.both += (a + b).T @ (a + b)
        family = np.array([f or "" for f in table["family"].to_pylist()], dtype=object)
        for name in set(family.tolist()):
            self.by_family[name] += decisive[family == name].sum(0)
        # A reward margin is of response a over b: turned to the side that the label prefers.
        margin = np.array([margins.get(i, np.nan) for i in table["id"].to_pylist()]) * preferred
        there = ~np.isnan(margin)
        self.margin_sum += (decisive[there] * margin[there, None]).sum(0)
        self.margin_n += decisive[there].sum(0)
        if sum(map(len, self._labels)) < _RECONSTRUCTED:
            self._kept.append(probability.astype(np.float32))
            self._labels.append(preferred)

    def matrix(self, votes: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """Probability of response a by each principle (N, K), NaN where it did not vote or abstained; who abstained."""
        parts = Flat(votes)
        shape = (len(votes), len(self.names))
        probability, abstained = np.full(shape, np.nan), np.zeros(shape, bool)
        # A principle that the constitution has no longer is left out.
        column = np.array(
            [self._place.get(name, -1) for name in parts.field("principle_id").to_pylist()], int
        )
        given = parts.field("p_a").to_numpy(zero_copy_only=False).astype(float)
        known = column >= 0
        probability[parts.row[known], column[known]] = given[known]
        abstained[parts.row[known], column[known]] = np.isnan(given[known])
        return probability, abstained

    def decisive(self, probability: np.ndarray, preferred: np.ndarray) -> np.ndarray:
        """Whether without a vote the label would not prefer what it prefers (N, K)."""
        there = ~np.isnan(probability)
        if self.combine == "log_odds":
            p = np.clip(probability, _EPSILON, 1 - _EPSILON)
            parts = np.where(there, self.weights * np.log(p / (1 - p)), 0.0)
        else:  # the mean is above one half where the weighted distances from one half add up to more than 0
            parts = np.where(there, self.weights * (probability - 0.5), 0.0)
        rest = parts.sum(1, keepdims=True) - parts
        return there & (preferred != 0)[:, None] & (rest * preferred[:, None] <= _EPSILON)

    def counts(self) -> dict[str, dict[str, Any]]:
        found = {}
        for i, name in enumerate(self.names):
            n = int(self.margin_n[i])
            found[name] = {
                "votes": {
                    **{kind: int(counts[i]) for kind, counts in self.sums.items()},
                    "by_family": {f: int(c[i]) for f, c in sorted(self.by_family.items()) if f and c[i]},
                },
                "conflicts": {
                    other: {"against": int(self.against[i, j]), "both": int(self.both[i, j])}
                    for j, other in enumerate(self.names)
                    if self.against[i, j]
                },
                "margin": {"value": float(self.margin_sum[i] / n) if n else None, "n": n},
            }
        return found

    @property
    def kept(self) -> np.ndarray:
        return np.concatenate(self._kept) if self._kept else np.zeros((0, len(self.names)))

    @property
    def labels(self) -> np.ndarray:
        return np.concatenate(self._labels) if self._labels else np.zeros(0)


def sides(probability: np.ndarray) -> np.ndarray:
    """1 where a vote prefers a, -1 where b, 0 where neither or where there is none."""
    distance = np.nan_to_num(probability - 0.5)
    return np.where(np.abs(distance) <= TIE, 0, np.sign(distance)).astype(np.int8)


def reconstruct(
    probability: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """How well each principle's votes alone explain the labels, beside the same votes dealt to other comparisons.

    Args:
        probability: votes for response a (N, K), NaN where there is none.
        labels: which response the label prefers (N), 1, -1 or 0; comparisons with 0 are left out.

    Returns:
        for each principle with a vote: accuracy (a tie is half right); shuffled, its mean over permutations, and
        shuffled_high, the highest of them; n.
    """
    rng = np.random.default_rng(0)
    found = {}
    for i, name in enumerate(names):
        there = ~np.isnan(probability[:, i]) & (labels != 0)
        if not there.any():
            continue
        side, label = sides(probability[there, i]), labels[there]
        chance = [_right(rng.permutation(side), label) for _ in range(SHUFFLES)]
        found[name] = {
            "accuracy": _right(side, label),
            "shuffled": float(np.mean(chance)),
            "shuffled_high": float(np.max(chance)),
            "n": int(there.sum()),
        }
    return found


def _right(side: np.ndarray, label: np.ndarray) -> float:
    return float(np.mean(np.where(side == 0, 0.5, side == label)))


def _margins(run: Run) -> dict[str, float]:
    """Reward of response a less that of b, of the comparisons that `evaluate` scored."""
    return {
        row["id"]: row["reward_a"] - row["reward_b"]
        for table in _tables(run, "evaluate", ["id", "reward_a", "reward_b"], "margins")
        for row in table.to_pylist()
        if row["reward_a"] is not None and row["reward_b"] is not None
    }


def _named(run: Run) -> dict[str, Counter[str]]:
    """Policy to how many of its refusals name a principle."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for table in _tables(run, "evaluate", ["model", "principle_named"]):
        table = table.filter(pc.is_valid(table["principle_named"]))
        for model, named in zip(
            table["model"].to_pylist(), table["principle_named"].to_pylist(), strict=True
        ):
            found[model][named] += 1
    return found

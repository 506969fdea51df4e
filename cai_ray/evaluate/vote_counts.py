"""Votes of principles, counted over many comparisons.

A vote is *tied* if it prefers neither response (`certificate.TIE`), *overruled* if it prefers the response that the
label does not, and *decisive* if without it the label would prefer the other response, or neither.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cai_ray.judging.certificate import TIE

_EPSILON = 1e-9
_RECONSTRUCTED = 50_000
"""Comparisons whose votes are held in memory for the reconstruction, at most."""


class FlatList:
    """A column of lists of structs as columns of its parts."""

    def __init__(self, column: pa.ChunkedArray):
        whole = column.combine_chunks()
        self.row = pc.list_parent_indices(whole).to_numpy()
        """The place of each part's row."""
        self.first = np.diff(self.row, prepend=-1) != 0
        """Whether a part is the first of its row."""
        self._parts = pc.list_flatten(whole)

    def field(self, name: str) -> pa.Array:
        return pc.struct_field(self._parts, name)


class VoteCounts:
    """Counts over comparisons, which are added some thousands at a time."""

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
        self._probabilities: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def add(self, table: pa.Table, margins: Mapping[str, float]) -> None:
        """Adds comparisons.

        Args:
            table: rows with id, family, votes and p_a_raw.
            margins: reward of response a minus that of b, of the comparisons that were scored, by id.
        """
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
        # Margins are those of response a over b; here they are turned to the side that the label prefers.
        margin = np.array([margins.get(i, np.nan) for i in table["id"].to_pylist()]) * preferred
        scored = ~np.isnan(margin)
        self.margin_sum += (decisive[scored] * margin[scored, None]).sum(0)
        self.margin_n += decisive[scored].sum(0)
        if sum(map(len, self._labels)) < _RECONSTRUCTED:
            self._probabilities.append(probability.astype(np.float32))
            self._labels.append(preferred)

    def matrix(self, votes: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """Probability of response a by each principle (N, K), NaN where it did not vote or abstained; who abstained."""
        parts = FlatList(votes)
        shape = (len(votes), len(self.names))
        probability, abstained = np.full(shape, np.nan), np.zeros(shape, bool)
        # A principle that is no longer in the constitution is left out.
        column = np.array(
            [self._place.get(name, -1) for name in parts.field("principle_id").to_pylist()], int
        )
        p_a = parts.field("p_a").to_numpy(zero_copy_only=False).astype(float)
        named = column >= 0
        probability[parts.row[named], column[named]] = p_a[named]
        abstained[parts.row[named], column[named]] = np.isnan(p_a[named])
        return probability, abstained

    def decisive(self, probability: np.ndarray, preferred: np.ndarray) -> np.ndarray:
        """Which votes are decisive (N, K).

        Args:
            preferred: the side that the label prefers (N): 1, -1 or 0.
        """
        voted = ~np.isnan(probability)
        if self.combine == "log_odds":
            p = np.clip(probability, _EPSILON, 1 - _EPSILON)
            parts = np.where(voted, self.weights * np.log(p / (1 - p)), 0.0)
        else:  # the mean is above one half where the weighted distances from one half add up to more than 0
            parts = np.where(voted, self.weights * (probability - 0.5), 0.0)
        rest = parts.sum(1, keepdims=True) - parts
        return voted & (preferred != 0)[:, None] & (rest * preferred[:, None] <= _EPSILON)

    def counts(self) -> dict[str, dict[str, Any]]:
        """By principle: `votes`, `conflicts` and `margin`, as `attribution` returns them."""
        counts = {}
        for i, name in enumerate(self.names):
            n = int(self.margin_n[i])
            counts[name] = {
                "votes": {
                    **{kind: int(sums[i]) for kind, sums in self.sums.items()},
                    "by_family": {f: int(c[i]) for f, c in sorted(self.by_family.items()) if f and c[i]},
                },
                "conflicts": {
                    other: {"against": int(self.against[i, j]), "both": int(self.both[i, j])}
                    for j, other in enumerate(self.names)
                    if self.against[i, j]
                },
                "margin": {"value": float(self.margin_sum[i] / n) if n else None, "n": n},
            }
        return counts

    @property
    def probabilities(self) -> np.ndarray:
        return np.concatenate(self._probabilities) if self._probabilities else np.zeros((0, len(self.names)))

    @property
    def labels(self) -> np.ndarray:
        return np.concatenate(self._labels) if self._labels else np.zeros(0)


def sides(probability: np.ndarray) -> np.ndarray:
    """The side that each vote prefers: 1 for a, -1 for b, 0 for neither or where there is no vote."""
    distance = np.nan_to_num(probability - 0.5)
    return np.where(np.abs(distance) <= TIE, 0, np.sign(distance)).astype(np.int8)

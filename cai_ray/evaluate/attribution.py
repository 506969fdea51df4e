"""Attributes effects to principles: revision steps, votes, labels, rewards and refusals, counted over all rows.

Rows are read some thousands at a time, as columns: 200,000 comparisons with 16 votes each take seconds and little
memory. vote_counts.py says when a vote is tied, overruled or decisive.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cai_ray.constitution import Constitution
from cai_ray.evaluate.reconstruction import reconstruct
from cai_ray.evaluate.vote_counts import FlatList, VoteCounts
from cai_ray.storage.run import Run
from cai_ray.storage.tables import iter_tables


def attribution(run: Run, constitution: Constitution) -> dict[str, Any]:
    """What each principle did in a run.

    Returns:
        `principles`, by id: `revision` (drawn; changed, also by_family); `votes` (cast, abstained, tied,
        with_label, overruled, decisive, and the decisive ones by_family); `conflicts` (for each other principle, on how
        many of the comparisons where both preferred a response they disagreed); `margin` (where it was decisive: mean
        and n of the preferred response's reward minus the other's); `named` (by policy, refusals that name it).
        `coverage`: ids that were never drawn, never voted or never decisive, and families of red-team prompts that no
        principle names. `reconstruction`: see `reconstruct`. `comparisons`: how many were read.
    """
    names = [p.id for p in constitution.principles]
    revised, families = _revisions(run, names)
    votes = VoteCounts(names, [p.weight for p in constitution.principles], run.config.label.judge.combine)
    margins = _margins(run)
    for table in _tables(run, "label", ["id", "family", "votes", "p_a_raw", "error"]):
        votes.add(table.filter(pc.is_null(table["error"])), margins)
    named = _named(run)
    enabled = [p for p in constitution.principles if p.enabled]
    counts = votes.counts()
    covered = {f for p in enabled for f in (p.id, *p.families)}
    return {
        "principles": {
            name: {
                "revision": revised[name],
                **counts[name],
                "named": {policy: refusals[name] for policy, refusals in named.items() if refusals[name]},
            }
            for name in names
        },
        "coverage": {
            "never_drawn": [p.id for p in enabled if not revised[p.id]["drawn"]],
            "never_voted": [p.id for p in enabled if not counts[p.id]["votes"]["cast"]],
            "never_decisive": [p.id for p in enabled if not counts[p.id]["votes"]["decisive"]],
            "families_without_principle": sorted(families - covered),
        },
        "reconstruction": reconstruct(votes.probabilities, votes.labels, names),
        "comparisons": votes.comparisons,
    }


def _tables(run: Run, stage: str, columns: list[str], name: str = "part") -> Any:
    return iter_tables(run.path(stage), columns, name)


def _revisions(run: Run, names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """How often each principle was drawn, and how often its revision differs from the answer before it; and the
    families of the red-team prompts."""
    drawn: Counter[str] = Counter()
    changed: dict[str, Counter[str]] = defaultdict(Counter)
    families: set[str] = set()
    for table in _tables(run, "revise", ["kind", "family", "response", "steps", "error"]):
        table = table.filter(pc.and_(pc.is_null(table["error"]), pc.equal(table["kind"], "red_team")))
        families.update(f for f in pc.unique(table["family"]).to_pylist() if f is not None)
        steps = FlatList(table["steps"])
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


def _shifted(values: pa.Array) -> pa.Array:
    """Each value's predecessor; the first's is null."""
    return pa.concat_arrays([pa.nulls(min(1, len(values)), values.type), values[: max(0, len(values) - 1)]])


def _margins(run: Run) -> dict[str, float]:
    """Reward of response a minus that of b, of the comparisons that `evaluate` scored."""
    return {
        row["id"]: row["reward_a"] - row["reward_b"]
        for table in _tables(run, "evaluate", ["id", "reward_a", "reward_b"], "margins")
        for row in table.to_pylist()
        if row["reward_a"] is not None and row["reward_b"] is not None
    }


def _named(run: Run) -> dict[str, Counter[str]]:
    """How many of each policy's refusals name each principle."""
    refusals: dict[str, Counter[str]] = defaultdict(Counter)
    for table in _tables(run, "evaluate", ["model", "principle_named"]):
        table = table.filter(pc.is_valid(table["principle_named"]))
        for model, named in zip(
            table["model"].to_pylist(), table["principle_named"].to_pylist(), strict=True
        ):
            refusals[model][named] += 1
    return refusals

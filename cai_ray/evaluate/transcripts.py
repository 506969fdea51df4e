"""Chooses the conversations that a report shows from end to end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from cai_ray.storage.records import Revision

UNCHANGED = ""


def choose(revisions: Iterable[Revision], n: int = 3) -> list[Revision]:
    """The n revisions that show most: each changed under a principle of its own.

    Only red-team rows without an error are considered. The principles that changed most rows come first; of a
    principle's rows, those whose family is that principle, then the smallest ids. Where fewer than n principles changed
    anything, further changed rows follow, then unchanged ones. The order of the rows does not matter. At most n rows of
    each principle are held in memory.
    """
    counts: Counter[str] = Counter()
    best: dict[str, list[Revision]] = defaultdict(list)
    for row in revisions:
        if row["kind"] != "red_team" or row["error"] is not None:
            continue
        principle = first_change(row)
        counts[principle] += principle != UNCHANGED
        best[principle] = sorted([*best[principle], row], key=lambda r: (r["family"] != principle, r["id"]))[
            :n
        ]
    same = best.pop(UNCHANGED, [])
    ranked = sorted(best, key=lambda p: (-counts[p], p))
    chosen = [best[p][0] for p in ranked] + [row for p in ranked for row in best[p][1:]] + same
    return chosen[:n]


def first_change(row: Revision) -> str:
    """The principle of the first step whose revision differs from the text before it."""
    before = row["response"]
    for step in row["steps"] or []:
        if step["revision"] != before:
            return str(step["principle_id"])
        before = step["revision"]
    return UNCHANGED

"""Which conversations a report shows from end to end."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple


class Change(NamedTuple):
    """The first step of a row whose revision differs from the text before it."""

    principle_id: str
    row: dict[str, Any]


def choose(revisions: list[dict[str, Any]], n: int = 3) -> list[dict[str, Any]]:
    """The n rows of schema `revisions` that show most: each changed under a principle of its own.

    Red-team rows without error. The principles that changed most rows come first; of a principle's rows, one whose
    family is that principle, then the smallest id. Where fewer than n principles changed anything, further changed
    rows follow, then unchanged ones. The same rows in any order give the same choice.
    """
    rows = sorted(
        (r for r in revisions if r["kind"] == "red_team" and r["error"] is None), key=lambda r: r["id"]
    )
    by_principle: dict[str, list[Change]] = defaultdict(list)
    for row in rows:
        if change := first_change(row):
            by_principle[change.principle_id].append(change)
    for changes in by_principle.values():
        changes.sort(key=lambda c: (c.row["family"] != c.principle_id, c.row["id"]))
    ranked = sorted(by_principle, key=lambda p: (-len(by_principle[p]), p))
    chosen = [by_principle[p][0].row for p in ranked]
    chosen += [change.row for p in ranked for change in by_principle[p][1:]]
    seen = {row["id"] for row in chosen}
    chosen += [row for row in rows if row["id"] not in seen]
    return chosen[:n]


def first_change(row: dict[str, Any]) -> Change | None:
    before = row["response"]
    for step in row["steps"] or []:
        if step["revision"] != before:
            return Change(step["principle_id"], row)
        before = step["revision"]
    return None

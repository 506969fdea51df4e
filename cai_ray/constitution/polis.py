"""Drafts a constitution from people's votes: the CSV export of a Polis conversation.

The export has two files: `comments.csv` (statements: `comment-id`, `comment-body`, and `moderated`, which is -1 for a
statement that was taken down) and `participants-votes.csv` (a row per person: `group-id`, and a column per statement
with 1 for agree, -1 for disagree, 0 for pass, and nothing if the person did not see it). A statement's weight is its
group-informed consensus: the product over opinion groups of the share that agrees, (agrees + 1) / (seen + 2), so that
no majority carries a statement that a group rejects (Small et al. 2021, "Polis: scaling deliberation by mapping high
dimensional opinion spaces"). Weights are scaled to mean 1.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cai_ray.constitution.document import Constitution, parse
from cai_ray.constitution.markdown import default_requests
from cai_ray.errors import InputError

Seen = dict[str, tuple[int, int]]
"""For each group: how many agree, and how many have voted."""


class Statement(NamedTuple):
    id: str
    text: str
    groups: Seen

    @property
    def consensus(self) -> float:
        """In (0, 1): the geometric mean over groups, so that more groups do not mean smaller numbers."""
        shares = [(agrees + 1) / (seen + 2) for agrees, seen in self.groups.values()]
        return math.prod(shares) ** (1 / len(shares)) if shares else 0.0


def draft(comments: str, votes: str, name: str, least: float = 0.6, most: int = 0) -> Constitution:
    """A constitution whose principles are the statements with a consensus of at least `least`, the strongest first.

    Args:
        most: the largest number of principles; 0 for no limit.

    Raises:
        InputError: a file has no such column, a vote is not valid, or no statement is left.
    """
    statements = read(comments, votes)
    agreed = sorted((s for s in statements if s.consensus >= least), key=lambda s: (-s.consensus, s.id))
    agreed = agreed[:most] if most else agreed
    if not agreed:
        best = max((s.consensus for s in statements), default=0.0)
        raise InputError(
            f"votes {votes}: none of {len(statements)} statements has a consensus of {least:g}, the best has {best:.2f}"
            "; use a lower --least"
        )
    mean = sum(s.consensus for s in agreed) / len(agreed)
    principles = [_principle(s, s.consensus / mean) for s in agreed]
    source = (
        f"{len(agreed)} of {len(statements)} statements that people voted on, by group-informed consensus"
    )
    return parse({"name": name, "version": "draft", "source": source, "principles": principles}, name)


def read(comments: str, votes: str) -> list[Statement]:
    """All statements that were not taken down, with their votes."""
    texts = {
        row["comment-id"].strip(): " ".join(row["comment-body"].split())
        for row in _rows(comments, "comment-id", "comment-body")
        if (row.get("moderated") or "").strip() != "-1"
    }
    counts: dict[str, dict[str, list[int]]] = {name: defaultdict(lambda: [0, 0]) for name in texts}
    for number, row in enumerate(_rows(votes, "group-id"), 2):
        for name in texts.keys() & row.keys():
            vote = (row[name] or "").strip()
            if not vote:
                continue
            if vote not in ("1", "0", "-1", "1.0", "0.0", "-1.0"):
                raise InputError(
                    f"votes {votes}: line {number}: {vote!r} for statement {name} is not a vote; "
                    "use 1, 0, -1 or nothing"
                )
            seen = counts[name][(row["group-id"] or "").strip()]
            seen[0] += vote.startswith("1")
            seen[1] += 1
    return [
        Statement(name, text, {group: (a, n) for group, (a, n) in sorted(counts[name].items())})
        for name, text in texts.items()
        if text
    ]


def _rows(path: str, *needed: str) -> Iterator[dict[str, Any]]:
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if missing := [name for name in needed if name not in (rows.fieldnames or ())]:
                raise InputError(
                    f"votes {path}: column {missing[0]!r} is missing; give the CSV that Polis exports"
                )
            yield from rows
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"votes {path}: cannot be read ({e}); give the CSV that Polis exports") from e


def _principle(statement: Statement, weight: float) -> dict[str, Any]:
    people = sum(n for _, n in statement.groups.values())
    shares = ", ".join(f"{group or 'no group'} {a} of {n}" for group, (a, n) in statement.groups.items())
    words = statement.text.split()
    title = " ".join(words[:6]) + (" …" if len(words) > 6 else "")
    return {
        **default_requests(statement.text),
        "id": f"statement-{statement.id}",
        "title": title,
        "text": statement.text,
        "weight": round(weight, 3),
        "source": f"statement {statement.id}, on which {people} people voted; agree by group: {shares}",
    }

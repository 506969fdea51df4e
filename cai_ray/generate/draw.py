"""Which principles a row meets: rendezvous hashing, so that draws depend on the row and the principle alone.

Each principle gets a number from the hash of (seed, row id, round, principle id), shaped so that the largest one
falls on a principle with probability proportional to its weight (weighted rendezvous hashing, Schindelhauer and
Schomaker 2005: -weight / ln(u)). Order of processing plays no part, and a principle that comes or goes redraws
only the rows that it wins or had won (docs/method.md, item 7).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from cai_ray.constitution import Principle


def draw(
    principles: Sequence[Principle], n: int, *, seed: int, row_id: str, replacement: bool
) -> list[Principle | None]:
    """`n` draws for a row. A disabled principle keeps its slot, which is None, so that the others' draws stay.

    Without replacement there are at most as many draws as principles.
    """
    if replacement:
        drawn = [max(principles, key=lambda p, r=r: _score(p, seed, row_id, r)) for r in range(n)]  # type: ignore[misc]
    else:
        drawn = sorted(principles, key=lambda p: -_score(p, seed, row_id, 0))[:n]
    return [p if p.enabled else None for p in drawn]


def _score(principle: Principle, seed: int, row_id: str, round_: int) -> float:
    digest = hashlib.sha256(f"{seed}\0{row_id}\0{round_}\0{principle.id}".encode()).digest()
    u = (int.from_bytes(digest[:8], "big") + 0.5) / 2.0**64
    return -principle.weight / math.log(u)

"""Exports comparisons that people should discuss: orders or principles disagree, or the label is near one half.

People fill in `preferred` (`a` or `b`; an empty one is skipped). The file can then be read as human comparisons:
`rm.human: [{path: FILE, about: harmless}]`.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping
from typing import Any

from cai_ray.constitution import Constitution
from cai_ray.errors import InputError
from cai_ray.judging.certificate import is_tie
from cai_ray.judging.votes import survives_swap
from cai_ray.storage import files
from cai_ray.storage.run import Run
from cai_ray.storage.tables import iter_tables

COLUMNS = ["id", "messages", "family", "response_a", "response_b", "votes", "p_a_raw", "error"]


def export(run: Run, constitution: Constitution, path: str, limit: int) -> dict[str, int]:
    """Writes the most contested comparisons as JSON lines.

    Returns:
        The number of contested comparisons by reason, and how many were `written`.

    Raises:
        InputError: the run has no labels, or the file exists and may hold people's answers.
    """
    if run.manifest("label") is None:
        raise InputError(f"{run.root}: label is not complete; run `cai-ray label` first")
    if files.exists(path):
        raise InputError(f"{path}: already exists, and may hold people's answers; choose another --out")
    titles = {p.id: p.title for p in constitution.principles}
    counts = dict.fromkeys(("principles", "orders", "unsure"), 0)
    queue: list[tuple[float, str, dict[str, Any]]] = []
    for row in _rows(run):
        reasons, weight = contested(row)
        for reason in reasons:
            counts[reason] += 1
        if reasons:
            item = (weight, row["id"], {**row, "why": reasons})
            (heapq.heappush if len(queue) < limit else heapq.heappushpop)(queue, item)
    rows = [_exported(row, titles) for _, _, row in sorted(queue, key=lambda item: (-item[0], item[1]))]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files.write_bytes(path, text.encode())
    return {**counts, "written": len(rows)}


def contested(row: Mapping[str, Any]) -> tuple[list[str], float]:
    """The reasons why a label is contested, and how contested it is.

    That is the weight of the weaker side of its votes, plus one for each reason.
    """
    votes = [v for v in row["votes"] or () if v["p_a"] is not None]
    if not votes:
        return [], 0.0
    for_a = sum(v["p_a"] - 0.5 for v in votes if v["p_a"] > 0.5 and not is_tie(v["p_a"]))
    for_b = sum(0.5 - v["p_a"] for v in votes if v["p_a"] < 0.5 and not is_tie(v["p_a"]))
    # A vote that is near one half in both orders has no side that swapping the responses could change.
    stuck = [v for v in votes if survives_swap(v) and not _undecided(v)]
    reasons = (
        ["principles"] * bool(for_a and for_b)
        + ["orders"] * bool(stuck)
        + ["unsure"] * is_tie(row["p_a_raw"])
    )
    return reasons, min(for_a, for_b) + len(reasons)


def _undecided(vote: Mapping[str, Any]) -> bool:
    """Whether both orders are near one half, so that slot bias is not a disagreement."""
    gaps = (
        vote["logprob_a"] - vote["logprob_b"],
        vote["logprob_a_swapped"] - vote["logprob_b_swapped"],
    )
    return all(abs(gap) < 0.2 for gap in gaps)  # log-odds of a probability within TIE of one half


def _rows(run: Run) -> Iterator[dict[str, Any]]:
    for table in iter_tables(run.path("label"), COLUMNS):
        yield from (row for row in table.to_pylist() if row["error"] is None)


def _exported(row: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    return {
        **{name: row[name] for name in ("id", "messages", "family", "response_a", "response_b", "why")},
        "p_a": row["p_a_raw"],
        "votes": [
            {"principle": v["principle_id"], "title": titles.get(v["principle_id"]), "p_a": v["p_a"]}
            for v in row["votes"]
        ],
        "preferred": None,
    }

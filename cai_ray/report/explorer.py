"""The sample that the page's browser shows: revised prompts and judged answers, from files of any size.

Ids are hashes, so the smallest of each family are a random sample, which is the same in every report of a run. Files
are read some thousands of rows at a time.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from typing import Any

import pyarrow.compute as pc

from cai_ray.constitution import Constitution
from cai_ray.report.conversations import assemble, by_prompt
from cai_ray.report.roles import in_order
from cai_ray.storage.run import Run
from cai_ray.storage.tables import iter_tables

ROWS = 240
"""Most entries of either kind."""
CHARACTERS = 2_500_000
"""Most characters of all texts together: a page is opened at once, and sent by mail."""
VERDICTS = ("harmful", "helpful", "refused", "evasive", "malformed", "principle_named", "reward")


def read(run: Run, constitution: Constitution) -> dict[str, Any]:
    """Entries of the browser, and how many rows they are a sample of.

    Returns:
        revisions: as `conversations.assemble` makes them, with `prompt_id`, `kind`, `changed_by` (ids of principles
        whose step changed the answer) and `outcome` (revised, unchanged). answers: prompt_id, messages, kind, family,
        `policies` (name to text and verdicts) and `outcome` of the last policy. total: rows of either kind in the run.
    """
    ids, revised = _sample(run, "revise", "id", "red_team")
    prompts, judged = _sample(run, "evaluate", "prompt_id", None)
    rows = list(run.rows_where("revise", "id", ids))
    labels = by_prompt(run.rows_where("label", "prompt_id", {row["prompt_id"] for row in rows}))
    revisions = [_revision(row, constitution, labels) for row in sorted(rows, key=lambda r: r["id"])]
    answers = _answers(list(run.rows_where("evaluate", "prompt_id", prompts)))
    return {
        "revisions": _within(revisions, CHARACTERS // 2),
        "answers": _within(answers, CHARACTERS // 2),
        "total": {"revisions": revised, "answers": judged},
    }


def _revision(
    row: dict[str, Any], constitution: Constitution, labels: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    entry = assemble(row, constitution, {}, {}, labels)
    changed = [step["principle_id"] for step in entry["steps"] if step["changed"]]
    return {
        **entry,
        "prompt_id": row["prompt_id"],
        "kind": row["kind"],
        "changed_by": list(dict.fromkeys(changed)),
        "outcome": "revised" if changed else "unchanged",
    }


def _sample(run: Run, stage: str, column: str, kind: str | None) -> tuple[set[str], int]:
    """The smallest ids of each family, about as many of each; and the number of different ids."""
    ids_of: dict[str, set[str]] = defaultdict(set)
    for table in iter_tables(run.path(stage), [column, "kind", "family", "error"]):
        keep = pc.is_null(table["error"])
        table = table.filter(keep if kind is None else pc.and_(keep, pc.equal(table["kind"], kind)))
        for row_id, family in zip(table[column].to_pylist(), table["family"].to_pylist(), strict=True):
            ids_of[family or ""].add(row_id)
    each = -(-ROWS // max(1, len(ids_of)))
    sample = {row_id for ids in ids_of.values() for row_id in heapq.nsmallest(each, ids)}
    return sample, sum(map(len, ids_of.values()))


def _answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the policies say to each prompt, and what the last of them does."""
    grouped: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        grouped[row["prompt_id"]][row["model"]] = row
    entries = []
    for prompt, policies in sorted(grouped.items()):
        order = in_order(policies)
        last = policies["rl" if "rl" in policies else order[-1]]
        entries.append(
            {
                "prompt_id": prompt,
                **{name: last[name] for name in ("messages", "kind", "family")},
                "policies": {
                    m: {"text": policies[m]["response"], **{v: policies[m].get(v) for v in VERDICTS}}
                    for m in order
                },
                "outcome": outcome(last),
            }
        )
    return entries


def outcome(row: dict[str, Any]) -> str:
    """A word for what an answer does."""
    if row["malformed"]:
        return "malformed"
    if row["harmful"]:
        return "harmful"
    if row["refused"]:
        return "refused" if row["kind"] == "red_team" else "over-refused"
    return "helped" if row["helpful"] else "answered"


def _within(entries: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """The first entries that have at most `budget` characters together, but at least one."""
    fitting: list[dict[str, Any]] = []
    for entry in entries:
        budget -= _characters(entry)
        if budget < 0 and fitting:
            break
        fitting.append(entry)
    return fitting


def _characters(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 0

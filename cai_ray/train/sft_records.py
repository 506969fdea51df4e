"""Which records the SL-CAI policy is trained on, of the rows of `revise`.

There may be millions: a first reading chooses and keeps no more than ids, a second one makes the records.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cai_ray.config.training import SftConfig
from cai_ray.judging.quality import kind
from cai_ray.storage.ids import IdSet, id_number
from cai_ray.storage.records import derive_id
from cai_ray.train.dialogues import as_numpy


class Choice(NamedTuple):
    """The records that are trained on, found by a first reading of the revisions."""

    ids: IdSet
    kinds: Counter[str]
    """Revisions by kind (`judging.quality.kind`), including those that `sft.drop` leaves out."""
    cut: Counter[str]
    """Texts that are left out because they were cut off (`truncated`), or because the cut fell before they began, so
    that there is nothing to train on (`no_text`)."""
    rows: int
    errors: int


class Candidate(NamedTuple):
    """A record that could be trained on."""

    record: dict[str, Any]
    step: dict[str, Any] | None = None
    """The step whose revision it is; None where it is a first response."""
    before: str = ""
    """The response that the step starts from."""


def choose_records(
    rows: Iterable[dict[str, Any]], cfg: SftConfig, seed: int, critiques: Sequence[str] = ()
) -> Choice:
    """Chooses among the records of rows of schema `revisions`; rows with an error have none.

    Revisions of a kind in `sft.drop` are left out. Helpfulness samples are drawn by their ids, at most
    `helpful_per_revision` times as many as there are revisions.

    Args:
        critiques: rules of the template set that tell a critique from a revision.
    """
    kinds, cut = Counter[str](), Counter({"truncated": 0, "no_text": 0})
    count = errors = 0
    revisions, helpful, draws = array("Q"), array("Q"), array("Q")
    for row in rows:
        count, errors = count + 1, errors + bool(row["error"])
        for record, step, before in candidates(row, cfg, cut):
            number = id_number(record["id"])
            if record["kind"] == "helpful":
                helpful.append(number)
                draws.append(id_number(derive_id(seed, "helpful", record["id"])))
                continue
            what = kind(step["revision"], before, step.get("critique") or "", critiques) if step else "sound"
            kinds[what] += 1
            if what not in cfg.drop:
                revisions.append(number)
    if revisions:
        drawn = np.argsort(as_numpy(draws), kind="stable")[: round(cfg.helpful_per_revision * len(revisions))]
        helpful = array("Q", as_numpy(helpful)[drawn].tobytes())
    return Choice(IdSet.of_numbers(revisions + helpful), kinds, cut, count, errors)


def to_records(
    rows: Iterable[dict[str, Any]], cfg: SftConfig, chosen: Container[str]
) -> Iterator[dict[str, Any]]:
    """Rows of schema `sft`: the records that were chosen (`choose_records`), in the order of their rows."""
    for row in rows:
        yield from (record for record, _, _ in candidates(row, cfg) if record["id"] in chosen)


def candidates(row: dict[str, Any], cfg: SftConfig, cut: Counter[str] | None = None) -> Iterator[Candidate]:
    """A helpfulness sample; or a row's last revision, every round's, or those of the first (`sft.revisions`).

    Args:
        cut: counts the texts that are left out as cut off (`Choice.cut`).
    """
    cut = Counter() if cut is None else cut
    if row["error"]:
        return
    without_text = row["truncated"] and not row["response"]
    if row["kind"] == "helpful":
        if without_text:
            cut["no_text"] += 1
        else:
            yield Candidate(_record(row, row["response"], "helpful", truncated=row["truncated"]))
        return
    rounds = [s for s in row["steps"] if cfg.revisions != "up_to_n" or s["round"] <= cfg.up_to]
    steps = [s for s in rounds if not s.get("left_out")]
    before = [row["response"], *(s["revision"] for s in steps)]
    pairs = list(zip(steps, before, strict=False))
    for step, response in pairs[-1:] if cfg.revisions == "final" else pairs:
        truncated = bool(step.get("revision_truncated"))
        if truncated and cfg.truncated == "drop":
            cut["truncated"] += 1
        else:
            record = _record(row, step["revision"], "revision", step["round"], truncated)
            yield Candidate(record, step, response)
    if steps:
        return
    if rounds or without_text:  # no round made a revision
        cut["no_text"] += 1
    elif row["truncated"] and cfg.truncated == "drop":
        cut["truncated"] += 1
    else:  # every slot was a disabled principle's: the response needed no revision
        yield Candidate(_record(row, row["response"], "revision", truncated=row["truncated"]))


def _record(
    row: dict[str, Any], response: str, kind: str, number: int = 0, truncated: bool = False
) -> dict[str, Any]:
    return {
        "id": derive_id("sft", row["id"], number),
        "messages": [*row["messages"], {"role": "assistant", "content": response}],
        "kind": kind,
        "truncated": truncated,
        "source_id": row["id"],
    }

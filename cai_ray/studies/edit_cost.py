"""What it would cost to bring a run up to date with an edited constitution, before anything is started."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cai_ray.constitution import Constitution
from cai_ray.errors import InputError
from cai_ray.generate import label, revise
from cai_ray.generate.draw import draw
from cai_ray.stages import stages_of, upstream_of
from cai_ray.storage.run import Run

KEPT = tuple(upstream_of("label", "ppo"))


def cost(run: Run, after: Constitution) -> dict[str, list[dict[str, Any]]]:
    """For each stage of the run: engine calls now and from nothing, and the seconds that it took last time.

    Returns:
        `again`: all that the edit reaches runs again; `kept`: the comparisons stay (`--keep revise,sft,compare`). Each
        is a list of stage, calls, all_calls (None of a stage that asks no engine, or not by rows), at_most (what a
        revised answer becomes is not known before), seconds (None of a stage that does not run again).

    Raises:
        InputError: the run has no labels yet.
    """
    if run.manifest("revise") is None or run.manifest("label") is None:
        raise InputError(
            f"{run.root}: revise and label are not complete; the cost of an edit shows beside them"
        )
    *revisions, rows = _revisions(run, after)
    votes, changed = _votes(run, after), rows > 0
    voted = votes[0] > 0 or after.sha != run.constitution().sha
    samples = 2 * (run.manifest("compare") or {}).get("rows_out", 0)
    calls = {"revise": revisions, "compare": (samples * changed, samples), "label": votes}
    again, kept = [], []
    for stage in stages_of(run.config.method):
        done = run.manifest(stage)
        if done is None:
            continue
        reached = changed or (voted and stage not in KEPT)
        now, whole = calls.get(stage, (None, None))
        if stage == "label" and changed:  # other answers are compared
            now = whole
        row = {"stage": stage, "calls": now, "all_calls": whole, "at_most": stage == "revise" and changed}
        again.append({**row, "seconds": done["seconds"] if reached else None})
        if stage in KEPT:
            row |= {"calls": whole and 0, "at_most": False}
        elif stage == "label":
            row["calls"] = votes[0]
        kept.append({**row, "seconds": done["seconds"] if voted and stage not in KEPT else None})
    return {"again": again, "kept": kept}


def _revisions(run: Run, after: Constitution) -> tuple[int, int, int]:
    """Engine calls of stage `revise`, those from nothing, and rows that change. From the first step that an edit
    reaches all are new; a row that failed is tried again, and mostly fails again."""
    chain = replace(revise.make_chain(run), constitution=after)
    config, calls, whole, changed = run.config.revise, 0, 0, 0
    per_step = 2 if config.critique else 1
    for row in run.each_row("revise", ["id", "messages", "kind", "response", "steps", "error"]):
        failed = row["error"] is not None
        whole, calls = whole + 1, calls + failed
        if row["kind"] == "helpful":
            continue
        drawn = draw(
            after.principles, config.rounds, seed=run.config.seed, row_id=row["id"],
            replacement=config.draw == "with_replacement",
        )  # fmt: skip
        slots = [(number, p) for number, p in enumerate(drawn) if p is not None]
        whole += per_step * len(slots)
        known = {step["key"]: step["revision"] for step in row["steps"] or ()}
        kept, current = [], row["response"]
        for number, principle in slots if not failed else ():
            key = chain.key(row, current, number, principle)
            if key not in known:
                break
            kept.append(key)
            current = known[key]
        calls += per_step * (len(slots) - len(kept))
        changed += not failed and kept != list(known)
    return calls, whole, changed


def _votes(run: Run, after: Constitution) -> tuple[int, int]:
    """Engine calls of stage `label` on the comparisons that are there, and those from nothing."""
    chain = replace(label.make_chain(run), constitution=after)
    config = run.config.label
    per_vote = 2 if config.mode == "score" else (1 + config.both_orders) * (2 if config.mode == "cot" else 1)
    calls = whole = 0
    for name in ("part", "gold") if config.gold else ("part",):
        for row in run.each_row("label", ["id", "messages", "response_a", "response_b", "votes"], name):
            if row["response_a"] == row["response_b"]:
                continue
            known = {vote["key"] for vote in row["votes"] or ()}
            keys = [chain.key(row, p) for p in chain.voters(row)]
            whole += per_vote * len(keys)
            calls += per_vote * sum(key not in known for key in keys)
    return calls, whole


def lines(found: dict[str, list[dict[str, Any]]], root: str) -> list[list[str]]:
    """Two tables for a terminal, as rows of cells."""
    tables = []
    for title, rows in (
        (f"to bring {root} up to date", found["again"]),
        (f"with --keep {','.join(KEPT)}", found["kept"]),
    ):
        tables.append([title, "engine calls", "of", "took"])
        for row in rows:
            calls = "" if row["calls"] is None else f"{'up to ' * row['at_most']}{row['calls']}"
            seconds = "not run again" if row["seconds"] is None else f"{row['seconds']:.0f} s"
            tables.append(
                [row["stage"], calls, "" if row["all_calls"] is None else str(row["all_calls"]), seconds]
            )
    return tables

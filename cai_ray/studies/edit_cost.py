"""Computes what it would cost to bring a run up to date with an edited constitution. Nothing is started."""

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
    """The engine calls of each stage, for the edit and from scratch, and the seconds that it took last time.

    Returns:
        `again`: everything that the edit affects runs again. `kept`: the comparisons stay (`--keep
        revise,sft,compare`). Each is a list of rows with stage, calls, all_calls (None for a stage that does not ask
        engines by rows), at_most (whether the calls are an upper bound, since revised answers are not known yet), and
        seconds (None for a stage that does not run again).

    Raises:
        InputError: the run has no labels yet.
    """
    if run.manifest("revise") is None or run.manifest("label") is None:
        raise InputError(
            f"{run.root}: revise and label are not complete; run them first, the cost of an edit is computed from them"
        )
    *revisions, rows = _revisions(run, after)
    votes, changed = _votes(run, after), rows > 0
    voted = votes[0] > 0 or after.sha != run.constitution().sha
    samples = 2 * (run.manifest("compare") or {}).get("rows_out", 0)
    calls = {"revise": revisions, "compare": (samples * changed, samples), "label": votes}
    again, with_comparisons_kept = [], []
    for stage in stages_of(run.config.method):
        done = run.manifest(stage)
        if done is None:
            continue
        reached = changed or (voted and stage not in KEPT)
        now, whole = calls.get(stage, (None, None))
        if stage == "label" and changed:  # the answers to compare are new
            now = whole
        row = {"stage": stage, "calls": now, "all_calls": whole, "at_most": stage == "revise" and changed}
        again.append({**row, "seconds": done["seconds"] if reached else None})
        if stage in KEPT:
            row |= {"calls": whole and 0, "at_most": False}
        elif stage == "label":
            row["calls"] = votes[0]
        with_comparisons_kept.append(
            {**row, "seconds": done["seconds"] if voted and stage not in KEPT else None}
        )
    return {"again": again, "kept": with_comparisons_kept}


def _revisions(run: Run, after: Constitution) -> tuple[int, int, int]:
    """Engine calls of stage `revise` for the edit and from scratch, and the number of rows that change.

    From the first step that an edit affects, all steps are new. A row that failed is tried again, and mostly fails
    again.
    """
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
        revisions = {step["key"]: step["revision"] for step in row["steps"] or ()}
        reused, current = [], row["response"]
        for number, principle in slots if not failed else ():
            key = chain.key(row, current, number, principle)
            if key not in revisions:
                break
            reused.append(key)
            current = revisions[key]
        calls += per_step * (len(slots) - len(reused))
        changed += not failed and reused != list(revisions)
    return calls, whole, changed


def _votes(run: Run, after: Constitution) -> tuple[int, int]:
    """Engine calls of stage `label` on the existing comparisons, for the edit and from scratch."""
    config, judge = run.config.label, run.config.label.judge
    chain = label.make_chain(run)
    if judge.constitution is None:  # else the edit does not reach the document that it judges by
        chain = replace(chain, constitution=after)
    if judge.ask == "response":
        per_vote = 2
    else:
        per_vote = (1 + judge.both_orders) * (2 if judge.answer == "reasoned" else 1)
    calls = whole = 0
    for name in ("part", "gold") if config.gold else ("part",):
        for row in run.each_row("label", ["id", "messages", "response_a", "response_b", "votes"], name):
            if row["response_a"] == row["response_b"]:
                continue
            cached_votes = {vote["key"] for vote in row["votes"] or ()}
            keys = [chain.key(row, p) for p in chain.voters(row)]
            whole += per_vote * len(keys)
            calls += per_vote * sum(key not in cached_votes for key in keys)
    return calls, whole


def lines(result: dict[str, list[dict[str, Any]]], root: str) -> list[list[str]]:
    """What `cost` returns, as the cells of two tables for a terminal."""
    tables = []
    for title, rows in (
        (f"to bring {root} up to date", result["again"]),
        (f"with --keep {','.join(KEPT)}", result["kept"]),
    ):
        tables.append([title, "engine calls", "of", "took"])
        for row in rows:
            calls = "" if row["calls"] is None else f"{'up to ' * row['at_most']}{row['calls']}"
            seconds = "not run again" if row["seconds"] is None else f"{row['seconds']:.0f} s"
            tables.append(
                [row["stage"], calls, "" if row["all_calls"] is None else str(row["all_calls"]), seconds]
            )
    return tables

"""Transcripts to read from end to end: prompt, answer, critiques, revisions, and the final answer of each policy."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from cai_ray.constitution import Constitution
from cai_ray.evaluate.transcripts import choose
from cai_ray.storage.run import Run


def read(run: Run, constitution: Constitution, n: int = 3) -> list[dict[str, Any]]:
    """The report's transcripts.

    The policies' answers to the same prompts come from what `evaluate` wrote beside its judgements
    (RUN/evaluate/transcripts-*.parquet). If it wrote none, the last rollout of the prompt that PPO kept stands in.
    """
    answers = by_prompt(run.each_row("evaluate", name="transcripts"))
    prompts = {row["prompt_id"] for rows in answers.values() for row in rows}
    chosen = choose(run.rows_where("revise", "prompt_id", prompts), n)
    chosen = chosen or choose(run.each_row("revise"), n)
    prompts = {row["prompt_id"] for row in chosen}
    labels = by_prompt(run.rows_where("label", "prompt_id", prompts))
    rollouts = by_prompt(run.each_row("ppo") if run.config.method == "ppo" else ())
    return [assemble(row, constitution, answers, rollouts, labels) for row in chosen]


def assemble(
    row: Mapping[str, Any],
    constitution: Constitution,
    answers: dict[str, list[dict[str, Any]]],
    rollouts: dict[str, list[dict[str, Any]]],
    labels: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """One transcript from a revision row and the rows on the same prompt, each keyed by its conversation."""
    key = _key(row["messages"])
    titles = {p.id: p.title for p in constitution.principles}
    final: dict[str, dict[str, Any]] = {
        a["model"]: {"text": a["response"], "reward": a["reward"]}
        for a in answers.get(key, [])
        if a["response"] is not None
    }
    if "rl" not in final and rollouts.get(key):
        last = max(rollouts[key], key=lambda r: r["step"])
        final["rl"] = {"text": last["response"], "reward": last["reward"]}
    transcript = {
        "id": row["id"],
        "family": row["family"],
        "messages": row["messages"],
        "response": row["response"],
        "steps": _steps(row, titles),
        "answers": final,
    }
    if compared := [label for label in labels.get(key, []) if label["votes"] and label["error"] is None]:
        transcript["comparison"] = _comparison(compared[0], titles)
    return transcript


def _steps(row: Mapping[str, Any], titles: dict[str, str]) -> list[dict[str, Any]]:
    """The rounds of critique and revision, and whether each changed the answer."""
    steps, before = [], row["response"]
    for step in row["steps"]:
        steps.append(
            {
                "round": step["round"],
                "principle_id": step["principle_id"],
                "title": titles.get(step["principle_id"], step["principle_id"]),
                "critique": step["critique"],
                "critique_unused": bool(step.get("critique_truncated")),
                "revision": step["revision"],
                "revision_cut": bool(step.get("revision_truncated")),
                "left_out": step.get("left_out"),
                "changed": step["revision"] != before,
            }
        )
        before = step["revision"]
    return steps


def _comparison(label: dict[str, Any], titles: dict[str, str]) -> dict[str, Any]:
    votes = [
        {"title": titles.get(v["principle_id"], v["principle_id"]), "p_a": v["p_a"]}
        for v in label["votes"]
        if v["p_a"] is not None  # else it abstained
    ]
    return {
        "response_a": label["response_a"],
        "response_b": label["response_b"],
        "p_a": label["p_a"],
        "votes": votes,
    }


def by_prompt(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by their conversation, sorted by id if they have one."""
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[_key(row["messages"])].append(row)
    return {key: sorted(alike, key=lambda r: r.get("id") or "") for key, alike in grouped.items()}


def _key(messages: list[dict[str, str]]) -> str:
    return json.dumps([[m["role"], m["content"]] for m in messages])

"""The chain behind a row: what was asked, each step and its principle, votes, rewards, and what the policies say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from cai_ray.constitution import Constitution
from cai_ray.errors import InputError
from cai_ray.report import text
from cai_ray.report.transcripts import assemble
from cai_ray.storage.run import Run
from cai_ray.storage.tables import has_rows, read_tables

ROWS = (
    ("revise", "part"),
    ("label", "part"),
    ("compare", "part"),
    ("evaluate", "part"),
    ("evaluate", "transcripts"),
)
"""Where rows with an id and a prompt's id stand."""
TOLD = ("harmful", "helpful", "refused", "malformed", "insult", "principle_named")


class Found(NamedTuple):
    stage: str
    id: str
    prompt_id: str


def explain(run: Run, constitution: Constitution, id: str) -> dict[str, Any]:
    """All that the run knows of the prompt of a row.

    Args:
        id: of a prompt, a revision, a comparison, a label or a judged answer, or how it begins.

    Returns:
        `found`, the stage and id of the row; `messages`, `kind`, `family`; `revisions`, with their steps;
        `comparisons`, with each principle's vote; `rollouts` that PPO kept; `answers` by policy.

    Raises:
        InputError: no row has such an id, or rows of several prompts have.
    """
    found = _find(run, id)
    rows = {place: _of_prompt(run, *place, found.prompt_id) for place in ROWS}
    first = next(row for some in rows.values() for row in some)
    titles = {p.id: p.title for p in constitution.principles}
    answers: dict[str, list[dict[str, Any]]] = {}
    for row in rows["evaluate", "part"] + rows["evaluate", "transcripts"]:
        if row["response"] is not None:
            told = {name: row[name] for name in ("response", "reward", *TOLD)}
            answers.setdefault(row["model"], []).append(told)
    return {
        "found": found._asdict(),
        **{name: first[name] for name in ("messages", "kind", "family")},
        "revisions": [
            assemble(row, constitution, {}, {}, {}) for row in rows["revise", "part"] if row["error"] is None
        ],
        "comparisons": [_comparison(row, titles) for row in rows["label", "part"] if row["error"] is None],
        "rollouts": [
            {name: row[name] for name in ("step", "policy_version", "response", "reward", "kl_reference")}
            for row in _table(
                run,
                "ppo",
                "part",
                ["step", "policy_version", "messages", "response", "reward", "kl_reference"],
            )
            if row["messages"] == first["messages"]
        ],
        "answers": {name: answers[name] for name in text.in_order(answers)},
    }


def lines(told: dict[str, Any]) -> Iterator[str]:
    """For a terminal."""
    found = told["found"]
    yield f"{found['stage']} {found['id']}, prompt {found['prompt_id']} ({told['kind']}, {told['family']})"
    for message in told["messages"]:
        yield text.said("prompt" if message["role"] == "user" else message["role"], message["content"])
    for item in told["revisions"]:
        yield "\nRevision"
        yield text.said("first answer", item["response"])
        for step in item["steps"]:
            yield text.said(f"critique {step['round']}", f"[{step['title']}] {step['critique'] or '(none)'}")
            yield text.said(
                f"revision {step['round']}", step["revision"] if step["changed"] else "(unchanged)"
            )
    for item in told["comparisons"]:
        yield f"\nComparison {item['id']}"
        yield text.said("a", item["response_a"])
        yield text.said("b", item["response_b"])
        yield text.said("label", f"{text.percent(item['p_a'])} for a")
        for vote in item["votes"]:
            said = vote["abstained"] or f"{text.percent(vote['p_a'])} for a, {vote['weighs']}"
            yield text.said("", f"[{vote['title']}] {said}")
    if told["rollouts"]:
        yield "\nRollouts of PPO"
        for row in told["rollouts"]:
            yield text.said(f"step {row['step']}", f"{row['response']}  (reward {row['reward']:+.2f})")
    if told["answers"]:
        yield "\nAnswers"
        for model, some in told["answers"].items():
            for row in some:
                marks = [name for name in TOLD[:-1] if row[name]]
                marks += [f"names {row['principle_named']}"] * bool(row["principle_named"])
                marks += [] if row["reward"] is None else [f"reward {row['reward']:+.2f}"]
                yield text.said(
                    text.name_of(model), row["response"] + (f"  ({', '.join(marks)})" if marks else "")
                )


def _find(run: Run, id: str) -> Found:
    found: dict[str, Found] = {}
    for stage, name in ROWS:
        table = _columns(run, stage, name, ["id", "prompt_id"])
        if table is None:
            continue
        for column in ("id", "prompt_id"):
            for row in table.filter(pc.starts_with(table[column], id)).to_pylist():
                found.setdefault(row["prompt_id"], Found(stage, row[column], row["prompt_id"]))
                if len(found) > 1:
                    one, two = found.values()
                    raise InputError(
                        f"id {id}: begins those of several prompts ({one.id}, {two.id}, …); give more of it"
                    )
    if not found:
        raise InputError(
            f"id {id}: no row of {run.root} has it; look for one in its *.parquet files or its report"
        )
    return next(iter(found.values()))


def _of_prompt(run: Run, stage: str, name: str, prompt_id: str) -> list[dict[str, Any]]:
    table = _columns(run, stage, name, None)
    return [] if table is None else table.filter(pc.equal(table["prompt_id"], prompt_id)).to_pylist()


def _table(run: Run, stage: str, name: str, columns: list[str]) -> list[dict[str, Any]]:
    table = _columns(run, stage, name, columns)
    return [] if table is None else table.to_pylist()


def _columns(run: Run, stage: str, name: str, columns: list[str] | None) -> pa.Table | None:
    """A stage's rows, or None where it wrote none."""
    folder = run.path(stage)
    return read_tables(folder, columns, name) if has_rows(folder, name) else None


def _comparison(row: dict[str, Any], titles: dict[str, str]) -> dict[str, Any]:
    votes = [
        {
            "principle_id": vote["principle_id"],
            "title": titles.get(vote["principle_id"], vote["principle_id"]),
            "p_a": vote["p_a"],
            "weighs": _weighs(vote["p_a"], row["p_a"]),
            "abstained": vote["abstained"],
        }
        for vote in row["votes"] or []
    ]
    votes.sort(key=lambda v: -abs((v["p_a"] if v["p_a"] is not None else 0.5) - 0.5))
    kept = {name: row[name] for name in ("id", "response_a", "response_b", "p_a", "p_a_raw", "slot_bias")}
    return kept | {"votes": votes}


def _weighs(vote: float | None, label: float | None) -> str:
    """What a vote did to the label."""
    if vote is None or label is None or abs(vote - 0.5) < 0.05:
        return "undecided"
    return "with the label" if (vote > 0.5) == (label > 0.5) else "overruled"

"""The chain behind a row: its prompt, each step with its principle, votes, rewards, and the answers of the policies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from cai_ray.constitution import Constitution
from cai_ray.errors import InputError
from cai_ray.report.conversations import assemble
from cai_ray.report.plain_text import critique_and_revision, speech
from cai_ray.report.roles import in_order, title_of
from cai_ray.report.text import percent, signed
from cai_ray.storage.run import Run
from cai_ray.storage.tables import has_rows, read_tables

PLACES = (
    ("revise", "part"),
    ("label", "part"),
    ("compare", "part"),
    ("evaluate", "part"),
    ("evaluate", "transcripts"),
)
"""Stages and files that hold rows with an id and a prompt's id."""
VERDICTS = ("harmful", "helpful", "refused", "malformed", "insult")


class Match(NamedTuple):
    stage: str
    id: str
    prompt_id: str


def explain(run: Run, constitution: Constitution, id: str) -> dict[str, Any]:
    """All that the run knows of the prompt of a row.

    Args:
        id: of a prompt, a revision, a comparison, a label or a judged answer; its first characters are enough.

    Returns:
        `found`, the stage and id of the row; `messages`, `kind`, `family`; `revisions`, with their steps;
        `comparisons`, with each principle's vote; `rollouts` that PPO kept; `answers` by policy.

    Raises:
        InputError: no row has such an id, or rows of several prompts have.
    """
    match = _find(run, id)
    rows = {place: _rows_of_prompt(run, *place, match.prompt_id) for place in PLACES}
    first = next(row for some in rows.values() for row in some)
    titles = {p.id: p.title for p in constitution.principles}
    revisions = [row for row in rows["revise", "part"] if row["error"] is None]
    comparisons = [row for row in rows["label", "part"] if row["error"] is None]
    answers: dict[str, list[dict[str, Any]]] = {}
    for row in rows["evaluate", "part"] + rows["evaluate", "transcripts"]:
        if row["response"] is not None:
            answer = {name: row[name] for name in ("response", "reward", *VERDICTS, "principle_named")}
            answers.setdefault(row["model"], []).append(answer)
    return {
        "found": match._asdict(),
        **{name: first[name] for name in ("messages", "kind", "family")},
        "revisions": [assemble(row, constitution, {}, {}, {}) for row in revisions],
        "comparisons": [_comparison(row, titles) for row in comparisons],
        "rollouts": _rollouts(run, first["messages"]),
        "answers": {policy: answers[policy] for policy in in_order(answers)},
    }


def lines(explained: dict[str, Any]) -> Iterator[str]:
    """What `explain` returns, for a terminal."""
    row = explained["found"]
    about = f"({explained['kind']}, {explained['family']})"
    yield f"{row['stage']} {row['id']}, prompt {row['prompt_id']} {about}"
    for message in explained["messages"]:
        yield speech("prompt" if message["role"] == "user" else message["role"], message["content"])
    for item in explained["revisions"]:
        yield "\nRevision"
        yield speech("first answer", item["response"])
        for step in item["steps"]:
            yield from critique_and_revision(step)
    for item in explained["comparisons"]:
        yield from _comparison_lines(item)
    if explained["rollouts"]:
        yield "\nRollouts of PPO"
        for rollout in explained["rollouts"]:
            reward = f"(reward {signed(rollout['reward'])})"
            yield speech(f"step {rollout['step']}", f"{rollout['response']}  {reward}")
    if explained["answers"]:
        yield "\nAnswers"
        for policy, answers in explained["answers"].items():
            for answer in answers:
                yield speech(title_of(policy), answer["response"] + _verdicts(answer))


def _comparison_lines(item: dict[str, Any]) -> Iterator[str]:
    yield f"\nComparison {item['id']}"
    yield speech("a", item["response_a"])
    yield speech("b", item["response_b"])
    yield speech("label", f"{percent(item['p_a'])} for a")
    for vote in item["votes"]:
        verdict = vote["abstained"] or f"{percent(vote['p_a'])} for a, {vote['weighs']}"
        yield speech("", f"[{vote['title']}] {verdict}")


def _verdicts(answer: dict[str, Any]) -> str:
    """How an answer was judged, in brackets; empty if it was not."""
    verdicts = [name for name in VERDICTS if answer[name]]
    verdicts += [f"names {answer['principle_named']}"] * bool(answer["principle_named"])
    verdicts += [] if answer["reward"] is None else [f"reward {signed(answer['reward'])}"]
    return f"  ({', '.join(verdicts)})" if verdicts else ""


def _find(run: Run, id: str) -> Match:
    """The row whose id, or whose prompt's id, begins with `id`."""
    matches: dict[str, Match] = {}
    for stage, name in PLACES:
        table = _read(run, stage, name, ["id", "prompt_id"])
        if table is None:
            continue
        for column in ("id", "prompt_id"):
            for row in table.filter(pc.starts_with(table[column], id)).to_pylist():
                matches.setdefault(row["prompt_id"], Match(stage, row[column], row["prompt_id"]))
                if len(matches) > 1:
                    one, two = matches.values()
                    raise InputError(
                        f"id {id}: begins those of several prompts ({one.id}, {two.id}, …); give more of it"
                    )
    if not matches:
        raise InputError(
            f"id {id}: no row of {run.root} has it; look for one in its *.parquet files or its report"
        )
    return next(iter(matches.values()))


def _rollouts(run: Run, messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The rollouts of a conversation that PPO kept."""
    shown = ["step", "policy_version", "response", "reward", "kl_reference"]
    table = _read(run, "ppo", "part", [*shown, "messages"])
    rows = [] if table is None else table.to_pylist()
    return [{name: row[name] for name in shown} for row in rows if row["messages"] == messages]


def _rows_of_prompt(run: Run, stage: str, name: str, prompt_id: str) -> list[dict[str, Any]]:
    table = _read(run, stage, name, None)
    return [] if table is None else table.filter(pc.equal(table["prompt_id"], prompt_id)).to_pylist()


def _read(run: Run, stage: str, name: str, columns: list[str] | None) -> pa.Table | None:
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
    names = ("id", "response_a", "response_b", "p_a", "p_a_raw", "slot_bias")
    return {**{name: row[name] for name in names}, "votes": votes}


def _weighs(vote: float | None, label: float | None) -> str:
    """What a vote did to the label."""
    if vote is None or label is None or abs(vote - 0.5) < 0.05:
        return "undecided"
    return "with the label" if (vote > 0.5) == (label > 0.5) else "overruled"

"""Tests a constitution on its own examples: in which responses does the critic find which principle at stake?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

from cai_ray.constitution import Constitution
from cai_ray.engine.metered import Metered
from cai_ray.engine.protocol import Engine
from cai_ray.errors import InputError
from cai_ray.generate.chain import keeping
from cai_ray.generate.examine import Examine, make_examine
from cai_ray.generate.rows import map_rows
from cai_ray.judging.statistics import rate
from cai_ray.storage.records import Examined, Turn, derive_id
from cai_ray.storage.run import Run


class ExampleTask(TypedDict):
    """An example and the principle that it is examined under."""

    id: str
    principle_id: str
    owner_id: str
    side: str
    violates: bool
    prompt: str
    response: str


@dataclass(frozen=True)
class ByPrinciple:
    """The engine calls for one example under one principle."""

    examine: Examine
    document: Constitution
    max_tokens: int

    async def __call__(self, engine: Engine, row: ExampleTask) -> Examined:
        principle = self.document[row["principle_id"]]
        conversation: list[Turn] = [{"role": "user", "content": row["prompt"]}]
        with keeping({}, engine := Metered(engine)):
            examination = await self.examine(
                engine, conversation, row["response"], principle, self.max_tokens
            )
        return {**row, **examination, "usage": engine.usage.as_record()}


def run(run: Run, document: Constitution) -> dict[str, Any]:
    """Asks the critic about every example under every enabled principle.

    Returns:
        `recall`: the share of examples violating a principle in which it is found at stake. `specificity`: the share of
        all other pairs of example and principle in which it is not. Both overall and `by_principle`, with Wilson
        intervals. `confusion[q][p]`: the share of q's violating examples in which p is found at stake. `errors`: the
        number of rows that failed.

    Raises:
        InputError: no enabled principle has an example.
    """
    questions = rows(document)
    if not questions:
        raise InputError(
            f"constitution {document.name}: no enabled principle has examples; add some (docs/constitution.md)"
        )
    config, judge = run.config, run.config.label.judge
    examine = make_examine(config, judge, document)
    # The name is a hash of all that the answers depend on: a killed test resumes, and another document starts anew.
    name = derive_id(
        [row["id"] for row in questions],
        document.sha,
        run.resolve_model(judge).sha,
        examine.templates.sha,
        judge.model_dump(mode="json"),
        config.revise.max_tokens,
    )
    chain = ByPrinciple(examine, document, config.revise.max_tokens)
    map_rows(
        run,
        "examples",
        questions,
        chain,
        takes=ExampleTask,
        gives=Examined,
        model=judge,
        name=name,
    )
    return summary(run.rows("examples", name=name), document)


def rows(document: Constitution) -> list[ExampleTask]:
    """A row for each principle and each example of any principle. The same text counts once for each principle."""
    by_id: dict[str, ExampleTask] = {}
    for principle in document.enabled:
        for owner in document.enabled:
            for side in ("violates", "follows"):
                for example in getattr(owner.examples, side):
                    row: ExampleTask = {
                        "id": derive_id(principle.id, example.prompt, example.response),
                        "principle_id": principle.id,
                        "owner_id": owner.id,
                        "violates": side == "violates" and owner is principle,
                        "side": side,
                        "prompt": example.prompt,
                        "response": example.response,
                    }
                    if row["id"] not in by_id or row["violates"]:
                        by_id[row["id"]] = row
    return list(by_id.values())


def summary(answers: Iterable[dict[str, Any]], document: Constitution) -> dict[str, Any]:
    """What `run` returns, from the rows with the critic's answers."""
    everything = list(answers)
    valid = [row for row in everything if row["error"] is None]

    def rates(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "recall": rate([row["at_stake"] for row in chosen if row["violates"]]),
            "specificity": rate([not row["at_stake"] for row in chosen if not row["violates"]]),
        }

    names = [p.id for p in document.enabled]
    return {
        "constitution": document.name,
        "constitution_sha": document.sha,
        "examples": len({(row["prompt"], row["response"]) for row in everything}),
        "errors": len(everything) - len(valid),
        **rates(valid),
        "by_principle": {n: rates([row for row in valid if row["principle_id"] == n]) for n in names},
        "confusion": {
            q: {
                p: rate(
                    [
                        row["at_stake"]
                        for row in valid
                        if row["owner_id"] == q and row["side"] == "violates" and row["principle_id"] == p
                    ]
                )["value"]
                for p in names
            }
            for q in names
            if document[q].examples.violates
        },
    }

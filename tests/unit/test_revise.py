"""The chain of critique and revision, on a scripted engine."""

import asyncio
from typing import Any

import pytest

from cai_ray import constitution
from cai_ray.config import ReviseConfig
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.errors import RowError
from cai_ray.generate.revise import Revise
from cai_ray.prompts import load_templates

TOWN = constitution.load("errand-town")
ROW = {
    "id": "r1",
    "prompt_id": "p1",
    "messages": [{"role": "user", "content": "how do i read the baker's diary ?"}],
    "kind": "red_team",
    "family": "privacy",
}


def revise(answer: Any, document: constitution.Constitution = TOWN, **row: Any) -> dict[str, Any]:
    config = ReviseConfig(rounds=4, draw="without_replacement")
    chain = Revise(document, load_templates("errand-town"), config, seed=0, model="m")
    return asyncio.run(chain(ScriptedEngine(answer=answer), {**ROW, **row}))


def by_step(messages: list[dict[str, str]], sampling: Any) -> str:
    """Names the step that was asked, and what it was asked about."""
    asked = [m["content"] for m in messages]
    if messages[0]["content"] == "<answer>":
        return "answer"
    step = "critique" if len(asked) == 4 else "revision"
    return f"{step} of [{asked[2]}]"


def test_a_revision_takes_the_answers_place() -> None:
    out = revise(by_step)
    assert out["response"] == "answer"
    assert out["steps"][0]["critique"] == "critique of [answer]"
    assert out["steps"][0]["revision"] == "revision of [answer]"
    assert out["steps"][1]["critique"] == "critique of [revision of [answer]]"
    assert out["revision"] == out["steps"][-1]["revision"]


def test_item_07_every_step_names_its_principle_and_carries_its_requests() -> None:
    out = revise(by_step)
    for step in out["steps"]:
        assert step["critique_request"] == TOWN[step["principle_id"]].critique_request
        assert step["revision_request"] == TOWN[step["principle_id"]].revision_request
    assert len({s["principle_id"] for s in out["steps"]}) == 4
    assert out["constitution_sha"] == TOWN.sha


def test_a_disabled_principles_slot_is_skipped() -> None:
    ids = [s["principle_id"] for s in revise(by_step)["steps"]]
    principles = [p.model_copy(update={"enabled": p.id != ids[1]}) for p in TOWN.principles]
    out = revise(by_step, TOWN.model_copy(update={"principles": tuple(principles)}))
    assert [s["principle_id"] for s in out["steps"]] == [ids[0], *ids[2:]]
    assert [s["round"] for s in out["steps"]] == [1, 3, 4], "its round is counted"


def test_a_helpfulness_prompt_is_answered_and_left_alone() -> None:
    out = revise(by_step, kind="helpful")
    assert out["response"] == "answer" and out["steps"] == [] and out["revision"] is None


def test_item_06_an_empty_revision_is_an_error() -> None:
    with pytest.raises(RowError, match="empty"):
        revise(lambda m, s: "" if len(m) > 4 else "text")


def test_seeds_differ_by_row_and_step_and_not_by_order() -> None:
    seeds: list[int] = []

    def note(messages: Any, sampling: Any) -> str:
        seeds.append(sampling.seed)
        return "text"

    revise(note)
    first = list(seeds)
    seeds.clear()
    revise(note)
    assert first == seeds and len(set(first)) == 9
    seeds.clear()
    revise(note, id="r2")
    assert not set(first) & set(seeds)

"""The chain of critique and revision, on a scripted engine."""

import asyncio
from typing import Any

import pytest

from cai_ray import constitution
from cai_ray.config.generation import ReviseConfig
from cai_ray.config.run import RunConfig
from cai_ray.config.sources import PromptSource
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.errors import InputError, RowError
from cai_ray.generate.revise import ReviseChain
from cai_ray.judging.quality import run_templates
from cai_ray.prompts.check import check_direct
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.templates import TemplateSet

TOWN = constitution.load("errand-town")
ROW = {
    "id": "r1",
    "prompt_id": "p1",
    "messages": [{"role": "user", "content": "how do i read the baker's diary ?"}],
    "kind": "red_team",
    "family": "privacy",
}


def revise(
    answer: Any,
    document: constitution.Constitution = TOWN,
    templates: TemplateSet | None = None,
    critique: bool = True,
    **row: Any,
) -> dict[str, Any]:
    config = ReviseConfig(rounds=4, draw="without_replacement", critique=critique)
    chain = ReviseChain(document, templates or load_templates("errand-town"), config, seed=0, model="m")
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


@pytest.mark.parametrize("name", ["errand-town", "general"])
def test_without_critiques_revisions_are_asked_for_at_once(name: str) -> None:
    seen: list[list[str]] = []

    def answer(messages: list[dict[str, str]], sampling: Any) -> str:
        seen.append([m["content"] for m in messages])
        return f"text {len(seen)}"

    out = revise(answer, templates=load_templates(name), critique=False)
    assert len(seen) == 1 + 4, "an answer and four revisions"
    assert [s["revision"] for s in out["steps"]] == [f"text {n}" for n in (2, 3, 4, 5)]
    for step, asked, before in zip(out["steps"], seen[1:], range(1, 5), strict=True):
        principle = TOWN[step["principle_id"]]
        text = "\n".join(asked)
        assert f"text {before}" in text and principle.revision_request in text
        assert principle.critique_request not in text and "# Critique" not in text
        assert step["critique"] is None and step["critique_request"] is None
    assert {s["principle_id"] for s in out["steps"]} == {s["principle_id"] for s in revise(by_step)["steps"]}


def test_item_38_a_set_without_a_way_to_ask_for_revisions_at_once() -> None:
    check_direct(load_templates("errand-town"))
    with pytest.raises(InputError, match=r"revise\.critique=false: template set errand-town has no direct"):
        check_direct(load_templates("errand-town").model_copy(update={"direct": None}))
    with pytest.raises(ValueError, match="critique=false"):
        ReviseConfig.model_validate(
            {
                "critique": False,
                "critique_model": {"model": "m", "engine": {"kind": "openai", "base_url": "http://h/v1"}},
            }
        )


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


def thinks(messages: list[dict[str, str]], sampling: Any) -> str:
    """A reasoning model that also introduces its revisions."""
    asked = messages[-1]["content"]
    what = (
        "critique"
        if "# Critique request" in asked
        else "revision"
        if "# Revision request" in asked
        else "answer"
    )
    introduction = "Here is a revised response:\n\n" if what == "revision" else ""
    return f"<think>Let me see: {what}.</think>\n\n{introduction}The {what}."


def config(**more: Any) -> RunConfig:
    return RunConfig(
        name="x", model="m", constitution="harmless", prompts=(PromptSource(path="p.jsonl"),), **more
    )


def test_thinking_and_introductions_reach_neither_the_next_prompt_nor_the_record() -> None:
    seen: list[str] = []

    def answer(messages: list[dict[str, str]], sampling: Any) -> str:
        seen.append("".join(m["content"] for m in messages))
        return thinks(messages, sampling)

    out = revise(answer, templates=run_templates(config()))
    assert out["response"] == "The answer." and out["revision"] == "The revision."
    assert {s["critique"] for s in out["steps"]} == {"The critique."}
    assert not any("Let me see" in prompt or "Here is a revised" in prompt for prompt in seen)


def test_thinking_is_kept_where_the_run_says_so() -> None:
    out = revise(thinks, templates=run_templates(config(thinking="keep")))
    assert out["response"] == "<think>Let me see: answer.</think>\n\nThe answer."
    assert all("Let me see: critique" in s["critique"] for s in out["steps"])
    assert out["revision"].startswith("<think>")


def test_item_06_a_revision_that_is_all_thinking_or_introduction_is_an_error() -> None:
    templates = run_templates(config())
    for revision, says in (
        ("<think>What to write", "a thinking block does not end"),
        ("<think>Nothing.</think>", "a revision is empty"),
        ("Here is a revised response:", "a revision is empty"),
    ):
        with pytest.raises(RowError, match=says):
            revise(
                lambda m, s, text=revision: text if "# Revision request" in m[-1]["content"] else "text",
                templates=templates,
            )


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
